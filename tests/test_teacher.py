"""teacher.py from the command line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, contents
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cifar
import models
import student
import teacher
from harness import checkpoint, sources
from harness.sources import Split

NETWORKS = {"teacher": "best.pth", "student": "student_best.pth"}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_run_leaves_its_checkpoints_its_flags_and_its_result(runs):
    files = {path.name for path in (runs.teacher / "ckpt").iterdir() if "ss_head_" not in path.name}
    assert files == {"best.pth", "last.pth", "002.pth", "003.pth"}
    best = torch.load(runs.teacher / "ckpt" / "best.pth", weights_only=True)
    result, lines = result_of(runs.teacher), lines_of(runs.teacher)
    assert set(best) == {"epoch", "state_dict", "acc", "about"}
    mean, std = ([value] * 3 for value in (0.1863, 0.2018))
    about = {"arch": "resnet8", "dataset": "synthetic", "classes": 100, "side": 32, "mean": mean, "std": std}
    assert best["about"] == about | {"names": sources.CLASSES["synthetic"], "tested": 40}
    assert (best["acc"], best["epoch"]) == (result["best_acc"], result["best_epoch"])
    assert (result["epochs"], result["params"], result["multiply_adds"]) == (3, 83_892, 12_507_392)
    assert result["seconds"] > 0
    config = json.loads((runs.teacher / "config.json").read_text())
    assert {name: config["flags"][name] for name in ("arch", "dataset", "side")} == {
        "arch": "resnet8", "dataset": "synthetic", "side": 32,
    }  # fmt: skip
    assert config["starts"][0]["torch"] == torch.__version__
    assert config["starts"][0]["images"] == {"train": 48, "val": 0, "test": 40, "ignored": {}}
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert max(line["val/cls_acc"] for line in lines) == result["best_acc"]
    assert lines[-1]["val/cls_acc"] == result["last_acc"]
    assert [line["train/lr"] for line in lines] == pytest.approx([0.05, 0.05, 0.005])  # falls after epoch 2


def test_tensorboard_shows_what_the_log_says(runs):
    events = EventAccumulator(str(runs.teacher / "events")).Reload()
    tags = {"train/cls_loss", "train/cls_acc", "train/lr", "val/cls_loss", "val/cls_acc", "val/cls_acc_top5"}
    others = {"speed/teacher_images_per_second", "final/best_acc", "final/last_acc"}  # not in the log, which repeats
    assert set(events.Tags()["scalars"]) == tags | others
    for tag in tags:
        points = [(point.step, point.value) for point in events.Scalars(tag)]
        assert points == [(line["epoch"], pytest.approx(line[tag])) for line in lines_of(runs.teacher)], tag


def test_the_terminal_gets_one_line_per_epoch_and_a_warning_about_synthetic_data(runs):
    lines = runs.outputs[0].splitlines()
    assert sum(line.startswith("teacher ") for line in lines) == 3
    assert any("accuracy says nothing" in line for line in lines)


def test_the_default_data_set_is_cifar100_and_its_checkpoints_say_so(tmp_path, monkeypatch, capsys):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (100, 32, 32, 3), dtype=torch.uint8, generator=draw)
    monkeypatch.setattr(sources, "_cifar100", lambda *where: [Split(pixels, torch.arange(100))] * 2)
    monkeypatch.chdir(tmp_path)
    teacher.main(["--arch", "resnet8", "--epoch", "1", "--milestones", "1"])
    short = ["--epoch", "1", "--milestones", "1", "--t-epoch", "1", "--t-milestones", "1"]
    student.main(["--t-path", "experiments/teacher_resnet8_seed0", "--s-arch", "resnet8", *short])
    (folder,) = tmp_path.glob("experiments/sskd_*")
    for each in (tmp_path / "experiments" / "teacher_resnet8_seed0", folder):
        assert checkpoint.read(each).about["dataset"] == "cifar100"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("whose", NETWORKS)
def test_evaluate_gives_the_accuracy_that_the_run_reported(whose, runs, tmp_path, monkeypatch, capsys):
    """From the run's folder, and from a renamed file, which says itself what data set and network it needs."""
    monkeypatch.chdir(tmp_path)
    folder = getattr(runs, whose)
    shutil.copy(folder / "ckpt" / NETWORKS[whose], "renamed.pth")
    for path, flags in ((folder, TINY), ("renamed.pth", ["--test-size", "40"])):
        teacher.main(["--evaluate", str(path), *flags])
        shown = capsys.readouterr()
        assert f"test accuracy {result_of(folder)['best_acc']:.2f} %" in shown.out
        assert "of 40 images" in shown.out and shown.err == ""
    assert "data: synthetic, because renamed.pth was trained on it\n" in shown.out


