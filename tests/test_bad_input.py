"""What a user can get wrong: flags, checkpoints, records and data. One line, status 2, nothing written."""

import importlib.util
import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHORT, end_of, run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import record
from harness import sources
import student
import teacher

STUDENT = ["--t-path", "teacher_resnet8_seed0", "--s-arch", "resnet8", *SHORT]
BAD_FLAGS = [
    ("teacher.py", [], "--arch is missing; the known ones are resnet8, "),
    ("teacher.py", ["--arch", "resnet9"], "--arch: invalid choice: 'resnet9' (choose from "),
    ("teacher.py", ["--arch", "wrn_40_2", "--dataset", "imagenet"], "invalid choice: 'imagenet'"),
    (
        "teacher.py",
        ["--arch", "wrn_40_2", "--batch-size", "0"],
        "--batch-size: '0' is not a whole number of",
    ),
    ("teacher.py", ["--arch", "wrn_40_2", "--batch-size", "many"], "'many' is not a whole number"),
    ("teacher.py", ["--arch", "wrn_40_2", "--epoch", "0"], "--epoch: '0'"),
    ("teacher.py", ["--arch", "wrn_40_2", "--epoch", "1.5"], "--epoch: '1.5'"),
    ("teacher.py", ["--arch", "wrn_40_2", "--epoch", "9" * 400], "at most 1000000000"),
    ("teacher.py", ["--arch", "wrn_40_2", "--lr", "0"], "--lr: '0' is not a number above 0"),
    ("teacher.py", ["--arch", "wrn_40_2", "--lr", "nan"], "--lr: 'nan'"),
    ("teacher.py", ["--arch", "wrn_40_2", "--lr", "inf"], "--lr: 'inf'"),
    ("teacher.py", ["--arch", "wrn_40_2", "--momentum", "-1"], "--momentum: '-1'"),
    ("teacher.py", ["--arch", "wrn_40_2", "--weight-decay", "x"], "--weight-decay: 'x'"),
    ("teacher.py", ["--arch", "wrn_40_2", "--gamma", "-0.1"], "--gamma: '-0.1'"),
    ("teacher.py", ["--arch", "wrn_40_2", "--milestones", "3", "2"], "--milestones: 3 2: milestones must increase"),
    ("teacher.py", ["--arch", "wrn_40_2", "--milestones", "3", "3"], "milestones must increase"),
    ("teacher.py", ["--arch", "wrn_40_2", "--milestones", "0", "3"], "--milestones: '0'"),
    ("teacher.py", ["--arch", "wrn_40_2", "--milestones"], "--milestones: expected at least one argument"),
    ("teacher.py", ["--arch", "wrn_40_2", "--seed", "-1"], "--seed: '-1'"),
    ("teacher.py", ["--arch", "wrn_40_2", "--save-interval", "0"], "--save-interval: '0'"),
    ("teacher.py", ["--arch", "wrn_40_2", "--amp", "int8"], "invalid choice: 'int8'"),
    ("teacher.py", ["--arch", "wrn_40_2", "--gpu-id", "-2"], "--gpu-id: '-2'"),
    ("teacher.py", ["--arch", "wrn_40_2", "--epochs", "3"], "unrecognized arguments: --epochs 3; did you mean --epoch"),
    ("teacher.py", ["--arch", "resnet8", *SHORT, "--train-size", "10001"], "choose 1 to 10000"),
    ("teacher.py", ["--arch", "resnet8", *SHORT, "--test-size", "0"], "--test-size: '0'"),
    ("teacher.py", ["--arch", "resnet8", *SHORT, "--few-shot", "0"], "--few-shot: '0'"),
    ("teacher.py", ["--arch", "resnet8", *SHORT, "--label-noise", "1.1"], "--label-noise: '1.1'"),
    ("teacher.py", ["--arch", "resnet8", *SHORT, "--val-fraction", "0"], "--val-fraction: '0'"),
    ("teacher.py", ["--arch", "resnet8", *SHORT, "--val-fraction", "0.5"], "no class has two training images"),
    ("teacher.py", ["--arch", "resnet8", *SHORT, "--side", "64"], "--side 64 is for --dataset folder"),
    ("teacher.py", ["--arch", "resnet8", "--dataset", "folder"], "train: no such folder; --data-root is to hold"),
    ("teacher.py", ["--evaluate", "nowhere"], "nowhere: no such file or folder"),
    ("student.py", ["--s-arch", "resnet8"], "--t-path is missing"),
    ("student.py", ["--t-path", "teacher_resnet8_seed0"], "--s-arch is missing; the known ones are resnet8, "),
    (
        "student.py",
        ["--t-path", "teacher_resnet8_seed0", "--s-arch", "vgg7"],
        "--s-arch: invalid choice: 'vgg7' (choose from ",
    ),
    ("student.py", [*STUDENT, "--t-path", "nowhere"], "nowhere: no such file or folder"),
    ("student.py", [*STUDENT, "--t-path", "empty"], "found no checkpoint with 'best' in its name"),
    ("student.py", [*STUDENT, "--batch-size", "1"], "--batch-size 1: "),
    ("student.py", [*STUDENT, "--ratio-tf", "1.1"], "--ratio-tf: '1.1' is not a number of at least 0 and at most 1"),
    ("student.py", [*STUDENT, "--ratio-ss", "-0.1"], "--ratio-ss: '-0.1'"),
    ("student.py", [*STUDENT, "--kd-T", "0"], "--kd-T: '0' is not a number above 0"),
    ("student.py", [*STUDENT, "--tf-T", "-4"], "--tf-T: '-4'"),
    ("student.py", [*STUDENT, "--ss-T", "nan"], "--ss-T: 'nan'"),
    ("student.py", [*STUDENT, "--ss-weight", "-1"], "--ss-weight: '-1'"),
    ("student.py", [*STUDENT, "--t-epoch", "0"], "--t-epoch: '0'"),
    ("student.py", [*STUDENT, "--t-milestones", "2", "1"], "--t-milestones: 2 1: milestones must increase"),
    ("student.py", [*STUDENT, "--dataset", "cifar10"], "trained on synthetic, 100 classes; cifar10 has 10"),
    ("student.py", [*STUDENT, "--t-path", "old/best.pth"], "--t-arch"),
    ("student.py", [*STUDENT, "--t-path", "old/best.pth", "--t-arch", "vgg8"], "does not fit vgg8"),
    ("student.py", [*STUDENT, "--t-path", "old/best.pth", "--t-arch", "vgg9"], "invalid choice: 'vgg9'"),
    ("student.py", [*STUDENT, "--t-path", "unfinished"], "unfinished: this run is not finished"),
    ("student.py", [*STUDENT, "--t-path", "unfinished/ckpt"], "unfinished: this run is not finished"),
    ("student.py", [*STUDENT, *"--ce-weight 0 --kd-weight 0 --tf-weight 0 --ss-weight 0".split()], "nothing to learn"),
    ("student.py", [*STUDENT, "--export", "nowhere/student.pt2"], "--export nowhere/student.pt2: give a file's name"),
    ("student.py", [*STUDENT, "--export", "empty"], "--export empty: give a file's name"),
    ("student.py", [*STUDENT, "--export", ""], "--export '': give a file's name"),
    ("student.py", [*STUDENT, "--export", "."], "--export .: give a file's name"),
    ("student.py", ["--s-path", "plain", "--export", "plain/best.pth"], "--export plain/best.pth: is there already"),
    ("student.py", ["--s-path", "plain", "--export", "s.pt"], "--export s.pt: ends in neither .pt2 (torch.export) nor"),
    ("student.py", ["--s-path", "old", "--export", "s.pt2"], "--s-arch beside --s-path"),
    ("baseline.py", STUDENT, "--method is missing; the known ones are kd, fitnet, "),
    ("baseline.py", [*STUDENT, "--method", "sskd"], "--method: invalid choice: 'sskd' (choose from "),
    ("baseline.py", ["--method", "kd", "--s-arch", "resnet8"], "--t-path is missing"),
    ("baseline.py", ["--method", "kd", "--t-path", "teacher_resnet8_seed0"], "--s-arch is missing"),
    ("baseline.py", [*STUDENT, "--method", "kd", "--t-path", "unfinished"], "unfinished: this run is not finished"),
    ("baseline.py", [*STUDENT, "--method", "kd", "--t-path", "old/best.pth"], "--t-arch"),
    ("baseline.py", [*STUDENT, "--method", "kd", "--export", "empty"], "--export empty: give a file's name"),
    ("baseline.py", [*STUDENT, "--method", "crd", "--weight", "-1"], "--weight: '-1' is not a number of at least 0"),
    ("baseline.py", [*STUDENT, "--method", "crd", "--kd-T", "0"], "--kd-T: '0' is not a number above 0"),
    ("baseline.py", [*STUDENT, "--method", "kd", "--weight", "1"], "whose weight is --kd-weight"),
    ("baseline.py", [*STUDENT, "--method", "ab", "--ce-weight", "0", "--kd-weight", "0"], "nothing to learn"),
    ("baseline.py", [*STUDENT, "--method", "ab", "--s-arch", "vgg8"], "the student has 4 of them, the teacher 3"),
    (
        "baseline.py",
        [*STUDENT, "--method", "crd", "--train-size", "1", "--batch-size", "1"],
        "the training set has one class only",
    ),
]


