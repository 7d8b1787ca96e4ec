"""harness/processes.py: several processes compute what one computes, and end together."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY

import baseline
import cifar
import teacher
import utils
from harness import files, processes, sources
from harness.flags import UserError
from methods import METHODS
from models import model_dict
from wrapper import classifier, frozen

# with three processes the batches of 5 and 2 have shares of 1, 2, 2 and of 0, 1, 1; with two of 2, 3 and of 1, 1
SMALL = "--dataset synthetic --train-size 7 --test-size 7 --batch-size 5 --epoch 2 --milestones 1".split()
STUDENT = [*SMALL, *"--s-arch resnet8 --t-epoch 1 --t-milestones 1 --ratio-tf 0.5".split()]


def perform(*jobs, cwd):
    """Performs jobs, see several.py; returns the exit statuses of each, and what was printed."""
    command = [sys.executable, "-W", "error", ROOT / "tests" / "several.py", *map(json.dumps, jobs)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.replace(" ", "").replace("-", "").isdigit()]
    return [[int(status) for status in line.split()] for line in lines], done.stdout, done.stderr


def state_of(root):
    (file,) = root.glob("*/ckpt/last.pth")
    state = files.read_state(file)
    return state | {"files": state["files"][state["best"]["name"]]}  # a resumed run has others, too


def assert_equal(found, expected):
    """Everything but seconds; numbers to 1e-12, tensors to 1e-12 of their length."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected.keys() - {"seconds"}:
            assert_equal(found[name], expected[name])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype != torch.float32
        assert (found - expected).double().norm() <= 1e-12 * expected.double().norm()
    else:
        assert found == (pytest.approx(expected, rel=1e-12) if isinstance(expected, float) else expected)


def place_teacher(runs, *folders):
    for folder in folders:
        folder.mkdir()
        (folder / "best.pth").write_bytes((runs.teacher / "ckpt" / "best.pth").read_bytes())


def test_two_processes_one_of_which_dies_and_then_three_train_a_student_like_one(runs, tmp_path):
    """SS head and student, with uneven and empty shares, and selective transfer of the whole batch."""
    place_teacher(runs, tmp_path / "teacher_resnet8", tmp_path / "own_teacher")
    (tmp_path / "teacher_resnet8_seed0").mkdir()
    taken = files.lock(tmp_path / "teacher_resnet8_seed0" / ".lock")
    several = ["--t-path", "teacher_resnet8", *STUDENT, "--experiments", "several"]
    one = ["--t-path", "own_teacher", *STUDENT, "--experiments", "one"]
    statuses, out, err = perform(
        [2, ["float64", "last_dies"], "student.py", several],
        [3, ["float64"], "student.py", several],
        [1, ["float64"], "student.py", one],
        [2, [], "teacher.py", ["--arch", "resnet8", *SMALL, "--experiments", "."]],
        [2, [], "cifar.py", ["--dataset", "synthetic"]],
        cwd=tmp_path,
    )
    os.close(taken)
    assert statuses == [[1, 9], [0, 0, 0], [0], [2, 1], [2, 2]], err
    assert_equal(state_of(tmp_path / "several"), state_of(tmp_path / "one"))
    assert out.count("continuing after epoch 1 of the student") == 1
    died, warned, refused, alone = err.splitlines()
    assert "another process of this run has ended; the same command continues" in died
    assert "so not bit for bit: processes was 2, is 3" in warned
    assert "another process is running in teacher_resnet8_seed0" in refused
    assert "cifar.py: error: torchrun is for teacher.py, student.py and baseline.py" in alone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("teacher.py", ["--arch", "MobileNetV2", "--lr", "0.01"]),
        ("baseline.py", ["--method", "sp", "--lr", "0.001"]),
        ("baseline.py", ["--method", "at"]),
        ("baseline.py", ["--method", "rkd", "--t-features", "disk"]),  # one process reads what two have stored
    ],
)
def test_any_number_of_processes_trains_like_one(script, flags, runs, tmp_path):
    if script == "baseline.py":
        place_teacher(runs, tmp_path / "teacher_resnet8")
        flags = [*flags, "--t-path", "teacher_resnet8", "--s-arch", "resnet8"]
    jobs = [[count, ["float64"], script, [*flags, *SMALL, "--experiments", str(count)]] for count in (2, 3, 1)]
    statuses, _, err = perform(*jobs, cwd=tmp_path)
    assert (statuses, err) == ([[0, 0], [0, 0, 0], [0]], "")
    for count in "23":
        assert_equal(state_of(tmp_path / count), state_of(tmp_path / "1"))


