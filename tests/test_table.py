"""experiments/table.py, and the study's page that it fills."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import student
import teacher
from experiments import table
from utils.run import HARMLESS

LOW_RATE = ("MobileNetV2", "ShuffleV1", "ShuffleV2")


def flags_of(parse_args, *words):
    """What config.json holds for a command line."""
    return {name: value for name, value in vars(parse_args(words)).items() if name not in HARMLESS}


def write_run(folder, flags, best, last):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    (folder / "result.json").write_text(json.dumps({"best_acc": best, "last_acc": last, "best_epoch": 1}))


def write_teacher(root, arch, best, last, *words):
    flags = flags_of(teacher.parse_args, "--arch", arch, "--lr", "0.01" if arch in LOW_RATE else "0.05", *words)
    write_run(root / f"teacher_{arch}_seed{flags['seed']}", flags, best, last)


def write_student(root, pair, best, last, *words):
    flags = flags_of(student.parse_args, "--t-path", "-", "--s-arch", pair[1], *words) | {"teacher": "0123"}
    weights = f"weight{flags['tf_weight']}+{flags['ss_weight']}"
    folder = f"sskd_student_{pair[1]}_{weights}_seed{flags['seed']}_teacher_{pair[0]}_seed{flags['seed']}"
    write_run(root / folder, flags, best, last)


def cells(printed, title, pair):
    """{row: text} of the column of a pair in a published table that was printed as Markdown."""
    rows = [[text.strip() for text in line.strip("|").split("|")] for line in printed.splitlines() if "|" in line]
    head = next(row for row in rows if " → ".join(pair) in row)
    column, found, label = head.index(" → ".join(pair)), {}, ""
    for row in rows[rows.index(head) + 2 :]:
        if " → " in row[2]:  # the next table
            break
        label = row[0] or label
        if label == title:
            found[row[1]] = row[column]
    return found


def show(capsys, *words):
    table.main([str(word) for word in words])
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def test_the_published_flags_are_the_defaults_of_the_scripts():
    for arch in ("resnet8", "ShuffleV1"):
        flags = flags_of(teacher.parse_args, "--arch", arch, "--lr", "0.01" if arch in LOW_RATE else "0.05")
        assert table.kind_of(flags, "") == table.Kind("", arch, "alone")
    flags = flags_of(student.parse_args, "--t-path", "-", "--s-arch", "resnet8")
    assert table.kind_of(flags, "x_seed0_teacher_vgg13") == table.Kind("vgg13", "resnet8", "SSKD")
    assert set(table.COMMON) | set(table.STUDENT) <= set(flags)


def test_table_has_mean_and_deviation_over_seeds(tmp_path, capsys):
    pair = ("vgg13", "vgg8")
    for seed, best in enumerate((75.0, 76.0, 77.0)):
        write_student(tmp_path, pair, best, best - 1.5, "--seed", str(seed))
    write_student(tmp_path, pair, 73, 72.5, "--tf-weight", "0", "--ss-weight", "0", "--amp", "bf16", "--compile")
    write_student(tmp_path, pair, 74, 73.5, "--ss-weight", "0")
    write_teacher(tmp_path, "vgg13", 75.5, 75.25)
    write_teacher(tmp_path / "deeper", "vgg8", 70, 69)
    write_teacher(tmp_path / "deeper", "vgg8", 71, 70, "--seed", "1")
    write_teacher(tmp_path / "deeper" / "twice", "vgg8", 71, 70, "--seed", "1")

    printed = show(capsys, tmp_path, "--markdown")
    here = {
        title: tuple(text for row, text in cells(printed, title, pair).items() if row.startswith("here"))
        for title in ("teacher", "student", "KD", "KD + tf", "SSKD")
    }
    assert here == {
        "teacher": ("75.50 (1)", "75.25 (1)"),
        "student": ("70.50 ± 0.71 (2)", "69.50 ± 0.71 (2)"),
        "KD": ("73.00 (1)", "72.50 (1)"),
        "KD + tf": ("74.00 (1)", "73.50 (1)"),
        "SSKD": ("76.00 ± 1.00 (3)", "74.50 ± 1.00 (3)"),
    }
    assert cells(printed, "SSKD", pair)["published"] == "75.33"
    assert cells(printed, "SSKD", ("resnet56", "resnet20")) == {
        **{"published": "71.49", "re-run, HSAKD": "70.80 ± 0.02", "normal range": "70.49 to 71.59"},
        **{"here, best": "–", "here, last": "–"},
    }
    assert cells(printed, "student", ("ResNet50", "vgg8"))["here, best"] == "70.50 ± 0.71 (2)"  # in both tables


def test_every_published_figure_is_shown(capsys, tmp_path):
    printed = show(capsys, tmp_path, "--markdown")
    for part in json.loads((ROOT / "experiments" / "published_results.json").read_text()).values():
        for i, pair in enumerate(part["pairs"] if isinstance(part, dict) else []):
            for title in ("teacher", "student", "KD", "SSKD"):
                assert cells(printed, title, pair)["published"] == f"{part[title][i]:.2f}"


@pytest.mark.parametrize(
    "words",
    ["--epoch 24 --milestones 15 18 21", "--train-size 500", "--few-shot 0.25", "--label-noise 0.3", "--lr 0.1"],
)
def test_runs_with_other_flags_are_listed_apart(tmp_path, capsys, words):
    pair = ("vgg13", "vgg8")
    write_student(tmp_path, pair, 50, 49, *words.split())
    write_teacher(tmp_path, "vgg13", 55, 54, *words.split())
    printed = show(capsys, tmp_path)
    assert printed.count(" (1)") == 4
    listed = printed[printed.index(f"cifar100, {words}\n") :]
    assert re.search(r"vgg8 +vgg13 +SSKD +50\.00 \(1\) +49\.00 \(1\)\n", listed)
    assert re.search(r"vgg13 +– +alone +55\.00 \(1\) +54\.00 \(1\)\n", listed)


def test_a_seed_counts_once_and_what_is_left_out_is_told(tmp_path, capsys):
    pair = ("vgg13", "vgg8")
    write_student(tmp_path, pair, 75, 74)
    write_student(tmp_path / "copy", pair, 75, 74)
    assert cells(show(capsys, tmp_path, "--markdown"), "SSKD", pair)["here, best"] == "75.00 (1)"
    write_student(tmp_path / "other", pair, 77, 76)
    table.main([str(tmp_path), "--markdown"])
    printed = capsys.readouterr()
    assert cells(printed.out, "SSKD", pair)["here, best"] == "75.00 (1)"
    (line,) = printed.err.splitlines()
    assert str(tmp_path / "other") in line and "left out" in line


def test_links_to_runs_and_teachers_of_others_are_found(tmp_path, capsys):
    pair = ("resnet32x4_vanilla", "resnet8x4")
    write_student(tmp_path / "disk", pair, 75, 74)
    (tmp_path / "runs").mkdir()
    (run,) = (tmp_path / "disk").iterdir()
    (tmp_path / "runs" / run.name).symlink_to(run)
    printed = show(capsys, tmp_path / "runs", "--markdown")
    assert cells(printed, "SSKD", ("resnet32x4", "resnet8x4"))["here, best"] == "75.00 (1)"


def test_flags_of_a_term_that_is_not_used_do_not_part_runs(tmp_path, capsys):
    common = ["--dataset", "synthetic", "--tf-weight", "0", "--ss-weight", "0"]
    write_student(tmp_path, ("resnet14", "resnet8"), 20, 20, *common)
    write_student(tmp_path, ("resnet14", "resnet8"), 22, 22, *common, "--t-epoch", "3", "--seed", "1", "--ss-T", "1")
    assert re.search(r"KD +21\.00 ± 1\.41 \(2\)", show(capsys, tmp_path, "--dataset", "synthetic"))


def test_flags_of_students_only_do_not_part_them_from_their_teachers(tmp_path, capsys):
    common = ["--dataset", "synthetic", "--epoch", "2", "--milestones", "1"]
    write_teacher(tmp_path, "resnet14", 20, 19, *common)
    write_student(tmp_path, ("resnet14", "resnet8"), 15, 14, *common, "--t-epoch", "3", "--t-milestones", "1", "2")
    printed = show(capsys, tmp_path, "--dataset", "synthetic")
    assert printed.count("--epoch 2 --milestones 1\n") == 1
    assert re.search(r"SSKD +15\.00 \(1\) +14\.00 \(1\) +--t-epoch 3 --t-milestones 1 2\n", printed)
    assert "Similar" not in printed


def test_a_damaged_run_is_named_and_left_out(tmp_path, capsys):
    write_teacher(tmp_path, "vgg13", 70, 69)
    write_teacher(tmp_path, "vgg8", 50, 49, "--epoch", "3")
    flags = json.loads((tmp_path / "teacher_vgg8_seed0" / "config.json").read_text())["flags"]
    odd = json.dumps({"flags": flags | {"arch": [1], "epoch": 2}}), '{"best_acc": 1, "last_acc": 1}'
    (tmp_path / "odd").mkdir()
    for name, content in zip(("config.json", "result.json"), odd, strict=True):
        (tmp_path / "odd" / name).write_text(content)
    for name, config, result in (("a", "{", "{}"), ("b", "[]", "{}"), ("c", None, "{}"), ("d", '{"flags": {}}', "3")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(result)
        if config is not None:
            (tmp_path / name / "config.json").write_text(config)
    table.main([str(tmp_path)])
    printed = capsys.readouterr()
    assert [str(tmp_path / name) in line for name, line in zip("abcd", printed.err.splitlines(), strict=True)]
    assert "70.00 (1)" in printed.out


def test_a_table_that_nobody_reads_to_its_end_ends_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, ROOT / "experiments" / "table.py"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.stderr == b""


@pytest.fixture
def committed(tmp_path):
    """The folder experiments/ as it was committed: a user's may hold runs of his own."""
    archive = subprocess.run(["git", "-C", ROOT, "archive", "HEAD", "experiments"], capture_output=True)
    if archive.returncode:
        return ROOT / "experiments"  # not a clone
    subprocess.run(["tar", "-x", "-C", tmp_path], input=archive.stdout, check=True)
    return tmp_path / "experiments"


