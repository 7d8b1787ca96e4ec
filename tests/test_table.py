"""experiments/table.py."""

import csv
import errno
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import (
    LOW_RATE,
    ROOT,
    START,
    change,
    flags_of,
    records,
    rows_in,
    write_run,
    write_student,
    write_teacher,
)

import baseline
import student
import teacher
from experiments import runs, table
from methods import METHODS

SYNTHETIC = ("--dataset", "synthetic")


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


def listed(markdown):
    """The rows of the list that stands last in what was printed as Markdown, by the heads of their columns."""
    lines = markdown.rpartition("**\n\n")[2].partition("\n\n")[0].splitlines()
    return rows_in(lines)


def show(capsys, *words):
    table.main([str(word) for word in words])
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def test_the_published_flags_are_the_defaults_of_the_scripts():
    for arch in ("resnet8", "ShuffleV1"):
        flags = flags_of(teacher.parse_args, "--arch", arch, "--lr", "0.01" if arch in LOW_RATE else "0.05")
        assert runs.kind_of(flags, "") == runs.Kind("", arch, "alone")
    flags = flags_of(student.parse_args, "--t-path", "-", "--s-arch", "resnet8")
    assert runs.kind_of(flags, "x_seed0_teacher_vgg13") == runs.Kind("vgg13", "resnet8", "SSKD")
    assert set(runs.COMMON | runs.KD | runs.TF | runs.SS) <= set(flags)


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
        for title in ("teacher", "student", "KD, 4 views", "KD + tf", "SSKD")
    }
    assert here == {
        "teacher": ("75.50 (1)", "75.25 (1)"),
        "student": ("70.50 ± 0.71 (2)", "69.50 ± 0.71 (2)"),
        "KD, 4 views": ("73.00 (1)", "72.50 (1)"),
        "KD + tf": ("74.00 (1)", "73.50 (1)"),
        "SSKD": ("76.00 ± 1.00 (3)", "74.50 ± 1.00 (3)"),
    }
    assert cells(printed, "SSKD", pair)["published"] == "75.33"
    assert cells(printed, "SSKD", ("resnet56", "resnet20")) == {
        **{"published": "71.49", "re-run, HSAKD": "70.80 ± 0.02", "normal range": "70.49 to 71.59"},
        **{"here, best": "–", "here, last": "–"},
    }
    assert cells(printed, "student", ("ResNet50", "vgg8"))["here, best"] == "70.50 ± 0.71 (2)"  # in both tables


def test_every_compared_method_has_its_row(tmp_path, capsys):
    pair = ("wrn_40_2", "wrn_16_2")
    for i, method in enumerate(METHODS):
        flags = flags_of(baseline.parse_args, "--method", method, "--t-path", "-", "--s-arch", pair[1])
        flags["teacher"] = f"{pair[0]}-0"
        write_run(tmp_path / f"{method}_student_{pair[1]}_seed0_teacher_{pair[0]}_seed0", flags, 60 + i, 50 + i)
    write_student(tmp_path, pair, 80, 79, "--tf-weight", "0", "--ss-weight", "0")
    flags = flags_of(baseline.parse_args, "--method", "at", "--t-path", "-", "--s-arch", pair[1], "--weight", "3")
    write_run(tmp_path / f"at_student_{pair[1]}_weight3_seed0_teacher_{pair[0]}_seed0", flags, 30, 29)
    printed = show(capsys, tmp_path, "--markdown")
    for i, method in enumerate(METHODS):
        row = cells(printed, runs.METHODS[method][0], pair)
        assert (row["here, best"], row["here, last"]) == (f"{60 + i}.00 (1)", f"{50 + i}.00 (1)")
        assert float(row["published"]) > 68
    assert cells(printed, "KD", pair)["published"] == "74.92"
    assert "published" not in cells(printed, "KD, 4 views", pair)
    assert cells(printed, "KD, 4 views", pair)["here, best"] == "80.00 (1)"
    assert "**cifar100, --weight 3.0**" in printed
    assert re.search(r"\| AT +\| 30\.00 \(1\) +\| 29\.00 \(1\) +\|", printed)


def test_the_published_weights_are_those_of_the_methods():
    for method, (_, ce, kd, weight) in runs.METHODS.items():
        args = baseline.parse_args(["--method", method, "--t-path", "-", "--s-arch", "vgg8"])
        assert (args.ce_weight, args.kd_weight, args.weight) == (ce, kd, weight)
    assert list(runs.METHODS) == list(METHODS)


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


