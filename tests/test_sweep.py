"""experiments/sweep.py: the commands that it makes, and how they run on Ray."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SHORT, SHORT_STUDENT, contents, run_script
from recorded import change

import student
import teacher
from experiments import sweep

PAIR = ["--pairs", "resnet20:resnet8"]


def parsed(line):
    """The script of a line as typed in a shell, and its parsed flags."""
    python, script, *flags = shlex.split(line)
    assert python == "python"
    return Path(script).name, sweep.SCRIPTS[Path(script).name](flags)


@pytest.fixture
def listed(capsys, monkeypatch):
    """Returns what --list prints, as (script, parsed flags)."""
    monkeypatch.chdir(ROOT)

    def check(*words):
        sweep.main(["--list", *words])
        output = capsys.readouterr()
        assert output.err == ""
        return [parsed(line) for line in output.out.splitlines()]

    return check


# ------------------------------------------------------------------------------------------------------- the commands


def test_without_options_the_published_commands_are_listed_in_their_order(listed):
    done = subprocess.run(["bash", "command.sh", "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("python ")]
    assert len(lines) == 24
    assert listed() == [parsed(line) for line in lines]
    assert listed("teachers") == listed()[:13]
    assert listed("similar") == [*listed()[:4], *listed()[13:18]]  # four teachers for five students
    assert [args.arch for _, args in listed("teachers", *PAIR)] == ["resnet20"]


def test_grids_methods_and_seeds_multiply_but_a_method_that_no_grid_affects_runs_once_without_a_folder(listed):
    grids = ["--grid", "ss-T", "0.1", "0.5", "--grid", "t-milestones", "10 20", "30 45"]
    jobs = listed(*PAIR, "--seeds", "0", "1", "--methods", "kd", "alone", "sskd", *grids)
    assert [name for name, _ in jobs] == ["teacher.py"] * 4 + ["baseline.py"] * 2 + ["student.py"] * 8
    assert [(args.arch, args.seed) for _, args in jobs[:4]] == [
        (arch, seed) for arch in ("resnet20", "resnet8") for seed in (0, 1)
    ]
    assert {args.experiments for _, args in jobs[:6]} == {"experiments"}
    assert {(args.seed, args.ss_T, *args.t_milestones, args.experiments, args.t_path) for _, args in jobs[6:]} == {
        (seed, T, a, b, f"experiments/ss-T_{T}_t-milestones_{a}-{b}", f"experiments/teacher_resnet20_seed{seed}")
        for seed in (0, 1)
        for T in (0.1, 0.5)
        for a, b in ((10, 20), (30, 45))
    }


@pytest.mark.parametrize(
    ("words", "flag", "values"),
    [
        (["--methods", "alone", "sskd", "--grid", "lr", "0.1", "0.2"], "lr", [0.1, 0.2, 0.1, 0.2]),
        (["--methods", "sskd", "kd-4views", "--grid", "ss-weight", "1", "10"], "ss_weight", [1, 10, 0]),
        (["--methods", "kd+tf", "kd+ss", "--grid", "ratio-ss", "0", "1"], "ratio_ss", [0.75, 0, 1]),
        (["--methods", "sskd", "kd+ss", "--grid", "tf-T", "1", "2"], "tf_T", [1, 2, 4]),
        (["--methods", "sskd", "--grid", "lr", "1", "2", "--", "--lr", "3"], "lr", [1, 2]),
        (["--methods", "sskd", "kd-4views", "--", "--ss-weight=1"], "ss_weight", [1, 0]),
    ],
)
def test_a_grid_varies_no_teacher_and_the_method_wins_over_the_grid_and_the_grid_over_common_flags(
    words, flag, values, listed
):
    (_, teacher), *students = listed("--pairs", "vgg13:MobileNetV2", *words)
    assert teacher.lr == (3 if "3" in words else 0.05)
    assert [getattr(args, flag) for _, args in students] == values


def test_every_method_is_a_command_with_its_published_rate(listed):
    methods = [method for method in sweep.known_methods() if method != "teacher"]
    jobs = listed("--pairs", "vgg13:ShuffleV2", "--methods", *methods)[1:]
    assert len(jobs) == 17 and {args.lr for _, args in jobs} == {0.01}
    assert [args.method for name, args in jobs if name == "baseline.py"] == list(sweep.METHODS)
    students = [args for name, args in jobs if name == "student.py"]
    weights = sorted((args.ce_weight, args.kd_weight, args.tf_weight, args.ss_weight) for args in students)
    assert weights == [(0.1, 0.9, tf, ss) for tf in (0, 2.7) for ss in (0, 10)]


def test_flags_go_to_every_script_that_has_them_but_few_images_to_no_teacher(listed):
    flags = "--amp bf16 --lr=0.2 --few-shot 0.25 --label-noise=0.1 --kd-T 2 --t-epoch 9 --weight 3".split()
    jobs = listed(*PAIR, "--methods", "alone", "sskd", "crd", "at", "--", *flags, "--t-features", "disk")
    (_, trained), (_, alone), (_, sskd), (_, crd), (_, at) = jobs
    assert {(args.amp, args.lr) for _, args in jobs} == {("bf16", 0.2)}
    assert (trained.arch, trained.few_shot, trained.label_noise) == ("resnet20", 1, 0)
    assert {(args.few_shot, args.label_noise) for args in (alone, sskd, crd, at)} == {(0.25, 0.1)}
    assert (sskd.kd_T, crd.kd_T, sskd.t_epoch, crd.weight) == (2, 2, 9, 3)
    # the maps that at needs are not stored
    assert [args.t_features for args in (sskd, crd, at)] == ["disk", "disk", "compute"]


def test_one_teacher_may_serve_all_seeds_and_the_list_is_quoted_for_a_shell(listed):
    folder = "my runs; rm *"
    jobs = listed(*PAIR, "--seeds", "1", "2", "--teacher-seed", "7", "--experiments", folder)
    assert [(name, args.seed) for name, args in jobs] == [("teacher.py", 7), ("student.py", 1), ("student.py", 2)]
    assert {args.t_path for _, args in jobs[1:]} == {f"{folder}/teacher_resnet20_seed7"}
    assert {args.experiments for _, args in jobs} == {folder}


def test_trained_teachers_are_found_by_their_seed_or_their_network(listed, tmp_path, fails):
    for name in ("teacher_resnet20_seed1", "teacher_resnet20", "vgg13_vanilla"):
        (tmp_path / name).mkdir(parents=True)
    words = ["--teachers", str(tmp_path), "--pairs", "resnet20:resnet8", "vgg13:resnet8"]
    jobs = listed(*words, "--seeds", "0", "1")
    assert {name for name, _ in jobs} == {"student.py"}
    paths = [Path(args.t_path).relative_to(tmp_path).name for _, args in jobs]
    assert paths == ["teacher_resnet20", "vgg13_vanilla", "teacher_resnet20_seed1", "vgg13_vanilla"]
    assert listed(*words, "--teacher-seed", "1")[0][1].t_path == str(tmp_path / "teacher_resnet20_seed1")
    error = fails(sweep.main, "--list", "--teachers", tmp_path, "--pairs", "resnet56:resnet8")
    assert f"--teachers {tmp_path}: none of the folders teacher_resnet56_seed0, " in error


def test_teacher_and_student_hold_the_same_images_out(listed, tmp_path, fails):
    words = ["--", "--val-fraction=0.1"]
    (_, trained), (_, student) = listed(*PAIR, *words)
    assert trained.val_fraction == student.val_fraction == 0.1
    assert student.t_path == "experiments/teacher_resnet20_val0.1_seed0"
    (tmp_path / "teacher_resnet20_seed0").mkdir()  # trained on all images
    assert "none of the folders" in fails(sweep.main, "--list", "--teachers", tmp_path, *PAIR, *words)
    (tmp_path / "teacher_resnet20_val0.1_seed0").mkdir()
    assert listed("--teachers", str(tmp_path), *PAIR, *words)[0][1].t_path.endswith("_val0.1_seed0")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nope"], "invalid choice: 'nope'"),
        (["--pairs", "resnet20:resnet9"], "--s-arch: the network 'resnet9' is unknown"),
        (["--pairs", "resnet20"], "--s-arch: the network '' is unknown"),
        (["similar", "--amp", "bf16"], "unrecognized arguments: --amp bf16"),
        (["--teacher-seed", "1", "--", "--val-fraction", "0.1"], "--val-fraction: students of other seeds"),
        (["--grid", "ratio-ss"], "--grid: give a flag and its values"),
        (["--methods", "crd", "--grid", "ratio-ss", "1"], "unrecognized arguments: --ratio-ss"),
        (["--grid", "seed", "0", "1"], "--seed can't be the same for all runs"),
        (["--grid", "ratio-ss", "0.5", "2"], "--ratio-ss: '2' is not a number of at least 0 and at most 1"),
        (["--", "--epochs", "3"], "did you mean --epoch "),
        (["--", "--amp", "int8"], "invalid choice: 'int8'"),
        (["--", "--t-path", "x"], "--t-path can't be the same for all runs"),
    ],
)
def test_wrong_flags_are_reported_in_one_line_before_anything_starts(words, says, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in fails(sweep.main, *words)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- without Ray


def test_without_ray_it_says_what_to_install(fails, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install -r requirements-experiments.txt" in fails(sweep.main, *PAIR, "--experiments", tmp_path)


@pytest.mark.parametrize(
    ("gpus", "per_gpu", "share"),
    [
        (8, 1, {"num_gpus": 1.0, "num_cpus": 0}),
        (2, 3, {"num_gpus": 0.3333, "num_cpus": 0}),
        (0, 1, {"num_cpus": 4.0}),  # of the smallest machine
        (0, 3, {"num_cpus": 1.3333}),
    ],
)
def test_a_run_takes_its_share_of_a_gpu_or_of_the_cores(gpus, per_gpu, share, monkeypatch):
    nodes = [{"Alive": alive, "Resources": {"CPU": cores}} for alive, cores in ((True, 16), (True, 4), (False, 2))]
    addresses = []
    ray = SimpleNamespace(
        init=lambda address, **settings: addresses.append(address),
        cluster_resources=lambda: {"CPU": 20.0} | ({"GPU": gpus} if gpus else {}),
        nodes=lambda: nodes,
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert sweep.start_ray("auto", per_gpu) == (ray, share)
    assert addresses == ["auto"]


@pytest.mark.parametrize(
    ("error", "words", "says"),
    [
        (OSError("AF_UNIX path length cannot exceed 107 bytes: /long/plasma_store"), [], "RAY_TMPDIR"),
        (ConnectionError("Could not find any\nrunning Ray instance."), ["--address", "auto"], "--address auto"),
        (ValueError("Invalid address format: a b"), ["--address", "a b"], "Invalid address format"),
        (RuntimeError("Version mismatch"), ["--address", "auto"], "Version mismatch"),
        (LookupError(), [], "LookupError"),
    ],
)
def test_whatever_keeps_ray_from_starting_ends_in_one_line(error, words, says, monkeypatch, tmp_path, fails):
    def init(*_, **settings):
        raise error

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    assert says in fails(sweep.main, *PAIR, "--experiments", tmp_path, *words)


class FakeRay:
    """Ends one task at each `wait`, in the order of submission. `errors`: what ends a run and all that need it."""

    exceptions = SimpleNamespace(RayError=LookupError)

    def __init__(self, errors):
        self.errors, self.submitted = errors, 0

    def remote(self, **options):
        return lambda work: SimpleNamespace(remote=self.submit)

    def submit(self, command, log, folder, *needed):
        self.submitted += 1
        self.errors.update((log.stem, self.errors[task.stem]) for task in needed if task.stem in self.errors)
        return log

    def wait(self, tasks, timeout):
        for log in tasks:
            log.write_text(f"one line\nepoch 1 of {log.stem}\n")
            os.utime(log, (time.time() + 1,) * 2)
        return tasks[:1], tasks[1:]

    def get(self, log):
        if log.stem in self.errors:
            raise LookupError(self.errors[log.stem])
        return "done"

    def shutdown(self):
        pass


def test_a_failure_is_reported_for_the_run_and_those_that_need_it_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    errors = {"teacher_vgg8_seed0": "the\nnode died", "sskd_resnet8_seed0_teacher_vgg11_seed0": "no space"}
    monkeypatch.setattr(sweep, "start_ray", lambda *_: (FakeRay(errors), {}))
    monkeypatch.setattr(sweep, "REPORT", -1)  # progress is reported at every look
    pairs = [f"{teacher}:resnet8" for teacher in ("vgg8", "vgg11", "vgg13")]
    with pytest.raises(SystemExit) as end:
        sweep.main(["--pairs", *pairs, "--experiments", str(tmp_path)])
    assert end.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    student = "sskd_resnet8_seed0_teacher_{}_seed0"
    failed = ["failed: teacher_vgg8_seed0: node died", f"failed: {student.format('vgg8')}: node died"]
    failed += [f"failed: {student.format('vgg11')}: no space"]
    assert lines[0] == f"6 runs, logs in {tmp_path / 'logs'}"
    assert lines[-4:] == [*failed, "6 runs: 3 finished, 3 failed"]
    assert f"{student.format('vgg13')}: epoch 1 of {student.format('vgg13')}" in lines
    assert "[2/6] finished: teacher_vgg11_seed0: done" in lines


def test_a_finished_run_starts_no_process_unless_its_flags_data_or_teacher_are_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    at = ["--experiments", "runs"]
    teacher.main(["--arch", "resnet8", *at, *SHORT])
    student.main(["--t-path", "runs/teacher_resnet8_seed0", *at, *SHORT_STUDENT])
    student_folder = next(Path("runs").glob("sskd_*"))

    def started(*more):
        """How many runs a sweep gives to Ray, and what it prints."""
        ray = FakeRay({})
        monkeypatch.setattr(sweep, "start_ray", lambda *_: (ray, {}))
        capsys.readouterr()
        sweep.main(["--pairs", "resnet8:resnet8", *at, "--", *SHORT_STUDENT[:-6], *SHORT_STUDENT[-4:], *more])
        return ray.submitted, capsys.readouterr().out

    count, output = started()
    assert count == 0
    for folder, line in zip(("runs/teacher_resnet8_seed0", student_folder), output.splitlines()[1:3], strict=True):
        assert f"{json.loads((Path(folder) / 'result.json').read_text())['best_acc']:.2f}" in line
    assert output.splitlines()[-1] == "2 runs: 2 finished"
    count, output = started("--momentum", "0.5")  # the folders hold other runs: both scripts must say so
    assert (count, output.splitlines()[-1]) == (2, "2 runs: 2 finished")
    assert started("--ss-T", "0.25")[0] == 1  # a student with a folder of its own
    config = student_folder / "config.json"
    flags = json.loads(config.read_text())["flags"]
    for name in ("data", "teacher"):
        change(config, flags=flags | {name: "of others"})
        assert started()[0] == 1
    change(config, flags=flags)
    assert started()[0] == 0
    (student_folder / "result.json").unlink()
    assert started()[0] == 1


# ------------------------------------------------------------------------------------------------------------- on Ray

# so many epochs that no run ends within the second that a sweep takes to notice a signal
DATA = [*"--dataset synthetic --train-size 64 --test-size 16 --epoch 30 --milestones 15".split()]
STUDENTS = [*DATA, *"--t-epoch 3 --t-milestones 2".split()]
SWEEP = ["--pairs", "resnet8:resnet14x05", "--methods", "sskd", "--experiments", "runs"]
TEACHER = "teacher_resnet8_seed0"
SSKD = f"sskd_student_resnet14x05_weight0.1+0.9+2.7+10.0_T4.0+4.0+0.5_ratio1.0+0.75_seed0_{TEACHER}"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a sweep in `tmp_path`, in its own process group as a terminal does."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = []

    def check(*words, flags=STUDENTS):
        pytest.importorskip("ray")
        command = [sys.executable, "-W", "error", ROOT / "experiments" / "sweep.py", *words, "--", *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=tmp_path, text=True, start_new_session=True, **pipes))
        return started[-1]

    yield check
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same runs without Ray."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    common = ["--lr", "0.05", "--experiments", "runs"]
    student = ["student.py", "--t-path", f"runs/{TEACHER}", "--s-arch", "resnet14x05", *common, *STUDENTS]
    for command in (["teacher.py", "--arch", "resnet8", *common, *DATA], student):
        done = run_script(*command, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    return cwd / "runs"


def until_epoch(count, folder, phase, process):
    """Waits until a run of a sweep has finished `count` epochs of a phase."""
    log, deadline = folder / "log.jsonl", time.monotonic() + 900
    while not log.exists() or log.read_text().count(f'"phase": "{phase}"') < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_that_is_killed_starts_again_and_ends_bit_for_bit_the_same(start, undisturbed, tmp_path):
    process, runs = start(*SWEEP), tmp_path / "runs"
    logs = {TEACHER: f"{TEACHER}.log", SSKD: f"sskd_resnet14x05_seed0_{TEACHER}.log"}
    for folder, phase, kill in ((TEACHER, "teacher", signal.SIGKILL), (SSKD, "student", signal.SIGTERM)):
        until_epoch(2, runs / folder, phase, process)
        os.kill(int(re.search(r"^=== .* process (\d+)", (runs / "logs" / logs[folder]).read_text())[1]), kill)
    output, error = process.communicate()
    assert (process.returncode, error) == (0, ""), output
    assert output.splitlines()[-1] == "2 runs: 2 finished"
    for folder, log in logs.items():
        assert (runs / "logs" / log).read_text().count("\ncontinuing after epoch") == 1
        assert contents(runs / folder) == contents(undisturbed / folder)


@pytest.mark.slow
def test_ctrl_c_at_any_moment_and_the_same_command_again_is_as_never_stopped(start, undisturbed, tmp_path):
    runs = tmp_path / "runs"
    for folder, phase, epochs in ((TEACHER, "teacher", 5), (SSKD, "ss_head", 1), (SSKD, "student", 7)):
        process = start(*SWEEP)
        until_epoch(epochs, runs / folder, phase, process)
        os.killpg(process.pid, signal.SIGINT)
        output, error = process.communicate()
        assert (process.returncode, error) == (130, "sweep.py: stopped by SIGINT; the same command continues\n"), output
        outcomes = "2 not finished" if folder == TEACHER else "1 finished, 1 not finished"
        assert output.splitlines()[-1] == f"2 runs: {outcomes}"
        assert not (runs / folder / "result.json").exists()
    process = start(*SWEEP)
    output, error = process.communicate()
    assert (process.returncode, error) == (0, ""), output
    for folder in (TEACHER, SSKD):
        assert contents(runs / folder) == contents(undisturbed / folder)


@pytest.mark.slow
def test_a_teacher_that_fails_fails_its_students_and_no_others(start, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "teacher_resnet14_seed0").write_text("in the way")
    words = ["--pairs", "resnet14:resnet8", "resnet8:resnet14x05", "--methods", "kd", "sskd"]
    flags = [*SHORT, *"--t-epoch 1 --t-milestones 1".split()]
    process = start(*words, "--per-gpu", "2", "--experiments", "runs", flags=flags)
    output, error = process.communicate()
    assert (process.returncode, error) == (1, "")
    *_, failed, first, second, last = output.splitlines()
    assert failed.startswith("failed: teacher_resnet14_seed0: ") and "teacher.py: error: " in failed
    for method, line in (("kd", first), ("sskd", second)):
        assert line.startswith(f"failed: {method}_resnet8_seed0_teacher_resnet14_seed0: ")
        assert "teacher.py: error: " in line  # its teacher's
    assert last == "6 runs: 3 finished, 3 failed"
    assert not list(runs.glob("logs/*_resnet8_seed0_teacher_resnet14_seed0.log"))  # they were not started
    assert len(list(runs.glob("*/result.json"))) == 3
