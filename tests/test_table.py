"""experiments/table.py and runs.py."""

import csv
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import SHORT
from recorded import COMMON, KD, PLAIN, SS, START, TF, change, write_network, write_run, write_student

import baseline
import teacher
from experiments import runs, sweep, table
from harness.flags import HARMLESS
from methods import METHODS, Method
from models import model_dict

PAIR = ("vgg13", "vgg8")
T_975 = 4.302653  # Student's t for 95 % with two degrees of freedom, from a printed table
WEIGHTS = {"kd": 0.0, "fitnet": 100.0, "at": 1000.0, "sp": 3000.0, "vid": 1.0, "rkd": 1.0, "pkt": 30000.0, "ab": 1.0}
WEIGHTS |= {"ft": 200.0, "crd": 0.8, "dkd": 1.0, "ls": 9.0}
OTHERS = {"dkd": {"ce_weight": 1.0, "kd_weight": 0.0}, "ls": {"kd_weight": 0.0}}  # beside 0.1 and 0.9


def show(capsys, *words):
    """What table.py prints, if it prints nothing on stderr."""
    table.main([str(word) for word in words])
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def tables(markdown):
    """{title: rows by the heads of their columns} of all tables in what was printed as Markdown."""
    found, title, head = {}, "", None
    for line in markdown.splitlines():
        cells = [text.strip() for text in line.strip("|").split("|")]
        if line.startswith("**"):
            title, head = line.strip("*"), None
        elif line.startswith("|") and head is None:
            found[title], head = [], cells
        elif line.startswith("|") and "---" not in cells:
            found[title].append(dict(zip(head, cells, strict=True)))
    return found


def listed(capsys, *words):
    """(title, rows) of the list of runs."""
    *_, last = tables(show(capsys, *words, "--markdown")).items()
    return last


def column(capsys, pair, *words):
    """{(method, row): text} of the column of a pair in a published table."""
    name = " → ".join(pair)
    found = tables(show(capsys, *words, "--markdown")).values()
    (rows,) = [rows for rows in found if name in rows[0]]
    return {(row["teacher → student"], row[""]): row[name] for row in rows}


def as_json(capsys, *words):
    return json.loads(show(capsys, *words, "--json"))


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_published_flags_are_the_defaults_of_the_scripts():
    import student

    def unusual(parse_args, *words):
        flags = vars(parse_args([str(word) for word in words])) | {"dataset": "cifar100"}
        flags = {name: value for name, value in flags.items() if name not in HARMLESS}
        return runs.run_of("", {"run": "x", "flags": flags, "result": {"best_acc": 1, "last_acc": 1}})["unusual"]

    assert unusual(teacher.parse_args, "--arch", "resnet8") == ()
    assert unusual(teacher.parse_args, "--arch", "ShuffleV1", "--lr", "0.01") == ()
    assert unusual(student.parse_args, "--t-path", "-", "--s-arch", "resnet8") == ()
    for method in WEIGHTS:
        assert unusual(baseline.parse_args, "--t-path", "-", "--s-arch", "resnet8", "--method", method) == ()


def test_published_tables_show_mean_and_deviation_over_seeds(tmp_path, capsys):
    for seed, best in enumerate((75.0, 76.0, 77.5)):
        write_student(tmp_path, PAIR, best, best - 1.5, seed)
    for best, flags in ((73, PLAIN | {"amp": "bf16", "compile": True}), (74, TF), (74.5, SS)):
        write_student(tmp_path, PAIR, best, 72, **flags)
    write_network(tmp_path, "vgg13", 75.5, 75.25)
    write_network(tmp_path / "deeper", "vgg8", 70, 69)
    write_network(tmp_path / "deeper", "vgg8", 71, 70, seed=1)
    write_network(tmp_path / "deeper" / "copy", "vgg8", 71, 70, seed=1)
    deviation = np.std([75, 76, 77.5], ddof=1)
    found = column(capsys, PAIR, tmp_path)
    assert found["SSKD", "published"] == "75.33" and found["KD", "published"] == "72.98"
    assert found["SSKD", "normal range"] == "74.33 to 75.43"
    for which, less in (("best", 0), ("last", 1.5)):
        assert found["SSKD", f"here, {which}"] == f"{np.mean([75, 76, 77.5]) - less:.2f} ± {deviation:.2f} (3)"
    expected = {"teacher": "75.50 (1)", "student": "70.50 ± 0.71 (2)", "KD, 4 views": "73.00 (1)"}
    expected |= {"KD + tf": "74.00 (1)", "KD + ss": "74.50 (1)", "KD": "–"}
    assert {method: found[method, "here, best"] for method in expected} == expected
    other = column(capsys, ("resnet56", "resnet20"), tmp_path)
    assert other["SSKD", "re-run, HSAKD"] == "70.80 ± 0.02" and other["SSKD", "here, best"] == "–"
    other = column(capsys, ("ResNet50", "vgg8"), tmp_path)
    assert other["student", "here, best"] == "70.50 ± 0.71 (2)"  # vgg8 is in both tables


