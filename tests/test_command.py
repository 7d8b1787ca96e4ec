"""command.sh, most of it with a stand-in for Python."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import LOW_RATE, ROOT

import student
import teacher

OUTSIDE = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}


def command(*words, root=ROOT, **variables):
    """Runs command.sh from another folder."""
    script = ["bash", root / "command.sh", *words]
    return subprocess.run(script, env=OUTSIDE | variables, cwd="/", capture_output=True, text=True, timeout=120)


# ------------------------------------------------------------------------------------------------------------ its list


def published_commands():
    """The published tables' teachers, then the students' networks alone, each once, then a student a column."""
    published = json.loads((ROOT / "experiments" / "published_results.json").read_text())
    pairs = published["similar"]["pairs"] + published["cross"]["pairs"]
    rates = {arch: 0.01 if arch in LOW_RATE else 0.05 for pair in pairs for arch in pair}
    columns = zip(*pairs, strict=True)
    alone = [f"teacher.py --arch {arch}" for arch in dict.fromkeys(arch for column in columns for arch in column)]
    distilled = [f"student.py --t-path experiments/teacher_{t}_seed0 --s-arch {s}" for t, s in pairs]
    return [f"{line} --lr {rates[line.rpartition(' ')[2]]}" for line in alone + distilled]


def test_the_list_is_that_of_the_published_tables():
    done = command("--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.removeprefix("python ") for line in done.stdout.splitlines()]
    assert len(lines) == 24
    assert sorted(lines[:13]) == sorted(published_commands()[:13])  # the students' networks in the order of the list
    assert lines[:5] + lines[13:] == published_commands()[:5] + published_commands()[13:]


def test_the_list_can_be_read_in_the_script_line_by_line():
    text = (ROOT / "command.sh").read_text()
    assert [line for line in command("--dry-run").stdout.splitlines() if f"\n  {line}\n" not in text] == []


@pytest.mark.parametrize("words", [(), ("demo",)])
def test_every_command_is_one_that_the_scripts_accept(place, words):
    root, run = place
    assert run(*words).returncode == 0
    entries = {"teacher.py": teacher, "student.py": student}
    lines = [line.split() for line in record(root, "begin") if not line.startswith("experiments/table.py")]
    args = [entries[script].parse_args(flags) for script, *flags in lines]
    assert len(args) == (3 if words else 24)
    assert {(each.dataset, each.seed) for each in args} == {("synthetic" if words else "cifar100", 0)}


@pytest.mark.parametrize("words", [("nope",), ("--dry",), ("demo", "now"), ("--dry-run", "demo"), ("table",), ("",)])
def test_words_that_it_does_not_know_are_told_in_one_line(place, words):
    done = place[1](*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{' '.join(words) or 'an empty word'} is none of --dry-run setup demo test" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_is_the_head_of_the_script():
    done = command("--help")
    assert done.returncode == 0
    for word in ("--dry-run", "setup", "demo", "test", "test-slow", ".venv"):
        assert word in done.stdout


# ------------------------------------------------------------------------------------------------- running it, stopping

# Stands in for the Python of an environment. It has what is needed once the file `complete` lies beside it; a script
# fails where FAIL is among its words and waits for a signal where HOLD is. What it does is noted in RECORD.
WAIT = """import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
print("waits", flush=True)
signal.sigwait({signal.SIGINT})
print("stopped", *sys.argv[1:], file=open(os.environ["RECORD"], "a"))
sys.exit(130)
"""
STAND_IN = f"""#!/bin/sh
note() {{ echo "$*" && echo "$*" >>"$RECORD"; }}
here=${{0%/*}}
case "$1 $2" in
  "-c "*) exit "${{OLD:-0}}" ;;
  "- "*) [ -e "$here/complete" ] || echo torch ;;
  "-m venv")
    shift 2
    note venv "$@"
    for folder; do :; done
    mkdir "$folder/bin" && cp "$0" "$folder/bin/python"
    if [ -n "$NO_PIP" ]; then kill -9 $PPID; fi
    ;;
  "-m pip")
    shift 2
    note "$0" "$@"
    if [ -n "$HALF" ]; then kill -9 $PPID; fi
    : >"$here/complete"
    ;;
  *)
    note begin "$@"
    case " $* " in *" ${{HOLD:--}} "*) exec {sys.executable} -IS "$here/wait" "$@" ;; esac
    note end "$@"
    case " $* " in *" ${{FAIL:--}} "*) exit 3 ;; esac
    ;;
esac
"""


@pytest.fixture
def place(tmp_path):
    """command.sh in a folder of its own, and what runs it there in an active environment that has all."""
    for name in ("command.sh", "requirements.txt", "requirements-experiments.txt", "requirements-test.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "complete").touch()
    stand_in = tmp_path / "env" / "bin" / "python"
    stand_in.write_text(STAND_IN)
    (tmp_path / "env" / "bin" / "wait").write_text(WAIT)
    stand_in.chmod(0o755)
    variables = {"RECORD": str(tmp_path / "record"), "VIRTUAL_ENV": str(tmp_path / "env")}
    return tmp_path, lambda *words, **more: command(*words, root=tmp_path, **variables | more)


def record(root, word):
    file = root / "record"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.removeprefix(f"{word} ") for line in lines if line.startswith(f"{word} ")]


def summary(output):
    """The last lines of the output: {command: what became of it}."""
    rows = [line.split(" python ") for line in output.rpartition("\n\n")[2].splitlines()]
    return {words: outcome.strip() for outcome, words in rows}


def test_all_run_in_order_and_show_their_output(place):
    root, run = place
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.removeprefix("python ") for line in command("--dry-run").stdout.splitlines()]
    assert record(root, "begin") == record(root, "end") == lines
    assert summary(done.stdout) == dict.fromkeys(lines, "finished")
    assert all(f"\nbegin {line}\n" in done.stdout for line in lines)


def test_a_failure_keeps_only_the_students_of_that_teacher_from_running(place):
    root, run = place
    done = run(FAIL="vgg13")
    assert done.returncode == 1
    outcomes = summary(done.stdout)
    assert outcomes.pop("teacher.py --arch vgg13 --lr 0.05") == "failed (3)"
    of_vgg13 = [words for words in outcomes if "teacher_vgg13_seed0" in words]
    assert [outcomes.pop(words) for words in of_vgg13] == ["left out"] * 2
    assert list(outcomes.values()) == ["finished"] * 21
    assert len(record(root, "end")) == 22


def test_a_failed_student_fails_the_list(place):
    done = place[1](FAIL="ShuffleV2")  # as a network alone and as a student
    assert done.returncode == 1
    assert sorted(summary(done.stdout).values()) == ["failed (3)"] * 2 + ["finished"] * 22


def test_ctrl_c_stops_what_runs_and_starts_nothing_more(place):
    root, _ = place
    variables = {"RECORD": str(root / "record"), "VIRTUAL_ENV": str(root / "env"), "HOLD": "resnet56"}
    # pytest in the background of a shell ignores SIGINT, and what is ignored at the start can't be trapped
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    script = ["bash", root / "command.sh"]
    process = subprocess.Popen(
        script, env=OUTSIDE | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    signal.signal(signal.SIGINT, before)
    while process.stdout.readline() != "waits\n":
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    output, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "")
    assert record(root, "stopped") == ["teacher.py --arch resnet56 --lr 0.05"]
    assert len(record(root, "begin")) == 2
    assert list(summary("\n" + output).values()) == ["finished", "stopped"] + ["not run"] * 22


def test_the_demo_ends_with_its_figures_unless_something_failed(place):
    root, run = place
    done = run("demo")
    assert (done.returncode, done.stderr) == (0, "")
    ran = [line.split()[0] for line in record(root, "end")]
    assert ran == ["teacher.py", "teacher.py", "student.py", "experiments/table.py"]
    assert (
        done.stdout.index("\nfinished ") < done.stdout.index("end experiments/table.py") < done.stdout.index("What it")
    )
    failed = run("demo", FAIL="resnet14")
    assert (failed.returncode, list(summary(failed.stdout).values())) == (1, ["failed (3)", "finished", "left out"])


@pytest.mark.slow
def test_the_demo_ends_with_sskd_above_the_same_student_alone(tmp_path):
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".sh", ".txt") or path.name == "models":
            (shutil.copy if path.suffix == ".sh" else os.symlink)(path, tmp_path / path.name)
    (tmp_path / "experiments").mkdir()
    for path in (ROOT / "experiments").glob("*.*"):
        (tmp_path / "experiments" / path.name).symlink_to(path)
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "env" / "bin" / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", tmp_path / "command.sh", "demo"],
        env=OUTSIDE | {"VIRTUAL_ENV": str(tmp_path / "env")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    results = {
        path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("experiments/demo/*/result.json")
    }
    teacher_acc, alone, sskd = (
        next(result["best_acc"] for name, result in results.items() if name.startswith(start))
        for start in ("teacher_resnet14_", "teacher_resnet8_", "sskd_")
    )
    assert teacher_acc > sskd > alone + 4
    table = done.stdout[done.stdout.index("finished") :]
    assert all(f"{acc:.2f} (1)" in table for acc in (teacher_acc, alone, sskd))


# -------------------------------------------------------------------------------------------------------------- set-up


@pytest.fixture
def bare(place):
    """The same without an active environment: `python3` is the stand-in and has nothing that is needed."""
    root, run = place
    (root / "env" / "bin" / "complete").unlink()
    (root / "env" / "bin" / "python").rename(root / "env" / "bin" / "python3")
    path = f"{root / 'env' / 'bin'}:{OUTSIDE['PATH']}"
    return root, lambda *words, **more: run(*words, VIRTUAL_ENV="", PATH=path, **more)


def installs(root):
    return [line.partition(" -r")[2].split(" -r") for line in record(root, ".venv/bin/python install")]


def test_a_bare_machine_gets_a_venv_once(bare):
    root, run = bare
    assert run("setup").returncode == 0
    done = run("test", "-k", "name")
    assert done.returncode == 0
    assert record(root, "venv") == [".venv"]
    assert installs(root) == [["requirements.txt"]]
    assert not (root / ".venv" / "unfinished").exists()
    ruff, form, tests = record(root, "begin")
    assert (ruff, form) == ("-m ruff check .", "-m ruff format --check .")
    assert tests == "-m pytest -n auto --maxprocesses 8 -k name"


def test_tests_install_all_requirements(bare):
    root, run = bare
    assert run("test-slow").returncode == 0
    assert sorted(installs(root)[0]) == ["requirements-experiments.txt", "requirements-test.txt", "requirements.txt"]
    assert record(root, "begin") == ["-m pytest -m slow"]


@pytest.mark.parametrize("moment", ["NO_PIP", "HALF"])
def test_a_venv_whose_making_was_interrupted_is_made_anew(bare, moment):
    root, run = bare
    assert run("setup", **{moment: "1"}).returncode == -signal.SIGKILL
    assert (root / ".venv" / "bin" / "python").exists()
    done = run("setup")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, ".venv/bin/python has what requirements.txt names")
    assert record(root, "venv") == [".venv"] * 2


