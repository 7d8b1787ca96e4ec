"""experiments/published_pair.py: tables and figures of recorded runs, and a student to hand out."""

import csv
import json
import random
import shutil

import pytest
import torch
from conftest import TINY
from matplotlib.figure import Figure

import models
import teacher
from experiments import published_pair
from harness.checkpoint import read

CSV = published_pair.RECORD / "published_code.csv"
SCALARS = [f"train/{term}_loss" for term in ("ce", "kd", "tf", "ss")] + ["train/cls_acc", "train/ss_acc", "val/cls_acc"]


def log_of(run, phase, epochs, names):
    draw = random.Random(run)
    return [
        {"phase": phase, "epoch": epoch} | {name: draw.uniform(1, 80) for name in names}
        for epoch in range(1, epochs + 1)
    ]


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """The logs of two runs, which are recorded."""
    monkeypatch.setattr(published_pair, "RECORD", tmp_path / "published_pair")
    (tmp_path / "published_pair").mkdir()
    shutil.copy(CSV, tmp_path / "published_pair")
    shutil.copy(CSV.parents[1] / "published_results.json", tmp_path)
    found = {name: log_of(name, "student", 240, SCALARS) for name in ("SSKD", "KD")}
    head = [f"{split}/teacher_ssp_{what}" for split in ("train", "val") for what in ("loss", "acc")]
    found["SSKD"] = log_of("head", "ss_head", 60, head) + found["SSKD"]
    for name, log in found.items():
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        about = {"teacher": {"path": str(tmp_path / "best.pth"), "arch": "resnet56"}}
        (run / "config.json").write_text(json.dumps({"flags": {}, "starts": [about, about, about]}))
        (run / "result.json").write_text(json.dumps({"seconds": 9000} | about))
        published_pair.main(["--record", name, str(run)])
    return found


def test_the_tables_show_what_the_logs_say(logs, tmp_path, capsys):
    capsys.readouterr()
    published_pair.main([])
    tables = [table.splitlines() for table in capsys.readouterr().out.strip().split("\n\n")]
    results, head, student = (
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table if not line.startswith("| ---")]
        for table in tables
    )
    acc = {name: [line["val/cls_acc"] for line in log if line["phase"] == "student"] for name, log in logs.items()}
    best = [f"{max(acc[name]):.2f} ({acc[name].index(max(acc[name])) + 1})" for name in ("SSKD", "KD")]
    assert results == [
        ["", "SSKD", "KD"],
        ["paper", "71.49", "70.66"],
        ["HSAKD's re-runs", "70.80 ± 0.02", "70.91 ± 0.10"],
        ["published code, best of every fifth epoch", "70.87", "–"],
        ["published code, last epoch", "70.67", "–"],
        ["here, best epoch", *best],
        ["here, best of every fifth epoch", *(f"{max(acc[name][4::5]):.2f}" for name in ("SSKD", "KD"))],
        ["here, last epoch", *(f"{acc[name][-1]:.2f}" for name in ("SSKD", "KD"))],
        ["hours of computing", "2.5", "2.5"],
        ["resumed", "2", "2"],
    ]
    by_epoch = {(line["phase"], str(line["epoch"])): line for line in logs["SSKD"]}
    code = {(line["phase"], line["epoch"]): line for line in csv.DictReader(CSV.read_text().splitlines()[4:])}
    for phase, (_, *rows), places in (  # of a column, the name in the log and its decimals
        ("ss_head", head, {2: ("train/teacher_ssp_loss", 4), 5: ("val/teacher_ssp_acc", 2)}),
        ("student", student, {5: ("train/ss_loss", 5), 8: ("val/cls_acc", 2)}),
    ):
        assert len(rows) == 2 * {"ss_head": 4, "student": 14}[phase]
        for row in rows:
            epoch, whose = row[:2]
            for place, (name, decimals) in places.items():
                of_code = code[phase, epoch][name.replace("train/", "").replace("val/", "val_")]
                value = by_epoch[phase, epoch][name] if whose == "here" else of_code
                assert row[place] == ("–" if value == "" else f"{float(value):.{decimals}f}")
    assert not any(str(tmp_path) in file.read_text() for file in (tmp_path / "published_pair").rglob("*.json"))


def test_the_figures_show_the_logs(logs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    published_pair.main(["--figures", str(tmp_path)])
    accuracy, terms = drawn
    lines = {line.get_label(): line for line in accuracy.axes[0].lines}
    for name, log in logs.items():
        assert list(lines[name].get_ydata()) == [line["val/cls_acc"] for line in log if line["phase"] == "student"]
    assert lines["SSKD, published code"].get_ydata().max() == 70.87
    for ax in terms.axes:
        expected = [line[f"train/{ax.get_title()}_loss"] for line in logs["SSKD"] if line["phase"] == "student"]
        assert list(ax.lines[0].get_ydata()) == expected


def test_a_released_student_is_the_best_one_without_ss_head_or_paths(runs, tmp_path, capsys):
    file = tmp_path / "resnet14x05.pth"
    published_pair.main(["--release", str(file), str(runs.student)])
    best = torch.load(runs.student / "ckpt" / "student_best.pth")
    for name, value in models.load(file).state_dict().items():
        assert torch.equal(value, best["state_dict"][f"backbone.{name}"])
    content = torch.load(file, weights_only=True)
    assert content.keys() == {"state_dict", "acc", "about", "commit", "command"}
    assert content["about"].keys() >= {"arch", "names", "mean", "std"}
    capsys.readouterr()
    teacher.main(["--evaluate", str(file), *TINY])
    assert f"test accuracy {read(file).acc:.2f} %" in capsys.readouterr().out