def test_every_compared_method_has_its_published_row(tmp_path, capsys):
    pair = ("wrn_40_2", "ShuffleV1")
    for i, (method, weight) in enumerate(WEIGHTS.items()):
        write_student(tmp_path, pair, 60 + i, 50, method=method, lr=0.01, weight=weight, **OTHERS.get(method, {}))
    found = column(capsys, pair, tmp_path)
    rows = "KD", "FitNet", "AT", "SP", "VID", "RKD", "PKT", "AB", "FT", "CRD", "DKD", "KD + LS"
    assert [found[row, "here, best"] for row in rows] == [f"{60 + i}.00 (1)" for i in range(12)]
    file = json.loads(table.PUBLISHED.read_text())["cross"]
    place = file["pairs"].index(list(pair))
    for row in ("teacher", "student", *rows, "SSKD"):
        assert found[row, "published"] == (f"{file[row][place]:.2f}" if file[row][place] else "–")
    write_student(tmp_path, pair, 30, 29, method="at", lr=0.01, weight=3.0)
    title, (row,) = listed(capsys, tmp_path)
    assert (title, row["method"], row["best"]) == ("cifar100, --weight 3.0", "AT", "30.00 (1)")


@pytest.mark.parametrize(
    "flags, title",
    [
        ({"epoch": 24, "milestones": [15, 18, 21]}, "--epoch 24 --milestones 15 18 21"),
        ({"few_shot": 0.25}, "--few-shot 0.25"),
        ({"side": 64}, "--side 64"),
        ({"new_flag": 3}, "--new-flag 3"),
    ],
)
def test_runs_with_other_flags_are_listed_apart(flags, title, tmp_path, capsys):
    write_student(tmp_path, PAIR, 50, 49, **flags)
    write_network(tmp_path, "vgg13", 55, 54, **flags)
    ((found, rows),) = tables(show(capsys, tmp_path, "--markdown")).items()
    assert found == f"cifar100, {title}"
    cells = [[row[name] for name in ("network", "teacher", "method", "best", "last")] for row in rows]
    assert cells == [
        ["vgg13", "–", "alone", "55.00 (1)", "54.00 (1)"],
        ["vgg8", "vgg13", "SSKD", "50.00 (1)", "49.00 (1)"],
    ]


def test_what_describes_a_run_or_its_data_makes_no_setting(tmp_path, capsys):
    for seed, more in enumerate(({}, {"side": None}, {"data": "f00d", "t_features": "stored"})):
        write_student(tmp_path, PAIR, 70 + seed, 69, seed, **more)
    write_network(tmp_path, "vgg13", 75, 74, teacher=None, data="f00d")
    old = write_student(tmp_path, PAIR, 73, 69, seed=3)
    flags = json.loads((old / "config.json").read_text())["flags"]
    newer = ("side", "val_fraction", "few_shot", "label_noise", "deterministic", "amp", "ratio_tf")
    change(old / "config.json", flags={name: value for name, value in flags.items() if name not in newer})
    write_student(tmp_path, PAIR, 20, 20, **PLAIN)
    write_student(tmp_path, PAIR, 22, 22, 1, **PLAIN, t_epoch=3, ss_T=1.0, tf_T=2.0)  # of terms that are not used
    found = column(capsys, PAIR, tmp_path)
    assert found["SSKD", "here, best"] == "71.50 ± 1.29 (4)" and found["teacher", "here, best"] == "75.00 (1)"
    assert found["KD, 4 views", "here, best"] == "21.00 ± 1.41 (2)"
    assert "cifar100, " not in show(capsys, tmp_path)  # nothing is left to be listed


