"""teacher.py from the command line."""

import json
import shutil

import pytest
import torch
from conftest import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cifar
import models
import student
import teacher

SPEED = "speed/teacher_images_per_second"  # not in the log, which has to repeat bit for bit


def test_a_run_leaves_what_the_design_promises(runs):
    files = {path.name for path in (runs.teacher / "ckpt").iterdir() if not path.name.startswith("ss_head_")}
    assert files == {"best.pth", "last.pth", "002.pth", "003.pth"}
    best = torch.load(runs.teacher / "ckpt" / "best.pth", weights_only=True)
    result = json.loads((runs.teacher / "result.json").read_text())
    assert set(best) == {"epoch", "state_dict", "acc", "about"}
    mean, std = ([value] * 3 for value in (0.1863, 0.2018))
    told = {"arch": "resnet8", "dataset": "synthetic", "classes": 100, "side": 32, "mean": mean, "std": std}
    assert best["about"] == told | {"tested": 40}
    assert (best["acc"], best["epoch"]) == (result["best_acc"], result["best_epoch"])
    assert result["epochs"] == 3
    assert result["seconds"] > 0
    assert (result["params"], result["multiply_adds"]) == (83_892, 12_507_392)
    config = json.loads((runs.teacher / "config.json").read_text())
    assert config["flags"]["arch"] == "resnet8"
    assert config["starts"][0]["torch"] == torch.__version__
    lines = [json.loads(line) for line in (runs.teacher / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert max(line["val/cls_acc"] for line in lines) == result["best_acc"]
    assert lines[-1]["val/cls_acc"] == result["last_acc"]


def test_without_dataset_the_checkpoints_are_of_cifar100_and_can_be_read(tmp_path, monkeypatch, capsys):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (100, 32, 32, 3), dtype=torch.uint8, generator=draw)
    split = cifar.Split(pixels, torch.arange(100))
    monkeypatch.setattr(cifar, "read_cifar100", lambda *where: {"train": split, "test": split})
    monkeypatch.chdir(tmp_path)
    teacher.main(["--arch", "resnet8", "--epoch", "1", "--milestones", "1"])
    short = ["--epoch", "1", "--milestones", "1", "--t-epoch", "1", "--t-milestones", "1"]
    student.main(["--t-path", "experiments/teacher_resnet8_seed0", "--s-arch", "resnet8", *short])
    (folder,) = tmp_path.glob("experiments/sskd_*")
    for checkpoint in (tmp_path / "experiments" / "teacher_resnet8_seed0", folder):
        assert models.read(checkpoint).about["dataset"] == "cifar100"
        torch.load(checkpoint / "ckpt" / "last.pth", weights_only=True)
    assert capsys.readouterr().err == ""


def test_tensorboard_reads_the_curves(runs):
    events = EventAccumulator(str(runs.teacher / "events")).Reload()
    logged = {"train/cls_loss", "train/cls_acc", "train/lr", "val/cls_loss", "val/cls_acc", "val/cls_acc_top5"}
    assert set(events.Tags()["scalars"]) == logged | {SPEED, "final/best_acc", "final/last_acc"}
    lines = [json.loads(line) for line in (runs.teacher / "log.jsonl").read_text().splitlines()]
    for tag in logged:
        points = events.Scalars(tag)
        assert [point.step for point in points] == [1, 2, 3]
        assert [point.value for point in points] == pytest.approx([line[tag] for line in lines])


def test_the_terminal_gets_one_line_an_epoch_and_a_word_on_synthetic_data(runs):
    lines = runs.outputs[0].splitlines()
    assert sum(line.startswith("teacher ") for line in lines) == 3
    assert any("accuracy says nothing" in line for line in lines)
    assert lines[0].startswith("device: ")


def test_evaluate_gives_the_accuracies_that_the_runs_reported(runs, capsys):
    for folder, network in ((runs.teacher, "best.pth"), (runs.student, "student_best.pth")):
        reported = json.loads((folder / "result.json").read_text())["best_acc"]
        for path in (folder, folder / "ckpt" / network):
            teacher.main(["--evaluate", str(path), *TINY])
            assert f"test accuracy {reported:.2f} %" in capsys.readouterr().out


def test_evaluate_prints_the_accuracy_of_every_class(runs, monkeypatch, capsys):
    monkeypatch.setitem(cifar.CLASSES, "synthetic", [f"name{label}" for label in range(100)])
    teacher.main(["--evaluate", str(runs.teacher), *TINY, "--per-class"])
    _, _, total, *table = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in table]
    labels = sorted(set(cifar.synthetic(False, 40)[1].tolist()))
    assert [row[:2] for row in rows] == [[str(label), f"name{label}"] for label in labels]
    assert sum(int(row[2]) for row in rows) == 40
    mean = sum(int(row[2]) * float(row[4]) for row in rows) / 40
    assert total.startswith(f"test accuracy {mean:.2f} %, top-5 ")


def test_every_label_of_the_data_sets_has_its_name():
    assert {name: len(names) for name, names in cifar.CLASSES.items()} == {
        name: count for name, count in cifar.NUM_CLASSES.items() if name != "synthetic"
    }
    assert cifar.CLASSES["cifar100"] == sorted(set(cifar.CLASSES["cifar100"]))


