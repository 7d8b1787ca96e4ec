"""teacher_store.py: later students find a teacher's SS head and features; nothing damaged or foreign is used."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_STUDENT, contents, end_of, plain, stop_at
from torch import nn

import cifar
import student
import teacher_store
import utils
from harness import sources
from harness.checkpoint import Checkpoint
from harness.files import read_state
from harness.flags import UserError
from harness.sources import STATISTICS, Split
from models import load, model_dict
from teacher_store import SSHeadFile, doubt_about, fingerprint, read_teacher, report_teacher
from wrapper import Wrapper, frozen

CPU = torch.device("cpu")
IDENTITY = {"dataset": "synthetic", "side": 32, "data": "pixels and labels", "teacher": "weights"}
FEW = [*TINY_STUDENT, "--train-size", "10", "--test-size", "6", "--batch-size", "4"]
FEW += ["--epoch", "2", "--milestones", "1"]


def args_of(*flags):
    return student.parse_args(["--t-path", "unused", *TINY_STUDENT, *flags])


def copy_of(teacher, folder):
    """A copy of a teacher's run folder without its SS head."""
    copy = folder / teacher.name
    copy.mkdir()
    shutil.copy(teacher / "ckpt" / "best.pth", copy)
    return copy


# The teacher


def test_an_unfinished_teacher_is_refused(runs, tmp_path):
    shutil.copy(runs.teacher / "config.json", copy_of(runs.teacher, tmp_path))
    with pytest.raises(UserError, match="this run is not finished"):
        read_teacher(SimpleNamespace(t_path=tmp_path / runs.teacher.name, t_arch=None))


def test_the_fingerprint_is_that_of_the_weights():
    networks = [nn.Linear(2, 2) for _ in range(3)]
    for each in networks:
        each.load_state_dict(networks[0].state_dict())
    with torch.no_grad():
        networks[2].bias[0] += 1e-6
    assert fingerprint(networks[0]) == fingerprint(networks[1]) != fingerprint(networks[2])


@pytest.mark.parametrize(
    ("acc", "images", "classes", "reported", "tested", "doubt"),
    [
        (75.9, 10_000, 100, 76.46, 10_000, None),
        (75.4, 10_000, 100, 76.46, 10_000, "but 76.46 in its checkpoint"),
        (77.5, 10_000, 100, 76.46, 10_000, "but 76.46 in its checkpoint"),
        (76.0, 10_000, 100, 0.7646, 10_000, None),  # a share
        (70.0, 10_000, 100, 0.7646, 10_000, "but 76.46 in its checkpoint"),
        (0.9, 40, 100, 0.9, 40, None),  # not a share
        (70.0, 200, 100, 76.46, 10_000, None),  # three standard errors are 9 points
        (60.0, 200, 100, 76.46, 10_000, "but 76.46 in its checkpoint"),
        (2.5, 40, 100, 7.5, 40, None),  # the same images: two of them may differ
        (2.5, 40, 100, 10.0, 40, "but 10.00 in its checkpoint"),
        (1.1, 10_000, 100, 1.1, 10_000, "near chance (1.00)"),
        (3.0, 10_000, 100, None, 10_000, None),
        (51.0, 10_000, 2, None, 10_000, "near chance (50.00)"),
        (50.0, 40, 2, None, 10_000, None),  # too few images to tell
    ],
)
def test_an_accuracy_is_doubted_beyond_one_point_and_beyond_sampling(acc, images, classes, reported, tested, doubt):
    answer = doubt_about(acc, images, classes, reported, tested)
    assert answer is None if doubt is None else doubt in answer


def report(acc=None, flags=(), **about):
    """`report_teacher` of an untrained network, with some entries of its checkpoint."""
    source = sources.read("synthetic", "unused", sizes=(400, 4))
    data = cifar.load(source, args_of("--train-size", "400", "--test-size", "4", "--batch-size", "4", *flags), CPU)
    found = Checkpoint(Path("it.pth"), "resnet8", source.about | about, acc, {})
    torch.manual_seed(0)
    return report_teacher(found, model_dict["resnet8"](), data, utils.precision("off", CPU))


