"""teacher_store.py: SS head and features are found by later students, and nothing damaged or of another is taken."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, TINY_STUDENT, contents, end_of, run_script
from torch import nn

import baseline
import cifar
import models
from harness import record
import student
import teacher_store
import utils
from harness.flags import UserError
from teacher_store import SSHeadFile, TeacherCheckpoint, doubt_about, look_once
from wrapper import Wrapper


def head_file(*more, folder=Path("teacher"), teacher="teacher", device="cpu"):
    args = student.parse_args(["--t-path", "unused", *TINY_STUDENT, *more])
    checkpoint = TeacherCheckpoint(folder / "best.pth", folder.name, None, teacher)
    return SSHeadFile(args, checkpoint, torch.device(device))


def test_a_head_of_other_flags_is_another_file():
    others = [head_file("--t-lr", "0.01"), head_file("--seed", "1"), head_file("--few-shot", "0.5")]
    others += [head_file(teacher="another"), head_file(device="cuda")]
    assert len({file.path for file in [head_file(), *others]}) == 6
    same = head_file(*"--tf-weight 0 --lr 0.3 --s-arch vgg8 --label-noise 0.3".split())
    assert same.path == head_file().path


def test_a_second_student_reads_the_head_and_ends_as_if_it_had_trained_it(runs, tmp_path, capsys):
    (kept,) = (runs.teacher / "ckpt").glob("ss_head_*.pth")
    flags = [*TINY_STUDENT, "--experiments", tmp_path, "--t-path", runs.teacher]
    student.main([str(flag) for flag in flags])
    assert f"read from {kept}" in capsys.readouterr().out
    assert contents(tmp_path / runs.student.name) == contents(runs.student)


def spoil(kind, good):
    """Bytes of a kept SS head with something wrong with it."""
    saved, buffer = torch.load(io.BytesIO(good), weights_only=True), io.BytesIO()
    if kind == "no lines":
        del saved["lines"]
    elif kind == "other shape":  # found only after the first tensors have been read
        saved["state_dict"]["2.bias"] = torch.zeros(3)
    elif kind == "empty lines":
        saved["lines"] = []
    elif kind == "not finite":
        saved["state_dict"]["2.bias"][1] = torch.nan
    elif kind == "another":
        saved["key"] = "0123456789abcdef"
    torch.save(saved, buffer)
    return {"text": b"damaged", "half": good[: len(good) // 2]}.get(kind, buffer.getvalue())


def test_a_damaged_ss_head_is_not_used_and_trained_anew(runs, tmp_path, capsys):
    (kept,) = (runs.teacher / "ckpt").glob("ss_head_*.pth")
    good, folder = kept.read_bytes(), tmp_path / runs.teacher.name
    folder.mkdir()
    shutil.copy(runs.teacher / "ckpt" / "best.pth", folder)
    (folder / kept.name).write_bytes(spoil("other shape", good))
    student.main(["--t-path", str(folder), *TINY_STUDENT, "--experiments", str(tmp_path)])
    assert "belongs to something else: not used" in capsys.readouterr().out
    assert (folder / kept.name).read_bytes() == good
    assert contents(tmp_path / runs.student.name) == contents(runs.student)


@pytest.mark.parametrize("kind", ["text", "half", "no lines", "empty lines", "other shape", "not finite", "another"])
def test_nothing_of_a_damaged_or_another_ss_head_is_taken(kind, runs, tmp_path, capsys):
    (kept,) = (runs.teacher / "ckpt").glob("ss_head_*.pth")
    file = head_file(folder=tmp_path, teacher=record.fingerprint(models.load(runs.teacher)))
    assert file.path.name == kept.name
    good = kept.read_bytes()
    head = Wrapper(models.load(runs.teacher)).proj_head
    before = record.fingerprint(head)
    file.path.write_bytes(spoil(kind, good))
    assert file.read_into(head) == []
    assert "belongs to something else: not used" in capsys.readouterr().out
    assert record.fingerprint(head) == before
    file.path.write_bytes(good)
    assert len(file.read_into(head)) == 2
    assert record.fingerprint(head) != before


def test_a_teacher_whose_folder_cannot_be_written_to_costs_no_student(tmp_path, capsys):
    file = head_file(folder=tmp_path / "is" / "not" / "there")
    file.write(torch.nn.Linear(2, 2), [{"train/teacher_lr": 0.05}])
    assert "SS head: not kept for later students" in capsys.readouterr().out


# The teacher, before hours are spent on it


@pytest.mark.parametrize(
    ("acc", "images", "classes", "told", "tested", "doubt"),
    [
        (75.9, 10_000, 100, 76.46, 10_000, None),
        (75.4, 10_000, 100, 76.46, 10_000, "but 76.46 by its checkpoint"),
        (77.5, 10_000, 100, 76.46, 10_000, "but 76.46 by its checkpoint"),
        (76.0, 10_000, 100, 0.7646, 10_000, None),  # a share
        (70.0, 10_000, 100, 0.7646, 10_000, "but 76.46 by its checkpoint"),
        (0.9, 40, 100, 0.9, 40, None),  # no share
        (70.0, 200, 100, 76.46, 10_000, None),  # sampling: 9 points
        (70.0, 200, 100, 76.46, None, None),
        (70.0, 10_000, 100, 76.46, 200, None),
        (60.0, 200, 100, 76.46, 10_000, "but 76.46 by its checkpoint"),
        (2.5, 40, 100, 76.46, None, "but 76.46 by its checkpoint"),
        (2.5, 40, 100, 7.5, 40, None),  # two images
        (2.5, 40, 100, 10.0, 40, "but 10.00 by its checkpoint"),
        (1.1, 10_000, 100, None, None, "near chance (1.00)"),
        (1.1, 10_000, 100, 1.1, 10_000, "near chance (1.00)"),
        (3.0, 10_000, 100, None, None, None),
        (10.5, 10_000, 10, None, None, "near chance (10.00)"),
        (25.0, 10_000, 10, None, None, None),
        (51.0, 10_000, 2, None, None, "near chance (50.00)"),
        (80.0, 10_000, 2, None, None, None),
        (50.0, 40, 2, None, None, None),
        (0.0, 40, 100, None, None, None),
    ],
)
def test_an_accuracy_is_doubted_beyond_a_point_and_beyond_sampling(acc, images, classes, told, tested, doubt):
    answer = doubt_about(acc, images, classes, told, tested)
    assert answer is None if doubt is None else doubt in answer


@pytest.fixture
def distil_from(runs, tmp_path):
    """Distils from the teacher with other words of it in its checkpoint; returns the flags' beginning."""

    def flags(**about):
        saved = torch.load(runs.teacher / "ckpt" / "best.pth", weights_only=True)
        saved["acc"] = about.pop("acc", saved["acc"])
        torch.save(saved | {"about": saved["about"] | about}, tmp_path / "it.pth")
        words = ["--method", "kd", "--t-path", tmp_path / "it.pth", "--s-arch", "resnet8", *SHORT]
        return [str(word) for word in [*words, "--experiments", tmp_path / "runs"]]

    return flags