def test_a_flag_that_varies_has_a_column_and_others_stand_in_the_title(tmp_path, capsys):
    common = {"epoch": 20, "milestones": [10, 15], "t_epoch": 5, "dataset": "synthetic"}
    for ratio in (0.5, 1.0, 0.75, 0.0):
        write_student(tmp_path, PAIR, 30, 29, **common, ratio_ss=ratio)
    write_student(tmp_path, PAIR, 20, 19, **common, **PLAIN, train_size=500, kd_T=2.0)
    write_network(tmp_path, "MobileNetV2", 10, 9, epoch=20, milestones=[10, 15], dataset="synthetic", lr=0.01)
    title, rows = listed(capsys, tmp_path, "--dataset", "synthetic")
    assert title == "synthetic, --epoch 20 --milestones 10 15 --t-epoch 5"
    assert [name for name in rows[0] if name.startswith("--")] == ["--kd-T", "--ratio-ss", "--train-size"]
    assert [(row["method"], row["--kd-T"], row["--ratio-ss"], row["--train-size"]) for row in rows] == [
        ("alone", "–", "–", "–"),
        *[("SSKD", "4.0", ratio, "–") for ratio in ("0.0", "0.5", "0.75", "1.0")],
        ("KD, 4 views", "2.0", "–", "500"),
    ]


def test_csv_and_json_hold_all_that_is_known_of_a_row(tmp_path, capsys):
    for seed, best in enumerate((75.0, 76.0, 78.5)):
        write_student(tmp_path, PAIR, best, best - 1, seed)
    write_student(tmp_path, ("resnet20", "resnet8"), 20, 19, **SS, epoch=20, milestones=[10, 15], t_epoch=7)
    first, second = as_json(capsys, tmp_path)
    names = {"dataset": "cifar100", "network": "vgg8", "teacher": "vgg13", "one_teacher": "", "method": "SSKD"}
    deviation = pytest.approx(np.std([75, 76, 78.5], ddof=1))
    flags = {"epoch": 240, "milestones": "150 180 210", "t_epoch": 60}
    figures = {"n": 3, "best_mean": 76.5, "best_sd": deviation, "last_mean": 75.5, "last_sd": deviation}
    assert second == names | flags | figures | {"seeds": [0, 1, 2]}
    assert (first["method"], first["epoch"], first["milestones"], first["t_epoch"]) == ("KD + ss", 20, "10 15", 7)
    assert (first["n"], first["best_mean"], first["best_sd"], first["seeds"]) == (1, 20, None, [0])
    row, _ = csv.DictReader(show(capsys, tmp_path, "--csv").splitlines())
    assert list(row) == list(first)
    assert (row["milestones"], row["best_mean"], row["best_sd"]) == ("10 15", "20.0", "")


def test_a_run_that_is_there_twice_counts_once(tmp_path, capsys):
    write_student(tmp_path, PAIR, 75, 74)
    write_student(tmp_path / "copy", PAIR, 75, 74)
    assert column(capsys, PAIR, tmp_path)["SSKD", "here, best"] == "75.00 (1)"
    other = write_student(tmp_path / "half", PAIR, 77, 76, amp="bf16")
    table.main([str(tmp_path), "--json"])
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert str(other) in line and "left out" in line and "--by" in line
    assert [(row["n"], row["best_mean"]) for row in json.loads(printed.out)] == [(1, 75)]
    rows = as_json(capsys, tmp_path, "--by", "amp")
    assert [(row["amp"], row["best_mean"]) for row in rows] == [("bf16", 77), ("off", 75)]


def test_device_and_precision_part_runs_on_demand(tmp_path, capsys):
    cpu, gpu = START, START | {"device": "cuda (NVIDIA H100)"}
    for seed, (best, starts) in enumerate(((50, [cpu]), (52, [cpu, cpu]), (60, [gpu]), (62, [cpu, gpu, cpu]))):
        change(write_student(tmp_path, PAIR, best, 40, seed) / "config.json", starts=starts)
    assert column(capsys, PAIR, tmp_path)["SSKD", "here, best"] == "56.00 ± 5.89 (4)"
    expected = {"cpu (x86_64)": 51, "cpu (x86_64), cuda (NVIDIA H100)": 62, "cuda (NVIDIA H100)": 60}
    show(capsys, "--record", tmp_path / "study.jsonl", tmp_path)
    for source in (tmp_path, tmp_path / "study.jsonl"):
        rows = as_json(capsys, source, "--by", "device", "compile")
        assert {row["device"]: row["best_mean"] for row in rows} == expected
        assert {row["compile"] for row in rows} == {False}


