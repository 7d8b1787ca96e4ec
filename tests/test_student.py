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
import teacher
import utils
from harness import checkpoint, sources
from harness.sources import STATISTICS, Split
from models import model_dict
from wrapper import Wrapper, frozen

PAIRS = PUBLISHED["similar"]["pairs"] + PUBLISHED["cross"]["pairs"]
CPU = torch.device("cpu")
FULL = utils.precision("off", CPU)


def args_of(*flags):
    return student.parse_args(["--t-path", "unused", "--s-arch", "resnet8", *flags])


def folded(plain):
    """The teacher as student.py uses it, with the SS head of `plain`."""
    network = Wrapper(frozen(plain.backbone, maps=False))
    network.proj_head = plain.proj_head
    return network.eval()


def warm_teacher(arch, x):
    """In float64, its batch norms as 30 passes over the same batch leave them."""
    network = fill(Wrapper(model_dict[arch]()).double(), 20000)
    network.to(memory_format=torch.channels_last).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1 - 0.9**30
    with torch.no_grad():
        network(x)
    return folded(network.eval())


def batch_of(x, target):
    return cifar.Batch(x.contiguous(memory_format=torch.channels_last), target, torch.arange(len(target)))


# ------------------------------------------------------------------------------------------------------------ the step


def test_both_training_steps_follow_the_published_trajectories():
    case = GOLDEN["ss_head_trajectory"]
    batch = batch_of(*trajectory_batch(case))
    fixed, args = warm_teacher(case["teacher"], batch.x), args_of()
    sgd = utils.SGD(fixed.proj_head, args.t_lr, args.t_milestones, args)
    loss_of = student.make_ss_loss(fixed, FULL)
    for loss_before, accuracy in case["steps"]:
        loss, logged = loss_of(batch)
        sgd.step(loss)
        assert loss.item() == pytest.approx(loss_before, rel=1e-6)
        assert logged["teacher_ssp_acc"].item() == pytest.approx(accuracy, rel=1e-6)

    case = GOLDEN["student_trajectory"]
    network = fill(Wrapper(model_dict[case["student"]]()).double(), case["student_fill_base"])
    network.to(memory_format=torch.channels_last).train()
    sgd = utils.SGD(network, args.lr, args.milestones, args)
    loss_of = student.make_loss(args, fixed, network, FULL)
    for *terms, total in case["steps"]:
        loss, logged = loss_of(batch)
        sgd.step(loss)
        assert [logged[f"{name}_loss"].item() for name in ("ce", "kd", "tf", "ss")] == pytest.approx(terms, rel=1e-6)
        assert loss.item() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_term_has_its_own_weight_and_one_of_weight_0_is_only_logged(compiled):
    """Even if that term is not finite."""
    fixed, network = (Wrapper(model_dict["resnet8"]()).eval() for _ in range(2))
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = batch_of(x, torch.tensor([1, 2, 3, 4]))
    weights = {"ce": 2.0, "kd": 3.0, "tf": 5.0, "ss": 7.0}
    for zero in [None, *weights]:
        flags = [word for name, w in weights.items() for word in (f"--{name}-weight", str(0 if name == zero else w))]
        loss, logged = student.make_loss(args_of(*flags), fixed, network, FULL)(batch)
        expected = sum(w * logged[f"{name}_loss"] for name, w in weights.items() if name != zero)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    with torch.no_grad():
        network.proj_head[2].bias.fill_(torch.nan)
    loss_of = student.make_loss(args_of("--ss-weight", "0"), fixed, network, FULL)
    loss, logged = (torch.compile(loss_of, backend="aot_eager") if compiled else loss_of)(batch)
    loss.backward()
    assert loss.isfinite() and logged["ss_loss"].isnan()
    assert all(parameter.grad.isfinite().all() for parameter in network.backbone.parameters())
    assert network.proj_head[0].weight.grad is None  # nothing trains it, not even weight decay


class Watch(TorchDispatchMode):
    """Collects all operations, those that touch a CPU tensor, and those that take images out of channels-last."""

    def __init__(self):
        super().__init__()
        self.names, self.on_cpu, self.contiguous = set(), set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        made = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
        taken = [x for x in args if isinstance(x, torch.Tensor)]
        self.names.add(name)
        if any(x.device.type == "cpu" and x.dim() > 0 for x in made + taken):
            self.on_cpu.add(name)
        if any(word in name for word in ("convolution", "batch_norm", "relu", "clamp_min", "threshold", "cat")):
            images = [x for x in made if x.dim() == 4 and x.shape[0] == 32]
            if not all(x.is_contiguous(memory_format=torch.channels_last) for x in images):
                self.contiguous.add(name)
        return out


