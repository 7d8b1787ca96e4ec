"""What a user can get wrong: flags, checkpoints, records and data. One line, status 2, nothing written."""

import shutil

import pytest
import torch
from conftest import SHORT, TINY

import student
import teacher
from harness import flags

STUDENT = ["--t-path", "teacher_resnet8_seed0", "--s-arch", "resnet8", *SHORT]
TEACHER = ["--arch", "resnet8", *SHORT]
KD = [*STUDENT, "--method", "kd"]
BAD_FLAGS = [
    ("teacher.py", [], "--arch is missing; the known ones are resnet8, "),
    ("teacher.py", [*TEACHER, "--batch-size", "many"], "--batch-size: 'many' is not a whole number of at least 1"),
    ("teacher.py", [*TEACHER, "--lr", "0"], "--lr: '0' is not a number above 0"),
    ("teacher.py", [*TEACHER, "--test-size", "2001"], "choose 1 to 2000"),
    ("teacher.py", [*TEACHER, "--val-fraction", "0.5"], "no class has two training images"),
    ("teacher.py", [*TEACHER, "--side", "64"], "--side 64 is for --dataset folder"),
    ("teacher.py", [*TEACHER, "--dataset", "folder", "--data-root", "typo"], "typo/train: no such folder; --data-root"),
    ("teacher.py", ["--evaluate", "nowhere"], "nowhere: no such file or folder"),
    ("student.py", ["--s-arch", "resnet8"], "--t-path is missing"),
    ("student.py", ["--t-path", "teacher_resnet8_seed0"], "--s-arch is missing; the known ones are resnet8, "),
    ("student.py", [*STUDENT, "--t-path", "empty"], "found no checkpoint with 'best' in its name"),
    ("student.py", [*STUDENT, "--t-path", "old/best.pth"], "--t-arch"),
    ("student.py", [*STUDENT, "--t-path", "old/best.pth", "--t-arch", "vgg8"], "does not fit vgg8"),
    ("student.py", [*STUDENT, "--t-path", "unfinished/ckpt"], "unfinished: this run is not finished"),
    ("student.py", [*STUDENT, "--dataset", "cifar10"], "trained on synthetic, 100 classes; cifar10 has 10"),
    ("student.py", [*STUDENT, "--batch-size", "1"], "--batch-size 1: "),
    ("student.py", [*STUDENT, "--ratio-tf", "1.1"], "--ratio-tf: '1.1' is not a number of at least 0 and at most 1"),
    ("student.py", [*STUDENT, "--t-milestones", "2", "1"], "--t-milestones: 2 1: milestones must increase"),
    ("student.py", [*STUDENT, *"--ce-weight 0 --kd-weight 0 --tf-weight 0 --ss-weight 0".split()], "nothing to learn"),
    ("student.py", [*STUDENT, "--export", "nowhere/s.pt2"], "--export nowhere/s.pt2: give the name of a file that"),
    ("student.py", ["--s-path", "plain", "--export", "plain/best.pth"], "that ends in .pt2 (torch.export) or .onnx"),
    ("student.py", ["--s-path", "old", "--export", "s.pt2"], "--s-arch beside --s-path"),
    ("student.py", ["--s-path", "plain"], "--s-path is for --export"),
    ("baseline.py", STUDENT, "--method is missing; the known ones are kd, fitnet, "),
    ("baseline.py", [*KD, "--t-path", "unfinished"], "unfinished: this run is not finished"),
    ("baseline.py", [*KD, "--weight", "1"], "whose weight is --kd-weight"),
    ("baseline.py", [*KD, "--method", "ab", "--ce-weight", "0", "--kd-weight", "0"], "nothing to learn"),
    ("baseline.py", [*KD, "--method", "ab", "--s-arch", "vgg8"], "the student has 4 of them, the teacher 3"),
    ("baseline.py", [*KD, "--method", "at", "--t-features", "disk"], "at needs maps, which are not stored"),
    ("baseline.py", [*KD, *"--method crd --train-size 1 --batch-size 1".split()], "training set has one class only"),
]


@pytest.fixture
def workplace(runs, tmp_path, monkeypatch):
    """The current directory: a teacher, checkpoints in folders without a telling name, an unfinished run."""
    for path in ("teacher_resnet8_seed0/best.pth", "plain/best.pth"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_bytes((runs.teacher / "ckpt" / "best.pth").read_bytes())
    (tmp_path / "old").mkdir()
    saved = torch.load(runs.teacher / "ckpt" / "best.pth", weights_only=True)
    torch.save({name: saved[name] for name in ("epoch", "state_dict", "acc")}, tmp_path / "old" / "best.pth")
    (tmp_path / "empty").mkdir()
    shutil.copytree(runs.teacher, tmp_path / "unfinished", ignore=shutil.ignore_patterns("result.json"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_onnx_without_its_packages_is_refused_at_once(workplace, monkeypatch, fails):
    monkeypatch.setattr(flags, "find_spec", lambda name: None)
    line = fails(student.main, "--s-path", "plain", "--export", "student.onnx")
    assert "--export student.onnx: ONNX needs `pip install onnx onnxscript`" in line


def listing(folder):
    return {path: path.stat().st_size for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "script, flags, words", BAD_FLAGS, ids=lambda x: " ".join(x[-2:]) if isinstance(x, list) else None
)
def test_bad_flags_end_in_one_line_and_write_nothing(script, flags, words, workplace, entries, fails):
    before = listing(workplace)
    assert words in fails(entries[script], *flags)
    assert listing(workplace) == before


def half(content):
    return content[: len(content) // 2]


def flipped(content):
    """One wrong bit in the middle; in a checkpoint it hits a tensor, and the checksum differs."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [half, flipped])
def test_a_damaged_checkpoint_is_refused(damage, workplace, fails):
    path = workplace / "teacher_resnet8_seed0" / "best.pth"
    path.write_bytes(damage(path.read_bytes()))
    before = listing(workplace)
    assert "best.pth" in fails(student.main, *STUDENT)
    assert "best.pth" in fails(teacher.main, "--evaluate", path, *SHORT)
    assert listing(workplace) == before


def copied(runs, root, name):
    """A copy of a teacher's run that is finished, or not if `name` is ckpt/last.pth: its flags, and its file `name`."""
    folder = root / runs.teacher.name
    left_out = ["result.json"] if name == "ckpt/last.pth" else []
    shutil.copytree(runs.teacher, folder, ignore=shutil.ignore_patterns(*left_out))
    return ["--arch", "resnet8", *TINY, "--experiments", root], folder / name


@pytest.mark.parametrize("name", ["ckpt/last.pth", "config.json", "result.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]"], ids=repr)
def test_a_damaged_record_of_a_run_is_refused(name, content, runs, tmp_path, fails):
    flags, path = copied(runs, tmp_path, name)
    path.write_bytes(content)
    before = listing(tmp_path)
    assert f"{path} is damaged" in fails(teacher.main, *flags)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["ckpt/last.pth", "config.json"])
def test_a_file_that_cannot_be_read_is_not_called_damaged(name, runs, tmp_path, fails):
    flags, path = copied(runs, tmp_path, name)
    path.unlink()
    path.mkdir()  # as unreadable as a file without permission, for root too
    assert f"{path} cannot be read: Is a directory" in fails(teacher.main, *flags)