def test_a_student_records_its_teacher_and_goes_on_when_that_has_moved(distil_from, runs, tmp_path, capsys):
    baseline.main(distil_from())
    (folder,) = (tmp_path / "runs").iterdir()
    result, config = (json.loads((folder / name).read_text()) for name in ("result.json", "config.json"))
    told = result["teacher"]
    assert told == config["starts"][0]["teacher"]
    assert f"teacher: {told['path']}, resnet8, test accuracy {told['acc']:.2f}\n" in capsys.readouterr().out
    assert (told["path"], told["arch"]) == (str(tmp_path / "it.pth"), "resnet8")
    assert told["fingerprint"] == config["flags"]["teacher"] == record.fingerprint(models.load(runs.teacher))
    moved = tmp_path / "moved" / tmp_path.name / "it.pth"
    moved.parent.mkdir(parents=True)
    (tmp_path / "it.pth").rename(moved)
    flags = distil_from()
    flags[flags.index("--t-path") + 1] = str(moved)
    (folder / "result.json").unlink()
    baseline.main(flags)
    out, err = capsys.readouterr()
    assert f"run: {folder}" in out and err == ""
    assert json.loads((folder / "result.json").read_text())["teacher"] == told | {"path": str(moved)}


@pytest.mark.parametrize(
    ("about", "warning"),
    [
        ({"acc": 99.0}, "the teacher's accuracy is "),
        ({"mean": [0.5, 0.43, 0.43]}, "its images were normalised by another mean ([0.5, 0.43, 0.43]) than these"),
        ({"std": [0.182, 0.182, 0.25]}, "its images were normalised by another std"),
        ({"dataset": "cifar100"}, "says that it was trained on cifar100, not on synthetic"),
    ],
    ids=["accuracy", "mean", "deviation", "data set"],
)
def test_a_teacher_that_is_hardly_the_one_meant_is_warned_of_in_one_line(about, warning, distil_from, capsys):
    baseline.main(distil_from(**about))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and warning in line


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"side": 64}, "trained on images of side 64, these have 32"),
        ({"classes": 10, "dataset": "cifar10"}, "trained on cifar10, 10 classes; synthetic has 100"),
    ],
    ids=["side", "classes"],
)
def test_a_teacher_that_cannot_be_right_is_refused_and_nothing_is_written(about, reason, distil_from, tmp_path, fails):
    assert reason in fails(baseline.main, *distil_from(**about))
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------------ the features