@pytest.mark.parametrize(
    "t_arch, s_arch", [*PAIRS[:3], *(pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS[3:])]
)
def test_the_step_runs_on_cuda_without_waiting_for_the_device(t_arch, s_arch):
    """With fake tensors, a tensor on the wrong device fails, and so does a value that the host reads."""
    with FakeTensorMode(), torch.device("cuda"):
        fixed, network = Wrapper(model_dict[t_arch]()).eval(), Wrapper(model_dict[s_arch]())
        pixels, numbers = torch.zeros(20, 32, 32, 3, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64)
        data = cifar.Images(Split(pixels, numbers), STATISTICS["cifar100"], "cuda")
        autocast = utils.precision("off", torch.device("cuda"))
        loss_of = student.make_loss(args_of(), fixed, network, autocast)
        ss_loss_of = student.make_ss_loss(fixed, autocast)
        meter = utils.Meter("test")
        rows, window = torch.arange(8), torch.zeros(8, 4, dtype=torch.int64)
        with Watch() as seen:
            batch = cifar.Batch(data.views(rows, window), data.labels[rows], rows)
            loss, logged = loss_of(batch)
            meter.add(len(rows), loss, logged)
            ss_loss, _ = ss_loss_of(batch)
            stored = batch._replace(feature=torch.zeros(32, fixed.proj_head[0].in_features, dtype=torch.float16))
            loss_of(stored)
            ss_loss_of(stored._replace(x=None))
        assert not seen.on_cpu
        assert batch.x.shape == (32, 3, 32, 32)
        assert {loss.device.type, ss_loss.device.type, meter.total.device.type} == {"cuda"}