def test_a_teacher_in_a_renamed_folder_is_known_by_the_result_and_its_path_is_not_recorded(tmp_path, capsys):
    folder = write_student(tmp_path / "runs", ("mine", "vgg8"), 75, 74)
    change(folder / "result.json", teacher={"path": "/home/me/mine.pth", "arch": "vgg13", "acc": 75.4})
    for source in (tmp_path / "runs", tmp_path / "study.jsonl"):
        assert cells(show(capsys, source, "--markdown"), "SSKD", ("vgg13", "vgg8"))["here, best"] == "75.00 (1)"
        show(capsys, "--record", tmp_path / "study.jsonl", tmp_path / "runs")
    (record,) = records(tmp_path / "study.jsonl")
    assert record["result"]["teacher"] == {"arch": "vgg13", "acc": 75.4}


def test_flags_of_a_term_that_is_not_used_do_not_part_runs(tmp_path, capsys):
    common = ["--dataset", "synthetic", "--tf-weight", "0", "--ss-weight", "0"]
    write_student(tmp_path, ("resnet14", "resnet8"), 20, 20, *common)
    write_student(tmp_path, ("resnet14", "resnet8"), 22, 22, *common, "--t-epoch", "3", "--seed", "1", "--ss-T", "1")
    assert re.search(r"KD, 4 views +21\.00 ± 1\.41 \(2\)", show(capsys, tmp_path, "--dataset", "synthetic"))


def test_flags_of_students_only_do_not_part_them_from_their_teachers(tmp_path, capsys):
    common = ["--dataset", "synthetic", "--epoch", "2", "--milestones", "1"]
    write_teacher(tmp_path, "resnet14", 20, 19, *common)
    write_student(tmp_path, ("resnet14", "resnet8"), 15, 14, *common, "--t-epoch", "3", "--t-milestones", "1", "2")
    printed = show(capsys, tmp_path, "--dataset", "synthetic")
    assert printed.count("--epoch 2 --milestones 1 --t-epoch 3 --t-milestones 1 2\n") == 1
    assert re.search(r"alone +20\.00 \(1\) +19\.00 \(1\)\n", printed)
    assert re.search(r"SSKD +15\.00 \(1\) +14\.00 \(1\)\n", printed)
    assert "Similar" not in printed


def test_numbers_sort_as_numbers(tmp_path, capsys):
    for arch in ("resnet20", "resnet8", "resnet110"):
        write_teacher(tmp_path, arch, 1, 1, *SYNTHETIC)
    for weight in ("10", "9", "2.5"):
        write_student(tmp_path / weight, ("vgg13", "resnet8"), 1, 1, *SYNTHETIC, "--kd-weight", weight)
    for share in ("0.5", "0.25", "0.125"):
        write_teacher(tmp_path / share, "resnet8", 1, 1, *SYNTHETIC, "--few-shot", share)
    write_teacher(tmp_path / "weight decay", "resnet8", 1, 1, *SYNTHETIC, "--weight-decay", "0.00001")
    write_teacher(tmp_path / "more weight decay", "resnet8", 1, 1, *SYNTHETIC, "--weight-decay", "0.001")
    rows = listed(show(capsys, tmp_path, *SYNTHETIC, "--markdown"))
    alone = [row for row in rows if row["method"] == "alone"]
    usual = [row["network"] for row in alone if (row["--few-shot"], row["--weight-decay"]) == ("1.0", "0.0005")]
    assert usual == ["resnet8", "resnet20", "resnet110"]
    assert [row["--kd-weight"] for row in rows if row["method"] == "SSKD"] == ["2.5", "9.0", "10.0"]
    assert list(dict.fromkeys(row["--few-shot"] for row in rows)) == ["0.125", "0.25", "0.5", "1.0"]
    assert list(dict.fromkeys(row["--weight-decay"] for row in rows[3:])) == ["1e-05", "0.0005", "0.001"]


def test_runs_on_other_data_sets_are_told_where_there_are_none_of_the_asked(tmp_path, capsys):
    write_teacher(tmp_path, "resnet8", 1, 1, *SYNTHETIC)
    write_teacher(tmp_path, "resnet14", 1, 1, "--dataset", "fashion_mnist")
    write_teacher(tmp_path, "resnet20", 1, 1, "--dataset", "fashion_mnist")
    told = ["2 runs on fashion_mnist: --dataset fashion_mnist", "1 run on synthetic: --dataset synthetic"]
    assert show(capsys, tmp_path).splitlines()[-3:] == [f"no finished run on cifar100 in {tmp_path}", *told]
    assert "no finished run" not in show(capsys, tmp_path, *SYNTHETIC)
    for form, nothing in (("--json", []), ("--csv", None)):
        table.main([str(tmp_path), form])
        printed = capsys.readouterr()
        assert printed.err.splitlines()[-2:] == told
        assert json.loads(printed.out) == [] if nothing == [] else printed.out == "\n"


KD, SS_ONLY = ("--tf-weight", "0", "--ss-weight", "0"), ("--tf-weight", "0")
PAIR = ("resnet20", "resnet8")