class Eyes(nn.Module):
    """A teacher whose two features of an image are the brightness of its corners; notes what it has looked at."""

    width, scale = 2, 1.0

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(self.width, 3)
        self.seen = []

    def forward(self, x, is_feat=True):
        self.seen.append(x)
        feature = torch.stack([x[..., :3, :3].mean((1, 2, 3)), x[..., -3:, -3:].mean((1, 2, 3))], 1) * self.scale
        return [feature], self.fc(feature)


def split_of(count=6, kept=slice(None), seed=0):
    """Some images of a split of `count`."""
    pixels, labels = cifar.synthetic(True, count)
    index = torch.arange(count)[kept]
    return cifar.Images(pixels[index], labels[index], cifar.STATISTICS["synthetic"], "cpu", 4, seed, index=index)


def opened(where, images, folder, *flags, eyes=None, teacher="teacher"):
    """`images` with the features of a table, and the teacher that looks at them."""
    args = student.parse_args(["--t-path", "unused", *TINY_STUDENT, "--t-features", where, *flags])
    eyes, autocast = eyes or Eyes(), utils.precision("off", torch.device("cpu"))
    look_once(args, TeacherCheckpoint(folder / "best.pth", "folder", None, teacher), eyes, autocast, train=images)
    return images.features, eyes


def asked(images, epoch=1):
    """What a student's epoch asks for, and the right answer."""
    draws = cifar.draw(len(images), 4, images.seed, "student", epoch)
    feature = Eyes()(images.views(draws.order, draws.window))[0][0]
    return draws.order, draws.window, feature.half().view(len(images), 4, 2)


def file_in(folder):
    (file,) = folder.glob("features_*.bin")
    return file


def test_features_are_those_of_the_backbone_and_looked_at_once(tmp_path):
    images = split_of(20)
    for where in ("memory", "disk"):
        features, eyes = opened(where, images, tmp_path)
        for epoch in (1, 2, 1):
            rows, window, expected = asked(images, epoch)
            assert torch.equal(features(rows, window), expected)
        looked = torch.cat(eyes.seen)
        assert {len(x) for x in eyes.seen} == {64}  # one static shape
        assert len(looked) == 2 * 128  # 80 views an epoch, and none again in the third
    features, eyes = opened("disk", images, tmp_path)
    assert torch.equal(features(*asked(images)[:2]), asked(images)[2])
    assert not eyes.seen


def test_batches_bring_the_features_of_their_own_views(tmp_path):
    images = split_of(6)
    opened("disk", images, tmp_path)
    for batches in (images.batches("student", 1, 4, features=True), images.batches("student", 2, 1, features=True)):
        batches = list(batches)
        assert [len(batch.target) for batch in batches] == [4, 2]
        for batch in batches:
            assert torch.equal(batch.feature, Eyes()(batch.x)[0][0].half())
    assert all(batch.feature is None for batch in images.batches("student", 1, 4))
    whole, bare = (list(images.batches("student", 1, 4, features=True, cut=cut)) for cut in (True, False))
    assert all(torch.equal(a.feature, b.feature) and b.x is None for a, b in zip(whole, bare, strict=True))
    images.features = None  # what is not stored has to be looked at
    bare = images.batches("student", 1, 4, features=True, cut=False)
    assert all(torch.equal(a.x, b.x) for a, b in zip(whole, bare, strict=True))


