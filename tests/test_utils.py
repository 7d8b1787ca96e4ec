"""utils: meters, files, and what a run survives: kills, full disks, signals, lost files."""

import errno
import io
import json
import os
import queue
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT, SHORT, SHORT_STUDENT, TINY, TINY_STUDENT, contents, end_of, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import student
import teacher
import utils
from utils.files import append

CPU = torch.device("cpu")


def curves(folder):
    events = EventAccumulator(str(folder / "events")).Reload()
    return {
        tag: [(p.step, p.value) for p in events.Scalars(tag)] for tag in events.Tags()["scalars"] if "second" not in tag
    }


# ------------------------------------------------------------------------------------------------------------- meters


def test_a_meter_weighs_by_rows():
    meter = utils.Meter(CPU, "epoch 1")
    meter.add(3, a=torch.tensor(1.0), b=torch.tensor(10.0))
    meter.add(1, a=torch.tensor(5.0), b=torch.tensor(20.0))
    assert meter.means() == {"a": 2.0, "b": 12.5}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_meter_names_the_first_step_and_term_that_are_not_finite(value):
    meter = utils.Meter(CPU, "student epoch 7")
    for step in range(1, 6):
        meter.add(2, ce=torch.tensor(1.0), kd=torch.tensor(value if step == 3 else 1.0))
    with pytest.raises(utils.Fault, match=r"student epoch 7, step 3: kd is not finite"):
        meter.means()


