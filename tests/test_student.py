"""student.py: the published trajectories, the step on a GPU, and runs from the command line."""

import io
import json

import numpy as np
import pytest
import torch
from conftest import TINY_STUDENT, contents
from oracle import GOLDEN, PUBLISHED, fill, hashed, labels
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cifar
import models
import student
import utils
from wrapper import Wrapper, fold_batch_norms

PAIRS = PUBLISHED["similar"]["pairs"] + PUBLISHED["cross"]["pairs"]


def trajectory_batch(case):
    """Four rotated views of blocky images, with noise of their own, and labels."""
    batch = case["batch"]
    blocks = 2 * hashed(40000, (batch, 3, 4, 4))
    picture = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)
    views = torch.stack([torch.rot90(picture, k, (2, 3)) for k in range(4)], 1).flatten(0, 1)
    x = views + 0.3 * hashed(40002, (4 * batch, 3, 32, 32))
    return x.contiguous(memory_format=torch.channels_last), labels(40001, batch, 100)


def warm_teacher(case, x):
    teacher = fill(Wrapper(models.model_dict[case["teacher"]]()).double(), 20000)
    teacher.to(memory_format=torch.channels_last).train()
    with torch.no_grad():
        for _ in range(30):
            teacher(x)
    return teacher.eval()


def test_both_training_steps_follow_the_published_trajectories():
    case = GOLDEN["ss_head_trajectory"]
    x, target = trajectory_batch(case)
    teacher = fold_batch_norms(warm_teacher(case, x))
    args = student.parse_args(["--t-path", "unused", "--s-arch", GOLDEN["student_trajectory"]["student"]])
    device = torch.device("cpu")
    precision = utils.Precision("off", device)

    optimizer, _ = utils.make_sgd(teacher.proj_head.parameters(), args, args.t_lr, args.t_milestones)
    loss_of = student.make_ss_loss(teacher, precision)
    for loss_before, accuracy in case["steps"]:
        loss, logged = loss_of(x)
        precision.update(optimizer, loss)
        assert loss.item() == pytest.approx(loss_before, rel=1e-6)
        assert logged["teacher_ssp_acc"].item() == pytest.approx(accuracy, rel=1e-6)

    case = GOLDEN["student_trajectory"]
    network = fill(Wrapper(models.model_dict[case["student"]]()).double(), case["student_fill_base"])
    network.to(memory_format=torch.channels_last).train()
    optimizer, _ = utils.make_sgd(network.parameters(), args, args.lr, args.milestones)
    loss_of = student.make_loss(args, teacher, network, precision)
    for *terms, total in case["steps"]:
        loss, logged = loss_of(x, target)
        precision.update(optimizer, loss)
        assert [logged[f"{name}_loss"].item() for name in ("ce", "kd", "tf", "ss")] == pytest.approx(terms, rel=1e-6)
        assert loss.item() == pytest.approx(total, rel=1e-6)


