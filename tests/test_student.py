"""student.py: the published trajectories, the step on a GPU, and runs from the command line."""

import io
import json

import numpy as np
import pytest
import torch
from conftest import TINY_STUDENT
from oracle import GOLDEN, PUBLISHED, fill, trajectory_batch
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


def warm_teacher(case, x):
    """In float64, its batch norms as 30 passes leave them."""
    teacher = fill(Wrapper(models.model_dict[case["teacher"]]()).double(), 20000)
    teacher.to(memory_format=torch.channels_last).train()
    with torch.no_grad():
        for _ in range(30):
            teacher(x)
    return teacher.eval()


CPU = torch.device("cpu")
FULL = utils.precision("off", CPU)


def batch_of(x, target):
    return cifar.Batch(x.contiguous(memory_format=torch.channels_last), target, torch.arange(len(target)), None)


def test_both_training_steps_follow_the_published_trajectories():
    case = GOLDEN["ss_head_trajectory"]
    batch = batch_of(*trajectory_batch(case))
    teacher = fold_batch_norms(warm_teacher(case, batch.x))
    args = student.parse_args(["--t-path", "unused", "--s-arch", GOLDEN["student_trajectory"]["student"]])
    sgd = utils.SGD(teacher.proj_head.parameters(), args.t_lr, args.t_milestones, args)
    loss_of = student.make_ss_loss(teacher, FULL)
    for loss_before, accuracy in case["steps"]:
        loss, logged = loss_of(batch)
        sgd.step(loss)
        assert loss.item() == pytest.approx(loss_before, rel=1e-6)
        assert logged["teacher_ssp_acc"].item() == pytest.approx(accuracy, rel=1e-6)

    case = GOLDEN["student_trajectory"]
    network = fill(Wrapper(models.model_dict[case["student"]]()).double(), case["student_fill_base"])
    network.to(memory_format=torch.channels_last).train()
    sgd = utils.SGD(network.parameters(), args.lr, args.milestones, args)
    loss_of = student.make_loss(args, teacher, network, FULL)
    for *terms, total in case["steps"]:
        loss, logged = loss_of(batch)
        sgd.step(loss)
        assert [logged[f"{name}_loss"].item() for name in ("ce", "kd", "tf", "ss")] == pytest.approx(terms, rel=1e-6)
        assert loss.item() == pytest.approx(total, rel=1e-6)


def test_each_term_has_its_own_weight_and_one_of_weight_0_is_only_logged():
    """Also a term that is not finite."""
    teacher, network = (Wrapper(models.model_dict["resnet8"]()) for _ in range(2))
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = batch_of(x, torch.tensor([1, 2, 3, 4]))
    weights = {"ce": 2.0, "kd": 3.0, "tf": 5.0, "ss": 7.0}
    for zero in [None, *weights]:
        flags = [word for name, w in weights.items() for word in (f"--{name}-weight", str(0 if name == zero else w))]
        args = student.parse_args(["--t-path", "unused", "--s-arch", "resnet8", *flags])
        loss, logged = student.make_loss(args, teacher.eval(), network.eval(), FULL)(batch)
        expected = sum(w * logged[f"{name}_loss"] for name, w in weights.items() if name != zero)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    with torch.no_grad():
        network.proj_head[2].bias.fill_(torch.nan)
    args = student.parse_args(["--t-path", "unused", "--s-arch", "resnet8", "--ss-weight", "0"])
    loss, logged = student.make_loss(args, teacher, network, FULL)(batch)
    loss.backward()
    assert loss.isfinite() and logged["ss_loss"].isnan()
    assert all(parameter.grad.isfinite().all() for parameter in network.backbone.parameters())
    assert network.proj_head[0].weight.grad is None  # nothing trains it, weight decay included


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
        autocast = utils.precision("off", torch.device("cuda"))
        loss_of = student.make_loss(args, teacher, network, autocast)
        ss_loss_of = student.make_ss_loss(teacher, autocast)
        meter = utils.Meter("test")
        rows, window = torch.arange(8), torch.zeros(8, 4, dtype=torch.int64)
        with Departures() as seen:
            batch = cifar.Batch(data.views(rows, window), data.labels[rows], rows, window)
            loss, logged = loss_of(batch)
            meter.add(len(rows), loss, logged)
            ss_loss, _ = ss_loss_of(batch)
            stored = batch._replace(feature=torch.zeros(32, teacher.proj_head[0].in_features, dtype=torch.float16))
            loss_of(stored)
            ss_loss_of(stored)
        assert not seen.names
        assert batch.x.shape == (32, 3, 32, 32)
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
    data = cifar.Images(*cifar.synthetic(False, 8), cifar.STATISTICS["synthetic"], CPU, batch_size=8)
    teacher = Wrapper(models.model_dict["resnet8"]()).to(memory_format=torch.channels_last).eval()
    network = Wrapper(models.model_dict[s_arch]()).to(memory_format=torch.channels_last)
    args = student.parse_args(["--t-path", "unused", "--s-arch", s_arch])
    loss_of = student.make_loss(args, fold_batch_norms(teacher), network, FULL)
    sgd = utils.SGD(network.parameters(), 0.05, [1], args)
    batches, meter = data.batches("student", 1, 4), utils.Meter("test")
    with Watch() as seen:
        batch = next(batches)
        loss, logged = loss_of(batch)
        sgd.step(loss)
        meter.add(len(batch.target), loss, logged)
    assert "_fused_sgd_" in seen.names
    assert not seen.names & {"_local_scalar_dense", "nonzero", "masked_select", "equal"}
    assert not seen.contiguous