def test_a_student_whose_head_is_there_and_that_is_stopped_at_once_has_lost_nothing(
    runs, tmp_path, monkeypatch, capsys
):
    """log.jsonl has the head's epochs from the first one of its own on, like last.pth."""
    command = ["--t-path", str(runs.teacher), *TINY_STUDENT, "--kd-T", "3", "--experiments", str(tmp_path)]

    def broken(*_):
        raise utils.Fault("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(utils, "train_epoch", broken)
        assert end_of(student.main, command) == 1
    capsys.readouterr()
    student.main(command)
    shown = capsys.readouterr()
    assert "SS head: read from" in shown.out and shown.err == ""
    (folder,) = tmp_path.iterdir()
    phases = [json.loads(line)["phase"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert phases == ["ss_head", "ss_head", "student", "student", "student"]


def test_the_test_split_has_a_table_of_its_own_with_four_windows_an_image(tmp_path):
    train, test = split_of(5), split_of(5)
    args = student.parse_args(["--t-path", "unused", *TINY_STUDENT, "--t-features", "disk"])
    checkpoint = TeacherCheckpoint(tmp_path / "best.pth", "folder", None, "teacher")
    autocast = utils.precision("off", torch.device("cpu"))
    look_once(args, checkpoint, Eyes(), autocast, train=train, test=test)
    entry = 2 * (2 + 4)  # two features and the checksum
    assert sorted(file.stat().st_size for file in tmp_path.glob("*.bin")) == [5 * 4 * entry, 5 * 648 * entry]
    (batch, *_) = test.test_batches(4, features=True)
    assert torch.equal(batch.feature, Eyes()(batch.x)[0][0].half())


def test_students_of_other_images_seeds_and_labels_share_the_table(tmp_path):
    features, eyes = opened("disk", split_of(6, slice(2, 5)), tmp_path)  # before the whole split, so the file grows
    few = split_of(6, slice(2, 5))
    features(*asked(few)[:2])
    rows, window, expected = asked(split_of(6))
    whole, later = opened("disk", split_of(6), tmp_path)
    again = [int(row) in (2, 3, 4) for row in rows]
    whole(rows[again], torch.stack([asked(few)[1][asked(few)[0] == row - 2][0] for row in rows[again]]))
    assert not later.seen  # known from the few
    assert torch.equal(whole(rows, window), expected)
    noisy = split_of(6, seed=1)
    noisy.labels = noisy.labels.flip(0)
    features, last = opened("disk", noisy, tmp_path, "--seed", "1", "--label-noise", "0.3", "--few-shot", "0.5")
    assert torch.equal(features(rows, window), expected)
    assert not last.seen
    file_in(tmp_path)


def test_another_teacher_precision_or_data_set_has_another_table(tmp_path):
    opened("disk", split_of(), tmp_path)
    opened("disk", split_of(), tmp_path, teacher="another")
    for flags in (["--amp", "bf16"], ["--dataset", "cifar10"], ["--deterministic"]):
        opened("disk", split_of(), tmp_path, *flags)
    assert len(list(tmp_path.glob("features_*.bin"))) == 5


def damaged(kind, content, folder):
    """The bytes of a table of 6 images with something wrong with it."""
    words = np.frombuffer(content, np.int16).reshape(-1, 6).copy()
    known = words.any(1).nonzero()[0]
    if kind == "truncated":
        return content[: len(content) // 2 + 5]
    if kind == "empty":
        return b""
    if kind == "longer":
        return content + b"more"
    if kind == "noise":
        return np.random.default_rng(0).integers(-(2**15), 2**15, words.shape, np.int16).tobytes()
    if kind == "all ones":
        return np.full_like(words, -1).tobytes()
    if kind == "two entries exchanged":
        words[known[:2]] = words[known[1::-1]]
    elif kind == "no checksums":
        words[:, 2:] = 0
    elif kind == "no features":
        words[:, :2] = 0
    elif kind == "signs":  # of both features
        words[:, :2] ^= np.int16(-(2**15))
    elif kind == "of another teacher":
        opened("disk", split_of(), folder, teacher="another")[0](*asked(split_of())[:2])
        return next(file for file in folder.glob("*.bin") if file.read_bytes() != content).read_bytes()
    elif kind == "of other images":
        other = split_of()
        other.pixels = other.pixels.flip(0)
        (folder / "other").mkdir()
        opened("disk", other, folder / "other")[0](*asked(split_of())[:2])
        return file_in(folder / "other").read_bytes()
    return words.tobytes()


KINDS = ["truncated", "empty", "longer", "noise", "all ones", "two entries exchanged", "no checksums", "no features"]
KINDS += ["signs", "of another teacher", "of other images", "copied without its holes"]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_wrong_is_read_from_a_damaged_table(kind, tmp_path):
    images = split_of()
    rows, window, expected = asked(images)
    opened("disk", images, tmp_path)[0](rows, window)
    file = file_in(tmp_path)
    spoilt = damaged(kind, file.read_bytes(), tmp_path)
    file.unlink()
    file.write_bytes(spoilt)
    features, eyes = opened("disk", images, tmp_path)
    assert torch.equal(features(rows, window), expected)
    assert bool(eyes.seen) == (kind not in ("longer", "copied without its holes"))
    features, eyes = opened("disk", images, tmp_path)
    assert torch.equal(features(rows, window), expected)
    assert not eyes.seen


def test_every_changed_bit_of_an_entry_is_noticed_and_told(tmp_path, capsys):
    images = split_of(1)
    rows, window, expected = asked(images)
    opened("disk", images, tmp_path)[0](rows, window)
    file = file_in(tmp_path)
    good = file.read_bytes()
    first = np.frombuffer(good, np.int16).reshape(-1, 6).any(1).nonzero()[0][0] * 12
    features, eyes = opened("disk", images, tmp_path)
    for bit in range(8 * 12):
        capsys.readouterr()
        with open(file, "r+b") as opened_file:
            opened_file.seek(first + bit // 8)
            opened_file.write(bytes([good[first + bit // 8] ^ 1 << bit % 8]))
        assert torch.equal(features(rows, window), expected)
        assert (len(eyes.seen), file.read_bytes()) == (bit + 1, good)
        assert f"1 entries of {file} are damaged" in capsys.readouterr().out


def test_two_that_look_at_once_see_each_others_entries(tmp_path):
    images = split_of()
    (first, _), (second, eyes) = opened("disk", split_of(), tmp_path), opened("disk", images, tmp_path)
    rows, window, expected = asked(images)
    first(rows, window)
    assert torch.equal(second(rows, window), expected)
    assert not eyes.seen
    both = [asked(images, epoch) for epoch in range(2, 40)]
    with ThreadPoolExecutor(2) as pool:
        for answers in pool.map(lambda features: [features(*of[:2]) for of in both], (first, second)):
            assert all(torch.equal(*pair) for pair in zip(answers, (of[2] for of in both), strict=True))


@pytest.mark.parametrize("how", ["an error", "half an entry"])
def test_a_disk_that_fills_ends_in_a_fault_and_what_is_there_stays_right(how, tmp_path, monkeypatch):
    images, pwrite, calls = split_of(), os.pwrite, []
    features, eyes = opened("disk", images, tmp_path)
    rows, window, expected = asked(images)

    def full(file, content, place):
        calls.append(place)
        if len(calls) == 7:
            if how == "an error":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return pwrite(file, bytes(content)[:5], place)
        return pwrite(file, content, place)

    with monkeypatch.context() as patch, pytest.raises(utils.Fault, match="No space left on device"):
        patch.setattr(os, "pwrite", full)
        features(rows, window)
    features, eyes = opened("disk", images, tmp_path)
    assert torch.equal(features(rows, window), expected)
    assert len(torch.unique(torch.cat(eyes.seen).flatten(1), dim=0)) == 24 - 6


def test_too_little_space_is_told_with_the_size_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=46_000))
    with pytest.raises(UserError, match=r"will grow by 47 kB, and 46 kB are free"):
        opened("disk", split_of(), tmp_path)  # 6 · 648 · 12 bytes
    assert not list(tmp_path.iterdir())
    opened("disk", split_of(6, slice(1, 6)), tmp_path)  # only what these images can add counts
    monkeypatch.setattr(teacher_store, "_available_memory", lambda: 60_000)
    with pytest.raises(UserError, match=r"the features take 47 kB, .* 60 kB"):
        opened("memory", split_of(), tmp_path)


def test_a_folder_that_cannot_hold_the_table_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be used: .*--t-features memory"):
        opened("disk", split_of(), tmp_path / "is" / "not" / "there")


@pytest.mark.parametrize("scale", [1e6, float("nan")])
def test_features_that_float16_cannot_hold_are_told(scale, tmp_path):
    eyes = Eyes()
    eyes.scale = scale
    features, _ = opened("disk", split_of(), tmp_path, eyes=eyes)
    with pytest.raises(UserError, match="not finite in float16; use --t-features compute"):
        features(*asked(split_of())[:2])
    assert not any(file_in(tmp_path).read_bytes())


def test_a_head_trained_on_stored_features_is_not_one_trained_on_computed_ones():
    paths = {where: head_file("--t-features", where).path for where in ("compute", "memory", "disk")}
    assert paths["memory"] == paths["disk"] != paths["compute"] == head_file().path


FEW = [*TINY_STUDENT, "--train-size", "10", "--test-size", "6", "--batch-size", "4"]
FEW += ["--epoch", "2", "--milestones", "1"]


def test_memory_and_disk_give_the_same_student_which_either_continues(runs, tmp_path, monkeypatch, capsys):
    """And it is the student of computed features up to rounding."""
    teacher, ends = tmp_path / runs.teacher.name, {}
    teacher.mkdir()
    shutil.copy(runs.teacher / "ckpt" / "best.pth", teacher)

    def train(name, where, stop=None):
        for kept in teacher.glob("ss_head_*"):
            kept.unlink()
        flags = ["--t-path", str(teacher), *FEW, "--experiments", str(tmp_path / name), "--t-features", where]
        with monkeypatch.context() as patch:
            if stop:
                patch.setattr(utils, "evaluate", stop)
            status = end_of(student.main, flags)
        (folder,) = (tmp_path / name).iterdir()
        ends[name] = contents(folder)
        return status

    evaluate, tests = utils.evaluate, []

    def stopping(*args):
        tests.append(args)
        if len(tests) == 2:  # after the second epoch
            raise utils.Fault("stopped by the test")
        return evaluate(*args)

    assert train("disk", "disk") == train("compute", "compute") == 0
    assert (train("memory", "memory", stopping), train("memory", "disk")) == (1, 0)
    assert "continuing after epoch 1 of the student" in capsys.readouterr().out
    assert ends["disk"] == ends["memory"]
    logs = [[json.loads(line) for line in ends[name]["log.jsonl"].splitlines()] for name in ("disk", "compute")]
    for of_stored, of_computed in zip(*logs, strict=True):
        assert of_stored.keys() == of_computed.keys()
        losses = [tag for tag in of_stored if tag.endswith("loss")]
        assert [of_stored[tag] for tag in losses] == pytest.approx([of_computed[tag] for tag in losses], rel=5e-3)
    (folder,) = (tmp_path / "compute").iterdir()
    flags = ["--t-path", str(teacher), *FEW, "--experiments", str(folder.parent), "--t-features", "disk"]
    assert end_of(student.main, flags) == 2
    assert "t_features was None, is stored" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_while_it_writes_the_table_ends_like_one_that_never_was(runs, tmp_path):
    teacher = tmp_path / runs.teacher.name
    teacher.mkdir()
    shutil.copy(runs.teacher / "ckpt" / "best.pth", teacher)
    flags = ["--t-path", teacher, *FEW, "--t-features"]
    assert run_script("student.py", *flags, "memory", cwd=tmp_path).returncode == 0
    (whole,) = (tmp_path / "experiments").iterdir()
    for kept in teacher.glob("ss_head_*"):
        kept.unlink()
    command = [sys.executable, ROOT / "tests" / "killer.py", "47", ROOT / "student.py", *flags, "disk"]
    command += ["--experiments", "killed"]
    deaths = 0
    while (end := subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)).returncode:
        assert end.returncode == -signal.SIGKILL, end.stderr
        deaths += 1
    (folder,) = (tmp_path / "killed").iterdir()
    assert deaths > 4
    assert contents(folder) == contents(whole)


@pytest.mark.slow
def test_two_students_on_one_table_at_once_end_like_one_after_the_other(runs, tmp_path):
    teacher = tmp_path / runs.teacher.name
    teacher.mkdir()
    shutil.copy(runs.teacher / "ckpt" / "best.pth", teacher)
    script = [sys.executable, "-W", "error", ROOT / "student.py", "--t-path", teacher, *FEW, "--t-features"]
    both = [
        subprocess.Popen([*script, "disk", "--experiments", name], cwd=tmp_path, stdout=subprocess.DEVNULL)
        for name in ("one", "two")
    ]
    assert [process.wait() for process in both] == [0, 0]
    assert run_script(*script[3:], "memory", "--experiments", "three", cwd=tmp_path).returncode == 0
    one, two, three = (contents(next((tmp_path / name).iterdir())) for name in ("one", "two", "three"))
    assert one == two == three