@pytest.mark.parametrize(
    ("about", "warning"),
    [
        ({"acc": 99.0}, "the teacher's accuracy is 0.00 here, but 99.00 in its checkpoint"),
        ({"flags": ["--val-fraction", "0.25"]}, "trained with no --val-fraction, as far as it says: it may have seen"),
        ({"flags": ["--val-fraction", "0.25"], "held_out": [0.25, 1]}, "trained with --val-fraction 0.25 --seed 1: it"),
    ],
)
def test_a_teacher_that_may_be_the_wrong_one_gets_one_line_of_warning(about, warning, capsys):
    assert report(**about) == {"path": str(Path("it.pth").absolute()), "arch": "resnet8", "acc": 0.0}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: it.pth: ") and warning in line


@pytest.mark.parametrize(("flags", "held_out"), [(["--val-fraction", "0.25"], [0.25, 0]), ([], None), ([], [0.25, 1])])
def test_a_teacher_that_held_out_the_same_images_or_more_gets_no_warning(flags, held_out, capsys):
    report(flags=flags, **({"held_out": held_out} if held_out else {}))
    assert capsys.readouterr().err == ""


def test_a_student_records_its_teacher_and_accepts_one_that_has_moved(runs, tmp_path, capsys):
    result, config = (json.loads((runs.student / name).read_text()) for name in ("result.json", "config.json"))
    acc = json.loads((runs.teacher / "result.json").read_text())["best_acc"]
    path = runs.teacher / "ckpt" / "best.pth"
    assert result["teacher"] == config["starts"][0]["teacher"]
    assert result["teacher"]["acc"] == acc and result["teacher"]["arch"] == "resnet8"
    assert Path(result["teacher"]["path"]).name == path.name
    assert config["flags"]["teacher"] == fingerprint(load(path))
    moved = copy_of(runs.teacher, tmp_path)
    student.main(["--t-path", str(moved), *TINY_STUDENT, "--experiments", str(runs.student.parent)])
    assert "is finished" in capsys.readouterr().out


# Its SS head

OTHER = {
    "t_epoch": "3", "t_lr": "0.1", "t_milestones": "2", "gamma": "0.2", "momentum": "0.8", "weight_decay": "0.001",
    "batch_size": "8", "seed": "1", "amp": "bf16", "compile": None, "deterministic": None, "tf32": "off",
    "train_size": "40", "test_size": "30", "few_shot": "0.5", "val_fraction": "0.5", "t_features": "memory",
}  # fmt: skip
SAME = {
    "epoch": "4", "lr": "0.1", "milestones": "1", "label_noise": "0.5", "gpu_id": "0", "experiments": "elsewhere",
    "save_interval": "2", "s_arch": "vgg8", "ce_weight": "1", "kd_weight": "1", "tf_weight": "1", "ss_weight": "1",
    "kd_T": "1", "tf_T": "1", "ss_T": "1", "ratio_tf": "0.5", "ratio_ss": "0.5", "workers": "1",
}  # fmt: skip
OF_IDENTITY = {"dataset", "data_root", "data_url", "side", "t_path", "t_arch"}  # of data and teacher
NO_TRAINING = {"s_path", "export"}


def head_file(*flags, folder=Path("teacher"), device="cpu", **identity):
    return SSHeadFile(args_of(*flags), folder / "best.pth", IDENTITY | identity, torch.device(device))


def test_a_heads_name_changes_with_everything_it_depends_on_and_with_nothing_else():
    def name(flag, value):
        return head_file("--" + flag.replace("_", "-"), *([] if value is None else [value])).path

    assert OTHER.keys() | SAME.keys() | OF_IDENTITY | NO_TRAINING == vars(args_of()).keys()  # no flag is forgotten
    paths = [head_file().path, *(name(*flag) for flag in OTHER.items())]
    paths += [head_file(device="cuda").path, *(head_file(**{part: "another"}).path for part in IDENTITY)]
    assert len(set(paths)) == len(paths)
    assert {name(*flag) for flag in SAME.items()} == {head_file().path}
    assert head_file("--t-features", "disk").path == head_file("--t-features", "memory").path