def test_a_flag_that_varies_has_a_column_and_others_stand_in_the_title(tmp_path, capsys):
    common = (*SYNTHETIC, "--epoch", "20", "--milestones", "10", "15", "--t-epoch", "5")
    for ratio in ("0.5", "1", "0.75", "0.0"):  # in folders as sweep.py makes them
        write_student(tmp_path / f"ratio-ss_{ratio}", PAIR, 30, 29, *common, "--ratio-ss", ratio)
    write_student(tmp_path, PAIR, 20, 19, *common, *KD, "--train-size", "500", "--kd-T", "2")
    write_teacher(tmp_path, "MobileNetV2", 10, 9, *common[:-2], "--lr", "0.01")
    printed = show(capsys, tmp_path, *SYNTHETIC, "--markdown")
    assert "**synthetic, --epoch 20 --milestones 10 15 --t-epoch 5**" in printed
    rows = listed(printed)
    flags = [name for name in rows[0] if name.startswith("--")]
    assert [(row["method"], *(row[name] for name in flags)) for row in rows] == [
        ("alone", "–", "–", "–"),
        *[("SSKD", "4.0", ratio, "–") for ratio in ("0.0", "0.5", "0.75", "1.0")],
        ("KD, 4 views", "2.0", "–", "500"),
    ]
    assert flags == ["--kd-T", "--ratio-ss", "--train-size"]


def test_csv_and_json_hold_every_row_with_all_that_is_known_of_it(tmp_path, capsys):
    for seed, best in enumerate((75.0, 76.0, 78.5)):
        write_student(tmp_path, ("vgg13", "vgg8"), best, best - 1, "--seed", str(seed))
    write_student(tmp_path, PAIR, 20, 19, *SS_ONLY, "--epoch", "20", "--milestones", "10", "15", "--t-epoch", "7")
    first, second = json.loads(show(capsys, tmp_path, "--json"))
    assert list(second.items()) == [
        ("dataset", "cifar100"),
        *(("network", "vgg8"), ("teacher", "vgg13"), ("one_teacher", ""), ("method", "SSKD")),
        *(("epoch", 240), ("milestones", [150, 180, 210]), ("t_epoch", 60), ("epoch_chosen_on", "test set")),
        *(("n", 3), ("best_mean", 76.5), ("best_sd", pytest.approx(np.std([75, 76, 78.5], ddof=1)))),
        *(("last_mean", 75.5), ("last_sd", pytest.approx(np.std([75, 76, 78.5], ddof=1))), ("seeds", [0, 1, 2])),
    ]
    assert (first["method"], first["epoch"], first["milestones"], first["t_epoch"]) == ("KD + ss", 20, [10, 15], 7)
    assert (first["n"], first["best_mean"], first["best_sd"], first["seeds"]) == (1, 20, None, [0])
    rows = list(csv.DictReader(show(capsys, tmp_path, "--csv").splitlines()))
    for row, same in zip(rows, (first, second), strict=True):
        words = {
            name: " ".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in same.items() if v is not None
        }
        assert row == dict.fromkeys(same, "") | words


def test_a_result_may_say_more_than_the_tables_need(tmp_path, capsys):
    folder = write_student(tmp_path, PAIR, 75, 74)
    before = show(capsys, tmp_path)
    change(folder / "result.json", params=1234, teacher={"acc": 70.5}, multiply_adds=None)
    assert show(capsys, tmp_path) == before


# ------------------------------------------------------------------------------------------------------------ teachers


def test_one_teacher_for_all_seeds_is_told_from_a_teacher_for_each(tmp_path, capsys):
    pair = ("vgg13", "vgg8")
    for seed in "012":
        write_student(tmp_path, pair, 70 + int(seed), 69, "--seed", seed, teacher_seed=0)
    assert cells(show(capsys, tmp_path, "--markdown"), "SSKD", pair)["here, best"] == "71.00 ± 1.00 (3) †"
    for seed in "12":  # seed 0 has the teacher of seed 0 either way
        write_student(tmp_path, pair, 80, 79, "--seed", seed)
    printed = show(capsys, tmp_path, "--markdown")
    assert cells(printed, "SSKD", pair)["here, best"] == "76.67 ± 5.77 (3)"
    (row,) = listed(printed)
    assert (row["teacher"], row["best"]) == ("vgg13 (vgg13-0)", "71.00 ± 1.00 (3)")
    assert "\nteacher (fingerprint of its weights): one for all seeds of the row" in printed
    own, shared = json.loads(show(capsys, tmp_path, "--json"))
    assert (own["one_teacher"], own["best_mean"]) == ("", pytest.approx((70 + 80 + 80) / 3))
    assert (shared["one_teacher"], shared["best_mean"], shared["seeds"]) == ("vgg13-0", 71, [0, 1, 2])


