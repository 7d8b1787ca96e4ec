"""record.py: how scripts end, files, and what a run survives: kills, full disks, signals, lost and damaged files."""

import errno
import io
import json
import os
import queue
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHORT, SHORT_STUDENT, TINY, TINY_STUDENT, contents, end_of, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cifar
from harness import record
import student
import teacher
import utils
from harness.flags import UserError


def curves(folder):
    events = EventAccumulator(str(folder / "events")).Reload()
    return {
        tag: [(p.step, p.value) for p in events.Scalars(tag)] for tag in events.Tags()["scalars"] if "second" not in tag
    }


def unreadable(folder):
    """The checkpoints in a folder that cannot be read back."""
    bad = []
    for path in folder.rglob("*.pth"):
        try:
            torch.load(path, weights_only=True)
        except Exception as error:
            bad.append((path, error))
    return bad


def made(folder, *more):
    """A short teacher below `folder`: its flags and its run folder, as if killed just before its result."""
    flags = ["--arch", "resnet8", *SHORT, "--epoch", "2", "--experiments", str(folder), *more]
    teacher.main(flags)
    (run,) = folder.glob("teacher_resnet8_seed*")
    (run / "result.json").unlink()
    return flags, run


# ------------------------------------------------------------------------------------------------ how a script ends


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("do this"), 2, "error: do this"),
        (KeyError("that"), 2, "error: 'that'"),
        (utils.Fault("broken"), 1, "error: broken"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 1, "error: [Errno 28] No space left on device: 'f'"),
        (MemoryError(), 1, "error: MemoryError"),
        (
            torch.OutOfMemoryError("much text"),
            1,
            "error: the device is out of memory; a smaller --batch-size needs less",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate much"),
            1,
            "error: the device is out of memory; a smaller --batch-size needs less",
        ),
        (UserError("a\n\x1b[31m b\udcff"), 2, "error: a \\x1b[31m b\\udcff"),
    ],
)
def test_errors_end_in_one_printable_line_and_a_status(error, status, line, capsys):
    @record.entry(KeyError)
    def main(argv):
        raise error

    before = signal.getsignal(signal.SIGTERM)
    assert end_of(main, []) == status
    assert capsys.readouterr().err == f"test_record.py: {line}\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_does_not_disturb_the_ending_of_the_first(capsys):
    @record.entry()
    def main(argv):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    status = end_of(main, [])
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)  # the entry leaves them ignored, for the process is about to end
    assert status == 143
    assert capsys.readouterr().err == "test_record.py: stopped by SIGTERM; the same command continues\n"


def test_names_that_a_terminal_cannot_show_are_no_error(tmp_path):
    folder = os.fsencode(tmp_path) + "/ü".encode() + b"\xff"
    os.mkdir(folder)
    command = [sys.executable, ROOT / "teacher.py", "--arch", "resnet8", *SHORT, "--experiments", folder]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"run: " in done.stdout and b"\\xfc\\udcff" in done.stdout


def test_closed_outputs_change_no_status(tmp_path):
    for flags, status in ((["--arch", "resnet8", *SHORT], 0), (["--arch", "resnet9"], 2)):
        command = [sys.executable, ROOT / "teacher.py", *flags]
        assert subprocess.run(command, cwd=tmp_path, preexec_fn=lambda: os.closerange(1, 3)).returncode == status


