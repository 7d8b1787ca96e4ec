"""experiments/bench.py: only equal work is timed, by the entries' own functions; the rows are what the manual says."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import run_script

import utils
from experiments import bench, published
from methods import METHODS

PAIR = "resnet8:resnet8"
TINY = bench.Plan(torch.device("cpu"), batch=4, images=16, seconds=0, least=1, ss_batches=5, ss_test_images=4)
TINY = TINY._replace(widths=(8, 16), batches=(2, 4), side=32)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("kl", lambda s, t, T: (s - t).square().mean()),
        ("kept", lambda scores, target, ratio: torch.arange(len(scores))),  # no selective transfer
        ("ss_head_loss", lambda teacher, x: (None, {"teacher_ssp_loss": teacher(x).embedding.mean()})),
    ],
)
def test_unequal_work_is_refused(monkeypatch, name, other):
    bench.check_pair(PAIR)
    monkeypatch.setattr(published, name, other)
    with pytest.raises(utils.Fault, match="unequal work"):
        bench.check_pair(PAIR)


def test_unequal_work_in_crds_term_is_refused(monkeypatch):
    bench.check_crd()
    monkeypatch.setattr(published.CRD, "contrast", lambda self, name, anchor, places: anchor.square().sum())
    with pytest.raises(utils.Fault, match="unequal work"):
        bench.check_crd()


@pytest.fixture
def seen(monkeypatch):
    """What train_epoch is given: images, shapes of the batches; whether it changed all parameters; what it logs."""
    seen, train_epoch = [], utils.train_epoch

    def watched(module, loss_of, batches, sgd, images, label):
        batches, before = list(batches), [parameter.clone() for parameter in module.parameters()]
        means = train_epoch(module, loss_of, iter(batches), sgd, images, label)
        changed = [not torch.equal(*both) for both in zip(before, module.parameters(), strict=True)]
        seen.append((images, [tuple(batch.x.shape) for batch in batches], all(changed), set(means)))
        return means

    monkeypatch.setattr(utils, "train_epoch", watched)
    return seen


def test_steps_here_are_those_of_an_epoch_of_the_entries(seen):
    side = bench.here_side(TINY, PAIR)
    side["student_step"](3)
    side["ss_epoch"](2)
    views, terms = (16, 3, 32, 32), {"ce_loss", "kd_loss", "tf_loss", "ss_loss", "cls_acc", "ss_acc"}
    head = (20, [views] * 5, True, {"teacher_ssp_loss", "teacher_ssp_acc"})
    assert seen == [(12, [views] * 3, True, terms), head, head]


def test_steps_of_the_compared_methods_are_those_of_baseline(seen):
    side = bench.methods_side(TINY, PAIR)
    assert list(side) == ["sskd", *METHODS][:9] + ["ab first", "ft", "ft first", "crd", "dkd", "ls"]
    for name in ("fitnet", "ab", "ab first", "ft first", "crd"):
        seen.clear()
        side[name](2)
        terms = {"first_loss"} if "first" in name else {"ce_loss", "kd_loss", f"{name}_loss", "cls_acc"}
        assert seen == [(8, [(4, 3, 32, 32)] * 2, True, terms)], name


def test_a_method_that_does_not_go_with_the_pair_is_left_out():
    assert "ab" not in bench.methods_side(TINY, "resnet8:vgg8")


def test_a_run_writes_every_figure_as_a_row(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *args, **kwargs: ThreadPoolExecutor(1))
    monkeypatch.setattr(bench, "Plan", lambda *args, **kwargs: TINY)
    monkeypatch.setattr(bench, "amps", lambda plan: ["off"])
    monkeypatch.setattr(bench, "published_pairs", lambda: [PAIR, "resnet8:resnet14x05"])
    bench.main(["--pairs", PAIR, "--device", "cpu", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    for row in rows:
        assert list(row) == ["figure", "pair", "amp", "published", "here", "ratio"]
        assert isinstance(row["here"], float)
        ratios = "batch_scaling", "method_step", "overhead"  # of other things than published ÷ here
        if row["figure"] not in ratios and row["published"] is not None and row["here"] > 0:
            assert row["ratio"] == pytest.approx(row["published"] / row["here"])
    found = {(row["figure"], row["pair"], row["amp"]) for row in rows}
    figures = "views loss teacher_forward student_forward_backward student_step overhead peak_share ss_epoch "
    figures += "student_step_stored stored_share ss_step ss_step_stored look read_share"
    assert {(figure, PAIR, "off") for figure in [*figures.split(), "peak_memory"]} <= found
    assert {
        (figure, f"{PAIR} {where}", "off")
        for figure in ("features_read", "peak_memory")
        for where in ("memory", "disk")
    } <= found
    assert {("reproduction", "2 students", "off"), ("stored_share", "reproduction", "off")} <= found
    assert {("loss", "D8", "off"), ("batch_scaling", f"{PAIR} B4", "off")} <= found
    assert {("method_step", f"{PAIR} {name}", "off") for name in (*METHODS, "ab first", "ft first")} <= found
    assert {(figure, PAIR, "off") for figure in ("crd_loss", "crd_negatives", "crd_memory")} <= found
    printed = capsys.readouterr().out
    assert "threads, PyTorch" in printed
    assert not [file for file in tmp_path.iterdir() if file.name != "rows.json"]
    assert len(printed.splitlines()) == 2 + len(rows)


def test_the_estimate_adds_up_what_the_published_students_ask_for():
    pairs = ["a:b", "a:c", "d:b"]
    rows = {("student_step", pair): {"published": 1e3, "here": 1e2} for pair in pairs}
    rows |= {("student_step_stored", pair): {"here": 10} for pair in pairs}
    rows |= {("ss_step", pair): {"published": 1e6, "here": 1e5} for pair in ("a:b", "d:b")}
    rows |= {("ss_step_stored", pair): {"here": 1e4} for pair in ("a:b", "d:b")}
    rows |= {("look", pair): {"here": 1.0} for pair in ("a:b", "d:b")}
    theirs, computed, stored = bench.reproduction(bench.Plan(torch.device("cpu")), pairs, rows)
    steps, looked = 782, 2 * 50_000 * 546.9  # of 64 images an epoch; 547 of 648 views in 300 epochs
    assert theirs == steps * 3 * (60 * 1e6 + 240 * 1e3)
    assert computed == steps * (3 * 240 * 1e2 + 2 * 60 * 1e5)
    assert stored == pytest.approx(steps * (3 * 240 * 10 + 2 * 60 * 1e4) + looked, rel=1e-4)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_concerns_this_repository_alone(amp):
    plan, dtypes = TINY._replace(amp=amp), []

    with torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: dtypes.append(output.dtype) if isinstance(module, torch.nn.Conv2d) else None
    ):
        for side, expected in ((bench.here_side, bench.DTYPES[amp]), (bench.published_side, torch.float32)):
            figures = side(plan, PAIR)
            dtypes.clear()
            for name in ("student_step", "ss_epoch", "teacher_forward", "student_forward_backward"):
                figures[name](1)
            assert set(dtypes) == {expected}
            figures["loss"](1)


def test_a_measurement_has_a_process_of_its_own_whose_death_is_a_fault():
    with pytest.raises(utils.Fault, match="killed"), bench.process(TINY.device) as call:
        assert call(os.getpid) != os.getpid()
        assert call(bench.clock, bench.here_side, TINY, PAIR, "student_step") > 0
        call(os._exit, 1)


def test_the_script_runs_from_any_folder(tmp_path):
    run = run_script("experiments/bench.py", "--help", cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert "--pairs TEACHER:STUDENT" in run.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pairs", "resnet8"], "TEACHER:STUDENT"),
        (["--pairs", "resnet8:nothing"], "TEACHER:STUDENT, two of .*resnet8x4"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--json", "/nowhere/at/all.json"], "folder does not exist"),
        (["--amp", "fp8"], "invalid choice"),
    ],
)
def test_bad_flags_end_in_one_line(flags, message, fails):
    assert re.search(message, fails(bench.main, *flags))