@pytest.mark.parametrize("kind", ["no file of torch", "cut short", "one byte changed", "of another teacher"])
def test_nothing_of_a_damaged_or_foreign_head_is_used(kind, tmp_path, capsys):
    file, trained = head_file(folder=tmp_path), Wrapper(model_dict["resnet8"]()).proj_head
    lines = [{"phase": "ss_head", "epoch": 1, "train/teacher_lr": 0.05}]
    file.write(trained, lines)
    good, head = file.path.read_bytes(), Wrapper(model_dict["resnet8"]()).proj_head
    before, middle = fingerprint(head), good.index(trained[2].weight.detach().numpy().tobytes()[:64])
    other = head_file(folder=tmp_path, teacher="another")
    other.write(trained, lines)
    spoilt = {"no file of torch": b"damaged", "cut short": good[:middle], "of another teacher": other.path.read_bytes()}
    changed = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    file.path.write_bytes(spoilt.get(kind, changed))
    assert file.read_into(head) == []
    assert "is damaged or belongs to something else, so it is trained again" in capsys.readouterr().out
    assert fingerprint(head) == before
    file.path.write_bytes(good)
    assert file.read_into(head) == lines
    assert fingerprint(head) == fingerprint(trained)


def test_a_teacher_whose_folder_cannot_be_written_to_costs_no_student(tmp_path, capsys):
    (tmp_path / "file").touch()
    file = head_file(folder=tmp_path / "file" / "ckpt")
    with file.alone():
        assert file.read_into(nn.Linear(2, 2)) == []
        file.write(nn.Linear(2, 2), [])
    assert "SS head: not kept for later students" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kept", "stops"),
    [
        ("", (5, 5, 5)),  # in the head's second epoch, in the student's first and second, each after new starts
        ("kept", (2,)),  # in the student's first epoch, before anything is saved of the head that was read
        ("damaged", ()),
    ],
    ids=["trained", "read", "damaged"],
)
def test_a_student_ends_the_same_wherever_its_head_comes_from(kept, stops, runs, tmp_path, monkeypatch, capsys):
    copy, (good,) = copy_of(runs.teacher, tmp_path), (runs.teacher / "ckpt").glob("ss_head_*.pth")
    content = good.read_bytes()
    if kept:
        (copy / good.name).write_bytes(content if kept == "kept" else content[:1000])
    command = ["--t-path", str(copy), *TINY_STUDENT, "--experiments", str(tmp_path / "runs")]
    for step in stops:
        with monkeypatch.context() as patch:
            stop_at(step, patch)
            assert end_of(student.main, command) == 1
        if not kept:
            (copy / good.name).unlink(missing_ok=True)  # a stopped student has its own copy
    student.main(command)
    shown = capsys.readouterr().out
    assert [words in shown for words in ("SS head: read from", "so it is trained again")] == [
        kept == "kept",
        kept == "damaged",
    ]
    assert contents(tmp_path / "runs" / runs.student.name) == contents(runs.student)
    assert not kept or plain(read_state(copy / good.name)) == plain(read_state(good))


def test_of_two_students_that_start_together_one_trains_the_head_and_both_share_the_features(
    runs, tmp_path, monkeypatch, capsys
):
    flags = ["--t-path", str(copy_of(runs.teacher, tmp_path)), *FEW, "--t-features", "disk", "--experiments"]
    test_ss_head, others = student.test_ss_head, []

    def starting(*args):
        """At the end of the head's first epoch, the other student starts, and has to wait."""
        if not others:
            command = [sys.executable, "-W", "error", ROOT / "student.py", *flags, "second"]
            others.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True))
            assert any(line.startswith("SS head: waiting for another student") for line in others[0].stdout)
        return test_ss_head(*args)

    monkeypatch.setattr(student, "test_ss_head", starting)
    student.main([*flags, str(tmp_path / "first")])
    rest, _ = others[0].communicate()
    assert others[0].returncode == 0
    assert "SS head: read from" in rest and "ss_head 1/2" not in rest
    first, second = (contents(next((tmp_path / name).iterdir())) for name in ("first", "second"))
    assert first == second
    assert capsys.readouterr().out.count("ss_head ") == 2