def test_students_of_different_teachers_of_one_name_are_never_averaged(tmp_path, capsys):
    for seed in "012":
        write_student(tmp_path / "a", PAIR, 70 + int(seed), 69, *SYNTHETIC, "--seed", seed)
    write_student(tmp_path / "b", PAIR, 50, 49, *SYNTHETIC, teacher="another")
    table.main([str(tmp_path), *SYNTHETIC, "--json"])
    printed = capsys.readouterr()
    rows = {row["one_teacher"]: (row["best_mean"], row["seeds"]) for row in json.loads(printed.out)}
    assert rows == {"": (71.5, [1, 2]), "another": (50, [0]), "resnet20-0": (70, [0])}
    (line,) = printed.err.splitlines()
    assert "different teachers of one name: teacher_resnet20_seed0;" in line


def test_teachers_of_one_name_that_differ_between_methods_are_told_and_not_paired(tmp_path, capsys):
    for seed in "01":
        write_student(tmp_path, PAIR, 60 + int(seed), 60, *SYNTHETIC, "--seed", seed)
    write_student(tmp_path, PAIR, 55, 55, *SYNTHETIC, *KD)
    write_student(tmp_path, PAIR, 50, 50, *SYNTHETIC, *KD, "--seed", "1", teacher="another")
    table.main([str(tmp_path), *SYNTHETIC, "--against", "KD, 4 views", "--json"])
    printed = capsys.readouterr()
    assert "teacher_resnet20_seed1;" in printed.err
    (sskd,) = [row for row in json.loads(printed.out) if row["method"] == "SSKD"]
    assert (sskd["n"], sskd["pairs"], sskd["best_difference"], sskd["best_low"]) == (2, 1, 5, None)


# --------------------------------------------------------------------------------------------- gains, seed by seed


def test_quantiles_of_students_t_are_those_of_the_tables():
    known = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 30: 2.0423, 100: 1.9840}
    assert {freedom: round(table.student_t(freedom), 4) for freedom in known} == known
    assert round(table.student_t(1000), 4) == 1.9623
    assert [round(table.student_t(freedom, 0.99), 4) for freedom in (1, 2, 5)] == [63.6567, 9.9248, 4.0321]


def test_gains_are_over_the_common_seeds_with_their_interval(tmp_path, capsys):
    reached = {"SSKD": [70.0, 72.5, 71.0, 99.0], "KD": [69.0, 70.0, 71.5], "KD + tf": [60.0]}
    words = {"SSKD": (), "KD": KD, "KD + tf": ("--ss-weight", "0")}
    for method, accuracies in reached.items():
        for seed, best in enumerate(accuracies):
            write_student(tmp_path, PAIR, best, best / 2, *SYNTHETIC, "--seed", str(seed), *words[method])
    write_student(tmp_path / "few", PAIR, 1, 1, *SYNTHETIC, "--few-shot", "0.5")  # in another setting
    write_student(tmp_path, ("resnet14", "resnet8"), 2, 1, *SYNTHETIC)  # of another teacher
    words = (tmp_path, *SYNTHETIC, "--against", "KD, 4 views")
    rows = listed(show(capsys, *words, "--markdown"))
    gains = {(row["method"], row["best"]): row["best − KD, 4 views"] for row in rows}
    difference = np.subtract(reached["SSKD"][:3], reached["KD"])
    half = 4.302653 * difference.std(ddof=1) / 3**0.5
    low, high = difference.mean() - half, difference.mean() + half
    assert gains == {
        ("SSKD", "78.12 ± 13.95 (4)"): f"{difference.mean():+.2f} [{low:+.2f}, {high:+.2f}] (3)",
        ("KD + tf", "60.00 (1)"): "-9.00 (1)",
        ("KD, 4 views", "70.17 ± 1.26 (3)"): "–",
        ("SSKD", "1.00 (1)"): "–",
        ("SSKD", "2.00 (1)"): "–",
    }
    found = json.loads(show(capsys, *words, "--json"))
    (row,) = [row for row in found if row["n"] == 4]
    expected = {
        "against": "KD, 4 views",
        "pairs": 3,
        "best_difference": difference.mean(),
        "best_low": low,
        "best_high": high,
    }
    expected |= {f"last_{what}": expected[f"best_{what}"] / 2 for what in ("difference", "low", "high")}
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_gains_over_the_network_alone_and_over_other_flags_of_the_method(tmp_path, capsys):
    write_teacher(tmp_path, "resnet8", 50, 50, *SYNTHETIC)
    for ratio, best in (("0.25", 53), ("0.75", 54), ("1", 51)):
        write_student(tmp_path / ratio, PAIR, best, best, *SYNTHETIC, "--ratio-ss", ratio)
    for method, gains in (("alone", [None, 3, 4, 1]), ("SSKD", [None, -1, None, -3])):
        rows = json.loads(show(capsys, tmp_path, *SYNTHETIC, "--against", method, "--json"))
        assert [row["ratio_ss"] for row in rows] == [None, 0.25, 0.75, 1]
        assert [row["best_difference"] for row in rows] == gains


