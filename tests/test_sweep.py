"""experiments/sweep.py: which commands it makes, and how Ray runs them."""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
from conftest import LOW_RATE, ROOT, SHORT, TINY_STUDENT, contents, run_script, section

import baseline
import student
import teacher
from experiments import sweep

PARSE = {"teacher.py": teacher.parse_args, "student.py": student.parse_args, "baseline.py": baseline.parse_args}
RATIOS = ["0", "0.25", "0.5", "0.75", "1"]
PAIR = ["--pairs", "resnet20:resnet8"]


def parsed(line):
    """The script of a line that one types in a shell, and what it makes of its flags."""
    python, script, *flags = shlex.split(line)
    assert python == "python"
    return Path(script).name, PARSE[Path(script).name](flags)


@pytest.fixture
def listed(capsys, monkeypatch):
    """What --list prints, as (script, its flags)."""
    monkeypatch.chdir(ROOT)

    def check(*words):
        own = list(words)
        own.insert(own.index("--") if "--" in own else len(own), "--list")
        sweep.main(own)
        output = capsys.readouterr()
        assert output.err == ""
        return [parsed(line) for line in output.out.splitlines()]

    return check


def networks(jobs, script):
    return [args.arch if script == "teacher.py" else args.s_arch for name, args in jobs if name == script]


# ---------------------------------------------------------------------------------------------- which commands it makes


