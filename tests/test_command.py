"""command.sh, mostly with a stand-in for Python: it records its calls and installs nothing."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT

import student
import teacher

BASH = shutil.which("bash")
OUTSIDE = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
REQUIREMENTS = ("requirements-experiments.txt", "requirements-test.txt", "requirements.txt")

# The file `complete` beside it says that this environment has all packages. FAIL holds words that make a script fail,
# CTRL_C one that makes it press Ctrl-C. OLD is the exit status of the check of Python's version. NO_PIP makes pip fail.
STAND_IN = """#!/bin/sh
here=${0%/*}
note() { echo "$*" && echo "$*" >>"$RECORD"; }
case "$1 $2" in
  "-c "*) exit "${OLD:-0}" ;;
  "- "*) [ -e "$here/complete" ] ;;
  "-m venv") note "$@" && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip") note "$0 $@" && [ ! "$NO_PIP" ] && touch "$here/complete" ;;
  *)
    note begin "$@"
    case " $* " in *" ${CTRL_C:--} "*) trap 'exit 130' INT && kill -INT 0 ;; esac
    for word; do case " $FAIL " in *" $word "*) exit 3 ;; esac done
    note end "$@"
    ;;
esac
"""


def command(*words, root=ROOT, **env):
    """Runs command.sh from another folder. It leads its own process group, so that Ctrl-C reaches nothing else."""
    start = {"env": OUTSIDE | env, "cwd": "/", "start_new_session": True}
    return subprocess.run([BASH, root / "command.sh", *words], capture_output=True, text=True, **start)


@pytest.fixture
def place(tmp_path):
    """A folder with command.sh, and a function that runs it there in an active environment with all packages."""
    for name in ("command.sh", *REQUIREMENTS):
        shutil.copy(ROOT / name, tmp_path)
    env = tmp_path / "env"
    (env / "bin").mkdir(parents=True)
    (env / "bin" / "complete").touch()
    (env / "bin" / "python").write_text(STAND_IN)
    (env / "bin" / "python").chmod(0o755)
    variables = {"RECORD": str(tmp_path / "record"), "VIRTUAL_ENV": str(env)}
    return tmp_path, lambda *words, **more: command(*words, root=tmp_path, **variables | more)


@pytest.fixture
def bare(place):
    """The same without an active environment: the stand-in is `python3` and has no packages."""
    root, run = place
    bin = root / "env" / "bin"
    (bin / "complete").unlink()
    (bin / "python").rename(bin / "python3")
    variables = {"VIRTUAL_ENV": "", "PATH": f"{bin}:{OUTSIDE['PATH']}"}
    return root, lambda *words, **more: run(*words, **variables | more)


def record(root, start):
    """The recorded calls that begin with these words, without them."""
    file = root / "record"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.removeprefix(f"{start} ") for line in lines if line.startswith(f"{start} ")]


def dry_run():
    return [line.removeprefix("python ") for line in command("--dry-run").stdout.splitlines()]


# ---------------------------------------------------------------------------------------------------------- the lists


def test_the_list_holds_the_experiments_of_the_published_tables_in_their_order():
    published = json.loads((ROOT / "experiments" / "published_results.json").read_text())
    pairs = [tuple(pair) for table in ("similar", "cross") for pair in published[table]["pairs"]]
    commands = [line.split() for line in dry_run()]
    networks, students = [words[2] for words in commands[:13]], commands[13:]
    assert networks[:5] == list(dict.fromkeys(teacher_arch for teacher_arch, _ in pairs))
    assert sorted(networks[5:]) == sorted({student_arch for _, student_arch in pairs})
    assert [(words[2], words[4]) for words in students] == [(f"experiments/teacher_{t}_seed0", s) for t, s in pairs]
    low = {"MobileNetV2", "ShuffleV1", "ShuffleV2"}
    assert {(words[-3], words[-1]) for words in commands} == {(a, "0.01" if a in low else "0.05") for a in networks}
    text = (ROOT / "command.sh").read_text()
    assert [words for words in dry_run() if f"\n  python {words}\n" not in text] == []


@pytest.mark.parametrize("words", ["nope", "--dry-run demo"])
def test_unknown_words_run_nothing_and_show_the_known_ones(place, words):
    root, run = place
    done = run(*words.split())
    assert (done.returncode, done.stdout, record(root, "begin")) == (2, "", [])
    assert all(f"bash command.sh {word} " in done.stderr for word in ("--dry-run", "demo", "setup", "test"))


# ------------------------------------------------------------------------------------------------ running and stopping


def test_all_commands_run_in_order_show_their_output_and_are_accepted_by_the_scripts(place):
    root, run = place
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert record(root, "begin") == record(root, "end") == dry_run()
    assert all(f"\nbegin {line}\n" in done.stdout for line in dry_run())
    run("demo")
    calls = [line.split() for line in record(root, "begin")]
    args = [{"teacher.py": teacher, "student.py": student}[script].parse_args(flags) for script, *flags in calls]
    assert (len(args), {each.seed for each in args}) == (24 + 3, {0})


def test_the_list_goes_on_after_a_failure_and_ends_with_the_commands_that_failed(place):
    root, run = place
    done = run(FAIL="ResNet50 ShuffleV2")
    assert record(root, "begin") == dry_run()
    failed = [f"python {words}" for words in dry_run() if words.split()[2] in ("ResNet50", "ShuffleV2")]
    failed += [f"python {words}" for words in dry_run() if "--s-arch ShuffleV2" in words]
    assert (done.returncode, done.stderr.splitlines()) == (1, ["failed:", *failed])


def test_ctrl_c_stops_the_list(place):
    root, run = place
    # a pytest in the background of a shell ignores SIGINT, and bash cannot trap a signal that is ignored from the start
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    done = run(CTRL_C="resnet56")
    signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stderr) == (130, "")
    assert record(root, "begin") == dry_run()[:2]


@pytest.mark.slow
def test_in_the_demo_sskd_is_above_the_same_student_alone(place):
    root, run = place
    for name in ("teacher.py", "student.py"):
        (root / name).symlink_to(ROOT / name)
    (root / "env" / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    done = run("demo")
    assert (done.returncode, done.stderr) == (0, "")
    results = {path.parent.name: json.loads(path.read_text()) for path in root.glob("experiments/demo/*/result.json")}
    teacher_acc, alone, sskd = (
        next(result["best_acc"] for name, result in results.items() if name.startswith(start))
        for start in ("teacher_resnet14_", "teacher_resnet8_", "sskd_")
    )
    assert teacher_acc > sskd > alone + 4


# -------------------------------------------------------------------------------------------------------- environments


def test_a_bare_machine_gets_a_venv_and_all_requirements_once(bare):
    root, run = bare
    for _ in range(2):
        assert run("test", "-k", "some name").returncode == 0
    assert record(root, "-m venv") == [".venv"]
    assert record(root, ".venv/bin/python -m pip install") == [" ".join(f"-r{name}" for name in REQUIREMENTS)]
    calls = ["-m ruff check .", "-m ruff format --check .", "-m pytest -n auto --maxprocesses 8 -k some name"]
    assert record(root, "begin") == calls * 2


def test_a_failed_installation_is_tried_again_and_an_old_python_gets_none(bare):
    root, run = bare
    assert run("demo", OLD="1").returncode == 2
    assert record(root, "-m venv") == []
    assert run("demo", NO_PIP="1").returncode == 2
    assert run("setup").stdout.splitlines()[-1] == ".venv/bin/python has everything in requirements.txt"
    assert record(root, ".venv/bin/python -m pip install") == ["-rrequirements.txt"] * 2
    assert record(root, "begin") == []


@pytest.mark.parametrize("fail", ["check", "--check", "pytest", ""])
def test_a_failure_of_lint_or_tests_is_the_exit_status(place, fail):
    root, run = place
    assert run("test", FAIL=fail).returncode == (3 if fail else 0)
    assert run("test-slow", "-k", "some", FAIL=fail).returncode == (3 if fail == "pytest" else 0)
    assert record(root, "begin")[-1] == "-m pytest -m slow -k some"


def test_a_python3_that_has_everything_is_used(bare):
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
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"required packages: {root / 'env'}/bin/python -m pip install -r requirements.txt\n")
    assert run("setup", **active).returncode == 0
    assert run("demo", **active).returncode == 0
    assert not (root / ".venv").exists()


