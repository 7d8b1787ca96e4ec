"""teacher_store.py: an SS head is read by later students, and nothing of a damaged or another one is taken."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHORT, TINY_STUDENT, contents

import baseline
import models
import record
import student
from teacher_store import SSHeadFile, TeacherCheckpoint, doubt_about
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