@pytest.mark.slow
def test_a_step_of_several_processes_compiles_to_one_graph_and_works_in_half_precision(runs, tmp_path):
    place_teacher(runs, tmp_path / "teacher_resnet8")
    student = ["--t-path", "teacher_resnet8", *STUDENT, "--experiments", "student"]
    teachers = [["--experiments", name, "--amp", name, "--deterministic"] for name in ("bf16", "fp16")]
    statuses, _, err = perform(
        [2, ["one_graph"], "student.py", [*student, "--compile"]],
        *([2, [], "teacher.py", ["--arch", "resnet8", *SMALL, *flags]] for flags in teachers),
        [2, [], "teacher.py", ["--arch", "resnet8", *SMALL, "--lr", "1e9", "--experiments", "nan"]],
        [2, [], "teacher.py", ["--arch", "resnet8", *SMALL, "--lrr", "1"]],
        cwd=tmp_path,
    )
    assert statuses == [[0, 0]] * 3 + [[1, 1], [2, 2]]
    infinite, wrong = err.splitlines()
    assert "is not finite" in infinite and "unrecognized arguments: --lrr" in wrong


@pytest.mark.slow
def test_torchrun_that_is_stopped_goes_on_with_the_same_command(runs, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, ROOT / "teacher.py", "--arch", "resnet8", *TINY, "--epoch", "9", "--experiments"]
    pipes = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    stopped = subprocess.Popen([*command, "stopped"], **pipes)
    next(line for line in stopped.stdout if line.startswith("teacher 2/"))
    stopped.send_signal(signal.SIGTERM)
    assert stopped.communicate()[1].count("teacher.py: stopped by SIGTERM; the same command continues") == 1
    again = subprocess.run([*command, "stopped"], **pipes)
    whole = subprocess.run([*command, "whole"], **pipes)
    assert (again.returncode, whole.returncode) == (0, 0), again.stderr
    assert again.stdout.count("\ncontinuing after epoch ") == again.stdout.count("\nrun: ") == 1
    found, expected = (state_of(tmp_path / name)["parts"]["model"] for name in ("stopped", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    evaluated = subprocess.run([*torchrun, ROOT / "teacher.py", "--evaluate", runs.teacher, *TINY], **pipes)
    accuracy = json.loads((runs.teacher / "result.json").read_text())["best_acc"]
    assert evaluated.stdout.count(f"test accuracy {accuracy:.2f} %") == 1


# -------------------------------------------------------------------------------------------------- in this process


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_follow_each_other_and_differ_by_one_row_at_most(count, monkeypatch):
    monkeypatch.setattr(processes, "COUNT", count)
    for images in range(20):
        rows = []
        for rank in range(count):
            monkeypatch.setattr(processes, "RANK", rank)
            rows.append(range(images)[processes.share(images)])
        assert [row for part in rows for row in part] == list(range(images))
        assert max(map(len, rows)) - min(map(len, rows)) <= 1


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 3, 2)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_batch_norm_is_pytorchs_where_one_process_has_all_rows(shape, settings, monkeypatch):
    monkeypatch.setattr(processes, "_Total", SimpleNamespace(apply=lambda x: x))
    kind = torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d
    draw = torch.Generator().manual_seed(0)
    theirs, ours = (kind(4, dtype=torch.float64, **settings) for _ in range(2))
    for _ in range(3):
        x = torch.randn(*shape, generator=draw, dtype=torch.float64) * 3 + 5
        pairs = []
        for module, function in ((theirs, processes._plain_batch_norm), (ours, processes._batch_norm)):
            monkeypatch.setattr(F, "batch_norm", function)
            inputs = x.clone().requires_grad_()
            y = module(inputs)
            pairs.append((y, *torch.autograd.grad((y * y.detach().cos()).sum(), [inputs, *module.parameters()])))
        for expected, found in zip(*pairs, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_of_the_compared_methods_those_without_layers_of_their_own_work(monkeypatch):
    monkeypatch.setattr(processes, "COUNT", 2)
    student, plain = (model_dict["resnet8"]() for _ in range(2))
    fixed, autocast = frozen(plain), utils.precision("off", torch.device("cpu"))
    networks = baseline.Networks(student, fixed, classifier(fixed), False, autocast)
    images = cifar.Images(sources.Split(*sources.synthetic(True, 200)), sources.STATISTICS["synthetic"], "cpu")
    for method in METHODS:
        args = baseline.parse_args(["--method", method, "--t-path", "-", "--s-arch", "resnet8"])
        works = method in ("kd", "at", "sp", "rkd", "pkt", "dkd", "ls")
        with (
            contextlib.nullcontext() if works else pytest.raises(UserError, match=f"{method} trains layers of its own")
        ):
            baseline.make_method(args, networks, images, "resnet8")


@pytest.mark.parametrize("flag", ["--batch-size", "--train-size"])
def test_fewer_images_than_processes_are_refused(flag, monkeypatch):
    monkeypatch.setattr(processes, "COUNT", 3)
    args = teacher.parse_args(["--arch", "resnet8", *SMALL, flag, "2"])
    with pytest.raises(UserError, match="a batch of 2 images is too small for 3 processes"):
        cifar.load(sources.read_for(args, about={}), args, "cpu")


def test_several_processes_without_torchrun_are_refused(monkeypatch, tmp_path, fails):
    monkeypatch.setattr(processes, "COUNT", 2)  # as WORLD_SIZE alone does
    assert "start with torchrun" in fails(teacher.main, "--arch", "resnet8", *SMALL, "--experiments", tmp_path)
    assert not list(tmp_path.iterdir())