# Its features


class Eyes(nn.Module):
    """A teacher whose two features of an image are the brightness of two corners; collects the images it sees."""

    width, scale = 2, 1.0

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(self.width, 3)
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        feature = torch.stack([x[..., :3, :3].mean((1, 2, 3)), x[..., -3:, -3:].mean((1, 2, 3))], 1) * self.scale
        return [feature], self.fc(feature)


def split_of(count=6, kept=slice(None), seed=0):
    """Some images of a split of `count`."""
    pixels, labels = sources.synthetic(True, count)
    index = torch.arange(count)[kept]
    return cifar.Images(Split(pixels[index], labels[index]), STATISTICS["synthetic"], CPU, 4, seed, index)


def opened(where, images, folder, *flags, backbone=None, **identity):
    """The table of some images, and the teacher that computes them."""
    backbone = backbone or Eyes()
    args = args_of("--t-features", where, *flags)
    return teacher_store.features(args, folder / "best.pth", IDENTITY | identity, images, backbone), backbone


def asked(images, epoch=1):
    """The views that a student's epoch uses, and their features."""
    draws = images.draws("student", epoch, 4)
    feature = Eyes()(images.views(*draws))[0][0]
    return draws.order, draws.window, feature.half().view(len(images), 4, 2)


def file_in(folder):
    (file,) = folder.glob("features_*.bin")
    return file


def test_features_are_computed_on_first_use_and_read_afterwards(tmp_path):
    images = split_of(20)
    for where in ("memory", "disk"):
        features, eyes = opened(where, images, tmp_path)
        for epoch in (1, 2, 1):
            rows, window, expected = asked(images, epoch)
            assert torch.equal(features(rows, window), expected)
        # 80 views in each of two epochs, in batches of one shape; none in the third epoch
        assert [len(x) for x in eyes.seen] == [64] * 4
    features, eyes = opened("disk", images, tmp_path)
    assert torch.equal(features(*asked(images)[:2]), asked(images)[2])
    assert not eyes.seen
    assert opened("compute", images, tmp_path)[0] is None


def test_the_bits_of_a_feature_do_not_depend_on_the_views_computed_with_it(tmp_path):
    torch.manual_seed(0)
    images, backbone = split_of(5), frozen(model_dict["resnet8"](), maps=False)
    rows, window, _ = asked(images)
    together, alone = (opened("memory", images, tmp_path, backbone=backbone)[0] for _ in range(2))
    expected = together(rows, window)
    for i in range(len(rows)):
        assert torch.equal(alone(rows[i : i + 1], window[i : i + 1])[0], expected[i])
    plain = backbone(images.views(rows, window))[0][-1].unflatten(0, window.shape)
    torch.testing.assert_close(expected.float(), plain, rtol=2e-3, atol=1e-5)


def test_batches_come_with_the_features_of_their_own_views(tmp_path):
    images = split_of(6)
    features, _ = opened("memory", images, tmp_path)
    for epoch, views in ((1, 4), (2, 1)):
        given = [f("student", epoch, views) for f in (images.batches, features.batches, features.batches_without_views)]
        sizes = []
        for computed, whole, bare in zip(*given, strict=True):
            sizes.append(len(computed.target))
            assert torch.equal(whole.x, computed.x) and bare.x is None and computed.feature is None
            for batch in (whole, bare):
                assert torch.equal(batch.feature, Eyes()(computed.x)[0][0].half())
                assert torch.equal(batch.rows, computed.rows) and torch.equal(batch.target, computed.target)
        assert sizes == [4, 2]


