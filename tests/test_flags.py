"""harness/flags.py: the flags, their checks, and what a script says about them."""

import argparse
from pathlib import Path

import pytest
from conftest import end_of

import baseline
import cifar
import student
import teacher
from harness import flags

TEACHER = ["--arch", "resnet8"]
STUDENT = ["--t-path", "x", "--s-arch", "vgg8"]


@pytest.mark.parametrize("script", [teacher, student, baseline, cifar], ids=lambda script: script.__name__)
def test_help_explains_every_flag_and_shows_the_defaults(script, capsys):
    assert end_of(script.main, ["--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("usage: ") and "--data-root DIR" in printed and "(default: ./data)" in printed
    assert "default: None" not in printed and "default: False" not in printed


def test_milestones_must_increase_and_numbers_must_lie_in_their_range():
    parser = flags.Parser("")
    parser.add_argument("--m", type=flags.number(int, 1, 9), nargs="+", action=flags.Increasing)
    parser.add_argument("--x", type=flags.number(float, 0, 1, above=True))
    assert parser.parse_args(["--m", "1", "9", "--x", "1"]) == argparse.Namespace(m=[1, 9], x=1.0)
    for bad in ("--m 2 2", "--m 3 2", "--m 0", "--m 10", "--m 1.5", "--m x", "--x 0", "--x 1.1", "--x nan", "--x inf"):
        with pytest.raises(flags.UserError, match=bad[:3]):
            parser.parse_args(bad.split())


@pytest.mark.parametrize(
    ("script", "words", "meant"),
    [
        (teacher, "--arch resnet8 --epochs 3", "--epoch"),
        (teacher, "--arch resnet8 --batchsize 3", "--batch-size"),
        (teacher, "--arch resnet23", "resnet32"),
        (teacher, "--arch mobilenetv2", "MobileNetV2"),
        (teacher, "--arch resnet8 --dataset cifar-100", "cifar100"),
        (student, "--t-path x --s-arch vgg8 --t-arch wrn-40-2", "wrn_40_2"),
        (baseline, "--t-path x --s-arch vgg8 --method fitnets", "fitnet"),
        (teacher, "--arch transformer", None),
        (teacher, "--arch resnet8 --wibble", None),
    ],
)
def test_a_mistyped_word_gets_the_known_words_most_like_it(script, words, meant):
    with pytest.raises(flags.UserError) as error:
        script.parse_args(words.split())
    suggested = str(error.value).partition("; did you mean ")[2].partition("?")[0].split(" or ")
    assert (meant or "") in suggested


def settings_of(script, *words):
    return flags.settings(script.parse_args(words), {"data": "0123"})


@pytest.mark.parametrize("harmless", ["--gpu-id 1", "--data-root there", "--experiments there", "--export a.pt2"])
def test_a_flag_that_does_not_affect_the_result_is_no_setting(harmless):
    assert settings_of(student, *STUDENT, *harmless.split()) == settings_of(student, *STUDENT)


@pytest.mark.parametrize("word", ["--lr 0.1", "--seed 1", "--amp bf16", "--few-shot 0.5", "--ss-T 1", "--t-epoch 9"])
def test_a_flag_that_affects_the_result_is_a_setting(word):
    assert settings_of(student, *STUDENT, *word.split()) != settings_of(student, *STUDENT)


def test_features_in_memory_and_on_disk_are_one_setting_and_computed_ones_another():
    memory, disk, compute = (settings_of(student, *STUDENT, "--t-features", x) for x in ("memory", "disk", "compute"))
    assert memory == disk != compute


def test_a_run_folder_is_named_by_its_part_of_the_data():
    words = [*TEACHER, "--val-fraction", "0.1", "--few-shot", "0.25", "--label-noise", "0.5"]
    assert flags.data_name(teacher.parse_args(words)) == "_val0.1_few0.25_noise0.5"
    assert flags.data_name(teacher.parse_args(TEACHER)) == ""


def test_a_learning_rate_that_never_falls_gets_a_warning(capsys):
    for words in ("--epoch 2 --milestones 2 3", "--epoch 2 --milestones 1 3", "--epoch 1 --milestones 2"):
        flags.warn_of_schedule(teacher.parse_args([*TEACHER, *words.split()]))
    flags.warn_of_schedule(student.parse_args([*STUDENT, "--t-epoch", "2", "--t-milestones", "3"]))
    assert capsys.readouterr().err.splitlines() == [
        "warning: --milestones 2 3: the learning rate never falls within 2 epochs",
        "warning: --t-milestones 3: the learning rate never falls within 2 epochs",
    ]


@pytest.mark.parametrize("words", ["--s-arch MobileNetV2", "--s-arch ShuffleV2 --lr 0.05", "--s-arch vgg8"])
def test_a_network_with_another_published_rate_gets_a_warning(words, capsys):
    flags.warn_of_schedule(student.parse_args([*STUDENT[:2], *words.split()]))
    expected = "" if "vgg8" in words else f"warning: --lr 0.05: {words.split()[1]} was published with --lr 0.01\n"
    assert capsys.readouterr().err == expected


def test_a_home_folder_is_expanded_in_paths_of_other_types_and_lists(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = flags.Parser("")
    parser.add_argument("places", nargs="+")
    parser.add_argument("--to", type=Path)
    args = parser.parse_args(["~/a", "b", "--to=~/c"])
    assert (args.places, args.to) == ([str(tmp_path / "a"), "b"], tmp_path / "c")


@pytest.mark.parametrize("flag", ["experiments", "data-root", "t-path", "export"])
def test_a_home_folder_is_expanded_in_every_path(flag, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = student.parse_args([*STUDENT, f"--{flag}=~/a.pt2"])
    assert getattr(args, flag.replace("-", "_")) == str(tmp_path / "a.pt2")


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        (teacher, "--milestones 150,180,210", "separate numbers by spaces"),
        (teacher, "--resume runs/x", "continues when its command is repeated"),
        (student, "--method kd", "python baseline.py --method"),
        (baseline, "--method sskd", "SSKD itself is student.py"),
    ],
)
def test_flags_of_other_repositories_are_told_what_does_the_same_here(script, words, says, fails):
    assert says in fails(script.main, *words.split())
