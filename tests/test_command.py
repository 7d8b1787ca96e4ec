"""command.sh, most of it with a stand-in for Python."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import LOW_RATE, ROOT, write_teacher

import student
import teacher

VARIABLES = ("SEEDS", "GPUS", "FLAGS", "STUDENT_FLAGS", "DATASET", "METHODS", "PAIRS", "PYTHON")
TWO_PAIRS = "resnet20:resnet8 resnet14:resnet8"
KD, KD_TF = " --tf-weight 0 --ss-weight 0", " --ss-weight 0"


def environment(variables):
    return {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables


def command(*words, root=ROOT, **variables):
    """Runs command.sh from another folder."""
    return subprocess.run(
        ["bash", root / "command.sh", *words],
        env=environment(variables),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )


def dry_run(*words, **variables):
    done = command(*words, "--dry-run", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


# ----------------------------------------------------------------------------------------------- which commands it runs


def teacher_line(arch, rest=""):
    return f"python teacher.py --arch {arch} --lr {0.01 if arch in LOW_RATE else 0.05}{rest}"


def student_line(t_arch, s_arch, rest="", folder="experiments", seed=0):
    rate = 0.01 if s_arch in LOW_RATE else 0.05
    return f"python student.py --t-path {folder}/teacher_{t_arch}_seed{seed} --s-arch {s_arch} --lr {rate}{rest}"


def published_pairs():
    published = json.loads((ROOT / "experiments" / "published_results.json").read_text())
    return published["similar"]["pairs"], published["cross"]["pairs"]


def published_teachers():
    """The teachers in the order of their first appearance, then the students in that of theirs, each once."""
    similar, cross = published_pairs()
    columns = zip(*similar, *cross, strict=True)
    return list(dict.fromkeys(arch for column in columns for arch in column))


def test_all_lists_exactly_the_published_commands():
    lines = dry_run()
    teachers = [teacher_line(arch) for arch in published_teachers()]
    students = [student_line(*pair) for pairs in published_pairs() for pair in pairs]
    assert (len(teachers), len(students)) == (13, 11)
    assert sorted(lines[:13]) == sorted(teachers)
    assert lines[:5] == [teacher_line(arch) for arch in ("wrn_40_2", "resnet56", "resnet32x4", "vgg13", "ResNet50")]
    assert lines[13:] == students


def test_parts_make_up_the_whole():
    parts = [dry_run(part) for part in ("teachers", "similar", "cross")]
    assert [len(part) for part in parts] == [13, 5, 6]
    assert sum(parts, []) == dry_run("all") == dry_run()
    assert command("--dry-run", "cross").stdout.splitlines() == parts[2]


def test_seeds_repeat_teachers_and_students():
    pairs = published_pairs()[0]
    expected = [student_line(*pair, f" --seed {seed}", seed=seed) for seed in (0, 7) for pair in pairs]
    assert dry_run("similar", SEEDS="0 7") == expected
    assert len(dry_run(SEEDS="1 2 3")) == 3 * 24


def test_flags_reach_every_command_and_student_flags_students_only():
    lines = dry_run(FLAGS="--amp bf16 --compile", STUDENT_FLAGS="--few-shot 0.25")
    assert all(line.endswith(" --amp bf16 --compile") for line in lines[:13])
    assert all(line.endswith(" --amp bf16 --compile --few-shot 0.25") for line in lines[13:])


def test_data_set_has_its_own_folder():
    folder = "experiments/cifar10"
    more = f" --dataset cifar10 --experiments {folder}"
    assert dry_run("teachers", DATASET="cifar10")[0] == teacher_line("wrn_40_2", more)
    assert dry_run("cross", DATASET="cifar10")[0] == student_line("vgg13", "MobileNetV2", more, folder)
    assert dry_run(DATASET="cifar100") == dry_run()


def test_methods_are_the_ablation_of_each_pair():
    pairs = published_pairs()[1]
    alone = [teacher_line(arch) for arch in dict.fromkeys(arch for _, arch in pairs)]
    ablation = [student_line(*pair, weights) for pair in pairs for weights in (KD, KD_TF, "")]
    assert dry_run("cross", METHODS="ce kd tf sskd") == alone + ablation
    assert len(dry_run(METHODS="ce kd tf sskd")) == 13 + 3 * 11  # the networks alone are among the 13
    assert dry_run(METHODS="sskd") == dry_run()


def test_pairs_of_ones_own_bring_only_their_teachers():
    teachers, students = [teacher_line("resnet20"), teacher_line("resnet14")], ["resnet20", "resnet14"]
    sskd = [student_line(arch, "resnet8") for arch in students]
    assert dry_run(PAIRS=TWO_PAIRS) == teachers + sskd
    both = [student_line(arch, "resnet8", weights) for arch in students for weights in (KD, "")]
    assert dry_run(PAIRS=TWO_PAIRS, METHODS="ce kd sskd") == [*teachers, teacher_line("resnet8"), *both]


def test_a_pair_that_is_named_twice_is_run_once():
    assert dry_run(PAIRS="resnet20:resnet8 resnet20:resnet8") == dry_run(PAIRS="resnet20:resnet8")


def test_flags_may_stand_on_several_lines():
    assert dry_run(FLAGS="--amp bf16\n--compile") == dry_run(FLAGS="--amp bf16 --compile")


def test_study_and_demo_list_what_they_run():
    lines = [line.partition(" --dataset ")[0] for line in dry_run("study", SEEDS="0 5")]
    assert len(lines) == 2 * (2 + 3 + 2 + 2)
    assert lines[:4] == [teacher_line(arch) for arch in ("resnet20", "resnet8")] * 2  # none of few or noisy images
    folder = "experiments/fashion_mnist"
    kd, tf, sskd = ([student_line("resnet20", "resnet8", w, folder, s) for s in (0, 5)] for w in (KD, KD_TF, ""))
    assert sorted(lines[4:]) == sorted(kd * 3 + tf + sskd * 3)
    for setting in ("--few-shot 0.25", "--label-noise 0.3"):
        assert sum(line.endswith(setting) for line in dry_run("study", SEEDS="0 5")) == 4
    assert [line.split()[1] for line in dry_run("demo")] == ["teacher.py", "teacher.py", "student.py"]


def test_every_command_is_one_that_the_scripts_accept():
    for line in dry_run(METHODS="ce kd tf sskd", SEEDS="3", DATASET="synthetic", FLAGS="--epoch 2 --milestones 1"):
        script, *flags = line.split()[1:]
        args = {"teacher.py": teacher, "student.py": student}[script].parse_args(flags)
        assert (args.seed, args.dataset, args.experiments) == (3, "synthetic", "experiments/synthetic")


@pytest.mark.parametrize(
    ("words", "variables", "says"),
    [
        (["nope"], {}, "nope is none of all teachers similar cross"),
        (["similar", "--dry"], {}, "similar takes --dry-run, not --dry"),
        ([], {"METHODS": "sskd at"}, "METHODS: at is none of ce kd tf sskd"),
        ([], {"PAIRS": "resnet20"}, "PAIRS: resnet20 is no teacher:student"),
        (["cross"], {"PAIRS": TWO_PAIRS}, "PAIRS does not go with cross"),
        ([], {"GPUS": "0,1"}, "not 0,1"),
        ([], {"SEEDS": "one"}, "not one"),
        ([], {"SEEDS": "00"}, "not 00"),
        ([], {"FLAGS": "--amp bf16 --seed 3"}, "--seed goes into SEEDS"),
        (["study"], {"FLAGS": "--experiments=elsewhere"}, "--experiments cannot be in FLAGS: DATASET="),
        (["demo"], {"STUDENT_FLAGS": "--s-arch vgg8"}, "--s-arch cannot be in FLAGS: PAIRS="),
        ([], {"FLAGS": "--few-shot=0.25"}, "--few-shot goes into STUDENT_FLAGS"),
        (["demo", "--dry"], {}, "demo takes --dry-run, not --dry"),
        (["similar", "--dry-run", "--more"], {}, "similar takes --dry-run, not --dry-run --more"),
        ([], {"PAIRS": " "}, "SEEDS or PAIRS name nothing to run"),
        (["demo"], {"PAIRS": TWO_PAIRS}, "demo sets PAIRS itself"),
        (["study"], {"METHODS": "kd"}, "study sets METHODS itself"),
        (["study"], {"STUDENT_FLAGS": "--few-shot 0.5"}, "study sets --few-shot"),
        ([], {"METHODS": "kd sskd", "STUDENT_FLAGS": "--tf-weight 3"}, "METHODS=kd and tf set --tf-weight"),
        (["teachers"], {"PYTHON": "pyhton3"}, "there is no pyhton3"),
    ],
)
def test_what_it_does_not_know_is_named_in_one_line(words, variables, says):
    done = command(*words, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_is_the_head_of_the_script():
    done = command("--help")
    assert done.returncode == 0
    for name in (*VARIABLES, "setup", "demo", "test-slow", "bench", "table"):
        assert name in done.stdout


# --------------------------------------------------------------------------------------------------------- the queue

# Stands in for Python: notes in RECORD when it begins and ends, fails where FAIL is among its words, and, given HOLD,
# tells so through the fifo ARRIVED and waits until the fifo HOLD says go.
STAND_IN = f"""#!{sys.executable} -IS
import os, signal, sys