# -------------------------------------------------------------------------------------------------------------- files


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "best.pth"
    record.save(path, {"epoch": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(utils.Fault, match="No space left on device"):
        record.save(path, {"epoch": 2})
    assert record.read(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["best.pth"]


def test_a_folder_that_cannot_be_written_to_is_told_as_such(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("builtins.open", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)  # on a read-only mount this fails for absent files too
    with pytest.raises(utils.Fault, match="Read-only file system"):
        record.write_atomically(tmp_path / "head.pth", b"")


def test_a_write_removes_the_parts_that_killed_writers_left_but_no_others(tmp_path):
    names = [
        ".a.pth.01234567.part",
        ".a.pth.89abcdef.part",
        ".b.pth.01234567.part",
        ".a.pth.part",
        ".a.pth.notahexn.part",
    ]
    for name in names:
        (tmp_path / name).write_text("half")
    with open(tmp_path / names[1]) as writing:
        record.fcntl.flock(writing, record.fcntl.LOCK_EX)
        record.write_atomically(tmp_path / "a.pth", b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", *names[1:]}


def test_nothing_is_written_through_a_link(tmp_path, monkeypatch):
    monkeypatch.setattr(record.secrets, "token_hex", lambda _: "not random")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".a.pth.not random.part").symlink_to(tmp_path / "mine")
    with pytest.raises(utils.Fault, match="File exists"):
        record.write_atomically(tmp_path / "a.pth", b"other")
    assert (tmp_path / "mine").read_text() == "mine"


def test_half_a_log_line_is_noticed(tmp_path, monkeypatch):
    class Half(io.FileIO):
        def write(self, content):
            return super().write(content[: len(content) // 2])

    monkeypatch.setattr("builtins.open", lambda path, mode, buffering: Half(path, mode.replace("b", "")))
    with pytest.raises(utils.Fault, match="log.jsonl could not be written"):
        record.append(tmp_path / "log.jsonl", b"a line\n")


def test_every_changed_bit_of_a_tensor_is_noticed(tmp_path):
    path = tmp_path / "a.pth"
    record.save(path, {"weight": torch.arange(64.0)})
    good = path.read_bytes()
    start = good.index(torch.arange(64.0).numpy().tobytes())
    for bit in range(0, 64 * 32, 37):
        bad = bytearray(good)
        bad[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(UserError, match="a.pth is damaged"):
            record.read(path)
    path.write_bytes(good)
    assert torch.equal(record.read(path)["weight"], torch.arange(64.0))


def test_a_fingerprint_tells_weights_and_their_names_apart():
    def network(value, name="a"):
        module = torch.nn.Module()
        module.register_buffer(name, torch.full((3,), value))
        return module

    assert record.fingerprint(network(1.0)) == record.fingerprint(network(1.0))
    assert len({record.fingerprint(x) for x in (network(1.0), network(2.0), network(1.0, "b"))}) == 3


@pytest.mark.parametrize("script", ["teacher.py", "student.py"])
def test_a_write_that_fails_anywhere_never_costs_a_checkpoint(script, runs, entries, tmp_path, monkeypatch, capsys):
    """Every single write of a short run fails once; the same command then ends as if nothing had been."""
    real, left = os.fsync, [0]

    def failing(handle):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    def run(root):
        """Exit status; a student gets a copy of the teacher of its own, for it keeps its SS head there."""
        flags = ["--arch", "resnet8", *SHORT, "--experiments", str(root)]
        if script == "student.py":
            (root / runs.teacher.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(runs.teacher / "ckpt" / "best.pth", root / runs.teacher.name)
            flags = ["--t-path", str(root / runs.teacher.name), *SHORT_STUDENT, "--experiments", str(root)]
        return end_of(entries[script], flags)

    monkeypatch.setattr(os, "fsync", failing)
    assert run(tmp_path / "reference") == 0
    expected, writes = contents(tmp_path / "reference"), -left[0]
    assert writes >= 8
    for number in range(1, writes + 1):
        root, left[0] = tmp_path / str(number), number
        capsys.readouterr()
        status, error = run(root), capsys.readouterr()
        if status == 0:  # the one write that a run can do without
            assert "SS head: not kept for later students" in error.out
            expected_now = {name: value for name, value in expected.items() if not name.startswith("ss_head_")}
        else:
            assert status == 1
            assert "No space left on device" in error.err
            assert len(error.err.splitlines()) == 1
            expected_now = expected
        assert not unreadable(root)
        assert not list(root.rglob("*.part"))
        assert run(root) == 0
        assert contents(root) == expected_now, number


def test_a_file_size_limit_ends_the_run_in_one_line(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no checkpoint fits

    done = run_script("teacher.py", "--arch", "resnet8", *SHORT, cwd=tmp_path, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert "could not be written: File too large" in done.stderr
    assert not unreadable(tmp_path)
    assert run_script("teacher.py", "--arch", "resnet8", *SHORT, cwd=tmp_path).returncode == 0


# -------------------------------------------------------------------------------------------------- kills and resuming


def same_run(folder, reference):
    """Whether two run folders hold the same weights, metrics, log and curves."""
    assert contents(folder) == contents(reference)
    assert curves(folder) == curves(reference)


def test_a_run_killed_again_and_again_ends_like_one_that_never_was(runs, tmp_path):
    """SIGKILL at every 18th touch of the disk, through all phases, until the same two commands are through."""
    kills = 0
    commands = [
        ("teacher.py", "--arch", "resnet8", *TINY),
        ("student.py", "--t-path", "experiments/teacher_resnet8_seed0", *TINY_STUDENT),
    ]
    for script, *flags in commands:
        command = [sys.executable, ROOT / "tests" / "killer.py", "18", ROOT / script, *flags]
        for _ in range(10):
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL, done.stderr
            kills += 1
            assert not unreadable(tmp_path)
        assert done.returncode == 0
    assert kills >= 3
    same_run(tmp_path / "experiments" / runs.teacher.name, runs.teacher)
    same_run(tmp_path / "experiments" / runs.student.name, runs.student)


@pytest.mark.slow
def test_thirty_kills_at_random_moments_change_nothing(runs, tmp_path):
    """Each round trains teacher and student anew, killed once at a random moment of either, and continues them."""
    rng = random.Random(0)
    commands = [
        ("teacher.py", "--arch", "resnet8", *TINY),
        ("student.py", "--t-path", "experiments/teacher_resnet8_seed0", *TINY_STUDENT),
    ]
    killed = 0
    for number in range(200):
        cwd = tmp_path / str(number)
        cwd.mkdir()
        for script, *flags in commands:
            command = [sys.executable, str(ROOT / script), *flags]
            process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            try:
                process.wait(timeout=rng.uniform(2.0, 6.0))
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
            process.communicate()
            done = run_script(script, *flags, cwd=cwd)
            assert (done.returncode, done.stderr) == (0, "")
        same_run(cwd / "experiments" / runs.teacher.name, runs.teacher)
        same_run(cwd / "experiments" / runs.student.name, runs.student)
        if killed >= 30:
            break
    assert killed >= 30


def start(cwd, *command):
    script, *flags = command
    return subprocess.Popen(
        [sys.executable, ROOT / script, *flags], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


ENDLESS = ["teacher.py", "--arch", "resnet8", *SHORT, "--epoch", "1000000"]


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_in_one_line_that_tells_how_to_continue(tmp_path, number, status):
    process = start(tmp_path, *ENDLESS)
    while not process.stdout.readline().startswith("teacher 2/"):
        assert process.poll() is None
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert error.splitlines() == [f"teacher.py: stopped by {number.name}; the same command continues"]
    run = record.Run(tmp_path / "experiments" / "teacher_resnet8_seed0", teacher.parse_args(ENDLESS[1:]))
    assert run.last["epoch"] >= 1


def test_of_two_processes_started_at_once_on_one_folder_exactly_one_runs(tmp_path):
    processes = [start(tmp_path, *ENDLESS) for _ in range(2)]
    ended = queue.Queue()

    def wait(process):
        ended.put((process, *process.communicate()))

    threads = [threading.Thread(target=wait, args=(process,)) for process in processes]
    for thread in threads:
        thread.start()
    loser, _, error = ended.get(timeout=120)
    (winner,) = set(processes) - {loser}
    assert winner.poll() is None
    winner.terminate()
    for thread in threads:
        thread.join()
    assert loser.returncode == 2
    assert "another process is running in experiments" in error
    assert len(error.splitlines()) == 1
    assert winner.returncode == 143


def test_other_flags_are_listed_and_nothing_is_touched(runs, monkeypatch, fails):
    monkeypatch.chdir(runs.cwd)
    before = contents(runs.teacher)
    line = fails(teacher.main, "--arch", "resnet8", *TINY, "--epoch", "4", "--lr", "0.1")
    assert "epoch was 3, is 4" in line
    assert "lr was 0.05, is 0.1" in line
    assert "--overwrite" in line
    assert contents(runs.teacher) == before


def test_a_teacher_of_other_weights_is_another_run(runs, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / runs.teacher.name
    folder.mkdir()
    for name in ("best.pth", "002.pth"):
        (folder / name).write_bytes((runs.teacher / "ckpt" / name).read_bytes())
    student.main(["--t-path", str(folder / "best.pth"), *SHORT_STUDENT])
    state = torch.load(folder / "best.pth", weights_only=True)
    state["state_dict"]["fc.bias"] += 1
    torch.save(state, folder / "best.pth")
    assert "teacher was" in fails(student.main, "--t-path", folder, *SHORT_STUDENT)


def test_overwrite_starts_anew(tmp_path, capsys):
    flags = ["--arch", "resnet8", *SHORT, "--experiments", str(tmp_path)]
    teacher.main([*flags, "--seed", "3", "--epoch", "2"])
    teacher.main([*flags, "--seed", "3", "--overwrite"])
    result = json.loads((tmp_path / "teacher_resnet8_seed3" / "result.json").read_text())
    assert result["epochs"] == 1
    assert not (tmp_path / "teacher_resnet8_seed3" / "ckpt" / "002.pth").exists()


def test_what_is_not_the_runs_stays_in_its_events(tmp_path, capsys):
    flags, folder = made(tmp_path)
    (folder / "events" / "a note").write_text("mine")
    (folder / "events" / "old").mkdir()
    teacher.main(flags)
    assert (folder / "events" / "a note").read_text() == "mine"
    assert len(curves(folder)["val/cls_acc"]) == 2


def test_overwrite_takes_the_link_to_a_folder_and_not_the_folder(tmp_path, capsys):
    flags, folder = made(tmp_path)
    (folder / "ckpt").rename(tmp_path / "elsewhere")
    (folder / "ckpt").symlink_to(tmp_path / "elsewhere")
    teacher.main([*flags, "--overwrite"])
    assert (tmp_path / "elsewhere" / "best.pth").exists()
    assert not (folder / "ckpt").is_symlink()
    assert (folder / "ckpt" / "best.pth").exists()


def test_a_run_that_overwrite_began_says_how_it_is_continued(tmp_path, monkeypatch, capsys):
    flags, folder = made(tmp_path)
    evaluate, epochs = utils.evaluate, []

    def stopping(*args):
        epochs.append(1)
        if len(epochs) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args)

    monkeypatch.setattr(utils, "evaluate", stopping)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    status = end_of(teacher.main, [*flags, "--overwrite"])
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)  # the entry leaves them ignored, for the process is about to end
    assert status == 130
    assert "the same command without --overwrite continues" in capsys.readouterr().err
    teacher.main(flags)
    assert "continuing after epoch 1" in capsys.readouterr().out
    assert json.loads((folder / "result.json").read_text())["epochs"] == 2


def test_a_finished_schedule_is_not_lengthened_and_the_line_says_why(tmp_path, capsys, fails):
    flags, folder = made(tmp_path)
    teacher.main(flags)
    line = fails(teacher.main, *flags, "--epoch", "3")
    assert "epoch was 2, is 3" in line and "can't be lengthened: its rate has already fallen" in line


# ------------------------------------------------------------------------------------- what lies in the folder already


@pytest.mark.parametrize(
    "name", ["best.pth", "ckpt/best.pth", "log.jsonl", "events/events.out.tfevents.1.host", "notes"]
)
def test_a_folder_that_is_no_run_is_left_alone(name, tmp_path, fails):
    folder = tmp_path / "teacher_resnet8_seed0"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(b"downloaded")
    line = fails(teacher.main, "--arch", "resnet8", *SHORT, "--experiments", tmp_path)
    assert f"holds {name}, but no config.json of a run" in line
    assert [path for path in folder.rglob("*") if path.is_file()] == [folder / name]
    assert (folder / name).read_bytes() == b"downloaded"


def test_a_start_that_was_killed_before_its_first_word_is_no_obstacle(tmp_path, capsys):
    folder = tmp_path / "teacher_resnet8_seed0"
    (folder / "ckpt").mkdir(parents=True)
    (folder / "events").mkdir()
    for name in (".lock", ".config.json.01234567.part"):
        (folder / name).touch()
    teacher.main(["--arch", "resnet8", *SHORT, "--experiments", str(tmp_path)])
    assert not list(folder.rglob("*.part"))


def test_a_checkpoint_that_students_would_read_instead_is_refused(tmp_path, fails):
    flags, folder = made(tmp_path)
    shutil.copy(folder / "ckpt" / "best.pth", folder / "resnet8_best.pth")
    assert "resnet8_best.pth, but students would read it instead" in fails(teacher.main, *flags)


def test_a_run_that_lost_its_last_checkpoint_is_not_begun_again(tmp_path, fails):
    flags, folder = made(tmp_path)
    (folder / "ckpt" / "last.pth").unlink()
    before = contents(folder)
    line = fails(teacher.main, *flags)
    assert "holds ckpt/001.pth, but no last.pth to continue from: put that back" in line
    assert contents(folder) == before


@pytest.mark.parametrize("lost", ["best.pth", "teacher.pth", "student_best.pth"])
@pytest.mark.parametrize("how", ["gone", "cut", "empty"])
def test_a_checkpoint_that_a_kill_kept_from_being_written_is_written_from_the_last(lost, how, runs, tmp_path):
    of_student = lost in ("teacher.pth", "student_best.pth")
    source = runs.student if of_student else runs.teacher
    folder = tmp_path / source.name
    shutil.copytree(source, folder)
    (folder / "result.json").unlink()
    path = folder / "ckpt" / lost
    good = path.read_bytes()
    path.unlink() if how == "gone" else path.write_bytes(good[:1000] if how == "cut" else b"")
    if of_student:
        student.main(["--t-path", str(runs.teacher), *TINY_STUDENT, "--experiments", str(tmp_path)])
    else:
        teacher.main(["--arch", "resnet8", *TINY, "--experiments", str(tmp_path)])
    assert contents(folder) == contents(source)


def test_the_best_checkpoint_is_the_one_that_the_result_tells_of(runs, tmp_path):
    """A kill between the two writes, and a second half that computes differently: last.pth decides."""
    folder = tmp_path / runs.teacher.name
    shutil.copytree(runs.teacher, folder)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").unlink()
    other = record.read(folder / "ckpt" / "best.pth")
    record.save(folder / "ckpt" / "best.pth", other | {"acc": 99.0, "epoch": 9})
    teacher.main(["--arch", "resnet8", *TINY, "--experiments", str(tmp_path)])
    best = record.read(folder / "ckpt" / "best.pth")
    assert (best["acc"], best["epoch"]) == (result["best_acc"], result["best_epoch"])


@pytest.mark.parametrize("name", ["best.pth", "student_best.pth"])
@pytest.mark.parametrize("how", ["gone", "empty", "holed"])
def test_a_finished_run_without_what_it_was_for_is_not_called_finished(name, how, runs, tmp_path, fails):
    of_student = name == "student_best.pth"
    source = runs.student if of_student else runs.teacher
    shutil.copytree(source, tmp_path / source.name)
    path = tmp_path / source.name / "ckpt" / name
    good = path.read_bytes()
    path.unlink() if how == "gone" else path.write_bytes(
        b"" if how == "empty" else good[:4096] + bytes(4096) + good[8192:]
    )
    flags = ["--arch", "resnet8", *TINY]
    if of_student:
        flags = ["--t-path", runs.teacher, *TINY_STUDENT, "--export", tmp_path / "student.pt2"]
    line = fails(student.main if of_student else teacher.main, *flags, "--experiments", tmp_path)
    assert name in line and "put" in line and "back" in line and "--overwrite" in line


def test_last_of_another_run_is_refused(tmp_path, fails):
    flags, folder = made(tmp_path)
    _, other = made(tmp_path / "other", "--seed", "1")
    shutil.copy(other / "ckpt" / "last.pth", folder / "ckpt" / "last.pth")
    assert "last.pth is damaged or not of this run" in fails(teacher.main, *flags)


@pytest.mark.parametrize("name", sorted(record.FRESH))
def test_last_without_something_or_with_another_kind_of_it_is_refused(name, tmp_path, fails):
    flags, folder = made(tmp_path)
    path = folder / "ckpt" / "last.pth"
    last = record.read(path)
    for bad in ({k: v for k, v in last.items() if k != name}, last | {name: torch.zeros(2)}, last | {name: None}):
        record.save(path, bad)
        before = contents(folder)
        assert "last.pth is damaged" in fails(teacher.main, *flags)
        assert contents(folder) == before


@pytest.mark.parametrize("spoil", ["parts", "model", "optimisation", "sizes", "best"])
def test_last_with_something_wrong_deep_inside_is_refused(spoil, tmp_path, fails):
    flags, folder = made(tmp_path)
    path = folder / "ckpt" / "last.pth"
    last = record.read(path)
    if spoil == "parts":
        del last["parts"]["model"]
    elif spoil in last["parts"]:
        last["parts"][spoil] = {"optimizer": 3}
    else:
        last[spoil] = dict.fromkeys(last[spoil], [])
    record.save(path, last)
    assert "last.pth is damaged" in fails(teacher.main, *flags)


@pytest.mark.parametrize("name", ["config.json", "ckpt/last.pth"])
def test_what_cannot_be_read_is_not_called_damaged(name, tmp_path, fails):
    flags, folder = made(tmp_path)
    (folder / name).unlink()
    (folder / name).mkdir()  # as good as a file without permission, and the same for root
    line = fails(teacher.main, *flags)
    assert f"{name} cannot be read: Is a directory" in line and "--overwrite" not in line


def test_a_config_nested_without_end_is_damaged(tmp_path, fails):
    flags, folder = made(tmp_path)
    (folder / "config.json").write_text("[" * 100_000)
    assert "config.json is damaged" in fails(teacher.main, *flags)


def test_overwrite_killed_at_any_deletion_leaves_nothing_that_passes_for_a_run(runs, tmp_path, monkeypatch, capsys):
    flags = ["--arch", "resnet8", *TINY, "--experiments", str(tmp_path)]
    folder, left, deaths = tmp_path / runs.teacher.name, [0], 0

    class Killed(BaseException):
        pass

    def deadly(delete):
        def dying(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return delete(*args, **kwargs)

        return dying

    for number in range(2, 40):  # the first deletes result.json; before it, the run is whole
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(runs.teacher, folder)
        left[0] = number
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", deadly(os.unlink))
            patch.setattr(os, "rmdir", deadly(os.rmdir))
            patch.setattr(cifar, "load", full)  # it need not train
            run = record.Run(folder, teacher.parse_args([*flags, "--overwrite"]))
            try:
                run.start(torch.device("cpu"))
                break
            except Killed:
                deaths += 1
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(cifar, "load", full)
            assert end_of(teacher.main, flags) in (1, 2)
        printed = capsys.readouterr()
        assert "is finished" not in printed.out, number
    assert deaths > 8


def test_a_run_whose_folder_is_removed_while_it_goes_on_ends(tmp_path, monkeypatch, capsys):
    evaluate = utils.evaluate
    flags = ["--arch", "resnet8", *SHORT, "--epoch", "2", "--experiments", str(tmp_path)]
    folder = tmp_path / "teacher_resnet8_seed0"

    def removing(*args):
        shutil.rmtree(folder)
        record.Run(folder, teacher.parse_args(flags)).start(torch.device("cpu"))  # another process's
        return evaluate(*args)

    monkeypatch.setattr(utils, "evaluate", removing)
    assert end_of(teacher.main, flags) == 1
    assert "was removed or replaced while this run was going on" in capsys.readouterr().err
    assert not (folder / "log.jsonl").exists() and not list((folder / "ckpt").iterdir())


def test_every_start_is_noted_and_other_conditions_are_told(tmp_path, monkeypatch, capsys):
    flags, folder = made(tmp_path)
    capsys.readouterr()
    teacher.main(flags)
    assert capsys.readouterr().err == ""
    (folder / "result.json").unlink()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    teacher.main(flags)
    assert "so not bit for bit: threads was" in capsys.readouterr().err
    starts = json.loads((folder / "config.json").read_text())["starts"]
    assert [start["threads"] == 77 for start in starts] == [False, False, True]
    assert {"command", "commit", "python", "torch", "device", "threads", "started"} == set(starts[0])


def test_events_that_were_cut_inside_a_record_do_not_hide_the_later_ones(tmp_path):
    flags, folder = made(tmp_path)
    shutil.rmtree(folder)
    teacher.main([*flags, "--epoch", "1"])
    (folder / "result.json").unlink()
    (events,) = (folder / "events").iterdir()
    os.truncate(events, events.stat().st_size - 5)
    run = record.Run(folder, teacher.parse_args([*flags, "--epoch", "1"]))
    run.start(torch.device("cpu"))
    for epoch in run.epochs("later", 1):
        run.log(epoch, 4, val={"cls_acc": 12.5})
    assert curves(folder)["val/cls_acc"][-1] == (1, 12.5)


def test_a_scalar_that_is_not_finite_is_null_in_the_log(tmp_path):
    run = record.Run(tmp_path / "run", teacher.parse_args(["--arch", "resnet8"]))
    run.start(torch.device("cpu"))
    for epoch in run.epochs("teacher", 1):
        run.log(epoch, 4, train={"ss_loss": float("nan"), "cls_loss": 1.0})
    assert run.lines("teacher") == [{"train/ss_loss": None, "train/cls_loss": 1.0}]


# ------------------------------------------------------------------------------------------ what is odd, in one line


def warnings_of(flags, capsys):
    capsys.readouterr()
    teacher.main(flags)
    return capsys.readouterr().err.splitlines()


def test_milestones_beyond_the_last_epoch_are_told(tmp_path, capsys):
    flags = ["--arch", "resnet8", *SHORT, "--experiments", str(tmp_path)]
    line = "warning: --milestones 2 3: the learning rate never falls within 2 epochs"  # it would after the last one
    assert warnings_of([*flags, "--epoch", "2", "--milestones", "2", "3"], capsys) == [line]
    assert warnings_of([*flags, "--epoch", "2", "--milestones", "1", "3", "--seed", "1"], capsys) == []
    assert warnings_of([*flags, "--epoch", "1", "--milestones", "2", "--seed", "2"], capsys) == []  # nothing to fall


def test_milestones_of_the_ss_head_beyond_its_last_epoch_are_told(tmp_path, capsys):
    run = record.Run(
        tmp_path / "run",
        student.parse_args(["--t-path", "unused", *SHORT_STUDENT, "--t-epoch", "2", "--t-milestones", "3"]),
    )
    run.start(torch.device("cpu"))
    line = "warning: --t-milestones 3: the learning rate never falls within 2 epochs"
    assert capsys.readouterr().err.splitlines() == [line]


def test_a_batch_larger_than_the_data_is_told(tmp_path, capsys):
    flags = ["--arch", "resnet8", *SHORT, "--experiments", str(tmp_path), "--batch-size", "5"]
    line = "warning: --batch-size 5 is more than the 4 training images: an epoch is one step"
    assert warnings_of(flags, capsys) == [line]


def test_a_gpu_that_is_not_there_is_told(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert utils.pick_device(0).type == utils.pick_device(1).type == "cpu"
    line = "warning: --gpu-id 1: PyTorch finds no CUDA device here, so this runs on the cpu"
    assert capsys.readouterr().err.splitlines() == [line]


def test_a_run_without_any_checkpoint_begins_anew_and_says_so(tmp_path, capsys):
    flags, folder = made(tmp_path)
    expected = contents(folder)
    for path in (folder / "ckpt").iterdir():
        path.unlink()
    line = f"warning: {folder} was begun before, but its ckpt/last.pth is gone: it begins anew"
    assert warnings_of(flags, capsys) == [line]
    (folder / "result.json").unlink()
    assert contents(folder) == expected


def test_whoever_replaces_tensorboardx_file_writer_is_told_the_folder(tmp_path, monkeypatch, capsys):
    """As W&B's sync_tensorboard does; it then reads all event files that appear there."""
    folders = []

    class Listening(record.writer.EventFileWriter):
        def __init__(self, logdir, *args, **kwargs):
            folders.append(logdir)
            super().__init__(logdir, *args, **kwargs)

    monkeypatch.setattr(record.writer, "EventFileWriter", Listening)
    _, folder = made(tmp_path)
    assert folders == [str(folder / "events")]
    assert [step for step, _ in curves(folder)["val/cls_acc"]] == [1, 2]