def test_without_options_it_lists_the_published_commands_in_their_order(listed):
    published = subprocess.run(
        ["bash", "command.sh", "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line for line in published.stdout.splitlines() if line.startswith("python ")]
    assert len(lines) == 24
    assert listed() == [parsed(line) for line in lines]


def test_a_part_has_its_teachers_and_its_students(listed):
    similar, cross = listed("similar"), listed("cross")
    assert networks(similar, "teacher.py") == ["wrn_40_2", "resnet56", "resnet32x4", "vgg13"]
    assert networks(cross, "teacher.py") == ["vgg13", "ResNet50", "resnet32x4", "wrn_40_2"]
    assert (len(similar), len(cross)) == (4 + 5, 4 + 6)
    assert listed("teachers") == listed()[:13]
    assert networks(listed("teachers", *PAIR), "teacher.py") == ["resnet20"]


def test_a_grid_of_5_by_2_seeds_by_2_methods_is_20_students_of_2_teachers(listed):
    jobs = listed(*PAIR, "--seeds", "0", "1", "--methods", "sskd", "kd+ss", "--grid", "ratio-ss", *RATIOS)
    assert [name for name, _ in jobs] == ["teacher.py"] * 2 + ["student.py"] * 20
    assert [(args.arch, args.seed, args.experiments) for _, args in jobs[:2]] == [
        ("resnet20", 0, "experiments"),
        ("resnet20", 1, "experiments"),
    ]
    found = {(args.seed, args.tf_weight, args.ratio_ss, args.experiments, args.t_path) for _, args in jobs[2:]}
    assert found == {
        (seed, weight, float(ratio), f"experiments/ratio-ss_{ratio}", f"experiments/teacher_resnet20_seed{seed}")
        for seed in (0, 1)
        for weight in (2.7, 0.0)
        for ratio in RATIOS
    }


def test_grids_multiply_and_a_method_without_the_flag_runs_once_outside(listed):
    grids = ["--grid", "ss-T", "0.1", "0.5", "--grid", "t-milestones", "10 20", "30 45"]
    jobs = listed(*PAIR, "--methods", "alone", "kd", "sskd", *grids)
    assert [name for name, _ in jobs] == ["teacher.py"] * 2 + ["baseline.py"] + ["student.py"] * 4
    assert {args.experiments for _, args in jobs[:3]} == {"experiments"}
    assert {(args.ss_T, *args.t_milestones, args.experiments) for _, args in jobs[3:]} == {
        (0.1, 10, 20, "experiments/ss-T_0.1_t-milestones_10-20"),
        (0.1, 30, 45, "experiments/ss-T_0.1_t-milestones_30-45"),
        (0.5, 10, 20, "experiments/ss-T_0.5_t-milestones_10-20"),
        (0.5, 30, 45, "experiments/ss-T_0.5_t-milestones_30-45"),
    }


def test_a_grid_varies_students_and_their_rate_but_no_teacher(listed):
    jobs = listed("--pairs", "vgg13:MobileNetV2", "--methods", "alone", "sskd", "--grid", "lr", "0.1", "0.2")
    assert [(name, args.lr) for name, args in jobs] == [
        ("teacher.py", 0.05),
        ("teacher.py", 0.1),
        ("teacher.py", 0.2),
        ("student.py", 0.1),
        ("student.py", 0.2),
    ]
    both = listed(*PAIR, "--methods", "sskd", "kd-4views", "--grid", "ss-weight", "1", "10")
    assert [args.ss_weight for _, args in both[1:]] == [1, 10, 0]  # kd-4views is what it is
    without = listed(*PAIR, "--methods", "kd+tf", "kd+ss", "--grid", "ratio-ss", "0", "1")  # kd+tf has no ss
    assert [(args.ss_weight, args.ratio_ss) for _, args in without[1:]] == [(0, 0.75), (10, 0), (10, 1)]


def test_every_method_is_a_command_with_its_published_rate(listed):
    jobs = listed("--pairs", "vgg13:ShuffleV2", "--methods", *sweep.KNOWN)[1:]
    assert len(jobs) == 17 and {args.lr for _, args in jobs} == {0.01}
    assert [args.method for name, args in jobs if name == "baseline.py"] == list(sweep.METHODS)
    weights = [(args.ce_weight, args.kd_weight, args.tf_weight, args.ss_weight) for name, args in jobs if "stu" in name]
    assert sorted(weights) == [(0.1, 0.9, tf, ss) for tf in (0, 2.7) for ss in (0, 10)]
    rates = {args.arch: args.lr for name, args in listed() if name == "teacher.py"}
    assert rates == {arch: 0.01 if arch in LOW_RATE else 0.05 for arch in rates}


def test_flags_go_to_every_script_that_has_them_and_few_images_to_no_teacher(listed):
    flags = "--amp bf16 --lr=0.2 --few-shot 0.25 --label-noise=0.1 --kd-T 2 --t-epoch 9 --weight 3".split()
    jobs = listed(*PAIR, "--methods", "alone", "sskd", "crd", "--", *flags)
    (_, trained), (_, alone), (_, sskd), (_, crd) = jobs
    assert {(args.amp, args.lr) for _, args in jobs} == {("bf16", 0.2)}
    assert (trained.arch, trained.few_shot, trained.label_noise) == ("resnet20", 1, 0)
    assert {(args.few_shot, args.label_noise) for args in (alone, sskd, crd)} == {(0.25, 0.1)}
    assert (sskd.kd_T, crd.kd_T, sskd.t_epoch, crd.weight) == (2, 2, 9, 3)


def test_features_are_stored_for_the_methods_that_can_use_them(listed):
    jobs = listed(*PAIR, "--methods", "alone", "sskd", "crd", "at", "--", "--t-features", "disk")
    features = [args.t_features for name, args in jobs if name != "teacher.py"]
    assert features == ["disk", "disk", "compute"]


def test_one_teacher_may_serve_all_seeds(listed):
    jobs = listed(*PAIR, "--seeds", "1", "2", "--teacher-seed", "7")
    assert [(name, args.seed) for name, args in jobs] == [("teacher.py", 7), ("student.py", 1), ("student.py", 2)]
    assert {args.t_path for _, args in jobs[1:]} == {"experiments/teacher_resnet20_seed7"}


def test_trained_teachers_are_taken_as_they_are(listed, tmp_path, fails):
    for name in ("teacher_resnet20_seed1/ckpt", "teacher_resnet20", "vgg13_vanilla", "teacher_vgg8_seed0/ckpt"):
        (tmp_path / name).mkdir(parents=True)
    pairs = ["--teachers", str(tmp_path), "--pairs", "resnet20:resnet8", "vgg13:resnet8"]
    jobs = listed(*pairs, "--seeds", "0", "1")
    assert {name for name, _ in jobs} == {"student.py"}
    vgg13 = tmp_path / "vgg13_vanilla"
    resnet20 = [tmp_path / "teacher_resnet20", tmp_path / "teacher_resnet20_seed1"]
    assert [args.t_path for _, args in jobs] == list(map(str, [resnet20[0], vgg13, resnet20[1], vgg13]))
    assert listed(*pairs, "--teacher-seed", "1")[0][1].t_path == str(resnet20[1])

    missing = fails(sweep.main, "--list", "--teachers", tmp_path, "--pairs", "resnet56:resnet8")
    assert f"--teachers {tmp_path}: no resnet56 of seed 0 there" in missing
    (tmp_path / "teacher_vgg8_seed0" / "config.json").touch()
    unfinished = fails(sweep.main, "--list", "--teachers", tmp_path, "--pairs", "vgg8:resnet8")
    assert f"{tmp_path / 'teacher_vgg8_seed0'}: this run is not finished" in unfinished


def test_teacher_and_student_hold_the_same_images_out(listed, tmp_path, fails):
    words = ["--", "--val-fraction=0.1"]
    (_, trained), (_, student) = listed(*PAIR, *words)
    assert trained.val_fraction == student.val_fraction == 0.1
    assert student.t_path == "experiments/teacher_resnet20_val0.1_seed0"
    (tmp_path / "teacher_resnet20_seed0").mkdir()  # has seen all images
    assert "no resnet20 of seed 0 there" in fails(sweep.main, "--list", "--teachers", tmp_path, *PAIR, *words)
    (tmp_path / "teacher_resnet20_val0.1_seed0").mkdir()
    assert listed("--teachers", str(tmp_path), *PAIR, *words)[0][1].t_path.endswith("_val0.1_seed0")


def test_the_list_can_be_pasted_into_a_shell_from_any_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = "my runs; rm *"
    sweep.main([*PAIR, "--experiments", folder, "--list"])
    (_, first), (_, second) = (parsed(line) for line in capsys.readouterr().out.splitlines())
    assert (first.experiments, second.t_path) == (folder, f"{folder}/teacher_resnet20_seed0")
    script = shlex.split(sweep.command(sweep.Job("", "teacher.py", [], Path())))[1]
    assert (tmp_path / script).samefile(ROOT / "teacher.py")
    assert list(tmp_path.iterdir()) == []


def test_the_parsers_are_asked_no_more_often_for_many_seeds(listed, monkeypatch):
    calls = []
    for script, (parse, needed) in sweep.SCRIPTS.items():
        counting = (lambda flags, parse=parse: (calls.append(flags), parse(flags))[1], needed)
        monkeypatch.setitem(sweep.SCRIPTS, script, counting)
    counts = []
    for seeds in (["0"], ["0", "1", "2", "3", "4"]):
        sweep.knows.cache_clear()
        calls.clear()
        assert len(listed(*PAIR, "--seeds", *seeds, "--", "--amp", "bf16")) == 2 * len(seeds)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


@pytest.fixture
def page_runs(listed, tmp_path, monkeypatch):
    """The flags of the runs of all sweeps in the last of some blocks of commands, once each, the others run before."""
    monkeypatch.chdir(tmp_path)  # where the teachers that --teachers names are finished
    for seed in (0, 1, 2):
        (tmp_path / "experiments" / "cifar100" / f"teacher_resnet20_seed{seed}").mkdir(parents=True)

    def check(study, *titles):
        parts = [re.findall(r"```bash\n(.*?)```", section(study, title), re.DOTALL) for title in titles]
        *before, block = map("\n".join, parts)
        print_it = 'python() { printf "%s\\n" "$*"; }\n'
        script = "\n".join(["exec 3>&1 >/dev/null", print_it, *before, "exec >&3", block])
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        sweeps = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("experiments/sweep.py")]
        return list({repr(args): vars(args) for words in sweeps for _, args in listed(*words)}.values())

    return check


def recorded(name):
    """The flags of the runs that a study's record has, but for those that a run notes otherwise than one gives them."""
    lines = (ROOT / "experiments" / f"{name}.jsonl").read_text().splitlines()
    noted = ("teacher", "t_features")
    return [{k: v for k, v in json.loads(line)["flags"].items() if k not in noted} for line in lines]


def is_run(args, flags):
    return all(args.get(name) == value for name, value in flags.items())


@pytest.mark.parametrize(("study", "name"), [("CIFAR-100", "cifar100"), ("Fashion-MNIST", "fashion_mnist")])
def test_a_studys_commands_are_the_runs_of_its_record(study, name, page_runs):
    found, runs = page_runs(study, "Running it"), recorded(name)
    assert len(found) == len(runs) > 0
    for flags in runs:
        assert sum(is_run(args, flags) for args in found) == 1, flags


def test_the_commands_of_what_was_not_run_are_of_other_runs(page_runs):
    found, runs = page_runs("CIFAR-100", "Running it", "Not run"), recorded("cifar100")
    assert found
    assert not any(is_run(args, flags) for args in found for flags in runs)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nope"], "invalid choice: 'nope'"),
        (["similar", *PAIR], "similar names its own pairs"),
        (["--pairs", "resnet20"], "--pairs: resnet20 is not TEACHER:STUDENT"),
        (["--pairs", "resnet20:resnet9"], "--pairs: resnet20:resnet9 is not TEACHER:STUDENT"),
        (["--seeds", "one"], "--seeds: 'one' is not a whole number"),
        (["--methods", "nst"], "invalid choice: 'nst'"),
        (["--per-gpu", "0"], "--per-gpu: '0'"),
        (["--amp", "bf16"], "flags of the scripts go behind --"),
        (["teachers", "--teachers", "there"], "--teachers brings the teachers"),
        (["--teacher-seed", "1", "--", "--val-fraction", "0.1"], "--val-fraction: students of other seeds"),
        (["--grid", "ratio-ss"], "--grid: give each flag once, with its values"),
        (["--grid", "lr", "1", "--grid", "lr", "2"], "--grid: give each flag once"),
        (["--grid", "nope", "1"], "--nope: no such flag in student.py, teacher.py"),
        (["--methods", "crd", "--grid", "ratio-ss", "1"], "--ratio-ss: no such flag in baseline.py"),
        (["--grid", "seed", "0", "1"], "--seed can't be the same for all runs: --seeds sets it"),
        (["--grid", "ratio-ss", "0.5", "2"], "--ratio-ss: '2' is not a number of at least 0 and at most 1"),
        (["--grid", "lr", "1", "--", "--lr", "2"], "--lr behind -- contradicts --grid"),
        (["--methods", "kd-4views", "--", "--ss-weight=1"], "--ss-weight behind -- contradicts --grid or --methods"),
        (["--", "--epochs", "3"], "--epochs: no such flag in student.py, teacher.py"),
        (["--", "bf16"], "'bf16' behind -- is no flag"),
        (["--", "--amp"], "--amp: expected one argument"),
        (["--", "--amp", "int8"], "invalid choice: 'int8'"),
        (["--", "--compile", "yes"], "unrecognized arguments: yes"),
        (["--", "-h"], "-h can't be the same for all runs"),
        (["--", "--seed=3"], "--seed can't be the same for all runs"),
        (["--", "--experiments", "there"], "--experiments can't be the same for all runs"),
        (["--", "--t-path", "there"], "--t-path can't be the same for all runs"),
        (["--", "--s-arch", "vgg8"], "--s-arch can't be the same for all runs"),
        (["--", "--arch", "vgg8"], "--arch can't be the same for all runs"),
        (["--", "--gpu-id", "1"], "--gpu-id can't be the same for all runs: Ray chooses"),
        (["--", "--overwrite"], "--overwrite can't be the same for all runs"),
    ],
)
def test_what_it_cannot_do_is_said_in_one_line(words, says, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in fails(sweep.main, *words)
    assert list(tmp_path.iterdir()) == []


def test_without_ray_it_says_what_to_install(fails, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    error = fails(sweep.main, *PAIR, "--experiments", tmp_path)
    assert "pip install -r requirements-experiments.txt" in error


# ------------------------------------------------------------------------------------------------------- what may start

CPU = torch.device("cpu")


def job(name, script="student.py", **more):
    return sweep.Job(name, script, [], Path("none.log"), **more)


def test_a_student_waits_for_its_teacher_and_is_left_out_if_that_fails():
    trained, failed = job("t", "teacher.py", outcome=sweep.RUNS), job("u", "teacher.py", outcome=sweep.FAILED)
    first, second = job("a", "baseline.py", teacher=trained), job("b", "baseline.py", teacher=failed)
    assert not sweep.may_start(first, {}, CPU) and not sweep.may_start(second, {}, CPU)
    assert (first.outcome, second.outcome) == (sweep.WAITS, sweep.LEFT_OUT)
    trained.outcome = sweep.FINISHED
    assert sweep.may_start(first, {}, CPU)


def test_students_with_the_same_ss_head_wait_until_one_of_them_has_trained_it(tmp_path):
    head, trainers = tmp_path / "head.pth", {}
    first, second, third = (job(name, head=head) for name in "abc")
    apart = job("d", head=tmp_path / "other.pth")

    def start(waiting):
        if started := sweep.may_start(waiting, trainers, CPU):
            waiting.outcome = sweep.RUNS
        return started

    assert [start(each) for each in (first, second, third, apart)] == [True, False, False, True]
    first.outcome = sweep.FAILED  # before the head was there: the next one trains it
    assert [start(second), start(third)] == [True, False]
    sweep.end(second, 2, "error: another process is running in there", [second])
    assert (second.outcome, start(second), start(third)) == (sweep.WAITS, False, True)
    second.rest = time.monotonic()
    assert not start(second)
    head.touch()
    assert start(second)
    assert start(job("e", head=head))


def test_a_head_that_could_not_be_kept_is_waited_for_no_longer(tmp_path):
    trainer = job("a", head=tmp_path / "head.pth", outcome=sweep.FINISHED)
    assert sweep.may_start(job("b", head=trainer.head), {trainer.head: trainer}, CPU)


def test_the_head_waited_for_is_the_one_that_the_student_leaves(runs):
    flags = [*TINY_STUDENT, "--ratio-ss", "0.5", "--t-path", str(runs.teacher)]
    (head,) = (runs.teacher / "ckpt").glob("ss_head_*.pth")
    assert sweep.ss_head(flags, CPU) == head
    assert sweep.ss_head([*flags, "--seed", "1"], CPU) != head
    assert sweep.ss_head([*flags, "--t-path", "nowhere"], CPU).exists()  # the run starts, and says what is wrong


def test_what_becomes_of_a_run_follows_from_its_status(capsys):
    expected = {0: sweep.FINISHED, 1: sweep.FAILED, 2: sweep.FAILED, 130: sweep.STOPPED}
    jobs = [job(f"run {status}") for status in expected]
    for each, status in zip(jobs, expected, strict=True):
        sweep.end(each, status, "the last line", jobs)
    assert [each.outcome for each in jobs] == list(expected.values())
    capsys.readouterr()
    sweep.summary(jobs)
    assert capsys.readouterr().out.splitlines() == [
        "failed: run 1: the last line",
        "failed: run 2: the last line",
        "stopped: run 130",
        "4 runs: 1 finished, 2 failed, 1 stopped",
    ]


# --------------------------------------------------------------------------------------------------------------- on Ray

# Epochs enough that no run ends in the second or so that a sweep takes to see a signal
DATA = [*"--dataset synthetic --train-size 128 --test-size 32 --epoch 30 --milestones 15".split()]
STUDENTS = [*DATA, *"--t-epoch 3 --t-milestones 2".split()]
SWEEP = ["--pairs", "resnet8:resnet14x05", "--methods", "sskd", "--experiments", "runs"]
TEACHER = "teacher_resnet8_seed0"
SSKD = f"sskd_student_resnet14x05_weight0.1+0.9+2.7+10.0_T4.0+4.0+0.5_ratio1.0+0.75_seed0_{TEACHER}"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a sweep in a process group of its own, as a terminal does; its folder is `tmp_path`."""
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


@pytest.fixture
def cluster(monkeypatch):
    """Ray's test cluster: a head that runs nothing, for nodes that may be killed."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    memory = {"object_store_memory": 100 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    made.add = lambda **resources: made.add_node(**memory, **resources)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same runs by hand."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    rate, runs = ["--lr", "0.05"], ["--experiments", "runs"]
    done = run_script("teacher.py", "--arch", "resnet8", *rate, *runs, *DATA, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    words = ["--t-path", f"runs/{TEACHER}", "--s-arch", "resnet14x05", *rate, *runs, *STUDENTS]
    done = run_script("student.py", *words, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return cwd / "runs"


def until(condition, process):
    """Waits for something that a running sweep does."""
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ending(process):
    """Exit status and standard output of a sweep, which has nothing to say on stderr."""
    output, error = process.communicate(timeout=900)
    return process.returncode, output, error


def epochs(folder, phase):
    log = folder / "log.jsonl"
    return log.read_text().count(f'"phase": "{phase}"') if log.exists() else 0


def starts(log):
    """(begin, end, process, CUDA_VISIBLE_DEVICES) of each time that a run was started; end is None if it was killed."""
    found = []
    for line in log.read_text().splitlines():
        if begins := re.match(rf"{sweep.BEGINS} (\S+) on .*, process (\d+), CUDA_VISIBLE_DEVICES (\S+):", line):
            found.append([datetime.fromisoformat(begins[1]), None, int(begins[2]), begins[3]])
        elif ends := re.match(rf"{sweep.ENDS} (\S+), status", line):
            found[-1][1] = datetime.fromisoformat(ends[1])
    return found


def parent_of(process):
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def kill_node(cluster, process):
    """Kills the node on which a process runs: its raylet first, and then all that it had started."""
    raylet = parent_of(process)
    (node,) = (
        node for node in cluster.worker_nodes if raylet in [each.process.pid for each in node.all_processes["raylet"]]
    )
    workers = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal() and parent_of(p.name) == raylet]
    for each in (raylet, *workers):
        os.kill(each, signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)


@pytest.mark.slow
def test_runs_of_a_node_that_is_killed_continue_on_another_and_end_bit_for_bit_the_same(
    cluster, start, undisturbed, tmp_path
):
    for _ in range(2):
        cluster.add(num_cpus=1)
    process = start("--address", cluster.address, *SWEEP)
    runs, logs = tmp_path / "runs", tmp_path / "runs" / "logs"
    for folder, phase, name in ((TEACHER, "teacher", TEACHER), (SSKD, "student", f"sskd_resnet14x05_seed0_{TEACHER}")):
        until(lambda folder=folder, phase=phase: epochs(runs / folder, phase) >= 2, process)
        kill_node(cluster, starts(logs / f"{name}.log")[-1][2])
        cluster.add(num_cpus=1)
        assert not (runs / folder / "result.json").exists()
    status, output, error = ending(process)
    assert (status, error) == (0, ""), output
    assert output.splitlines()[-1] == "2 runs: 2 finished"
    for folder, name in ((TEACHER, TEACHER), (SSKD, f"sskd_resnet14x05_seed0_{TEACHER}")):
        assert len(starts(logs / f"{name}.log")) >= 2
        assert "continuing after epoch" in (logs / f"{name}.log").read_text()
        assert contents(runs / folder) == contents(undisturbed / folder)


@pytest.mark.slow
def test_two_runs_at_most_share_a_gpu_and_each_sees_only_its_own(cluster, start, tmp_path):
    cluster.add(num_cpus=1, num_gpus=2)
    seeds = list(map(str, range(6)))
    words = ["teachers", "--pairs", "resnet8:resnet8", "--seeds", *seeds, "--experiments", "runs"]
    process = start("--address", cluster.address, "--per-gpu", "2", *words, flags=SHORT)
    status, output, error = ending(process)
    assert (status, error) == (0, ""), output
    runs = [starts(tmp_path / "runs" / "logs" / f"teacher_resnet8_seed{seed}.log") for seed in seeds]
    assert [len(each) for each in runs] == [1] * 6
    at_once = {}
    for gpu in ("0", "1"):
        spans = [(begin, end) for ((begin, end, _, seen),) in runs if seen == gpu]
        at_once[gpu] = max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans)
    assert {seen for ((*_, seen),) in runs} == {"0", "1"}
    assert at_once == {"0": 2, "1": 2}


@pytest.mark.slow
def test_ctrl_c_at_any_moment_and_the_same_command_again_is_as_never_stopped(start, undisturbed, tmp_path):
    runs = tmp_path / "runs"
    moments = [("teacher", TEACHER, 0), ("teacher", TEACHER, 5), ("ss_head", SSKD, 1), ("student", SSKD, 7)]
    for phase, folder, epoch in moments:
        process = start(*SWEEP)
        log = runs / "logs" / f"{TEACHER}.log"
        until(lambda p=phase, f=folder, e=epoch, log=log: epochs(runs / f, p) >= e and log.exists(), process)
        os.killpg(process.pid, signal.SIGINT)
        status, output, error = ending(process)
        assert (status, error) == (130, "sweep.py: stopped by SIGINT; the same command continues\n"), output
        assert "1 stopped" in output.splitlines()[-1]
        assert not (runs / folder / "result.json").exists()
    status, output, error = ending(start(*SWEEP))
    assert (status, error) == (0, ""), output
    for folder in (TEACHER, SSKD):
        assert contents(runs / folder) == contents(undisturbed / folder)


@pytest.mark.slow
def test_failed_runs_leave_out_their_students_held_ones_are_waited_for_and_one_ss_head_serves_all(start, tmp_path):
    runs = tmp_path / "runs"
    (runs / "teacher_resnet14_seed0").mkdir(parents=True)
    (runs / "teacher_resnet14_seed0" / "config.json").write_text("{}")  # damaged: its teacher fails
    held = runs / f"kd_student_resnet14x05_weight0.1+0.9+0.0_T4.0_seed0_{TEACHER}"
    held.mkdir()
    words = ["--pairs", "resnet14:resnet8", "resnet8:resnet14x05", "--methods", "kd", "sskd", "kd+tf", "kd-4views"]
    with open(held / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(
            *words, "--per-gpu", "2", "--experiments", "runs", flags=[*SHORT, *"--t-epoch 1 --t-milestones 1".split()]
        )
        lines = iter(process.stdout.readline, "")
        assert any(line.startswith("waits: kd_resnet14x05_seed0") for line in lines)
    status, output, error = ending(process)
    assert (status, error) == (1, "")
    *others, last = output.splitlines()[-6:]
    assert last == "10 runs: 1 failed, 5 finished, 4 left out"
    assert others[0].startswith("failed: teacher_resnet14_seed0: teacher.py: error: ")
    names = [f"{method}_resnet8_seed0_teacher_resnet14_seed0" for method in ("kd", "sskd", "kd+tf", "kd-4views")]
    assert others[1:] == [f"left out: {name}: its teacher is not finished: teacher_resnet14_seed0" for name in names]
    logs = [
        (runs / "logs" / f"{m}_resnet14x05_seed0_{TEACHER}.log").read_text() for m in ("sskd", "kd+tf", "kd-4views")
    ]
    assert sorted(log.count("ss_head 1/1") for log in logs) == [0, 0, 1]
    assert sorted(log.count("SS head: read from") for log in logs) == [0, 1, 1]