def write(name, *words):
    file = os.open(os.environ[name], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (" ".join(words) + "\\n").encode())
    os.close(file)

def stop(number, frame):
    write("RECORD", "stopped", *sys.argv[1:])
    sys.exit(143)

if sys.argv[1] == "-":
    sys.exit(0)  # asked whether it has all that requirements.txt names

signal.signal(signal.SIGTERM, stop)
write("RECORD", "begin", *sys.argv[1:])
print("output of", *sys.argv[1:])
if "HOLD" in os.environ:
    write("ARRIVED", *sys.argv[1:])
    os.read(os.open(os.environ["HOLD"], os.O_RDONLY), 1)
write("RECORD", "end", *sys.argv[1:])
sys.exit(3 if os.environ.get("FAIL", "-") in sys.argv else 0)
"""


class Fifo:
    """A named pipe, open at both ends, so that nobody waits to open it."""

    def __init__(self, path):
        os.mkfifo(path)
        self.path, self.file, self.rest = str(path), os.open(path, os.O_RDWR), b""

    def lines(self, count):
        found = []
        while len(found) < count:
            assert select.select([self.file], [], [], 60)[0], f"{count} lines were to come, but only {found} did"
            *whole, self.rest = (self.rest + os.read(self.file, 65536)).split(b"\n")
            found += [line.decode() for line in whole]
        assert len(found) == count
        return found


@pytest.fixture
def place(tmp_path):
    """command.sh in a folder of its own, and the variables that make it run the stand-in."""
    shutil.copy(ROOT / "command.sh", tmp_path)
    stand_in = tmp_path / "stand-in"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    return tmp_path, {"PYTHON": str(stand_in), "RECORD": str(tmp_path / "record")}


@pytest.fixture
def held(place):
    """The same with the fifos; yields also a function that starts command.sh."""
    root, variables = place
    arrived, hold = Fifo(root / "arrived"), Fifo(root / "hold")
    started = []

    def start(*words, **more):
        # pytest in the background of a shell ignores SIGINT, and what is ignored at the start can't be trapped
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        env = environment(variables | {"ARRIVED": arrived.path, "HOLD": hold.path} | more)
        process = subprocess.Popen(
            ["bash", root / "command.sh", *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        signal.signal(signal.SIGINT, before)
        started.append(process)
        return process

    yield root, arrived, hold, start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)
    for fifo in (arrived, hold):
        os.close(fifo.file)


def record(root, word):
    lines = (root / "record").read_text().splitlines()
    return [line.removeprefix(f"{word} ") for line in lines if line.startswith(f"{word} ")]


def summary(done):
    """The last lines of the output: {command: what became of it}."""
    rows = done.stdout.rpartition("\n\n")[2].splitlines()
    return {words: outcome for outcome, words in (re.split(r" {2,}(?=python )", row) for row in rows)}


def test_one_slot_runs_all_in_order_and_shows_their_output(place):
    root, variables = place
    done = command("similar", root=root, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.removeprefix("python ") for line in dry_run("similar")]
    assert record(root, "begin") == record(root, "end") == lines
    assert [line in done.stdout for line in (f"output of {line}" for line in lines)] == [True] * 5
    assert summary(done) == {f"python {line}": "finished" for line in lines}
    assert not (root / "experiments").exists()


def test_slots_share_a_queue_and_never_run_two_at_once(place):
    root, variables = place
    done = command(root=root, GPUS="0 1 5", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    expected = dry_run()
    assert list(summary(done)) == expected and set(summary(done).values()) == {"finished"}

    lines = (root / "record").read_text().splitlines()
    for gpu in (0, 1, 5):
        own = [line.removesuffix(f" --gpu-id {gpu}") for line in lines if line.endswith(f" --gpu-id {gpu}")]
        begins, ends = own[::2], own[1::2]
        assert [line.removeprefix("begin ") for line in begins] == [line.removeprefix("end ") for line in ends]
    ran = [line.partition(" --gpu-id")[0] for line in record(root, "begin")]
    assert sorted(f"python {line}" for line in ran) == sorted(expected)

    events = [line.split()[:2] for line in lines]
    assert events.index(["begin", "student.py"]) == 26  # after all 13 teachers began and ended
    logs = sorted((root / "experiments" / "logs").iterdir())
    assert len(logs) == 24 and all(log.read_text().startswith("output of ") for log in logs)
    for log in logs:
        assert f"log in experiments/logs/{log.name}" in done.stdout


def test_slots_run_side_by_side_and_a_gpu_may_have_several(held):
    root, arrived, hold, start = held
    process = start("similar", GPUS="0 0 1 1")
    running = arrived.lines(4)  # all four wait here, so they run at once
    assert sorted(line.split()[-1] for line in running) == ["0", "0", "1", "1"]
    os.write(hold.file, b"g")
    (fifth,) = arrived.lines(1)
    (ended,) = record(root, "end")
    assert fifth.split()[-1] == ended.split()[-1]  # in the place that came free
    os.write(hold.file, b"gggg")
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("gpus", ["", "0 1"])
def test_a_failure_does_not_keep_the_others_from_running(place, gpus):
    root, variables = place
    done = command("similar", root=root, GPUS=gpus, FAIL="resnet20", **variables)
    assert done.returncode == 1
    assert len(record(root, "end")) == 5
    failed = [line for line, outcome in summary(done).items() if outcome == "failed (3)"]
    assert failed == [student_line("resnet56", "resnet20")]
    assert list(summary(done).values()).count("finished") == 4


def test_no_student_learns_from_a_teacher_that_stopped_half_way(place):
    root, variables = place
    folder = root / "experiments" / "teacher_vgg13_seed0"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    done = command("cross", root=root, **variables)
    assert done.returncode == 1
    assert len(record(root, "end")) == 5
    assert summary(done)[student_line("vgg13", "MobileNetV2")] == "left out, no teacher"
    (folder / "result.json").touch()
    assert command("cross", root=root, **variables).returncode == 0


def test_no_student_learns_from_a_teacher_that_failed_in_this_sweep(place):
    root, variables = place
    folder = root / "experiments" / "teacher_resnet20_seed0"
    folder.mkdir(parents=True)
    for name in ("config.json", "result.json"):  # finished once, with other flags
        (folder / name).touch()
    done = command(root=root, PAIRS=TWO_PAIRS, FAIL="resnet20", GPUS="0 1", **variables)
    assert list(summary(done).values()) == ["failed (3)", "finished", "left out, no teacher", "finished"]


def test_slots_stop_when_the_script_was_killed(held):
    root, arrived, hold, start = held
    process = start("similar", GPUS="0 1")
    arrived.lines(2)
    process.kill()
    process.wait(timeout=60)
    os.write(hold.file, b"g" * 9)
    process.stdout.read()  # until the slots have ended too
    assert len(record(root, "begin")) == len(record(root, "end")) == 2


def test_a_python_that_is_too_old_is_told_and_nothing_is_made(tmp_path):
    shutil.copy(ROOT / "command.sh", tmp_path)
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 3\n")
    old.chmod(0o755)
    done = command("demo", root=tmp_path, PYTHON=str(old))
    assert (done.returncode, done.stdout) == (2, "")
    assert "is too old" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(("gpus", "slots"), [("", 1), ("0 1 1", 3)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_what_runs_and_starts_nothing_more(held, gpus, slots, number):
    root, arrived, _, start = held
    process = start(GPUS=gpus)
    running = arrived.lines(slots)
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (128 + number, "")
    assert sorted(record(root, "stopped")) == sorted(running) == sorted(record(root, "begin"))
    assert record(root, "end") == []
    outcomes = [line.partition("  ")[0] for line in output.rpartition("\n\n")[2].splitlines()]
    assert sorted(outcomes) == ["failed (143)"] * slots + ["not run"] * (24 - slots)


def test_table_through_command_sh(tmp_path):
    write_teacher(tmp_path, "resnet8", 12.5, 12.25, "--dataset", "synthetic")
    done = command("table", str(tmp_path), DATASET="synthetic", PYTHON=sys.executable)
    assert (done.returncode, done.stderr) == (0, "")
    assert "12.50 (1)  12.25 (1)" in done.stdout
    both = command("table", str(tmp_path), "--markdown", PYTHON=sys.executable)
    assert both.stdout.count("| published") == 30  # 13 rows of each table, and 2 later methods


@pytest.mark.slow
def test_a_sweep_stopped_half_way_ends_with_the_right_table(tmp_path):
    shutil.copy(ROOT / "command.sh", tmp_path)
    (tmp_path / "experiments").mkdir()
    for name in ("teacher.py", "student.py", "experiments/table.py", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    sweep = {"PYTHON": sys.executable, "DATASET": "synthetic", "SEEDS": "0 1", "PAIRS": TWO_PAIRS}
    sweep |= {"FLAGS": "--epoch 2 --milestones 1 --train-size 200 --test-size 100"}
    sweep |= {"STUDENT_FLAGS": "--t-epoch 2 --t-milestones 1"}

    script = ["bash", tmp_path / "command.sh"]
    with subprocess.Popen(script, env=environment(sweep), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("student 1/"):
                break
        process.terminate()
        rest = process.stdout.read()
    assert process.returncode == 143
    assert [rest.count(f"\n{outcome} ") for outcome in ("finished", "failed (143)", "not run")] == [4, 1, 3]

    assert subprocess.run(script, env=environment(sweep), timeout=600).returncode == 0
    done = command("table", root=tmp_path, **sweep)
    assert done.stdout.splitlines()[0] == f"synthetic, {sweep['FLAGS']}"
    for t_arch in ("resnet20", "resnet14"):
        found = sorted((tmp_path / "experiments" / "synthetic").glob(f"sskd_*_teacher_{t_arch}_seed*/result.json"))
        a, b = (json.loads(path.read_text())["best_acc"] for path in found)
        expected = f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f} (2)"
        assert re.search(rf"resnet8 +{t_arch} +SSKD +{re.escape(expected)} ", done.stdout)
