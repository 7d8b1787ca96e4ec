"""harness/record.py: how scripts end, what they write, and what a run survives."""

import errno
import fcntl
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, SHORT_STUDENT, TINY, TINY_STUDENT, contents, end_of, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import baseline
import cifar
import student
import teacher
import utils
from harness import files, record
from harness.flags import Fault, UserError
from models import model_dict

TEACHER = ["--arch", "resnet8", *TINY]
BASELINE = [*TINY, "--s-arch", "resnet14x05", "--t-path", "teacher_resnet8_seed0", "--method"]
STUDENT = [*TINY_STUDENT, "--t-path", "teacher_resnet8_seed0"]
ON_DISK = ["--t-features", "disk"]
RUNS = {
    "teacher": ("teacher.py", TEACHER),
    "student": ("student.py", STUDENT),
    "student on disk": ("student.py", [*STUDENT, *ON_DISK]),
    "crd on disk": ("baseline.py", [*BASELINE, "crd", *ON_DISK]),
    "ab": ("baseline.py", [*BASELINE, "ab", "--first-epoch", "2"]),
}


def curves(folder):
    """The scalars in TensorBoard's events, by tag and epoch; after a kill an epoch may be there twice."""
    events = EventAccumulator(str(folder / "events")).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: {point.step: point.value for point in events.Scalars(tag)} for tag in tags}


@pytest.fixture
def short(tmp_path):
    """Flags of a short teacher, and its folder."""
    flags = ["--arch", "resnet8", *SHORT, "--epoch", "2", "--experiments", str(tmp_path)]
    return flags, tmp_path / "teacher_resnet8_seed0"


@pytest.fixture
def unfinished(runs, tmp_path):
    """A teacher's run as if it had been killed just before its result: flags that continue it, and its folder."""
    folder = tmp_path / runs.teacher.name
    shutil.copytree(runs.teacher, folder, ignore=shutil.ignore_patterns("result.json"))
    return [*TEACHER, "--experiments", str(tmp_path)], folder


def place_teacher(runs, root):
    """Makes `root` with a folder that holds the trained teacher, but not its SS head."""
    (root / runs.teacher.name).mkdir(parents=True)
    shutil.copy(runs.teacher / "ckpt" / "best.pth", root / runs.teacher.name)
    return root


def without_head(found):
    return {name: content for name, content in found.items() if "ss_head_" not in name}


def refusal(number):
    """A function that fails as the system does."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    return refuse


def failing(write, number):
    """`write`, but its call with this number meets a full disk; and the list of its calls."""
    calls = []

    def attempt(*args):
        calls.append(args)
        return refusal(errno.ENOSPC)() if len(calls) == number else write(*args)

    return attempt, calls


def during_epoch(epoch, act, monkeypatch):
    """Makes a run `act` when it evaluates after an epoch."""
    evaluate = utils.evaluate

    def acting(network, images, autocast, label):
        if label.endswith(f"epoch {epoch}"):
            act()
        return evaluate(network, images, autocast, label)

    monkeypatch.setattr(utils, "evaluate", acting)


# ---------------------------------------------------------------------------------------------------- how a script ends

NO_MEMORY = "error: the device is out of memory; a smaller --batch-size needs less; "
NO_MEMORY += "if the images alone do not fit, use fewer of them"


NO_COMPILER = "error: --compile: No working C++ compiler; it needs a C++ compiler, and a TMPDIR without spaces; "
NO_COMPILER += "everything works without --compile"


class InductorError(RuntimeError):
    """Named like torch.compile's own."""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("do this"), 2, "error: do this"),
        (UserError("a\n  b"), 2, "error: a b"),
        (Fault("broken"), 1, "error: broken"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 1, "error: [Errno 28] No space left on device: 'f'"),
        (MemoryError(), 1, "error: MemoryError"),
        (torch.OutOfMemoryError("much text"), 1, NO_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, NO_MEMORY),
        (InductorError("No working C++ compiler\nand ninety lines"), 1, NO_COMPILER),
    ],
)
def test_an_error_ends_a_script_in_one_line_and_a_status(error, status, line, capsys):
    @record.entry
    def main(argv):
        raise error

    before = signal.getsignal(signal.SIGTERM)
    assert end_of(main, []) == status
    assert capsys.readouterr().err == f"test_record.py: {line}\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_script_runs_in_any_thread():
    done = []
    thread = threading.Thread(target=record.entry(done.append), args=(["flags"],))
    thread.start()
    thread.join()
    assert done == [["flags"]]