def test_a_row_that_is_not_there_cannot_be_compared_with(tmp_path, fails):
    write_student(tmp_path, PAIR, 50, 50, *SYNTHETIC)
    error = fails(table.main, tmp_path, *SYNTHETIC, "--against", "CRD")
    assert "--against CRD" in error and "there are SSKD" in error
    assert "invalid choice: 'epochs'" in fails(table.main, tmp_path, "--by", "epochs")


# ------------------------------------------------------------------------------------------ device, precision, protocol


def test_device_and_precision_part_runs_on_demand(tmp_path, capsys):
    write_student(tmp_path, PAIR, 50, 49, *SYNTHETIC)
    write_student(tmp_path, PAIR, 52, 51, *SYNTHETIC, "--seed", "1", "--amp", "bf16")
    gpu = [START | {"device": "cuda (NVIDIA H100)"}]
    change(write_student(tmp_path, PAIR, 60, 59, *SYNTHETIC, "--seed", "2") / "config.json", starts=gpu)
    moved = write_student(tmp_path, PAIR, 62, 61, *SYNTHETIC, "--seed", "3")
    change(moved / "config.json", starts=[START, *gpu, START])
    (row,) = listed(show(capsys, tmp_path, *SYNTHETIC, "--markdown"))
    assert row["best"] == "56.00 ± 5.89 (4)"
    rows = listed(show(capsys, tmp_path, *SYNTHETIC, "--markdown", "--by", "device", "amp"))
    assert [(row["device"], row["--amp"], row["best"]) for row in rows] == [
        ("cpu (x86_64)", "bf16", "52.00 (1)"),
        ("cpu (x86_64)", "off", "50.00 (1)"),
        ("cpu (x86_64), cuda (NVIDIA H100)", "off", "62.00 (1)"),
        ("cuda (NVIDIA H100)", "off", "60.00 (1)"),
    ]
    rows = json.loads(show(capsys, tmp_path, *SYNTHETIC, "--json", "--by", "compile"))
    assert [(row["compile"], row["n"]) for row in rows] == [(False, 4)]
    show(capsys, "--record", tmp_path / "study.jsonl", tmp_path)
    printed = show(capsys, tmp_path / "study.jsonl", *SYNTHETIC, "--by", "device")
    assert re.search(r"cuda \(NVIDIA H100\) +60\.00 \(1\)", printed)


def test_of_two_runs_of_a_seed_the_one_left_out_says_what_parts_them(tmp_path, capsys):
    write_student(tmp_path, PAIR, 50, 49, *SYNTHETIC)
    write_student(tmp_path / "half", PAIR, 52, 51, *SYNTHETIC, "--amp", "bf16")
    table.main([str(tmp_path), *SYNTHETIC])
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "half") in line and "--by amp" in line
    assert show(capsys, tmp_path, *SYNTHETIC, "--by", "amp").count(" (1)") == 4


def test_runs_that_choose_the_epoch_on_held_out_images_show_their_test_accuracy_apart(tmp_path, capsys):
    pair = ("vgg13", "vgg8")
    write_student(tmp_path, pair, 70, 69)
    folder = write_student(tmp_path / "held", pair, 90, 89, "--seed", "1", val_fraction=0.1)
    change(folder / "result.json", test_acc=71.25)
    printed = show(capsys, tmp_path, "--markdown")
    assert cells(printed, "SSKD", pair)["here, best"] == "70.00 (1)"
    assert "**cifar100, --val-fraction 0.1**" in printed
    (row,) = listed(printed)
    assert (row["best"], row["last"]) == ("71.25 (1)", "–")
    assert "--val-fraction: test accuracy at the epoch that is best on held-out images" in printed
    rows = json.loads(show(capsys, tmp_path, "--json", "--against", "SSKD"))
    chosen = [(row["epoch_chosen_on"], row["best_mean"], row["last_mean"]) for row in rows]
    assert chosen == [("test set", 70, 69), ("held-out images", 71.25, None)]
    change(folder / "result.json", test_acc=None)
    table.main([str(tmp_path), "--json"])
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == 1 and f"{folder} left out: " in printed.err


# ------------------------------------------------------------------------------------------------------------- records