class Departures(TorchDispatchMode):
    """Notes every operation that makes a CPU tensor, or has one among its arguments, beside the CUDA ones."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in (*args, *(out if isinstance(out, tuple | list) else [out])):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.dim() > 0:
                self.names.add(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("t_arch, s_arch", PAIRS)
def test_the_step_runs_on_cuda_without_asking_the_device(t_arch, s_arch):
    """On fake tensors a tensor left on the wrong device fails, and so does a value that the host asks for."""
    with FakeTensorMode(), torch.device("cuda"):
        teacher = Wrapper(models.model_dict[t_arch]()).eval()
        network = Wrapper(models.model_dict[s_arch]())
        pixels, numbers = torch.zeros(20, 32, 32, 3, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64)
        data = cifar.Images(pixels, numbers, cifar.STATISTICS["cifar100"], "cuda")
        args = student.parse_args(["--t-path", "unused", "--s-arch", s_arch])
        precision = utils.Precision("off", torch.device("cuda"))
        loss_of = student.make_loss(args, teacher, network, precision)
        ss_loss_of = student.make_ss_loss(teacher, precision)
        meter = utils.Meter(torch.device("cuda"), "test")
        rows, window = torch.arange(8), torch.zeros(8, 4, dtype=torch.int64)
        with Departures() as seen:
            x, target = data.views(rows, window), data.labels[rows]
            loss, logged = loss_of(x, target)
            meter.add(len(target), **logged)
            ss_loss, _ = ss_loss_of(x)
        assert not seen.names
        assert x.shape == (32, 3, 32, 32)
        assert {loss.device.type, ss_loss.device.type, meter.total.device.type} == {"cuda"}


class Watch(TorchDispatchMode):
    """Notes every operation and whether a 4-dimensional tensor left the channels-last format."""

    def __init__(self):
        super().__init__()
        self.names, self.contiguous = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.add(name)
        for x in out if isinstance(out, tuple | list) else [out]:
            image = isinstance(x, torch.Tensor) and x.dim() == 4 and x.shape[0] == 32
            layer = any(word in name for word in ("convolution", "batch_norm", "relu", "clamp_min", "threshold", "cat"))
            if image and layer and not x.is_contiguous(memory_format=torch.channels_last):
                self.contiguous.add((name, tuple(x.shape)))
        return out


@pytest.mark.parametrize("s_arch", ["wrn_16_2", "resnet8x4", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_a_whole_step_stays_on_the_device_and_in_channels_last(s_arch):
    device = torch.device("cpu")
    data = cifar.Images(*cifar.synthetic(False), cifar.STATISTICS["synthetic"], device)
    teacher = Wrapper(models.model_dict["resnet8"]()).to(memory_format=torch.channels_last).eval()
    network = Wrapper(models.model_dict[s_arch]()).to(memory_format=torch.channels_last)
    args = student.parse_args(["--t-path", "unused", "--s-arch", s_arch])
    precision = utils.Precision("off", device)
    loss_of = student.make_loss(args, fold_batch_norms(teacher), network, precision)
    optimizer, _ = utils.make_sgd(network.parameters(), args, 0.05, [1])
    meter = utils.Meter(device, "test")
    rows, window = torch.arange(8), cifar.draw(8, 4, 0, "student", 1).window
    with Watch() as seen:
        x, target = data.views(rows, window), data.labels[rows]
        loss, logged = loss_of(x, target)
        precision.update(optimizer, loss)
        meter.add(len(target), **logged)
    assert "_fused_sgd_" in seen.names
    assert not seen.names & {"_local_scalar_dense", "nonzero", "masked_select", "equal"}
    assert not seen.contiguous


def test_the_loss_with_both_networks_compiles_to_one_graph():
    teacher, network = (Wrapper(models.model_dict[arch]()) for arch in ("wrn_16_1", "ShuffleV2"))
    args = student.parse_args(["--t-path", "unused", "--s-arch", "ShuffleV2"])
    loss_of = student.make_loss(args, fold_batch_norms(teacher), network, utils.Precision("off", torch.device("cpu")))
    x, target = torch.randn(8, 3, 32, 32), torch.tensor([3, 5])
    loss, _ = torch.compile(loss_of, fullgraph=True, backend="eager")(x, target)
    loss.backward()
    assert network.backbone.conv1.weight.grad.abs().sum() > 0


def test_a_run_leaves_what_the_design_promises(runs):
    assert runs.student.name == (
        "sskd_student_resnet8x4_weight0.1+0.9+2.7+10.0_T4.0+4.0+0.5_ratio1.0+0.75_seed0_teacher_resnet8_seed0"
    )
    assert {path.name for path in (runs.student / "ckpt").iterdir()} == {"student_best.pth", "teacher.pth", "last.pth"}
    best = torch.load(runs.student / "ckpt" / "student_best.pth", weights_only=True)
    result = json.loads((runs.student / "result.json").read_text())
    assert set(best) == {"epoch", "state_dict", "best_acc"}
    assert (best["best_acc"], best["epoch"]) == (result["best_acc"], result["best_epoch"])
    teacher = Wrapper(models.model_dict["resnet8"]())
    teacher.load_state_dict(torch.load(runs.student / "ckpt" / "teacher.pth", weights_only=True))
    plain = models.load(runs.teacher)
    for name, value in plain.state_dict().items():
        assert torch.equal(teacher.backbone.state_dict()[name], value), name


def test_tensorboard_reads_the_curves_of_both_phases(runs):
    events = EventAccumulator(str(runs.student / "events")).Reload()
    head = {f"{split}/teacher_ssp_{what}" for split in ("train", "val") for what in ("loss", "acc")} | {
        "train/teacher_lr"
    }
    terms = {f"train/{name}" for name in ("ce_loss", "kd_loss", "tf_loss", "ss_loss", "cls_acc", "ss_acc", "lr")}
    logged = head | terms | {"val/ce_loss", "val/cls_acc"}
    others = {f"speed/{phase}_images_per_second" for phase in ("ss_head", "student")}
    others |= {"final/best_acc", "final/last_acc"}
    assert set(events.Tags()["scalars"]) == logged | others
    lines = [json.loads(line) for line in (runs.student / "log.jsonl").read_text().splitlines()]
    for tag in logged:
        points = [(point.step, point.value) for point in events.Scalars(tag)]
        assert points == [(line["epoch"], pytest.approx(line[tag])) for line in lines if tag in line], tag
        assert len(points) == (2 if tag in head else 3), tag


def test_the_teachers_accuracy_comes_before_all_training(runs):
    lines = runs.outputs[1].splitlines()
    reported = json.loads((runs.teacher / "result.json").read_text())["best_acc"]
    teacher_line = next(i for i, line in enumerate(lines) if line.startswith("teacher: "))
    assert f"test accuracy {reported:.2f}" in lines[teacher_line]
    assert [line.split()[0] for line in lines[teacher_line + 1 :]] == ["ss_head"] * 2 + ["student"] * 3 + ["finished:"]


def test_a_second_student_reads_the_head_and_ends_as_if_it_had_trained_it(runs, tmp_path, capsys):
    """The same student from a copy of the teacher without and with the kept head."""
    (head,) = (runs.teacher / "ckpt").glob("ss_head_*.pth")
    flags = [*TINY_STUDENT, "--experiments", tmp_path, "--t-path", runs.teacher]
    student.main([str(flag) for flag in flags])
    assert f"read from {head}" in capsys.readouterr().out
    (second,) = tmp_path.glob("sskd_student_*")
    assert contents(second) == contents(runs.student)


def test_a_head_of_other_flags_is_not_read():
    def key(*more, teacher="teacher", device="cpu"):
        args = student.parse_args(["--t-path", "unused", *TINY_STUDENT, *more])
        return student.ss_head_key(args, teacher, torch.device(device))

    others = [key("--t-lr", "0.01"), key("--seed", "1"), key(teacher="another"), key(device="cuda")]
    assert len({key(), *others}) == 5
    assert key("--tf-weight", "0", "--lr", "0.3", "--s-arch", "vgg8") == key()


def png(value):
    return np.asarray(Image.open(io.BytesIO(value.encoded_image_string)))


def test_tensorboard_shows_the_views_and_the_similarities(runs):
    events = EventAccumulator(str(runs.student / "events")).Reload()
    assert set(events.Tags()["images"]) == {"views", "similarity/teacher_and_student"}
    (views,) = events.Images("views")
    grid = png(views)
    assert grid.shape == (8 * 33 + 1, 4 * 33 + 1, 3)  # eight images, four views, a pixel between them
    similarities = events.Images("similarity/teacher_and_student")
    assert [image.step for image in similarities] == [1, 3]
    for image in similarities:
        assert png(image).shape[:2] == (4 * 48, 4 * (16 + 2 + 16))  # of a batch of 16
    assert len({image.encoded_image_string for image in similarities}) == 2


def test_the_grid_holds_the_views_that_the_student_is_trained_on(runs):
    (views,) = EventAccumulator(str(runs.student / "events")).Reload().Images("views")
    pixels, numbers = cifar.synthetic(True, 48)
    window = cifar.draw(48, 4, 0, "student", 1)
    data = cifar.Images(pixels, numbers, cifar.STATISTICS["synthetic"], "cpu")
    x = data.brightness(data.views(window.order[:8], window.window[:8]))
    first = png(views)[1:33, 1:33].astype(float)
    assert np.abs(first - x[0].permute(1, 2, 0).numpy() * 255).max() <= 1


def test_tensorboard_holds_the_flags_beside_the_final_accuracies(runs):
    events = EventAccumulator(str(runs.student / "events")).Reload()
    plugins = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    started = HParamsPluginData.FromString(plugins).session_start_info.hparams
    flags = json.loads((runs.student / "config.json").read_text())["flags"]
    assert set(started) == set(flags)
    assert started["s_arch"].string_value == "resnet8x4"
    assert started["milestones"].string_value == "2"
    result = json.loads((runs.student / "result.json").read_text())
    for name in ("best_acc", "last_acc"):
        assert events.Scalars(f"final/{name}")[0].value == pytest.approx(result[name])


@pytest.mark.parametrize("from_checkpoint", [False, True], ids=["after the run", "of a checkpoint"])
def test_the_exported_student_answers_like_the_checkpoint(from_checkpoint, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(runs.cwd)
    flags = ["--s-path", str(runs.student)] if from_checkpoint else ["--t-path", str(runs.teacher), *TINY_STUDENT]
    student.main([*flags, "--export", str(tmp_path / "student.pt2")])
    assert "exported" in capsys.readouterr().out
    exported = torch.export.load(tmp_path / "student.pt2").module()
    plain = models.load(runs.student).eval()
    for count in (1, 5):
        images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        torch.testing.assert_close(exported(images), plain(images), rtol=1e-4, atol=1e-4)