@pytest.mark.parametrize(
    ("line", "status"), [("numpy>=1.2", 0), ("# absent>=1", 0), ("numpy>=99.1", 2), ("no-such-package>=0.1", 2)]
)
def test_the_packages_and_their_versions_decide_whether_something_is_lacking(place, line, status):
    root, run = place
    python = root / "env" / "bin" / "python"
    python.write_text(f'#!/bin/sh\ncase $1 in -*) exec "{sys.executable}" "$@" ;; esac\n')  # runs no script
    (root / "requirements.txt").write_text(f"-r other.txt\n\n{line}\n")
    assert run("demo").returncode == status


def test_the_requirements_list_every_imported_package():
    folders = (".", "experiments", "harness", "methods", "models", "tests")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    packages -= {*folders, *(path.stem for path in files)}
    listed = {line.split(">")[0].lower() for name in REQUIREMENTS for line in (ROOT / name).read_text().splitlines()}
    known = packages_distributions()
    assert [name for name in packages if not {each.lower() for each in known.get(name, [name])} & listed] == []


def test_a_clone_that_converts_line_endings_leaves_them_alone(place):
    root, _ = place
    shutil.copy(ROOT / ".gitattributes", root)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=true"]
    for words in ("init -q", "add .gitattributes command.sh", "commit -qm files", "clone -q . clone"):
        subprocess.run([*git, *words.split()], cwd=root, check=True)
    assert (root / "clone" / "command.sh").read_bytes() == (ROOT / "command.sh").read_bytes()