def write_several(root):
    """Two seeds of a teacher and its student, and a run in another setting."""
    for seed in ("0", "1"):
        write_teacher(root, "vgg13", 75.5 + int(seed), 75.25, "--seed", seed)
        write_student(root, ("vgg13", "vgg8"), 74 - int(seed), 73.1, "--seed", seed)
    write_teacher(root, "vgg8", 12.5, 12, *SYNTHETIC)


def test_a_record_shows_the_same_tables_as_its_run_folders(tmp_path, capsys):
    runs, file = tmp_path / "runs", tmp_path / "study.jsonl"
    write_several(runs)
    assert show(capsys, "--record", file, runs) == f"{file} has 5 line(s), 5 of them of runs found now\n"
    for words in ([], ["--markdown"], SYNTHETIC):
        assert show(capsys, file, *words).replace(str(file), str(runs)) == show(capsys, runs, *words)
    order = ["teacher_vgg13_seed0", "teacher_vgg13_seed1"]
    order += [f"sskd_student_vgg8_weight2.7+10.0_seed{seed}_teacher_vgg13_seed{seed}" for seed in (0, 1)]
    assert [record["run"] for record in records(file)] == [*order, "teacher_vgg8_seed0"]
    assert list(tmp_path.glob("*part*")) == []


def test_a_record_says_what_was_run_and_where(tmp_path, capsys):
    flags = flags_of(teacher.parse_args, "--arch", "vgg8")
    write_run(tmp_path / "runs" / "teacher_vgg8_seed0", flags, 70.5, 70)
    show(capsys, "--record", tmp_path / "study.jsonl", tmp_path / "runs")
    (record,) = records(tmp_path / "study.jsonl")
    assert list(record.items()) == [
        ("run", "teacher_vgg8_seed0"),
        ("flags", flags),
        ("commit", "0123456789ab"),
        ("versions", {"python": "3.11.7", "torch": "2.14.1"}),
        ("device", "cpu (x86_64)"),
        ("threads", 1),
        ("started", "2026-01-02T03:04:05+00:00"),
        ("result", {"best_acc": 70.5, "last_acc": 70, "best_epoch": 1}),
    ]


def test_a_record_keeps_the_later_starts_at_which_something_else_ran(tmp_path, capsys):
    resumed = START | {"started": "2026-02-03T04:05:06+00:00", "command": ["other"]}
    other = {"commit": None, "torch": "2.15.0", "device": "cuda:0 (NVIDIA H100)", "threads": 2}
    changed = [resumed | {name: value} for name, value in other.items()]
    del changed[0]["commit"]  # started from a folder without git
    flags = flags_of(teacher.parse_args, "--arch", "vgg8")
    write_run(tmp_path / "runs" / "teacher_vgg8_seed0", flags, 70.5, 70, [START, resumed, *changed, resumed])
    show(capsys, "--record", tmp_path / "study.jsonl", tmp_path / "runs")
    (record,) = records(tmp_path / "study.jsonl")
    assert (record["commit"], record["started"]) == (START["commit"], START["started"])
    kept = [
        {name: start[name] for name in ("commit", "device", "threads")} | {"torch": start["versions"]["torch"]}
        for start in record["starts"]
    ]
    assert kept == [{name: START[name] for name in other} | {name: value} for name, value in other.items()]
    assert {start["started"] for start in record["starts"]} == {resumed["started"]}


def test_run_folders_from_before_several_starts_were_noted_are_read_too(tmp_path, capsys):
    write_teacher(tmp_path / "new", "vgg8", 70.5, 70)
    write_teacher(tmp_path / "old", "vgg8", 70.5, 70)
    config = tmp_path / "old" / "teacher_vgg8_seed0" / "config.json"
    config.write_text(json.dumps({"flags": json.loads(config.read_text())["flags"]} | START))
    assert show(capsys, tmp_path / "old") == show(capsys, tmp_path / "new")
    for name in ("old", "new"):
        show(capsys, "--record", tmp_path / f"{name}.jsonl", tmp_path / name)
    assert records(tmp_path / "old.jsonl") == records(tmp_path / "new.jsonl")


def test_the_run_folder_itself_may_be_named(tmp_path, capsys, monkeypatch):
    write_student(tmp_path, ("vgg13", "vgg8"), 74, 73)
    (run,) = tmp_path.iterdir()
    monkeypatch.chdir(run)
    assert cells(show(capsys, ".", "--markdown"), "SSKD", ("vgg13", "vgg8"))["here, best"] == "74.00 (1)"
    show(capsys, "--record", tmp_path / "study.jsonl", ".")
    assert records(tmp_path / "study.jsonl")[0]["run"] == run.name