@pytest.mark.parametrize("s_arch", ["wrn_16_2", "resnet8x4", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_a_whole_step_stays_on_the_device_and_in_channels_last(s_arch):
    data = cifar.Images(sources.synthetic(False, 8), STATISTICS["synthetic"], CPU, batch_size=8)
    fixed, network = (Wrapper(model_dict[arch]()).to(memory_format=torch.channels_last) for arch in ("resnet8", s_arch))
    loss_of = student.make_loss(args_of(), folded(fixed.eval()), network, FULL)
    sgd = utils.SGD(network, 0.05, [1], args_of())
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
    fixed, network = (Wrapper(model_dict["resnet8"]()) for _ in range(2))
    loss_of = student.make_loss(args_of(), folded(fixed), network, FULL)
    batch = cifar.Batch(torch.randn(8, 3, 32, 32), torch.tensor([3, 5]), torch.arange(2))
    step = torch.compile(loss_of, fullgraph=True, backend="eager")
    step(batch._replace(feature=torch.randn(8, 64).half()))
    loss, _ = step(batch)
    loss.backward()
    assert network.backbone.conv1.weight.grad.abs().sum() > 0


def test_features_rounded_to_float16_hardly_change_the_losses_and_spare_the_backbone(monkeypatch):
    batch = batch_of(*trajectory_batch(GOLDEN["ss_head_trajectory"]))
    fixed = warm_teacher("resnet8", batch.x)
    network = fill(Wrapper(model_dict["resnet8"]()).double(), 30000).eval()
    loss_of, ss_loss_of = student.make_loss(args_of(), fixed, network, FULL), student.make_ss_loss(fixed, FULL)
    expected = [loss_of(batch)[0].item(), ss_loss_of(batch)[0].item()]
    batch = batch._replace(feature=fixed(batch.x).feature.half())
    monkeypatch.setattr(fixed.backbone, "forward", None)
    stored = [loss_of(batch)[0].item(), ss_loss_of(batch)[0].item()]
    assert stored == pytest.approx(expected, rel=1e-4)
    assert stored != expected


# ------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_leaves_its_checkpoints_and_its_result(runs):
    assert runs.student.name == (
        "sskd_student_resnet14x05_weight0.1+0.9+2.7+10.0_T4.0+4.0+0.5_ratio1.0+0.75_seed0_teacher_resnet8_seed0"
    )
    assert {path.name for path in (runs.student / "ckpt").iterdir()} == {"student_best.pth", "teacher.pth", "last.pth"}
    best = torch.load(runs.student / "ckpt" / "student_best.pth", weights_only=True)
    result = json.loads((runs.student / "result.json").read_text())
    assert (result["teacher_params"], result["teacher_multiply_adds"]) == (83_892, 12_507_392)
    assert result["params"] == sum(x.numel() for x in model_dict["resnet14x05"]().parameters())
    assert set(best) == {"epoch", "state_dict", "best_acc", "about"}
    assert (best["best_acc"], best["epoch"]) == (result["best_acc"], result["best_epoch"])
    fixed = Wrapper(model_dict["resnet8"]())
    fixed.load_state_dict(torch.load(runs.student / "ckpt" / "teacher.pth", weights_only=True))
    for name, value in models.load(runs.teacher).state_dict().items():
        assert torch.equal(fixed.backbone.state_dict()[name], value), name


def test_the_teachers_accuracy_is_reported_before_all_training(runs):
    lines = runs.outputs[1].splitlines()
    reported = json.loads((runs.teacher / "result.json").read_text())["best_acc"]
    teacher_line = next(i for i, line in enumerate(lines) if line.startswith("teacher: "))
    assert f"test accuracy {reported:.2f}" in lines[teacher_line]
    words = ["network:", "run:", *["ss_head"] * 2, *["student"] * 3, "finished:"]
    assert [line.split()[0] for line in lines[teacher_line + 1 :]] == words


def test_data_set_side_and_held_out_images_of_class_folders_reach_the_student(tmp_path, monkeypatch, capsys):
    """The data set and its side come from the teacher's checkpoint; the best epoch is tested once."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for half, name, number in [(h, n, i) for h in ("train", "test") for n in ("ape", "bee") for i in range(4)]:
        place = tmp_path / "data" / half / name
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(256, size=(70, 80, 3), dtype=np.uint8)).save(place / f"{number}.png")
    short = "--epoch 1 --milestones 1 --batch-size 2 --val-fraction 0.5".split()
    teacher.main(["--arch", "resnet8", "--dataset", "folder", "--side", "64", *short])
    student.main("--t-path experiments/teacher_resnet8_val0.5_seed0 --t-epoch 1 --s-arch resnet8".split() + short)
    assert capsys.readouterr().err == ""
    (folder,) = tmp_path.glob("experiments/sskd_*")
    flags = json.loads((folder / "config.json").read_text())["flags"]
    about = checkpoint.read(folder).about
    assert (flags["dataset"], flags["side"]) == (about["dataset"], about["side"]) == ("folder", 64)
    assert (about["classes"], about["tested"]) == (2, 4)
    args = teacher.parse_args(["--evaluate", str(folder), *short])
    data = cifar.load(sources.read_for(args, about), args, CPU)
    best = utils.evaluate(models.load(folder), data.test, FULL).acc
    result = json.loads((folder / "result.json").read_text())
    assert result["test_acc"] == best
    assert result["best_acc"] == utils.evaluate(models.load(folder), data.val, FULL).acc


@pytest.fixture(scope="module")
def events(runs):
    """What TensorBoard reads from the student's run."""
    return EventAccumulator(str(runs.student / "events")).Reload()


def test_tensorboard_shows_the_curves_of_both_phases(runs, events):
    head = {f"{split}/teacher_ssp_{what}" for split in ("train", "val") for what in ("loss", "acc")}
    head |= {"train/teacher_lr"}
    terms = {f"train/{name}" for name in ("ce_loss", "kd_loss", "tf_loss", "ss_loss", "cls_acc", "ss_acc", "lr")}
    tags = head | terms | {"train/loss", "val/ce_loss", "val/cls_acc", "val/cls_acc_top5"}
    others = {f"speed/{phase}_images_per_second" for phase in ("ss_head", "student")}
    assert set(events.Tags()["scalars"]) == tags | others | {"final/best_acc", "final/last_acc"}
    lines = [json.loads(line) for line in (runs.student / "log.jsonl").read_text().splitlines()]
    for tag in tags:
        points = [(point.step, point.value) for point in events.Scalars(tag)]
        assert points == [(line["epoch"], pytest.approx(line[tag])) for line in lines if tag in line], tag
        assert len(points) == (2 if tag in head else 3), tag


def png(value):
    return np.asarray(Image.open(io.BytesIO(value.encoded_image_string)))


def test_tensorboard_shows_the_views_that_the_student_is_trained_on_and_the_similarities(events):
    assert set(events.Tags()["images"]) == {"views", "similarity/teacher_and_student"}
    similarities = events.Images("similarity/teacher_and_student")
    assert [image.step for image in similarities] == [1, 3]
    assert {png(image).shape[:2] for image in similarities} == {(4 * 48, 4 * (16 + 2 + 16))}  # of a batch of 16
    assert len({image.encoded_image_string for image in similarities}) == 2
    views = [png(image) for image in events.Images("views")]
    assert {grid.shape for grid in views} == {(8 * 33 + 1, 4 * 33 + 1, 3)}  # eight images, four views, borders of 1
    data = cifar.Images(sources.synthetic(True, 48), STATISTICS["synthetic"], CPU)
    draws = cifar.draw(48, 4, 0, "student", 1)
    x = data.brightness(data.views(draws.order[:8], draws.window[:8])).permute(0, 2, 3, 1).numpy()
    for row, column in ((0, 0), (0, 3), (7, 2)):
        shown = views[0][33 * row + 1 : 33 * row + 33, 33 * column + 1 : 33 * column + 33].astype(float)
        assert np.abs(shown - x[4 * row + column] * 255).max() <= 1


def test_tensorboard_lists_the_flags_beside_the_final_accuracies(runs, events):
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


@pytest.mark.parametrize("from_checkpoint", [False, True], ids=["after the run", "from a checkpoint"])
def test_the_exported_student_answers_like_the_checkpoint(from_checkpoint, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs.cwd)
    flags = ["--s-path", str(runs.student)] if from_checkpoint else ["--t-path", str(runs.teacher), *TINY_STUDENT]
    student.main([*flags, "--export", str(tmp_path / "student.pt2")])
    exported, plain = torch.export.load(tmp_path / "student.pt2").module(), models.load(runs.student).eval()
    for count in (1, 5):
        pixels = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        images = (pixels - 0.1863) / 0.2018  # the statistics of synthetic
        torch.testing.assert_close(exported(pixels), plain(images), rtol=1e-4, atol=1e-4)
