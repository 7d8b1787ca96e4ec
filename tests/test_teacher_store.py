"""teacher_store.py: an SS head is read by later students, and nothing of a damaged or another one is taken."""

import io
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_STUDENT, contents

import models
import record
import student
from teacher_store import SSHeadFile, TeacherCheckpoint
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