def test_a_mistake_in_the_code_keeps_its_traceback():
    @record.entry
    def main(argv):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        main([])


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_the_file_as_it_was(function, tmp_path, monkeypatch):
    path = tmp_path / "best.pth"
    record.save(path, {"epoch": 1})
    monkeypatch.setattr(os, function, refusal(errno.ENOSPC))
    with pytest.raises(Fault, match="best.pth could not be written: No space left on device"):
        record.save(path, {"epoch": 2})
    assert record.read_state(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["best.pth"]


def test_a_changed_bit_of_a_tensor_is_noticed(tmp_path):
    path, numbers = tmp_path / "a.pth", torch.arange(64.0)
    record.save(path, {"weight": numbers})
    good = path.read_bytes()
    assert torch.equal(record.read_state(path)["weight"], numbers)
    start = good.index(numbers.numpy().tobytes())
    for place in range(start, start + 256, 37):
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises(UserError, match="a.pth is damaged"):
            record.read_state(path)


def test_checkpoints_hold_plain_containers_and_the_networks_contiguous_tensors(runs):
    def parts(content):
        inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
        return [content, *(part for each in inner for part in parts(each))]

    for path in [*runs.teacher.glob("ckpt/[!.]*.pth"), *runs.student.glob("ckpt/*.pth")]:
        found = parts(torch.load(path, weights_only=True))  # to the device that they were saved from
        assert {type(part) for part in found} <= {dict, list, torch.Tensor, str, int, float, bool, type(None)}, path
        tensors = [part for part in found if isinstance(part, torch.Tensor)]
        assert tensors and all(tensor.device.type == "cpu" for tensor in tensors), path
        if path.name != "last.pth":
            assert all(tensor.is_contiguous() for tensor in tensors), path


def test_what_is_kept_does_not_change_with_the_network():
    weight = torch.zeros(3)
    copied = record.plain({"weight": weight})
    weight += 1
    assert copied["weight"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_no_obstacle(number, short, tmp_path, monkeypatch):
    flags, folder = short
    monkeypatch.setattr(fcntl, "flock", refusal(number))
    with files.alone(tmp_path / ".lock", "waiting"):
        teacher.main(flags)
    assert (folder / "result.json").exists()


# ---------------------------------------------------------------------------------- a full disk, a missing permission


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_any_failing_write_ends_in_one_line_and_costs_no_checkpoint(every, runs, tmp_path, monkeypatch, capsys):
    """Single writes of a short run fail once; the same command then ends as if nothing had happened."""

    def run(root, number=0):
        write, calls = failing(os.fsync, number)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", write)
            patch.chdir(root)
            status = end_of(student.main, ["--t-path", runs.teacher.name, *SHORT_STUDENT])
        return status, capsys.readouterr(), len(calls)

    whole = place_teacher(runs, tmp_path / "whole")
    status, _, writes = run(whole)
    assert status == 0 and writes >= 10
    expected = contents(whole)
    for number in range(1, writes + 1, every):
        root = place_teacher(runs, tmp_path / str(number))
        status, printed, _ = run(root, number)
        if status == 0:  # a run can do without one write
            assert "SS head: not kept for later students" in printed.out
        else:
            assert (status, len(printed.err.splitlines())) == (1, 1), printed.err
            assert "No space left on device" in printed.err
        assert not list(root.rglob("*.part"))
        assert run(root)[0] == 0
        assert contents(root) == (expected if status else without_head(expected)), number


def test_a_full_disk_is_noticed_by_the_curves_too(short, monkeypatch, fails):
    flags, folder = short
    with monkeypatch.context() as patch:
        flush, _ = failing(record.EventsWriter.flush, 3)  # in the second epoch
        patch.setattr(record.EventsWriter, "flush", flush)
        assert "No space left on device" in fails(teacher.main, *flags, status=1)
    assert record.read_state(folder / "ckpt" / "last.pth")["epoch"] == 1
    assert end_of(teacher.main, flags) == 0
    assert set(curves(folder)["val/cls_acc"]) == {1, 2}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def test_a_folder_that_may_not_be_written_to_is_named(number, short, monkeypatch, fails):
    flags, folder = short
    monkeypatch.setattr(record, "lock", refusal(number))  # the first file that a run makes
    assert f"{folder} could not be made: {os.strerror(number)}" in fails(teacher.main, *flags, status=1)


# --------------------------------------------------------------------------------------------------- kills and resuming


def killed(name, moments, whole, root, entries, monkeypatch):
    """Kills a run in `root` at each of the moments and compares it with one in `whole`; returns how often it killed."""
    script, flags = RUNS[name]
    if not (whole / "experiments").exists():
        with monkeypatch.context() as patch:
            patch.chdir(whole)
            entries[script](flags)
    done = run_script("tests/killer.py", ",".join(map(str, moments)), script, *flags, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")
    *statuses, last = map(int, done.stdout.splitlines()[-1].split())
    assert last == 0 and set(statuses) <= {0, -signal.SIGKILL, -signal.SIGALRM}
    assert contents(root) == contents(whole)
    assert not list(root.rglob("*.part"))
    (first,), (second,) = ((folder / "experiments").iterdir() for folder in (whole, root))
    assert curves(first) == curves(second)
    return len(statuses) - statuses.count(0)


@pytest.mark.parametrize(
    ("name", "moments"),
    [
        # the log of the start; the log of epoch 1, whose state is saved; its best.pth; the files of epoch 2
        ("teacher", (3, 7, 5, 12)),
        # the table; the head's epoch 2; its state, the head being saved; the log of the student's epoch 1; its files
        pytest.param("student on disk", (150, 60, 195, 205, 7), marks=pytest.mark.slow),
        # the table; the log of epoch 1, whose state is saved; its student_best.pth; epoch 2
        pytest.param("crd on disk", (40, 20, 5, 57), marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_again_and_again_ends_like_one_that_never_was(name, moments, runs, entries, tmp_path, monkeypatch):
    whole, root = place_teacher(runs, tmp_path / "whole"), place_teacher(runs, tmp_path / "killed")
    assert killed(name, moments, whole, root, entries, monkeypatch) == len(moments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "touches"),
    [("teacher", 20), ("student", 30), ("student on disk", 600), ("crd on disk", 150), ("ab", 25)],
)
def test_thirty_kills_at_random_moments_change_nothing(name, touches, runs, entries, tmp_path, monkeypatch):
    rng, kills = random.Random(0), 0
    whole = place_teacher(runs, tmp_path / "whole")
    while kills < 30:
        root = place_teacher(runs, tmp_path / str(kills))
        moments = [x for _ in range(3) for x in (rng.randint(1, touches), rng.uniform(0.05, 1.5))]
        kills += killed(name, moments, whole, root, entries, monkeypatch)


@pytest.mark.parametrize("lost", ["log.jsonl", "ckpt/best.pth"])
def test_what_a_kill_kept_from_being_written_is_written_from_the_state(lost, runs, unfinished):
    flags, folder = unfinished
    (folder / lost).unlink()
    teacher.main(flags)
    assert contents(folder) == contents(runs.teacher)


class Shaking(torch.nn.Module):
    """Draws from the generators of Python and NumPy."""

    def forward(self, x):
        return x * (1 + (random.random() + np.random.rand()) / 10) if self.training else x


def test_a_network_with_dropout_resumes_bit_for_bit(short, tmp_path, monkeypatch, capsys):
    def dropping(num_classes):
        network = model_dict["resnet8"](num_classes=num_classes)
        network.bn1 = torch.nn.Sequential(network.bn1, torch.nn.Dropout(0.3), Shaking())
        return network

    def train(name):
        flags = ["--arch", "dropping", *TINY, "--experiments", str(tmp_path / name)]
        return end_of(teacher.main, flags)

    monkeypatch.setitem(model_dict, "dropping", dropping)
    assert train("whole") == 0
    with monkeypatch.context() as patch:
        during_epoch(2, refusal(errno.ENOSPC), patch)
        assert train("stopped") == 1
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)
    assert train("stopped") == 0
    assert "continuing after epoch 1" in capsys.readouterr().out
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_in_one_line_and_the_same_command_continues(
    number, status, runs, tmp_path, monkeypatch, capsys
):
    flags = [*TEACHER, "--experiments", str(tmp_path)]
    with monkeypatch.context() as patch:
        during_epoch(2, lambda: os.kill(os.getpid(), number), patch)
        assert end_of(teacher.main, flags) == status
    assert capsys.readouterr().err == f"teacher.py: stopped by {number.name}; the same command continues\n"
    teacher.main(flags)
    assert "continuing after epoch 1 of the teacher" in capsys.readouterr().out
    assert contents(tmp_path / runs.teacher.name) == without_head(contents(runs.teacher))


@pytest.mark.slow
def test_of_two_processes_started_at_once_in_one_folder_one_runs(tmp_path):
    flags = ["--arch", "resnet8", *SHORT, "--epoch", "1000000"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, ROOT / "teacher.py", *flags], cwd=tmp_path, **pipes) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        ends = {pool.submit(process.communicate): process for process in both}
        (first,), (second,) = wait(ends, return_when=FIRST_COMPLETED)
        loser, winner = ends[first], ends[second]
        winner.send_signal(signal.SIGINT)
    assert (loser.returncode, winner.returncode) == (2, 130)
    (line,) = first.result()[1].splitlines()
    assert "error: another process is running in experiments/teacher_resnet8_seed0; wait for it or stop it" in line
    assert second.result()[1] == "teacher.py: stopped by SIGINT; the same command continues\n"


def test_a_run_that_another_process_finished_meanwhile_is_not_begun_again(runs, tmp_path):
    settings = json.loads((runs.teacher / "config.json").read_text())["flags"]
    run = record.Run(tmp_path / runs.teacher.name, settings)
    shutil.copytree(runs.teacher, run.folder)
    with pytest.raises(UserError, match="was finished by another process just now"):
        run.start(torch.device("cpu"))


# -------------------------------------------------------------------------------------- what lies in the folder already


def test_a_finished_run_answers_at_once_and_stays_as_it_is(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs.cwd)
    monkeypatch.setattr(cifar, "load", None)  # whoever calls it fails
    before = contents(runs.student)
    student.main(["--t-path", str(runs.teacher), *TINY_STUDENT])
    assert "is finished: best accuracy" in capsys.readouterr().out
    assert contents(runs.student) == before


def test_other_flags_are_listed_and_nothing_changes(runs, monkeypatch, fails):
    monkeypatch.chdir(runs.cwd)
    before = contents(runs.teacher)
    line = fails(teacher.main, *TEACHER, "--epoch", "4", "--lr", "0.1")
    assert f"{runs.teacher.relative_to(runs.cwd)} holds a run with other flags" in line
    assert "epoch was 3, is 4" in line and "lr was 0.05, is 0.1" in line and "delete the folder" in line
    assert contents(runs.teacher) == before


def test_a_teacher_with_other_weights_makes_another_run(runs, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(runs.cwd)
    changed = place_teacher(runs, tmp_path) / runs.teacher.name
    saved = torch.load(changed / "best.pth", weights_only=True)
    saved["state_dict"]["fc.bias"] += 1
    torch.save(saved, changed / "best.pth")
    assert "teacher was" in fails(student.main, "--t-path", changed, *TINY_STUDENT)


def test_a_run_without_a_finished_epoch_begins_anew_whatever_its_flags(runs, tmp_path):
    record.Run(tmp_path / runs.teacher.name, {"lr": 0.3}).start(torch.device("cpu"))
    teacher.main([*TEACHER, "--experiments", str(tmp_path)])
    assert contents(tmp_path / runs.teacher.name) == without_head(contents(runs.teacher))


@pytest.mark.parametrize("name", ["best.pth", "ckpt/001.pth"])
def test_checkpoints_that_no_run_can_continue_are_left_alone(name, short, fails):
    flags, folder = short
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(b"downloaded")
    assert f"holds {name}, but not both config.json and ckpt/last.pth" in fails(teacher.main, *flags)
    assert [path for path in folder.rglob("*") if path.is_file()] == [folder / name]
    assert (folder / name).read_bytes() == b"downloaded"


def test_the_state_of_another_network_is_refused(unfinished, fails):
    flags, folder = unfinished
    last = record.read_state(folder / "ckpt" / "last.pth")
    del last["parts"]["model"]["fc.bias"]
    record.save(folder / "ckpt" / "last.pth", last)
    assert "last.pth is damaged or belongs to another run" in fails(teacher.main, *flags)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_whose_folder_is_removed_or_replaced_ends(replaced, short, monkeypatch, fails):
    flags, folder = short
    others = []

    def remove():
        shutil.rmtree(folder)
        if replaced:
            others.append(record.Run(folder, {}))
            others[0].start(torch.device("cpu"))

    during_epoch(1, remove, monkeypatch)
    assert "was removed or replaced while this run was going on" in fails(teacher.main, *flags, status=1)
    assert folder.exists() == replaced
    assert not list(folder.glob("ckpt/*"))


def test_every_start_is_recorded_and_other_conditions_get_a_warning(unfinished, monkeypatch, capsys):
    flags, folder = unfinished
    teacher.main(flags)
    assert "threads was" not in capsys.readouterr().err
    (folder / "result.json").unlink()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    teacher.main(flags)
    assert "continued under other conditions, so not bit for bit: threads was" in capsys.readouterr().err
    starts = json.loads((folder / "config.json").read_text())["starts"]
    assert [start["threads"] == 77 for start in starts] == [False, False, True]


# ---------------------------------------------------------------------------------------------- losses, logs and curves


@pytest.mark.parametrize("name", ["teacher", "student", "ab"])
def test_a_loss_that_is_not_finite_names_its_epoch_and_step(name, runs, entries, tmp_path, monkeypatch, fails):
    script, flags = RUNS[name]
    module = {"teacher": teacher, "student": student, "ab": baseline}[name]
    make_loss = module.make_loss

    def make_bad_loss(*args):
        loss_of, factors = make_loss(*args), iter([1] * 4 + [math.nan] * 2)  # an epoch has 3 steps

        def bad(batch):
            loss, terms = loss_of(batch)
            return loss * next(factors), terms

        return bad

    monkeypatch.setattr(module, "make_loss", make_bad_loss)
    monkeypatch.chdir(place_teacher(runs, tmp_path))
    line = fails(entries[script], *flags, status=1)
    phase = "teacher" if name == "teacher" else "student"
    assert f"{phase} epoch 2, step 2: the loss is not finite; what was saved before is intact" in line
    (last,) = tmp_path.glob("experiments/*/ckpt/last.pth")
    assert record.read_state(last)["epoch"] == 1


def test_a_logged_value_that_is_not_finite_is_null(tmp_path):
    run = record.Run(tmp_path / "run", {})
    run.start(torch.device("cpu"))
    for epoch in run.epochs("teacher", 1):
        run.log(epoch, 4, train={"ss_loss": math.nan, "cls_loss": 1.0}, val={"cls_acc_top5": None})
    (line,) = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert run.lines("teacher") == [json.loads(line)]
    expected = {"phase": "teacher", "epoch": 1, "train/ss_loss": None, "train/cls_loss": 1.0}
    assert {name: value for name, value in json.loads(line).items() if name != "seconds"} == expected


def test_a_tool_that_replaces_tensorboardx_file_writer_learns_the_folder(short, monkeypatch):
    """As W&B's sync_tensorboard does; it then reads all event files that appear there."""
    folders = []

    def listening(folder, **_):
        folders.append(folder)
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(record.writer, "EventFileWriter", listening)
    flags, folder = short
    teacher.main(flags)
    assert folders == [str(folder / "events")]
    assert set(curves(folder)["val/cls_acc"]) == {1, 2}
