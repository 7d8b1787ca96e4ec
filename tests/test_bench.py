"""experiments/bench.py: it times only equal work, with the functions of the entries, and reports every figure."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import cifar
import utils
from experiments import bench, published
from harness.flags import Fault

PAIR = "resnet8:resnet8"
TINY = bench.Plan(torch.device("cpu"), batch=4, images=16, seconds=0, ss_test_images=4)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("kl", lambda s, t, T: (s - t).square().mean()),
        ("kept", lambda scores, target, ratio: torch.arange(len(scores))),  # no selective transfer
        ("ss_head_loss", lambda teacher, x: (None, {"teacher_ssp_loss": teacher(x).embedding.mean()})),
    ],
)
def test_unequal_work_is_refused(monkeypatch, name, other):
    monkeypatch.setattr(published, name, other)
    with pytest.raises(Fault, match="unequal work"):
        bench.check_pair(PAIR)


def convolutions(function):
    """The dtypes of the outputs of all convolutions that run while `function` does."""
    seen = []

    def note(module, args, output):
        if isinstance(module, torch.nn.Conv2d):
            seen.append(output.dtype)

    with torch.nn.modules.module.register_module_forward_hook(note):
        function()
    return seen


def test_steps_here_train_everything_on_four_views_and_stored_features_replace_the_teacher(monkeypatch):
    networks, added = [], []
    make_networks, add = bench.make_networks, utils.Meter.add
    monkeypatch.setattr(bench, "make_networks", lambda *args: networks.append(make_networks(*args)) or networks[-1])
    monkeypatch.setattr(utils.Meter, "add", lambda self, *args: added.append(args) or add(self, *args))
    side = bench.here_side.__wrapped__(TINY, PAIR)
    ((teacher, student),) = networks
    each = sum(isinstance(module, torch.nn.Conv2d) for module in student.modules())  # the teacher has as many
    for figure, trained, count in [
        ("student_step", student, 2 * each),
        ("student_step_stored", student, each),
        ("ss_epoch", teacher.proj_head, TINY.ss_batches * each),
        ("ss_epoch_stored", teacher.proj_head, 0),
    ]:
        side[figure]()  # the first time fills the table of features
        before, added[:] = [parameter.clone() for parameter in trained.parameters()], []
        assert len(convolutions(side[figure])) == count, figure
        assert all(not torch.equal(*both) for both in zip(before, trained.parameters(), strict=True)), figure
        assert all(rows == TINY.batch for rows, _, _ in added), figure
        terms = ["ce_loss", "kd_loss", "tf_loss", "ss_loss", "cls_acc", "ss_acc"]
        logged = [terms] if trained is student else [["teacher_ssp_loss", "teacher_ssp_acc"]] * (TINY.ss_batches + 1)
        assert [list(values) for _, _, values in added] == logged, figure


def test_half_precision_applies_only_to_this_repository():
    for side, expected in ((bench.here_side, torch.bfloat16), (bench.published_side, torch.float32)):
        figures = side.__wrapped__(TINY._replace(amp="bf16"), PAIR)
        assert {*convolutions(figures["student_step"]), *convolutions(figures["ss_epoch"])} == {expected}
        figures["loss"]()  # takes such outputs


def test_a_run_writes_every_figure_as_a_row(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *args: ThreadPoolExecutor(1))
    monkeypatch.setattr(bench, "Plan", lambda *args: TINY)
    monkeypatch.setattr(bench, "published_pairs", lambda: [PAIR, "resnet8:resnet14x05", "resnet14x05:resnet8"])
    bench.main(["--pairs", PAIR, "--device", "cpu", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    found = {(row["figure"], row["pair"]): row for row in rows}
    assert len(found) == len(rows)
    steps, of_teacher = ["student_step", "student_step_stored"], ["ss_epoch", "ss_epoch_stored", "new_view"]
    assert set(found) == {
        *((figure, PAIR) for figure in (*steps, "views", "loss", "student_step_memory", "crd")),
        *((figure, teacher) for figure in of_teacher for teacher in ("resnet8", "resnet14x05")),
        *((figure, pair) for figure in steps for pair in ("resnet8:resnet14x05", "resnet14x05:resnet8")),
        ("runs", "3 students"),
        ("runs_stored", "3 students"),
    }
    for (figure, _), row in found.items():
        assert list(row) == ["figure", "pair", "amp", "published", "here", "ratio"]
        assert isinstance(row["here"], float) and row["amp"] == "off"
        assert (row["published"] is None) == (figure == "new_view")
        if row["ratio"] is not None:
            assert row["ratio"] == pytest.approx(row["published"] / row["here"])
    assert found["student_step_stored", PAIR]["published"] == found["student_step", PAIR]["published"]
    printed, figures = capsys.readouterr().out.splitlines(), [row["figure"] for row in rows]
    assert [line.split()[0] for line in printed if line.split()[0] in figures] == figures


def test_each_condition_is_a_row_beside_the_published_step(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *args: ThreadPoolExecutor(1))
    monkeypatch.setattr(bench, "Plan", lambda *args: TINY)
    monkeypatch.setattr(cifar, "LAYOUT", cifar.LAYOUT)
    planned = bench.conditions(torch.device("cuda"), "resnet8:ShuffleV2")
    assert {key for each in planned for key in each} == {"amp", "compile", "features", "tf32", "layout"}
    monkeypatch.setattr(bench, "conditions", lambda device, pair: [{"features": "disk"}, planned[-2]])
    layouts, views = [], cifar.Images.views

    def noted(self, *args):
        x = views(self, *args)
        layouts.append(x.is_contiguous())
        return x

    monkeypatch.setattr(cifar.Images, "views", noted)
    bench.main(["--conditions", "--pairs", PAIR, "--device", "cpu", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["condition"] for row in rows] == ["disk", "memory contiguous_format"]
    assert all(0 < row[side]["host"] <= row[side]["device"] for row in rows for side in ("here", "published"))
    assert set(layouts) == {True, False}
    assert sum(line.startswith(PAIR) for line in capsys.readouterr().out.splitlines()) == len(rows)


def test_the_estimate_adds_up_all_epochs_of_the_published_students():
    pairs = ["a:b", "a:c", "d:b"]
    rows = {("student_step", pair): {"published": 1e3, "here": 1e2} for pair in pairs}
    rows |= {("student_step_stored", pair): {"here": 10} for pair in pairs}
    rows |= {("ss_epoch", teacher): {"published": 2e6, "here": 2e5} for teacher in "ad"}  # of two batches
    rows |= {("ss_epoch_stored", teacher): {"here": 2e4} for teacher in "ad"}
    rows |= {("new_view", teacher): {"here": 1.0} for teacher in "ad"}
    theirs, computed, stored = bench.whole_runs(bench.Plan(torch.device("cpu"), ss_batches=2), pairs, rows)
    steps, new_views = 782, 2 * 50_000 * 546.9  # of 64 images in an epoch; 547 of 648 views in 300 epochs
    assert theirs == pytest.approx(steps * 3 * (60 * 1e6 + 240 * 1e3))
    assert computed == pytest.approx(steps * (3 * 240 * 1e2 + 2 * 60 * 1e5))
    assert stored == pytest.approx(steps * (3 * 240 * 10 + 2 * 60 * 1e4) + new_views, rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pairs", "resnet8:nothing"], "TEACHER:STUDENT, two of .*resnet8x4"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--json", "/nowhere/at/all.json"], "folder does not exist"),
    ],
)
def test_bad_flags_end_in_one_line(flags, message, fails):
    assert re.search(message, fails(bench.main, *flags))