def test_folders_and_records_are_read_together_but_only_records_that_are_named(tmp_path, capsys):
    write_teacher(tmp_path / "a", "vgg13", 70, 69)
    write_teacher(tmp_path / "b", "vgg13", 72, 71, "--seed", "1")
    write_teacher(tmp_path / "c", "vgg13", 74, 73, "--seed", "2")
    show(capsys, "--record", tmp_path / "b" / "b.jsonl", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "teacher_vgg13_seed1")
    show(capsys, "--record", tmp_path / "c.jsonl", tmp_path / "c")
    assert "71.00 ± 1.41 (2)" in show(capsys, tmp_path / "a", tmp_path / "b" / "b.jsonl")
    assert "72.00 ± 2.83 (2)" in show(capsys, tmp_path)  # seeds 0 and 2
    assert "72.00 ± 2.00 (3)" in show(capsys, tmp_path, tmp_path / "b" / "b.jsonl", tmp_path / "c.jsonl")


def test_recording_again_replaces_the_lines_of_the_runs_found_and_keeps_all_others(tmp_path, capsys):
    file = tmp_path / "study.jsonl"
    write_several(tmp_path / "first")
    show(capsys, "--record", file, tmp_path / "first")
    before = file.read_text().splitlines()
    write_teacher(tmp_path / "second", "vgg13", 60, 59)  # the same run, made again
    write_teacher(tmp_path / "second", "vgg13", 61, 59, "--seed", "1", "--epoch", "3")  # the same name, other flags
    write_teacher(tmp_path / "second", "vgg13", 62, 59, "--seed", "2")
    printed = show(capsys, "--record", file, tmp_path / "second")
    assert printed == f"{file} has 7 line(s), 3 of them of runs found now\n"
    after = file.read_text().splitlines()
    assert set(before) - set(after) == {before[0]}
    new = [record for record in records(file) if json.dumps(record) not in before]
    reached = {(record["flags"]["seed"], record["flags"]["epoch"], record["result"]["best_acc"]) for record in new}
    assert reached == {(0, 240, 60), (1, 3, 61), (2, 240, 62)}


def test_a_run_that_is_found_twice_is_recorded_once_from_the_outer_folder(tmp_path, capsys):
    file = tmp_path / "study.jsonl"
    write_teacher(tmp_path / "runs" / "copy", "vgg13", 60, 59)
    write_teacher(tmp_path / "runs", "vgg13", 70, 69)
    inner = tmp_path / "runs" / "copy" / "teacher_vgg13_seed0" / "config.json"
    config = json.loads(inner.read_text())
    inner.write_text(json.dumps(config | {"flags": dict(reversed(config["flags"].items()))}))
    assert show(capsys, "--record", file, tmp_path / "runs") == f"{file} has 1 line(s), 1 of them of runs found now\n"
    assert records(file)[0]["result"]["best_acc"] == 70


def test_recording_what_is_recorded_changes_nothing(tmp_path, capsys):
    write_several(tmp_path / "runs")
    show(capsys, "--record", tmp_path / "study.jsonl", tmp_path / "runs")
    before = (tmp_path / "study.jsonl").read_bytes()
    show(capsys, "--record", tmp_path / "study.jsonl", tmp_path / "runs")
    show(capsys, "--record", tmp_path / "copy.jsonl", tmp_path / "study.jsonl")
    assert (tmp_path / "study.jsonl").read_bytes() == (tmp_path / "copy.jsonl").read_bytes() == before


def test_what_cannot_be_recorded_ends_in_one_line_and_leaves_the_file_as_it_was(tmp_path, fails):
    file = tmp_path / "study.jsonl"
    (tmp_path / "none").mkdir()
    assert "no finished run" in fails(table.main, "--record", file, tmp_path / "none")
    assert not file.exists()
    write_teacher(tmp_path / "runs", "vgg13", 70, 69)
    file.write_text('{"run": "a hand-made line"')
    assert f"{file}:1" in fails(table.main, "--record", file, tmp_path / "runs")
    assert file.read_text() == '{"run": "a hand-made line"'
    assert "no-such-folder" in fails(table.main, "--record", tmp_path / "no-such-folder" / "a.jsonl", tmp_path / "runs")
    assert "table.txt" in fails(table.main, "--record", tmp_path / "table.txt", tmp_path / "runs")
    assert "nowhere" in fails(table.main, tmp_path / "nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none", "runs", "study.jsonl"]