def test_a_venv_whose_python_is_gone_is_made_anew(bare):
    root, run = bare
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").symlink_to("/nowhere/python")
    assert run("setup").returncode == 0
    assert run("setup").returncode == 0
    assert (record(root, "venv"), len(installs(root))) == ([".venv"], 1)


def test_a_venv_that_another_call_is_making_is_left_to_it(bare):
    root, run = bare
    (root / ".venv").mkdir()
    (root / ".venv" / "unfinished").write_text(f"{os.getpid()}\n")
    done = run("setup")
    assert done.returncode == 2
    assert done.stderr.startswith(f"command.sh: process {os.getpid()} seems to be making .venv: wait for it")
    assert (root / ".venv" / "unfinished").exists()


def test_a_venv_of_ones_own_is_filled_and_never_made_anew(bare):
    root, run = bare
    (root / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(root / "env" / "bin" / "python3", root / ".venv" / "bin" / "python")
    assert run("setup").returncode == 0
    assert (record(root, "venv"), installs(root)) == ([], [["requirements.txt"]])


def test_a_system_that_has_all_is_used_as_it_is(bare):
    root, run = bare
    (root / "env" / "bin" / "complete").touch()
    assert run().returncode == 0
    assert len(record(root, "end")) == 24
    assert not (root / ".venv").exists()


@pytest.mark.parametrize("name", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_only_setup_installs_into_an_active_environment(place, name):
    root, run = place
    (root / "env" / "bin" / "complete").unlink()
    active = {"VIRTUAL_ENV": ""} | {name: str(root / "env")}
    done = run("demo", **active)
    python = root / "env" / "bin" / "python"
    line = f"command.sh: {root / 'env'} lacks torch: {python} -m pip install -r requirements.txt\n"
    assert (done.returncode, done.stderr, done.stdout) == (2, line, "")
    assert run("setup", **active).returncode == 0
    assert run(**active).returncode == 0
    assert not (root / ".venv").exists()


def test_a_python_that_is_too_old_is_told_and_nothing_is_made(bare):
    root, run = bare
    done = run("demo", OLD="1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "command.sh: python3 is older than Python 3.10\n")
    assert not (root / ".venv").exists()


def test_an_environment_without_python_is_told(place):
    root, run = place
    done = run("demo", VIRTUAL_ENV="/nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("command.sh: there is no /nowhere/bin/python")


def test_what_an_environment_lacks_is_told_by_name_and_version(place):
    root, run = place
    there = ["-r other.txt", "# absent>=1.0", "numpy>=1.2", "numpy[extra]>=1.2,<99 ; python_version > '3'"]
    not_there = ["numpy>=99.1", "no-such-package>=0.1"]
    python = root / "env" / "bin" / "python"
    python.write_text(f'#!/bin/sh\ncase $1 in -*) exec "{sys.executable}" "$@" ;; esac\n')  # runs no script
    (root / "requirements.txt").write_text("\n".join(there))
    assert run("demo").returncode == 0
    (root / "requirements.txt").write_text("\n".join(there + not_there))
    done = run("demo")
    assert done.returncode == 2
    assert "lacks numpy no-such-package: " in done.stderr