def test_accuracy_is_exact():
    scores = torch.eye(7)[[0, 1, 2, 3, 4, 5, 0]]
    assert utils.accuracy(scores, torch.arange(7)).item() == pytest.approx(600 / 7, rel=1e-15)


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_checkpoint_before_it(tmp_path, monkeypatch, capsys):
    flags = [*TINY, "--arch", "resnet8", "--experiments", str(tmp_path)]
    finite = teacher.make_loss
    epochs = []

    def bad_in_the_second_epoch(model, precision):
        loss_of = finite(model, precision)

        def spoilt(x, target):
            epochs.append(1)
            loss, logged = loss_of(x, target)
            return (
                (loss, logged)
                if len(epochs) != 5
                else (loss * float("nan"), {**logged, "cls_loss": loss * float("nan")})
            )

        return spoilt

    monkeypatch.setattr(teacher, "make_loss", bad_in_the_second_epoch)
    with pytest.raises(SystemExit) as end:
        teacher.main(flags)
    error = capsys.readouterr().err
    assert end.value.code == 1
    assert "teacher epoch 2, step 2: cls_loss is not finite" in error
    assert len(error.splitlines()) == 1
    last = torch.load(tmp_path / "teacher_resnet8_seed0" / "ckpt" / "last.pth", weights_only=True)
    assert last["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in last["model"].values())


# -------------------------------------------------------------------------------------------------------------- files


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "best.pth"
    utils.save(path, {"epoch": 1})

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(utils.Fault, match="No space left on device"):
        utils.save(path, {"epoch": 2})
    assert utils.read(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["best.pth"]


def test_half_a_log_line_is_noticed(tmp_path, monkeypatch):
    class Half(io.FileIO):
        def write(self, content):
            return super().write(content[: len(content) // 2])

    monkeypatch.setattr("builtins.open", lambda path, mode, buffering: Half(path, mode.replace("b", "")))
    with pytest.raises(utils.Fault, match="log.jsonl could not be written"):
        append(tmp_path / "log.jsonl", b"a line\n")


def unreadable(folder):
    """The checkpoints in a folder that cannot be read back."""
    bad = []
    for path in folder.rglob("*.pth"):
        try:
            torch.load(path, weights_only=True)
        except Exception as error:
            bad.append((path, error))
    return bad


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
    assert error.splitlines() == [f"teacher.py: stopped by {number.name}; run the same command again to continue"]
    process = start(tmp_path, *ENDLESS)
    lines = [process.stdout.readline() for _ in range(4)]
    process.kill()
    process.communicate()
    assert any(line.startswith("continuing after epoch ") for line in lines), lines


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


def test_the_readme_names_every_flag():
    text = (ROOT / "README.md").read_text()
    flags = vars(teacher.parse_args(["--arch", "vgg8"])) | vars(
        student.parse_args(["--t-path", "-", "--s-arch", "vgg8"])
    )
    missing = [name for name in flags if not re.search(rf"`--{name.replace('_', '-')}\b", text)]
    assert missing == []


def test_help_shows_the_defaults_that_there_are(capsys):
    assert end_of(student.main, ["--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.05)" in printed and "of every draw (default: 0)" in printed
    assert "default: None" not in printed and "default: False" not in printed


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


def test_a_folder_with_checkpoints_of_someone_else_is_left_alone(tmp_path, fails):
    folder = tmp_path / "teacher_resnet8_seed0" / "ckpt"
    folder.mkdir(parents=True)
    (folder / "best.pth").write_bytes(b"downloaded")
    line = fails(teacher.main, "--arch", "resnet8", *SHORT, "--experiments", tmp_path)
    assert "holds checkpoints but no config.json" in line
    assert (folder / "best.pth").read_bytes() == b"downloaded"


def made(folder):
    """A short teacher below `folder`: its flags and its run folder, as if killed just before its result."""
    flags = ["--arch", "resnet8", *SHORT, "--epoch", "2", "--experiments", str(folder)]
    teacher.main(flags)
    run = folder / "teacher_resnet8_seed0"
    (run / "result.json").unlink()
    return flags, run


def test_a_run_does_not_go_on_without_its_best_checkpoint(tmp_path, capsys, fails):
    flags, folder = made(tmp_path)
    best = folder / "ckpt" / "best.pth"
    good = best.read_bytes()
    best.write_bytes(good[:1000])
    assert "best.pth is damaged" in fails(teacher.main, *flags)
    best.unlink()
    assert "best.pth is missing; put it back, or start anew with --overwrite" in fails(teacher.main, *flags)
    assert not (folder / "result.json").exists()


def test_a_run_of_before_the_list_of_needed_files_goes_on(tmp_path, capsys):
    flags, folder = made(tmp_path)
    last = torch.load(folder / "ckpt" / "last.pth", weights_only=True)
    del last["needs"]
    torch.save(last, folder / "ckpt" / "last.pth")
    teacher.main(flags)
    assert (folder / "result.json").exists()


def test_a_record_without_checkpoints_is_made_anew_from_a_teacher_trained_again(runs, tmp_path, capsys, fails):
    folder = tmp_path / runs.student.name
    shutil.copytree(runs.student, folder, ignore=shutil.ignore_patterns("ckpt", "events", "log.jsonl"))
    flags = ["--t-path", str(runs.teacher), *TINY_STUDENT, "--experiments", str(tmp_path)]
    student.main(flags)
    assert "is finished" in capsys.readouterr().out  # the very same: the record counts
    assert "lr was 0.05, is 0.1" in fails(student.main, *flags, "--lr", "0.1")

    config = json.loads((folder / "config.json").read_text())
    config["flags"]["teacher"] = "another"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text("made here")
    assert "teacher was another" in fails(student.main, *flags)
    (folder / "log.jsonl").unlink()
    (folder / "result.json").rename(tmp_path / "result.json")
    assert "teacher was another" in fails(student.main, *flags)  # no record either, but what a stopped start left
    (tmp_path / "result.json").rename(folder / "result.json")
    student.main(flags)
    assert "made anew" in capsys.readouterr().out
    assert contents(folder) == contents(runs.student)


def test_a_finished_student_without_its_checkpoint_is_not_exported(runs, tmp_path, capsys, fails):
    folder = tmp_path / runs.student.name
    shutil.copytree(runs.student, folder, ignore=shutil.ignore_patterns("ckpt"))
    flags = ["--t-path", runs.teacher, *TINY_STUDENT, "--experiments", tmp_path]
    assert "--overwrite trains it anew" in fails(student.main, *flags, "--export", tmp_path / "student.pt2")
    assert (folder / "result.json").exists()


@pytest.mark.parametrize("name", ["teacher.pth", "student_best.pth"])
def test_a_student_does_not_go_on_without_its_checkpoints(name, runs, tmp_path, fails):
    folder = tmp_path / runs.student.name
    shutil.copytree(runs.student, folder)
    (folder / "result.json").unlink()
    (folder / "ckpt" / name).rename(tmp_path / name)
    flags = ["--t-path", runs.teacher, *TINY_STUDENT, "--experiments", tmp_path]
    assert f"{name} is missing; put it back" in fails(student.main, *flags)
    (tmp_path / name).rename(folder / "ckpt" / name)
    student.main([str(flag) for flag in flags])
    assert contents(folder) == contents(runs.student)


def test_a_log_that_lost_lines_is_not_padded(tmp_path, capsys):
    flags, folder = made(tmp_path)
    line, _ = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "log.jsonl").write_bytes(line)
    teacher.main(flags)
    assert (folder / "log.jsonl").read_bytes() == line


def test_what_is_not_the_runs_stays_in_its_events(tmp_path, capsys):
    flags, folder = made(tmp_path)
    (folder / "events" / "a note").write_text("mine")
    (folder / "events" / "old").mkdir()
    (folder / "ckpt" / "last.pth").unlink()  # so that it starts anew
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
