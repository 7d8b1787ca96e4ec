"""flags.py: the flags, and how a script ends that can't even begin."""

import argparse
import ast
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, end_of, run_script

import baseline
import cifar
from harness import flags
import methods
import models
import student
import teacher

SCRIPTS = ["teacher.py", "student.py", "baseline.py", "cifar.py"]
SCRIPTS += [f"experiments/{name}.py" for name in ("bench", "plot", "probe", "similarity", "sweep")]
ENTRIES = SCRIPTS[:3]
ALL = [*SCRIPTS, "experiments/table.py"]  # the last needs nothing but Python itself


def test_the_names_that_flags_take_are_those_that_there_are():
    assert tuple(models.model_dict) == flags.NETWORKS
    assert tuple(methods.METHODS) == flags.METHODS
    assert (*cifar.STATISTICS, "folder") == flags.DATASETS


def test_help_shows_the_defaults_that_there_are(capsys):
    assert end_of(student.main, ["--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.05)" in printed and "of every draw (default: 0)" in printed
    assert "default: None" not in printed and "default: False" not in printed


def test_milestones_must_increase_and_numbers_lie_in_their_range():
    parser = flags.Parser("")
    parser.add_argument("--m", type=flags.number(int, 1), nargs="+", action=flags.Increasing)
    assert parser.parse_args(["--m", "2", "5"]) == argparse.Namespace(m=[2, 5])
    for bad in (["2", "2"], ["3", "2"], ["0"], ["x"]):
        with pytest.raises(flags.UserError, match="--m"):
            parser.parse_args(["--m", *bad])


@pytest.mark.parametrize(
    ("parse_args", "words", "meant"),
    [
        (teacher.parse_args, "--arch resnet8 --epochs 3", "--epoch"),
        (teacher.parse_args, "--arch resnet8 --batchsize 3", "--batch-size"),
        (teacher.parse_args, "--arch resnet23", "resnet32"),
        (teacher.parse_args, "--arch mobilenetv2", "MobileNetV2"),
        (teacher.parse_args, "--arch WRN_40_2", "wrn_40_2"),
        (teacher.parse_args, "--arch resnet8 --dataset cifar-100", "cifar100"),
        (student.parse_args, "--t-path x --s-arch vgg8 --t-arch wrn-40-2", "wrn_40_2"),
        (baseline.parse_args, "--t-path x --s-arch vgg8 --method fitnets", "fitnet"),
    ],
)
def test_a_mistyped_flag_or_name_is_told_what_was_meant(parse_args, words, meant):
    with pytest.raises(flags.UserError) as error:
        parse_args(words.split())
    suggested = str(error.value).split("; did you mean ")[1].split("?")[0]
    assert meant in suggested.split(" or ")


def test_what_is_like_nothing_known_gets_no_suggestion():
    for words in (["--arch", "transformer"], ["--arch", "resnet8", "--wibble"]):
        with pytest.raises(flags.UserError) as error:
            teacher.parse_args(words)
        assert "did you mean" not in str(error.value)


# ------------------------------------------------------------------------------------- before PyTorch is imported


@pytest.fixture
def without_torch(tmp_path):
    """An environment in which importing PyTorch or matplotlib is an error, though Python finds both."""
    for name in ("torch", "matplotlib"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('imported')\n")
    return os.environ | {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("script", ALL)
def test_help_is_answered_before_pytorch_is_imported(script, without_torch, tmp_path):
    done = run_script(script, "--help", cwd=tmp_path, env=without_torch)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {script.split('/')[-1]} ")


@pytest.mark.parametrize("script", ENTRIES)
def test_a_wrong_flag_is_told_before_pytorch_is_imported(script, without_torch, tmp_path):
    done = run_script(script, "--epoch", "0", cwd=tmp_path, env=without_torch)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith(f"{script}: error: argument --epoch: '0' is not a whole number")


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_packages_end_in_one_line_that_says_how_to_get_them(script, tmp_path):
    command = [sys.executable, "-S", ROOT / script, "--help"]  # -S: nothing but Python's own library
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    missing, file = ("matplotlib, numpy", "-experiments") if "plot" in script else (", ".join(flags.PACKAGES), "")
    assert f"error: Python finds no {missing}; pip install -r requirements{file}.txt" in done.stderr


def test_the_packages_are_those_of_the_requirements():
    assert [line.split(">=")[0] for line in (ROOT / "requirements.txt").read_text().split()] == list(flags.PACKAGES)


@pytest.mark.parametrize("script", ALL)
def test_an_old_python_ends_in_one_line(script):
    pretend = "import runpy, sys; sys.version_info = (3, 9, 18); runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", pretend, script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: this is Python 3.9; 3.10 or newer is needed\n"


@pytest.mark.parametrize("file", [*ALL, "flags.py"])
def test_an_old_python_gets_as_far_as_the_check(file):
    text = (ROOT / file).read_text()
    ast.parse(text, feature_version=(3, 7))
    before = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            before.append(node.names[0].name if isinstance(node, ast.Import) else node.module)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            before.append(node.name)  # whose annotations an old Python may not understand
    before = before[: before.index("argparse" if file == "flags.py" else "flags")]
    assert {name.split(".")[0] for name in before} <= sys.stdlib_module_names


@pytest.mark.parametrize("script", ["teacher.py --arch resnet8", "student.py --t-path teacher --s-arch resnet8"])
def test_a_signal_during_the_imports_prints_nothing(script, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = run_script(*script.split(), cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