def test_a_record_that_cannot_be_replaced_stays(tmp_path, fails, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    file = tmp_path / "study.jsonl"
    write_teacher(tmp_path / "runs", "vgg13", 70, 69)
    file.write_text("")
    monkeypatch.setattr(os, "replace", full)
    assert "No space left" in fails(table.main, "--record", file, tmp_path / "runs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "study.jsonl"]


# ------------------------------------------------------------------------------------------------------ what is damaged

WHOLE = {
    "run": "teacher_vgg13_seed1",
    "flags": flags_of(teacher.parse_args, "--arch", "vgg13", "--seed", "1"),
    "result": {"best_acc": 50, "last_acc": 49},
}
DAMAGED = {
    "half a line": json.dumps(WHOLE)[:100],
    "no object": "[1, 2]",
    "a number": "3",
    "nesting without end": "[" * 100_000,
    "no UTF-8": b'{"run": "\xff"}',
    "half a character": json.dumps(WHOLE | {"run": "\ud800"}),
    "no flags": json.dumps(WHOLE | {"flags": None}),
    "no network": json.dumps(WHOLE | {"flags": {"dataset": "cifar100", "seed": 1}}),
    "a network that is no name": json.dumps(WHOLE | {"flags": WHOLE["flags"] | {"arch": [1]}}),
    "a data set that is no name": json.dumps(WHOLE | {"flags": WHOLE["flags"] | {"dataset": {}}}),
    "a seed that is no whole number": json.dumps(WHOLE | {"flags": WHOLE["flags"] | {"seed": 0.5}}),
    "a flag of no known type": json.dumps(WHOLE | {"flags": WHOLE["flags"] | {"lr": {"at": [1]}}}),
    "starts that are none": json.dumps(WHOLE | {"starts": [1]}),
    "a flag that is no number": json.dumps(WHOLE | {"flags": WHOLE["flags"] | {"lr": float("nan")}}),
    "a student without weights": json.dumps(WHOLE | {"flags": WHOLE["flags"] | {"s_arch": "vgg8"}}),
    "no result": json.dumps(WHOLE | {"result": []}),
    "NaN": json.dumps(WHOLE | {"result": {"best_acc": 50, "last_acc": float("nan")}}),
    "Infinity": json.dumps(WHOLE | {"result": {"best_acc": float("inf"), "last_acc": 50}}),
    "a number too large": json.dumps(WHOLE).replace('"best_acc": 50', '"best_acc": 1e999'),
    "a text": json.dumps(WHOLE | {"result": {"best_acc": "50", "last_acc": 49}}),
    "true": json.dumps(WHOLE | {"result": {"best_acc": True, "last_acc": 49}}),
    "more than all": json.dumps(WHOLE | {"result": {"best_acc": 101, "last_acc": 49}}),
    "less than none": json.dumps(WHOLE | {"result": {"best_acc": 50, "last_acc": -1}}),
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_named_and_left_out(tmp_path, capsys, line):
    flags = WHOLE["flags"] | {"seed": 0}
    good = json.dumps(WHOLE | {"flags": flags, "result": {"best_acc": 70, "last_acc": 69}}).encode()
    file = tmp_path / "study.jsonl"
    file.write_bytes(b"\n".join([good, b"", line if isinstance(line, bytes) else line.encode(), b""]))
    table.main([str(file)])
    printed = capsys.readouterr()
    (error,) = printed.err.splitlines()
    assert f": {file}:3 left out: " in error
    assert "70.00 (1)" in printed.out


def test_a_damaged_run_is_named_and_left_out(tmp_path, capsys):
    write_teacher(tmp_path, "vgg13", 70, 69)
    flags = json.dumps({"flags": flags_of(teacher.parse_args, "--arch", "vgg8")})
    result = json.dumps({"best_acc": 50, "last_acc": 49})
    damaged = {
        "config cut": (flags[:50], result),
        "config missing": (None, result),
        "config of no object": ("[]", result),
        "config without flags": ("{}", result),
        "config without starts": (flags[:-1] + ', "starts": []}', result),
        "config with odd starts": (flags[:-1] + ', "starts": [1]}', result),
        "result cut": (flags, result[:10]),
        "result of a number": (flags, "3"),
        "result with NaN": (flags, result.replace("50", "NaN")),
        "result with text": (flags, result.replace("50", '"50"')),
        "result without last": (flags, '{"best_acc": 50}'),
    }
    for name, contents in damaged.items():
        (tmp_path / name).mkdir()
        for file, content in zip(("config.json", "result.json"), contents, strict=True):
            if content is not None:
                (tmp_path / name / file).write_text(content)
    for words in ([], ["--record", str(tmp_path / "study.jsonl")]):
        table.main([str(tmp_path), *words])
        printed = capsys.readouterr()
        left_out = [re.search(r": (.*?) left out: ", line)[1] for line in printed.err.splitlines()]
        assert left_out == [str(tmp_path / name) for name in sorted(damaged)]
        assert "50.00" not in printed.out
    assert [record["result"]["best_acc"] for record in records(tmp_path / "study.jsonl")] == [70]


# ---------------------------------------------------------------------------------------------------------- the script


def test_the_table_starts_without_torch():
    check = "import sys, experiments.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_a_table_that_nobody_reads_to_its_end_ends_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, ROOT / "experiments" / "table.py"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.stderr == b""