def test_runs_with_held_out_images_show_their_test_accuracy(tmp_path, capsys):
    write_student(tmp_path, PAIR, 70, 69)
    held = write_student(tmp_path, PAIR, 90, 89, seed=1, val_fraction=0.1)
    change(held / "result.json", test_acc=71.25)
    assert column(capsys, PAIR, tmp_path)["SSKD", "here, best"] == "70.00 (1)"
    title, (row,) = listed(capsys, tmp_path)
    assert (title, row["best"], row["last"]) == ("cifar100, --val-fraction 0.1", "71.25 (1)", "–")
    assert "best on held-out images" in show(capsys, tmp_path)


def test_one_teacher_for_all_seeds_is_shown_apart_from_a_teacher_for_each(tmp_path, capsys):
    for seed in (0, 1, 2):
        write_student(tmp_path, PAIR, 70 + seed, 69, seed, teacher_seed=0)
    assert column(capsys, PAIR, tmp_path)["SSKD", "here, best"] == "71.00 ± 1.00 (3) †"
    for seed in (1, 2):  # seed 0 has the teacher of seed 0 in both designs
        write_student(tmp_path, PAIR, 80, 79, seed)
    assert column(capsys, PAIR, tmp_path)["SSKD", "here, best"] == "76.67 ± 5.77 (3)"
    _, (row,) = listed(capsys, tmp_path)
    assert (row["teacher"], row["best"]) == ("vgg13 (vgg13-0)", "71.00 ± 1.00 (3)")
    own, shared = as_json(capsys, tmp_path)
    assert (own["one_teacher"], own["best_mean"]) == ("", pytest.approx((70 + 80 + 80) / 3))
    assert (shared["one_teacher"], shared["best_mean"], shared["seeds"]) == ("vgg13-0", 71, [0, 1, 2])


@pytest.mark.parametrize("folder, told", [("mine", "vgg13"), ("vgg13_vanilla", None)])
def test_the_result_knows_the_network_of_a_teacher_in_a_renamed_folder(folder, told, tmp_path, capsys):
    run = write_student(tmp_path / "runs", (folder, "vgg8"), 75, 74)
    change(run / "result.json", teacher={"path": "/home/me/mine.pth", "arch": told})
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "runs").symlink_to(tmp_path / "runs")
    for source in (tmp_path / "runs", tmp_path / "link"):
        assert column(capsys, PAIR, source)["SSKD", "here, best"] == "75.00 (1)"
    show(capsys, "--record", tmp_path / "study.jsonl", tmp_path / "runs")
    assert "/home/me" not in (tmp_path / "study.jsonl").read_text()


def test_gains_are_over_the_common_seeds_with_their_interval(tmp_path, capsys):
    reached = {"SSKD": [70.0, 72.5, 71.0, 99.0], "KD, 4 views": [69.0, 70.0, 71.5], "KD + tf": [60.0]}
    for accuracies, flags in zip(reached.values(), ({}, PLAIN, TF), strict=True):
        for seed, best in enumerate(accuracies):
            write_student(tmp_path, PAIR, best, best / 2, seed, **flags)
    write_student(tmp_path, PAIR, 1, 1, few_shot=0.5)  # in another setting
    write_student(tmp_path, ("resnet14", "vgg8"), 2, 1)  # of another teacher
    words = (tmp_path, "--against", "KD, 4 views")
    difference = np.subtract(reached["SSKD"][:3], reached["KD, 4 views"])
    half = T_975 * difference.std(ddof=1) / 3**0.5
    mean, low, high = difference.mean(), difference.mean() - half, difference.mean() + half
    _, rows = listed(capsys, *words)
    assert {(row["method"], row["best"]): row["best − KD, 4 views"] for row in rows} == {
        ("SSKD", "78.12 ± 13.95 (4)"): f"{mean:+.2f} [{low:+.2f}, {high:+.2f}] (3)",
        ("KD + tf", "60.00 (1)"): "-9.00 (1)",
        ("KD, 4 views", "70.17 ± 1.26 (3)"): "–",
        ("SSKD", "1.00 (1)"): "–",
        ("SSKD", "2.00 (1)"): "–",
    }
    (row,) = [row for row in as_json(capsys, *words) if row["n"] == 4]
    expected = {"pairs": 3, "best_difference": mean, "best_low": low, "best_high": high}
    expected |= {f"last_{what}": expected[f"best_{what}"] / 2 for what in ("difference", "low", "high")}
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_gains_over_the_network_alone_and_over_the_usual_flags_of_a_method(tmp_path, capsys):
    write_network(tmp_path, "vgg8", 50, 50)
    for ratio, best in ((0.25, 53), (0.75, 54), (1.0, 51)):
        write_student(tmp_path, PAIR, best, best, ratio_ss=ratio)
    for method, gains in (("alone", [None, 3, 4, 1]), ("SSKD", [None, -1, None, -3])):
        rows = as_json(capsys, tmp_path, "--against", method)
        assert [row["ratio_ss"] for row in rows] == [None, 0.25, 0.75, 1]
        assert [row["best_difference"] for row in rows] == gains