def test_evaluating_on_another_data_set_than_the_checkpoints_gives_a_warning(runs, tmp_path, fails, capsys):
    saved = torch.load(runs.teacher / "ckpt" / "best.pth", weights_only=True)
    file = tmp_path / "renamed.pth"
    torch.save(saved | {"about": saved["about"] | {"dataset": "cifar100"}}, file)
    teacher.main(["--evaluate", str(file), *TINY])
    assert "renamed.pth says that it was trained on cifar100, not on synthetic" in capsys.readouterr().err
    torch.save(saved | {"about": saved["about"] | {"dataset": "svhn"}}, file)
    assert "trained on svhn, a data set unknown here; give --dataset" in fails(teacher.main, "--evaluate", file)


def test_the_same_flags_train_the_same_network_and_a_finished_run_is_left_alone(runs, tmp_path, capsys):
    flags = ["--arch", "resnet8", *TINY, "--experiments", str(tmp_path)]
    teacher.main(flags)
    folder = tmp_path / runs.teacher.name
    again, before = contents(folder), contents(runs.teacher)
    assert again == {name: before[name] for name in again}
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    teacher.main(flags)
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


BF16 = pytest.param(["--amp", "bf16"], marks=pytest.mark.slow)


@pytest.mark.parametrize("more", [["--deterministic"], BF16, ["--amp", "fp16"]], ids=" ".join)
def test_half_precision_and_deterministic_runs_learn(more, tmp_path):
    teacher.main(["--arch", "resnet8", *TINY, "--experiments", str(tmp_path), *more])
    assert torch.are_deterministic_algorithms_enabled() == (more == ["--deterministic"])
    losses = [line["train/cls_loss"] for line in lines_of(tmp_path / "teacher_resnet8_seed0")]
    assert losses[-1] < losses[0]


def test_a_network_that_could_not_be_a_teacher_is_refused_before_it_is_trained(tmp_path, monkeypatch, fails):
    class Lacking(models.model_dict["resnet8"].func):
        def forward(self, x):  # no is_feat
            return super().forward(x)

    monkeypatch.setitem(models.model_dict, "resnet8", lambda num_classes: Lacking(8, (16, 16, 32, 64), num_classes))
    line = fails(teacher.main, "--arch", "resnet8", *TINY, "--experiments", tmp_path)
    assert "resnet8 fails on two images, with is_feat=True or without:" in line
    assert not any(tmp_path.iterdir())


def test_the_best_epoch_on_held_out_images_is_tested_once(tmp_path, capsys):
    flags = ["--arch", "resnet8", *TINY, "--train-size", "200", "--test-size", "100", "--val-fraction", "0.5"]
    flags += ["--experiments", str(tmp_path)]
    teacher.main(flags)
    folder = tmp_path / "teacher_resnet8_val0.5_seed0"
    result, network = result_of(folder), models.load(folder).eval()
    assert result["best_acc"] == max(line["val/cls_acc"] for line in lines_of(folder))
    assert f"finished: test accuracy {result['test_acc']:.2f}" in capsys.readouterr().out
    args = teacher.parse_args(flags)
    data = cifar.load(sources.read_for(args, about={}), args, "cpu")
    for images, reported in ((data.test, result["test_acc"]), (data.val, result["best_acc"])):
        right = [network(batch.x).argmax(1) == batch.target for batch in images.test_batches(1)]
        assert torch.cat(right).double().mean() * 100 == pytest.approx(reported)
    (folder / "result.json").unlink()  # as if it had been killed after its last epoch
    teacher.main(flags)
    assert result_of(folder)["test_acc"] == result["test_acc"]


PUBLISHED = {  # test accuracy (%) of the authors' weights: the rows of the published tables
    "resnet56": 73.44, "resnet20": 69.63, "wrn_16_2": 73.64, "wrn_40_1": 72.24, "ShuffleV1": 70.77,
    "MobileNetV2": 65.79,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif("SSKD_TEACHERS" not in os.environ, reason="SSKD_TEACHERS names no folder of the authors' networks")
def test_the_authors_networks_reach_their_published_accuracy(capsys):
    """SSKD_TEACHERS holds teacher_NAME/ckpt/best.pth; SSKD_DATA (default: data) the real CIFAR-100."""
    folder, data = Path(os.environ["SSKD_TEACHERS"]), os.environ.get("SSKD_DATA", str(ROOT / "data"))
    found = [name for name in PUBLISHED if (folder / f"teacher_{name}").is_dir()]
    assert found, f"{folder} holds none of {', '.join(f'teacher_{name}' for name in PUBLISHED)}"
    for name in found:
        teacher.main(["--evaluate", str(folder / f"teacher_{name}"), "--data-root", data])
        assert f"test accuracy {PUBLISHED[name]:.2f} %" in capsys.readouterr().out, name
