"""What a user can get wrong: flags, checkpoints, records and data. One line, status 2, nothing written."""

import importlib.util
import io
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHORT, TINY, run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import student
import teacher
from harness import checkpoint, sources
from harness.flags import UserError

STUDENT = ["--t-path", "teacher_resnet8_seed0", "--s-arch", "resnet8", *SHORT]
TEACHER = ["--arch", "resnet8", *SHORT]
KD = [*STUDENT, "--method", "kd"]
BAD_FLAGS = [
    ("teacher.py", [], "--arch is missing; the known ones are resnet8, "),
    ("teacher.py", ["--arch", "resnet9"], "--arch: invalid choice: 'resnet9' (choose from "),
    ("teacher.py", [*TEACHER, "--dataset", "imagenet"], "invalid choice: 'imagenet'"),
    ("teacher.py", [*TEACHER, "--batch-size", "many"], "--batch-size: 'many' is not a whole number of at least 1"),
    ("teacher.py", [*TEACHER, "--epoch", "0"], "--epoch: '0' is not a whole number of at least 1"),
    ("teacher.py", [*TEACHER, "--lr", "0"], "--lr: '0' is not a number above 0"),
    ("teacher.py", [*TEACHER, "--milestones", "3", "2"], "--milestones: 3 2: milestones must increase"),
    ("teacher.py", [*TEACHER, "--milestones"], "--milestones: expected at least one argument"),
    ("teacher.py", [*TEACHER, "--seed", "-1"], "--seed: '-1'"),
    ("teacher.py", [*TEACHER, "--gpu-id", "-2"], "--gpu-id: '-2'"),
    ("teacher.py", [*TEACHER, "--epochs", "3"], "unrecognized arguments: --epochs 3; did you mean --epoch"),
    ("teacher.py", [*TEACHER, "--train-size", "10001"], "choose 1 to 10000"),
    ("teacher.py", [*TEACHER, "--few-shot", "0"], "--few-shot: '0'"),
    ("teacher.py", [*TEACHER, "--label-noise", "1.1"], "--label-noise: '1.1'"),
    ("teacher.py", [*TEACHER, "--val-fraction", "0.5"], "no class has two training images"),
    ("teacher.py", [*TEACHER, "--side", "64"], "--side 64 is for --dataset folder"),
    ("teacher.py", [*TEACHER, "--dataset", "folder"], "train: no such folder; --data-root needs train/CLASS/"),
    ("teacher.py", ["--evaluate", "nowhere"], "nowhere: no such file or folder"),
    ("student.py", ["--s-arch", "resnet8"], "--t-path is missing"),
    ("student.py", ["--t-path", "teacher_resnet8_seed0"], "--s-arch is missing; the known ones are resnet8, "),
    ("student.py", [*STUDENT, "--t-path", "nowhere"], "nowhere: no such file or folder"),
    ("student.py", [*STUDENT, "--t-path", "empty"], "found no checkpoint with 'best' in its name"),
    ("student.py", [*STUDENT, "--t-path", "old/best.pth"], "--t-arch"),
    ("student.py", [*STUDENT, "--t-path", "old/best.pth", "--t-arch", "vgg8"], "does not fit vgg8"),
    ("student.py", [*STUDENT, "--t-path", "unfinished"], "unfinished: this run is not finished"),
    ("student.py", [*STUDENT, "--t-path", "unfinished/ckpt"], "unfinished: this run is not finished"),
    ("student.py", [*STUDENT, "--dataset", "cifar10"], "trained on synthetic, 100 classes; cifar10 has 10"),
    ("student.py", [*STUDENT, "--batch-size", "1"], "--batch-size 1: "),
    ("student.py", [*STUDENT, "--ratio-tf", "1.1"], "--ratio-tf: '1.1' is not a number of at least 0 and at most 1"),
    ("student.py", [*STUDENT, "--ss-T", "0"], "--ss-T: '0' is not a number above 0"),
    ("student.py", [*STUDENT, "--ss-weight", "-1"], "--ss-weight: '-1'"),
    ("student.py", [*STUDENT, "--t-milestones", "2", "1"], "--t-milestones: 2 1: milestones must increase"),
    ("student.py", [*STUDENT, *"--ce-weight 0 --kd-weight 0 --tf-weight 0 --ss-weight 0".split()], "nothing to learn"),
    ("student.py", [*STUDENT, "--export", "nowhere/s.pt2"], "--export nowhere/s.pt2: give the name of a file"),
    ("student.py", [*STUDENT, "--export", "empty"], "--export empty: give the name of a file"),
    ("student.py", [*STUDENT, "--export", ""], "--export '': give the name of a file"),
    ("student.py", ["--s-path", "plain", "--export", "plain/best.pth"], "--export plain/best.pth: exists already and"),
    ("student.py", ["--s-path", "plain", "--export", "s.pt"], "--export s.pt: ends in neither .pt2 (torch.export) nor"),
    ("student.py", ["--s-path", "old", "--export", "s.pt2"], "--s-arch beside --s-path"),
    ("student.py", ["--s-path", "plain"], "--s-path is for --export"),
    ("baseline.py", STUDENT, "--method is missing; the known ones are kd, fitnet, "),
    ("baseline.py", ["--method", "kd", "--s-arch", "resnet8"], "--t-path is missing"),
    ("baseline.py", [*KD, "--t-path", "unfinished"], "unfinished: this run is not finished"),
    ("baseline.py", [*KD, "--export", "empty"], "--export empty: give the name of a file"),
    ("baseline.py", [*KD, "--weight", "1"], "whose weight is --kd-weight"),
    ("baseline.py", [*KD, "--method", "ab", "--ce-weight", "0", "--kd-weight", "0"], "nothing to learn"),
    ("baseline.py", [*KD, "--method", "ab", "--s-arch", "vgg8"], "the student has 4 of them, the teacher 3"),
    ("baseline.py", [*KD, "--method", "at", "--t-features", "disk"], "at needs maps, which are not stored"),
    ("baseline.py", [*KD, "--method", "crd", "--train-size", "1"], "the training set has one class only"),
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
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = fails(student.main, "--s-path", "plain", "--export", "student.onnx")
    assert "--export student.onnx: for ONNX PyTorch needs `pip install onnx onnxscript`" in line


def listing(folder):
    return {path: path.stat().st_size for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "script, flags, words", BAD_FLAGS, ids=lambda x: " ".join(x[-2:]) if isinstance(x, list) else None
)
def test_bad_flags_end_in_one_line_and_write_nothing(script, flags, words, workplace, entries, fails):
    before = listing(workplace)
    assert words in fails(entries[script], *flags)
    assert listing(workplace) == before


def test_bad_flags_end_without_a_traceback_from_the_command_line(tmp_path):
    done = run_script("student.py", "--s-arch", "resnet8", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("student.py: error: --t-path is missing")
    assert len(done.stderr.splitlines()) == 1


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def damaged(kind, good):
    """The bytes of the checkpoint `good` with something wrong."""
    state = torch.load(io.BytesIO(good), weights_only=True)["state_dict"]
    if kind == "half":
        return good[: len(good) // 2]
    contents = {
        "malicious": {"state_dict": Malicious()},
        "no weights": {"a": 1},
        "missing tensor": {"model": {name: tensor for name, tensor in state.items() if name != "fc.bias"}},
        "other shape": {"model": state | {"fc.bias": torch.zeros(3)}},
        "not finite": {"model": state | {"fc.bias": torch.full((100,), torch.nan)}},
    }
    buffer = io.BytesIO()
    torch.save(contents[kind], buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["half", "malicious", "no weights", "missing tensor", "other shape", "not finite"])
def test_a_bad_checkpoint_is_refused_and_nothing_in_it_runs(kind, workplace, fails):
    path = workplace / "teacher_resnet8_seed0" / "best.pth"
    path.write_bytes(damaged(kind, path.read_bytes()))
    before = listing(workplace)
    assert "best.pth" in fails(student.main, *STUDENT)
    assert "best.pth" in fails(teacher.main, "--evaluate", path, *SHORT)
    assert listing(workplace) == before  # no file "executed" either


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_other_byte_in_a_checkpoint_is_noticed_or_harmless(runs, tmp_path, data):
    good = (runs.teacher / "ckpt" / "best.pth").read_bytes()
    start = data.draw(st.integers(0, len(good) - 1))
    bad = good[:start] + data.draw(st.binary(max_size=40)) + good[start + 40 :]
    (tmp_path / "best.pth").write_bytes(bad)
    try:
        weights = checkpoint.read(tmp_path, "resnet8").network().state_dict()
    except UserError:
        return
    expected = torch.load(io.BytesIO(good), weights_only=True)["state_dict"]
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def flipped(content):
    """One wrong bit in the middle: in a checkpoint it hits a tensor, whose checksum tells."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in ("ckpt/last.pth", "config.json", "result.json") for damage in (b"", b"{", b"{}", b"[]")]
    + [("ckpt/last.pth", flipped), ("ckpt/last.pth", b"PK\x03\x04")],
    ids=lambda x: x if isinstance(x, str) else getattr(x, "__name__", repr(x)),
)
def test_a_damaged_record_of_a_run_is_refused(name, damage, runs, tmp_path, fails):
    folder = tmp_path / runs.teacher.name
    shutil.copytree(runs.teacher, folder)
    if name == "ckpt/last.pth":
        (folder / "result.json").unlink()
    path = folder / name
    path.write_bytes(damage(path.read_bytes()) if callable(damage) else damage)
    before = listing(tmp_path)
    assert f"{path} is damaged" in fails(teacher.main, "--arch", "resnet8", *TINY, "--experiments", tmp_path)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["ckpt/last.pth", "config.json"])
def test_a_file_that_cannot_be_read_is_not_called_damaged(name, runs, tmp_path, fails):
    folder = tmp_path / runs.teacher.name
    shutil.copytree(runs.teacher, folder, ignore=shutil.ignore_patterns("result.json"))
    (folder / name).unlink()
    (folder / name).mkdir()  # as unreadable as a file without permission, for root too
    line = fails(teacher.main, "--arch", "resnet8", *TINY, "--experiments", tmp_path)
    assert f"{name} cannot be read: Is a directory" in line


def test_missing_and_damaged_data_say_what_to_do(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(sources.tv.CIFAR100, "url", "http://127.0.0.1:9/cifar-100-python.tar.gz")  # nobody answers
    flags = ["--arch", "resnet8", "--experiments", tmp_path / "runs", "--data-root", tmp_path / "data"]
    assert "put cifar-100-python.tar.gz into" in fails(teacher.main, *flags)
    (tmp_path / "data" / "cifar-100-python.tar.gz").write_bytes(b"half of it")
    assert "put cifar-100-python.tar.gz into" in fails(teacher.main, *flags)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("more", ["", "below"])
def test_a_run_folder_cannot_be_made_below_a_file(more, tmp_path, fails):
    (tmp_path / "experiments").write_text("a file")
    line = fails(teacher.main, *TEACHER, "--experiments", tmp_path / "experiments" / more)
    assert "could not be made" in line and "is a file or lies below one" in line