def test_the_loss_with_both_networks_compiles_to_one_graph():
    teacher, network = (Wrapper(models.model_dict[arch]()) for arch in ("wrn_16_1", "ShuffleV2"))
    args = student.parse_args(["--t-path", "unused", "--s-arch", "ShuffleV2"])
    loss_of = student.make_loss(args, fold_batch_norms(teacher), network, FULL)
    batch = cifar.Batch(torch.randn(8, 3, 32, 32), torch.tensor([3, 5]), torch.arange(2), torch.zeros(2, 4).long())
    step = torch.compile(loss_of, fullgraph=True, backend="eager")
    step(batch._replace(feature=torch.randn(8, 64).half()))
    loss, _ = step(batch)
    loss.backward()
    assert network.backbone.conv1.weight.grad.abs().sum() > 0


def test_features_rounded_to_float16_move_the_losses_by_little_and_spare_the_backbone(monkeypatch):
    batch = batch_of(*trajectory_batch(GOLDEN["student_trajectory"]))
    teacher, network = (fill(Wrapper(models.model_dict["resnet8"]()).double(), base) for base in (20000, 30000))
    with torch.no_grad():
        for _ in range(9):
            teacher(batch.x)  # sets the statistics of its batch norms
    teacher = fold_batch_norms(teacher.eval())
    args = student.parse_args(["--t-path", "unused", "--s-arch", "resnet8"])
    loss_of, ss_loss_of = student.make_loss(args, teacher, network.eval(), FULL), student.make_ss_loss(teacher, FULL)
    expected = [loss_of(batch)[0].item(), ss_loss_of(batch)[0].item()]
    batch = batch._replace(feature=teacher(batch.x).feature.half())
    monkeypatch.setattr(teacher.backbone, "forward", None)
    stored = [loss_of(batch)[0].item(), ss_loss_of(batch)[0].item()]
    assert stored == pytest.approx(expected, rel=1e-4)
    assert stored != expected


def test_a_run_leaves_what_the_design_promises(runs):
    assert runs.student.name == (
        "sskd_student_resnet14x05_weight0.1+0.9+2.7+10.0_T4.0+4.0+0.5_ratio1.0+0.75_seed0_teacher_resnet8_seed0"
    )
    assert {path.name for path in (runs.student / "ckpt").iterdir()} == {"student_best.pth", "teacher.pth", "last.pth"}
    best = torch.load(runs.student / "ckpt" / "student_best.pth", weights_only=True)
    result = json.loads((runs.student / "result.json").read_text())
    assert (result["teacher_params"], result["teacher_multiply_adds"]) == (83_892, 12_507_392)
    assert result["params"] == sum(x.numel() for x in models.model_dict["resnet14x05"]().parameters())
    assert set(best) == {"epoch", "state_dict", "best_acc", "about"}
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
    logged = head | terms | {"val/ce_loss", "val/cls_acc", "val/cls_acc_top5"}
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
    (sizes,) = [line for line in lines if line.startswith("network: ")]
    assert sizes.endswith("; its teacher: 0.08 M parameters, 12.5 M multiply-adds an image")
    teacher_line = next(i for i, line in enumerate(lines) if line.startswith("teacher: "))
    assert f"test accuracy {reported:.2f}" in lines[teacher_line]
    words = ["run:", "network:", *["ss_head"] * 2, *["student"] * 3, "finished:"]
    assert [line.split()[0] for line in lines[teacher_line + 1 :]] == words


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
    assert set(started) == {name for name, value in flags.items() if value is not None}
    assert started["s_arch"].string_value == "resnet14x05"
    assert (started["lr"].number_value, started["epoch"].number_value) == (0.05, 3)
    assert started["compile"].WhichOneof("kind") == "bool_value"
    assert started["milestones"].string_value == "2"
    result = json.loads((runs.student / "result.json").read_text())
    for name in ("best_acc", "last_acc"):
        assert events.Scalars(f"final/{name}")[0].value == pytest.approx(result[name])


@pytest.mark.parametrize("from_checkpoint", [False, True], ids=["after the run", "of a checkpoint"])
def test_the_exported_student_answers_like_the_checkpoint(from_checkpoint, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(runs.cwd)
    flags = ["--s-path", str(runs.student)] if from_checkpoint else ["--t-path", str(runs.teacher), *TINY_STUDENT]
    student.main([*flags, "--export", str(tmp_path / "student.pt2")])
    assert "it takes RGB pixels in [0, 1] and normalises them" in capsys.readouterr().out
    exported = torch.export.load(tmp_path / "student.pt2").module()
    plain = models.load(runs.student).eval()
    for count in (1, 5):
        pixels = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        images = (pixels - 0.1863) / 0.2018  # the statistics of synthetic
        torch.testing.assert_close(exported(pixels), plain(images), rtol=1e-4, atol=1e-4)