@pytest.fixture
def workplace(runs, tmp_path, monkeypatch):
    """A folder with a teacher, checkpoints without a telling name, and an empty folder; the current directory."""
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


def damage(kind, good):
    """Bytes of a checkpoint with something wrong with it."""
    state = torch.load(io.BytesIO(good), weights_only=True)["state_dict"]
    buffer = io.BytesIO()
    if kind == "malicious":
        torch.save({"state_dict": Malicious()}, buffer)
    elif kind == "malicious pickle":
        pickle.dump(Malicious(), buffer)
    elif kind in ("list", "no tensors", "nested nothing", "number"):
        torch.save({"list": [1], "no tensors": {"a": 1}, "nested nothing": {"model": {}}, "number": 3}[kind], buffer)
    elif kind == "missing tensor":
        torch.save({"model": {k: v for k, v in state.items() if k != "fc.bias"}}, buffer)
    elif kind == "other shape":
        torch.save({f"module.{k}": v for k, v in state.items()} | {"module.fc.bias": torch.zeros(3)}, buffer)
    elif kind == "extra tensor":
        torch.save(state | {"fc2.bias": torch.zeros(3)}, buffer)
    return buffer.getvalue() or {"empty": b"", "text": b"not a checkpoint", "half": good[: len(good) // 2]}[kind]


KINDS = ["empty", "text", "half", "malicious", "malicious pickle", "list", "no tensors", "nested nothing", "number"]
KINDS += ["missing tensor", "other shape", "extra tensor"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_refused_and_nothing_in_it_runs(kind, workplace, fails):
    path = workplace / "teacher_resnet8_seed0" / "best.pth"
    path.write_bytes(damage(kind, path.read_bytes()))
    before = listing(workplace)
    assert "best.pth" in fails(student.main, *STUDENT)
    assert "best.pth" in fails(teacher.main, "--evaluate", path, *SHORT)
    assert listing(workplace) == before  # no file "executed" either


@pytest.mark.parametrize("name", ["last.pth", "config.json", "result.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"PK\x03\x04"], ids=repr)
def test_a_damaged_record_of_a_run_is_refused(name, content, tmp_path, fails, capsys):
    flags = ["--arch", "resnet8", *SHORT, "--experiments", str(tmp_path)]
    folder = tmp_path / "teacher_resnet8_seed0"
    (folder / "ckpt").mkdir(parents=True)
    run = record.Run(folder, teacher.parse_args(flags))
    (folder / "config.json").write_text(json.dumps({"flags": run.flags}))
    (folder / ("ckpt" if name == "last.pth" else "") / name).write_bytes(content)
    before = listing(tmp_path)
    assert name in fails(teacher.main, *flags)
    assert listing(tmp_path) == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_checkpoint_ends_in_a_traceback(runs, tmp_path, data):
    good = (runs.teacher / "ckpt" / "best.pth").read_bytes()
    if data.draw(st.booleans()):
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        start = data.draw(st.integers(0, len(good) - 1))
        bad = good[:start] + data.draw(st.binary(min_size=1, max_size=40)) + good[start + 40 :]
    folder = tmp_path / "teacher_resnet8_seed0"
    folder.mkdir(exist_ok=True)
    (folder / "best.pth").write_bytes(bad)
    assert end_of(teacher.main, ["--evaluate", str(folder), *SHORT]) in (0, 2)


def test_missing_and_corrupt_data_say_what_to_do(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(sources.tv.CIFAR100, "url", "http://127.0.0.1:9/cifar-100-python.tar.gz")  # nobody answers
    flags = ["--arch", "resnet8", "--experiments", tmp_path / "runs", "--data-root", tmp_path / "data"]
    assert "put cifar-100-python.tar.gz into" in fails(teacher.main, *flags)
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "cifar-100-python.tar.gz").write_bytes(b"half of it")
    assert "put cifar-100-python.tar.gz into" in fails(teacher.main, *flags)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("more", ["", "below"])
def test_a_run_folder_cannot_be_made_below_a_file(more, tmp_path, fails):
    (tmp_path / "experiments").write_text("a file")
    line = fails(teacher.main, "--arch", "resnet8", *SHORT, "--experiments", tmp_path / "experiments" / more)
    assert "could not be made" in line and "is a file or lies below one" in line