def test_the_studys_page_shows_what_its_results_say(committed, capsys):
    """Every line of the tables recomputed from the committed results stands in experiments/README.md, and no other."""
    page = (committed / "README.md").read_text().splitlines()
    printed = show(capsys, committed / "fashion_mnist", "--dataset", "fashion_mnist", "--markdown").splitlines()
    assert [line for line in page if line.startswith("|")] == [line for line in printed if line.startswith("|")]
    assert len(printed) > 4


def test_the_studys_figures_are_those_of_its_results(committed):
    """The same, reckoned here from the files themselves and without table.py."""
    groups = {}
    for path in (committed / "fashion_mnist").glob("*/result.json"):
        groups.setdefault(re.sub(r"seed\d+", "", path.parent.name), []).append(json.loads(path.read_text()))

    def shown(results, name):
        values = np.array([result[name] for result in results])
        return f"{values.mean():.2f} ± {values.std(ddof=1):.2f} ({len(values)})"

    expected = [tuple(shown(results, name) for name in ("best_acc", "last_acc")) for results in groups.values()]
    cells = r" +\| (\d\d\.\d\d ± \d\.\d\d \(\d\))"
    assert sorted(re.findall(cells + cells, (committed / "README.md").read_text())) == sorted(expected)


def test_the_studys_gains_are_those_of_its_results(committed):
    def best(weights, setting=""):
        runs = f"sskd_student_*+{weights}_T*0.75{setting}_seed*/result.json"
        paths = sorted((committed / "fashion_mnist").glob(runs))
        return np.array([json.loads(path.read_text())["best_acc"] for path in paths])

    kd, tf, sskd = "0.0+0.0", "2.7+0.0", "2.7+10.0"
    gains = [best(sskd) - best(kd), best(sskd) - best(tf)]
    gains += [best(sskd, setting) - best(kd, setting) for setting in ("_few0.25", "_noise0.3")]
    text = " ".join((committed / "README.md").read_text().partition("## Figures")[0].split())
    expected = [f"{gain.mean():.2f} ± {gain.std(ddof=1):.2f}" for gain in gains]
    assert re.findall(r"\d\.\d\d ± \d\.\d\d", text) == expected
