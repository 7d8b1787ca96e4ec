import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

if "SSKD_TEST_CUDA" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests are the same on every machine; test_cuda.py is for a GPU

import numpy as np
import pytest
import torch

import baseline
import student
import teacher
import utils
from harness.flags import Fault

ROOT = Path(__file__).parent.parent
TINY = ["--dataset", "synthetic", "--train-size", "48", "--test-size", "40", "--batch-size", "16"]
TINY += ["--epoch", "3", "--milestones", "2"]
TINY_STUDENT = [*TINY, "--t-epoch", "2", "--t-milestones", "1", "--s-arch", "resnet14x05"]
SHORT = ["--dataset", "synthetic", "--train-size", "4", "--test-size", "4", "--batch-size", "4"]
SHORT += ["--epoch", "1", "--milestones", "1"]
SHORT_STUDENT = [*SHORT, "--s-arch", "resnet8", "--t-epoch", "1", "--t-milestones", "1"]


def run_script(*command, cwd, **kwargs):
    """Runs a script of the repository as a user does; warnings are errors."""
    script, *flags = (str(word) for word in command)
    return subprocess.run(
        [sys.executable, "-W", "error", ROOT / script, *flags], cwd=cwd, capture_output=True, text=True, **kwargs
    )


def end_of(main, flags):
    """Runs an entry in this process; returns its exit status."""
    try:
        main(flags)
    except SystemExit as end:
        return end.code
    return 0


def stop_at(step, monkeypatch):
    """Lets a run fail before its update number `step`."""
    updates, update = itertools.count(1), utils.SGD.step

    def failing(self, loss):
        if next(updates) == step:
            raise Fault("stopped by the test")
        update(self, loss)

    monkeypatch.setattr(utils.SGD, "step", failing)


def contents(folder):
    """What must repeat bit for bit below a run's folder: all files but events and locks, without times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name.endswith(".lock") or path.parent.name == "events":
            continue
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = plain(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            found[name] = [plain(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".pth":
            content = torch.load(path, weights_only=True)
            if path.name == "last.pth":  # it holds the best checkpoint, and whatever else was just written
                content["files"] = content["files"].get(content["best"]["name"])
            found[name] = plain(content)
        else:
            found[name] = path.read_bytes()
    return found


def plain(value):
    """A file's content in a form that == compares bit for bit, without times and without the teacher's path."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items() if name not in ("seconds", "starts", "path")}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def colours(height, width):
    """An image whose every pixel differs from its neighbours: (height, width, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 128 // (height + width)], 2).astype(np.uint8)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A tiny teacher and its student, trained without any interruption or complaint, and what they printed."""
    cwd, outputs = tmp_path_factory.mktemp("runs"), [io.StringIO(), io.StringIO()]
    teacher_folder = cwd / "experiments" / "teacher_resnet8_seed0"
    commands = [(teacher.main, ["--arch", "resnet8", *TINY])]
    commands += [(student.main, ["--t-path", str(teacher_folder), *TINY_STUDENT])]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as complaints:
        patch.chdir(cwd)
        for output, (main, flags) in zip(outputs, commands, strict=True):
            with contextlib.redirect_stdout(output):
                main(flags)
    assert complaints.getvalue() == ""
    (student_folder,) = (cwd / "experiments").glob("sskd_student_*")
    printed = [output.getvalue() for output in outputs]
    return SimpleNamespace(cwd=cwd, teacher=teacher_folder, student=student_folder, outputs=printed)


@pytest.fixture
def fails(capsys):
    """Runs an entry in this process, which must end with one line on stderr; returns that line."""

    def check(main, *flags, status=2):
        with pytest.raises(SystemExit) as end:
            main([str(flag) for flag in flags])
        error = capsys.readouterr().err
        assert end.value.code == status, error
        assert len(error.strip().splitlines()) == 1, error
        assert "Traceback" not in error
        return error

    return check


@pytest.fixture
def entries():
    return {"teacher.py": teacher.main, "student.py": student.main, "baseline.py": baseline.main}