def test_a_renamed_checkpoint_needs_neither_data_set_nor_network(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder, network in ((runs.teacher, "best.pth"), (runs.student, "student_best.pth")):
        shutil.copy(folder / "ckpt" / network, tmp_path / "renamed.pth")
        reported = json.loads((folder / "result.json").read_text())["best_acc"]
        teacher.main(["--evaluate", "renamed.pth", "--test-size", "40"])
        out, err = capsys.readouterr()
        assert f"test accuracy {reported:.2f} %" in out and "of 40 images" in out and err == ""
        assert "data: synthetic, on which renamed.pth says that it was trained\n" in out


def test_another_data_set_than_the_checkpoints_is_warned_of_or_refused(runs, tmp_path, fails, capsys):
    saved = torch.load(runs.teacher / "ckpt" / "best.pth", weights_only=True)
    file = tmp_path / "renamed.pth"
    torch.save(saved | {"about": saved["about"] | {"dataset": "cifar100"}}, file)
    teacher.main(["--evaluate", str(file), *TINY])
    assert capsys.readouterr().err.startswith(
        f"warning: {file} says that it was trained on cifar100, not on synthetic;"
    )
    torch.save(saved | {"about": saved["about"] | {"dataset": "cifar\n1000"}}, file)
    assert "trained on cifar 1000, a data set unknown here; give --dataset" in fails(teacher.main, "--evaluate", file)
    assert "trained on synthetic, 100 classes; cifar10 has 10" in fails(
        teacher.main, "--evaluate", runs.teacher, "--dataset", "cifar10"
    )


def test_the_learning_rate_falls_after_the_milestones(runs):
    last = torch.load(runs.teacher / "ckpt" / "last.pth", weights_only=True)
    assert last["parts"]["optimisation"]["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.005)


def test_the_same_flags_train_the_same_network(runs, tmp_path):
    teacher.main(["--arch", "resnet8", *TINY, "--experiments", str(tmp_path)])
    for name in ("log.jsonl", "ckpt/best.pth"):
        first, second = (folder / name for folder in (runs.teacher, tmp_path / runs.teacher.name))
        assert first.read_bytes() == second.read_bytes(), name


def test_a_finished_run_says_so_and_trains_nothing(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs.cwd)
    before = (runs.teacher / "ckpt" / "last.pth").stat().st_mtime_ns
    teacher.main(["--arch", "resnet8", *TINY])
    assert "is finished" in capsys.readouterr().out
    assert (runs.teacher / "ckpt" / "last.pth").stat().st_mtime_ns == before


@pytest.mark.parametrize("more", [["--deterministic"], ["--amp", "bf16"], ["--amp", "fp16"]], ids=" ".join)
def test_half_precision_and_deterministic_runs_work(more, tmp_path, capsys):
    teacher.main(["--arch", "resnet8", *TINY, "--experiments", str(tmp_path), *more])
    assert torch.are_deterministic_algorithms_enabled() == (more == ["--deterministic"])
    assert "finished: " in capsys.readouterr().out
    lines = (tmp_path / "teacher_resnet8_seed0" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train/cls_loss"] for line in lines]
    assert losses[-1] < losses[0]


def test_a_network_that_could_be_no_teacher_is_refused_before_it_is_trained(tmp_path, monkeypatch, fails):
    class Lacking(models.model_dict["resnet8"].func):
        def forward(self, x):  # no is_feat
            return super().forward(x)

    monkeypatch.setitem(models.model_dict, "resnet8", lambda num_classes: Lacking(8, (16, 16, 32, 64), num_classes))
    line = fails(teacher.main, "--arch", "resnet8", *TINY, "--experiments", tmp_path)
    assert "resnet8 fails on two images, with is_feat=True or without:" in line
    assert not any(tmp_path.iterdir())


def test_the_best_epoch_on_held_out_images_is_tested_once(tmp_path, capsys):
    sizes = ["--train-size", "200", "--test-size", "100", "--val-fraction", "0.5"]
    teacher.main(["--arch", "resnet8", *TINY, *sizes, "--experiments", str(tmp_path)])
    last = capsys.readouterr().out.splitlines()[-1]
    folder = tmp_path / "teacher_resnet8_val0.5_seed0"
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert result["best_acc"] == max(line["val/cls_acc"] for line in lines)
    told = f"test accuracy {result['test_acc']:.2f}, of the epoch with the best validation accuracy"
    assert (
        last
        == f"finished: {told} {result['best_acc']:.2f} at epoch {result['best_epoch']}, last {result['last_acc']:.2f}"
    )
    best = torch.load(folder / "ckpt" / "best.pth", weights_only=True)
    data = cifar.load(teacher.parse_args(["--arch", "resnet8", *TINY, *sizes]), "cpu")
    network = models.load(folder).eval()
    for images, reported in ((data.test, result["test_acc"]), (data.val, best["acc"])):
        batches = list(images.test_batches(1))
        right = [network(batch.x).argmax(1) == batch.target for batch in batches]
        assert torch.cat(right).double().mean() * 100 == pytest.approx(reported)
    (folder / "result.json").unlink()  # as if it had been killed after its last epoch
    teacher.main(["--arch", "resnet8", *TINY, *sizes, "--experiments", str(tmp_path)])
    assert json.loads((folder / "result.json").read_text())["test_acc"] == result["test_acc"]