def test_the_row_of_a_grid_that_counts_for_against_is_named_and_can_be_chosen(tmp_path, capsys, fails):
    for ratio, best in ((0.25, 53), (0.5, 54)):
        write_student(tmp_path, PAIR, best, best, ratio_ss=ratio)
    write_student(tmp_path, PAIR, 50, 49, **PLAIN)
    for words, taken, gain in (
        ("SSKD", "0.25", "-3.00 (1)"),
        ("SSKD --ratio-ss 0.5", "0.5", "-4.00 (1)"),
        ("SSKD --ratio-ss=0.50", "0.5", "-4.00 (1)"),
    ):
        (_, rows) = listed(capsys, tmp_path, "--against", words)
        assert {row["method"]: row[f"best − {words}"] for row in rows}["KD, 4 views"] == gain
        found = {row["method"]: row["against"] for row in as_json(capsys, tmp_path, "--against", words)}
        assert found["KD, 4 views"] == f"SSKD --ratio-ss {taken}"
    text = show(capsys, tmp_path, "--against", "SSKD")
    assert "SSKD --ratio-ss 0.25" in text
    assert "ratio-ss" not in "".join(show(capsys, tmp_path, "--against", "KD, 4 views").splitlines()[-1:])
    for words in ("SSKD --ratio-ss 0.75", "SSKD --nope 1"):
        assert "there are SSKD --ratio-ss 0.25, SSKD --ratio-ss 0.5" in fails(table.main, tmp_path, "--against", words)


class Toy(Method):
    """A method as a user writes it."""

    maps = False

    def forward(self, student, teacher, target, rows):
        return (student.logits - teacher.logits).square().mean()