def test_students_with_other_images_seeds_and_labels_share_the_table(tmp_path):
    few = split_of(6, slice(2, 5))
    opened("disk", few, tmp_path)[0](*asked(few)[:2])  # before the whole split, so the file grows
    few_rows, few_window, few_expected = asked(few)
    whole, eyes = opened("disk", split_of(6), tmp_path)
    assert torch.equal(whole(few_rows + 2, few_window), few_expected)
    assert not eyes.seen
    rows, window, expected = asked(split_of(6))
    assert torch.equal(whole(rows, window), expected)
    noisy = split_of(6, seed=1)
    noisy.labels = noisy.labels.flip(0)
    features, eyes = opened("disk", noisy, tmp_path, "--seed", "1", "--label-noise", "0.3", "--few-shot", "0.5")
    assert torch.equal(features(rows, window), expected)
    assert not eyes.seen
    file_in(tmp_path)  # one file


def test_another_teacher_data_set_precision_or_device_has_another_table(monkeypatch):
    monkeypatch.setattr(teacher_store, "Features", lambda images, backbone, autocast, key, folder: key)

    def key(*flags, device="cpu", **identity):
        return opened("disk", SimpleNamespace(device=torch.device(device)), Path(), *flags, **identity)[0]

    keys = [key(), key("--amp", "bf16"), key("--deterministic"), key("--tf32", "off"), key(device="cuda")]
    keys += [key(**{part: "another"}) for part in IDENTITY]
    assert len(set(keys)) == len(keys)
    assert key("--seed", "1", "--lr", "1", "--few-shot", "0.5", "--batch-size", "8", "--compile") == key()


def test_only_damaged_entries_are_computed_again(tmp_path):
    images = split_of()
    rows, window, expected = asked(images)
    opened("disk", images, tmp_path)[0](rows, window)
    file = file_in(tmp_path)
    entries = np.fromfile(file, np.int16).reshape(len(images), 648, 2 + 4)  # two features, and their checksum
    entries[rows[0], window[0, 1], 0] ^= 1
    file.write_bytes(entries.tobytes())
    for computed in ([1], []):
        features, eyes = opened("disk", images, tmp_path)
        assert torch.equal(features(rows, window), expected)
        assert [len(torch.unique(x, dim=0)) for x in eyes.seen] == computed


def test_a_file_needs_space_for_the_entries_of_its_own_images(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=46_000))
    with pytest.raises(UserError, match="will grow by .* are free there"):
        opened("disk", split_of(), tmp_path)  # 6 · 648 · 12 bytes
    assert not list(tmp_path.iterdir())
    opened("disk", split_of(6, slice(1, 6)), tmp_path)  # five of six images fit


@pytest.mark.parametrize("scale", [1e6, float("nan")])
def test_features_that_float16_cannot_hold_end_the_run(scale, tmp_path):
    eyes = Eyes()
    eyes.scale = scale
    features, _ = opened("disk", split_of(), tmp_path, backbone=eyes)
    with pytest.raises(UserError, match="not finite in float16; use --t-features compute"):
        features(*asked(split_of())[:2])
    assert not any(file_in(tmp_path).read_bytes())


def test_memory_and_disk_give_the_same_student_and_compute_the_same_up_to_rounding(runs, tmp_path, monkeypatch, capsys):
    """A run that began with one continues with the other."""
    copy, ends = copy_of(runs.teacher, tmp_path), {}

    def train(name, where):
        for kept in copy.glob("ss_head_*"):
            kept.unlink()
        flags = ["--t-path", str(copy), *FEW, "--experiments", str(tmp_path / name), "--t-features", where]
        status = end_of(student.main, flags)
        ends[name] = contents(next((tmp_path / name).iterdir()))
        return status

    assert train("disk", "disk") == train("compute", "compute") == 0
    with monkeypatch.context() as patch:
        stop_at(6 + 5, patch)  # in the student's second epoch
        assert train("memory", "memory") == 1
    assert train("memory", "disk") == 0
    assert "continuing after epoch 1 of the student" in capsys.readouterr().out
    assert ends["disk"] == ends["memory"]
    logs = [ends[name]["log.jsonl"] for name in ("disk", "compute")]
    for of_stored, of_computed in zip(*logs, strict=True):
        losses = [tag for tag in of_stored if tag.endswith("loss")]
        assert [of_stored[tag] for tag in losses] == pytest.approx([of_computed[tag] for tag in losses], rel=5e-3)
    assert train("compute", "disk") == 2
    assert "t_features was None, is stored" in capsys.readouterr().err