def test_methods_and_model_dict_are_the_only_places_for_a_method_and_a_network(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from experiments import plot

    class Again(METHODS["crd"]):  # copied, with the label that it had
        weight = 0.5

    monkeypatch.setitem(METHODS, "toy", Toy)
    monkeypatch.setitem(METHODS, "again", Again)
    monkeypatch.setitem(model_dict, "tiny", model_dict["resnet8"])
    monkeypatch.chdir(tmp_path)
    sweep.main(["--list", "--pairs", "tiny:tiny", "--methods", "toy", "again", "crd", "--", *SHORT])
    scripts = {"teacher.py": teacher.main, "baseline.py": baseline.main}
    for line in capsys.readouterr().out.splitlines():
        _, script, *flags = shlex.split(line)
        scripts[Path(script).name](flags)
    capsys.readouterr()
    words = ["experiments", "--dataset", "synthetic"]
    rows = as_json(capsys, *words)
    assert {(row["network"], row["method"]) for row in rows} == {
        ("tiny", method) for method in ("alone", "toy", "again", "CRD")
    }
    title, rows = listed(capsys, *words)
    assert not any("weight" in name for name in (title, *rows[0]))  # all have their published weights
    ax = plot.draw(plot.parse_args(["accuracy", *words])).axes[0]
    assert {"toy", "again"} < {tick.get_text() for tick in ax.get_yticklabels()}
    labels = [line.get_label() for line in plot.draw(plot.parse_args(["curves", *words])).axes[0].get_lines()]
    assert {"tiny, toy", "tiny, again"} < set(labels)


def write_several(root):
    """Two seeds of a teacher and its student, and a run on another data set."""
    for seed in (0, 1):
        write_network(root, "vgg13", 75.5 + seed, 75.25, seed)
        write_student(root, PAIR, 74 - seed, 73.1, seed)
    write_network(root, "vgg8", 12.5, 12, dataset="synthetic")


def test_a_record_shows_the_same_tables_as_its_run_folders(tmp_path, capsys):
    folder, file = tmp_path / "runs", tmp_path / "study.jsonl"
    write_several(folder)
    assert show(capsys, "--record", file, folder) == f"{file} has 5 line(s), 5 of them of runs found now\n"
    for words in ([], ["--markdown"], ["--json"], ["--dataset", "synthetic"]):
        assert show(capsys, file, *words) == show(capsys, folder, *words)
    before = file.read_bytes()
    show(capsys, "--record", file, folder)
    show(capsys, "--record", tmp_path / "copy.jsonl", file)
    assert file.read_bytes() == (tmp_path / "copy.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.jsonl", "runs", "study.jsonl"]


def test_a_record_says_what_was_run_and_where(tmp_path, capsys, monkeypatch):
    resumed = START | {"started": "2026-02-03T04:05:06+00:00", "command": ["other"]}
    other = [resumed | {"torch": "2.15.0"}, resumed | {"device": "cuda:0 (NVIDIA H100)"}]
    flags = COMMON | {"arch": "vgg8"}
    folder = write_run(tmp_path / "teacher_vgg8_seed0", flags, 70.5, 70, [START, resumed, *other])
    monkeypatch.chdir(folder)
    show(capsys, "--record", tmp_path / "study.jsonl", ".")

    def kept(start):
        versions = {"versions": {name: start[name] for name in ("python", "torch")}}
        return {name: start[name] for name in ("commit", "device", "threads", "started")} | versions

    result = {"best_acc": 70.5, "last_acc": 70, "best_epoch": 1}
    starts = [kept(start) for start in other]  # those that differ from the first
    expected = {"run": folder.name, "flags": flags, "result": result, "starts": starts} | kept(START)
    assert records(tmp_path / "study.jsonl") == [expected]


def test_recording_again_replaces_the_lines_of_the_runs_found_and_keeps_all_others(tmp_path, capsys):
    file = tmp_path / "study.jsonl"
    write_several(tmp_path / "first")
    show(capsys, "--record", file, tmp_path / "first")
    before = records(file)
    again = tmp_path / "second"
    write_network(again, "vgg13", 60, 59)  # the same run, made again
    write_network(again / "copy", "vgg13", 59, 58)  # an inner copy does not count
    write_network(again, "vgg13", 61, 59, seed=1, epoch=3)  # the same name, other flags
    write_network(again, "vgg13", 62, 59, seed=2)
    assert show(capsys, "--record", file, again) == f"{file} has 7 line(s), 3 of them of runs found now\n"
    after = records(file)
    assert [record["run"] for record in before if record not in after] == ["teacher_vgg13_seed0"]
    new = [record for record in after if record not in before]
    reached = {(record["flags"]["seed"], record["flags"]["epoch"], record["result"]["best_acc"]) for record in new}
    assert reached == {(0, 240, 60), (1, 3, 61), (2, 240, 62)}


def test_what_is_not_there_is_reported_in_one_line(tmp_path, fails):
    write_student(tmp_path, PAIR, 50, 50, dataset="synthetic")
    line = fails(table.main, tmp_path)
    assert "no finished run on cifar100" in line and "synthetic" in line
    assert "there are SSKD" in fails(table.main, tmp_path, "--dataset", "synthetic", "--against", "CRD")
    assert "nowhere" in fails(table.main, tmp_path / "nowhere")
    assert "table.txt" in fails(table.main, "--record", tmp_path / "table.txt", tmp_path)


def test_a_damaged_run_is_named_and_left_out(tmp_path, capsys):
    good = {"run": "teacher_vgg13_seed0", "flags": COMMON | {"arch": "vgg13"}}
    good |= {"result": {"best_acc": 70, "last_acc": 69}}
    bad = [{"flags": None}, {"flags": COMMON | KD | {"s_arch": "vgg8", "method": "mine"}}, {"result": {}}]
    lines = [json.dumps(good | more) for more in ({}, *bad)]
    (tmp_path / "study.jsonl").write_text("\n".join([*lines, lines[0][:100]]))
    (write_network(tmp_path / "a", "vgg8", 50, 49) / "config.json").write_text('{"fl')
    (write_network(tmp_path / "b", "vgg8", 50, 49) / "config.json").unlink()
    (write_network(tmp_path / "running", "vgg8", 50, 49) / "result.json").unlink()  # a run in progress: no line
    table.main([str(tmp_path / "study.jsonl"), str(tmp_path), "--json"])
    printed = capsys.readouterr()
    places = [f"{tmp_path}/study.jsonl:{number}" for number in (2, 3, 4, 5)]
    places += [str(tmp_path / name / "teacher_vgg8_seed0") for name in "ab"]
    for place, line in zip(places, printed.err.splitlines(), strict=True):
        assert f"{place} left out: " in line
    assert [row["best_mean"] for row in json.loads(printed.out)] == [70]
