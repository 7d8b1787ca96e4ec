"""The CUDA path on a real GPU: bash command.sh test-cuda."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, contents, end_of, stop_at
from torch import nn
from torch._dynamo.utils import counters

import baseline
import cifar
import student
import teacher
import utils
from harness import machine
from harness.shapes import synthetic
from harness.sources import STATISTICS, Split
from losses import VIEWS
from methods import METHODS, set_phase
from models import model_dict
from wrapper import Wrapper, classifier, frozen

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: bash command.sh test-cuda"),
]
DEVICE = torch.device("cuda")
FEW = "--dataset synthetic --train-size 160 --test-size 100 --epoch 2 --milestones 1".split()  # batches of 64, 64, 32
DISTIL = ["--s-arch", "resnet8", *FEW]
HEAD = ["--t-epoch", "2", "--t-milestones", "1"]
PAIRS = ["resnet56:resnet20", "wrn_40_2:wrn_16_2", "wrn_40_2:wrn_40_1", "resnet32x4:resnet8x4", "vgg13:vgg8"]
PAIRS += ["vgg13:MobileNetV2", "ResNet50:MobileNetV2", "ResNet50:vgg8", "resnet32x4:ShuffleV1", "resnet32x4:ShuffleV2"]
PAIRS += ["wrn_40_2:ShuffleV1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a teacher that the GPU has trained."""
    folder = tmp_path_factory.mktemp("teacher")
    teacher.main(["--arch", "resnet14", *FEW, "--experiments", str(folder)])
    return folder / "teacher_resnet14_seed0"


@pytest.fixture(autouse=True)
def defaults():
    """What one test chose is not left to the next."""
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    yield
    for place, value in zip(places, before, strict=True):
        place.allow_tf32 = value
    torch.use_deterministic_algorithms(False)


# -------------------------------------------------------------------------------------------------------- every path


@pytest.mark.parametrize(
    "words",
    [
        "--arch wrn_16_2 --amp bf16",
        "--arch MobileNetV2 --amp fp16 --lr 0.01",
        "--arch ShuffleV1 --lr 0.01",
        "--arch ShuffleV2 --lr 0.01 --tf32 off",
        "--arch vgg8 --deterministic",
        "--arch resnet8 --compile",
    ],
)
def test_a_teacher_trains(words, tmp_path):
    teacher.main([*words.split(), *FEW, "--experiments", str(tmp_path)])
    (result,) = tmp_path.glob("*/result.json")
    assert json.loads(result.read_text())["epochs"] == 2


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--amp bf16",
        "--amp fp16",
        "--deterministic",
        "--t-features memory",
        "--t-features disk --amp bf16",
        "--compile --amp bf16",
        "--val-fraction 0.2",
    ],
)
def test_a_student_trains(words, trained, tmp_path, capsys):
    student.main(["--t-path", str(trained), *DISTIL, *HEAD, *words.split(), "--experiments", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["ss_head", "ss_head", "student", "student"]
    assert "cuda" in json.loads((folder / "config.json").read_text())["starts"][0]["device"]


@pytest.mark.parametrize("words", ["", "--amp fp16", "--deterministic"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, words, trained, tmp_path):
    flags = ["--method", method, "--first-epoch", "1", "--t-path", str(trained), *DISTIL, *words.split()]
    assert end_of(baseline.main, [*flags, "--experiments", str(tmp_path)]) == 0
    assert list(tmp_path.glob("*/result.json"))


def test_a_gpus_checkpoint_works_without_a_gpu(trained, tmp_path):
    student.main(["--t-path", str(trained), *DISTIL, *HEAD, "--experiments", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    without = {"env": os.environ | {"CUDA_VISIBLE_DEVICES": ""}, "cwd": tmp_path, "capture_output": True, "text": True}
    for words in (
        [ROOT / "teacher.py", "--evaluate", folder, "--dataset", "synthetic", "--test-size", "100"],
        [ROOT / "student.py", "--s-path", folder, "--export", "student.pt2"],
        ["-c", f"import torch; torch.load({str(folder / 'ckpt/student_best.pth')!r}, weights_only=True)"],
    ):
        ended = subprocess.run([sys.executable, *words], **without)
        assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_stopped_run_resumes_bit_for_bit_if_deterministic(amp, trained, tmp_path, monkeypatch):
    flags = ["--t-path", str(trained), *DISTIL, *HEAD, "--deterministic", "--amp", amp, "--experiments"]
    for head in (trained / "ckpt").glob("ss_head_*"):
        head.unlink()
    assert end_of(student.main, [*flags, str(tmp_path / "whole")]) == 0
    for head in (trained / "ckpt").glob("ss_head_*"):
        head.unlink()
    for step in (5, 5):  # in the second epoch of the SS head, then of the student
        with monkeypatch.context() as patch:
            stop_at(step, patch)
            assert end_of(student.main, [*flags, str(tmp_path / "stopped")]) == 1
    assert end_of(student.main, [*flags, str(tmp_path / "stopped")]) == 0
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


# -------------------------------------------------------------------------------------------------------- single steps


class Training:
    """A training as the entries set it up: `step` makes one; `state` is what it changes."""

    def __init__(self, what, t_arch="resnet14", s_arch="resnet8", amp="off", compile=False, images=160):
        torch.manual_seed(0)
        self.data = cifar.Images(Split(*synthetic(True, images)), STATISTICS["synthetic"], DEVICE, 64)
        autocast, name, first = utils.precision(amp, DEVICE), what.split()[0], "first" in what
        plain, network = model_dict[t_arch](), model_dict[s_arch]()
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # one pass gives the statistics of real maps
        with torch.no_grad():
            plain.train()(torch.randn(32, 3, 32, 32))
        for module in (plain.eval(), network):
            module.to(DEVICE, memory_format=cifar.LAYOUT)
        more, self.method, self.views = ["--amp", amp, "--lr", "0.001"], None, 1
        if name == "teacher":
            args, loss_of, self.trained = teacher.parse_args(["--arch", s_arch, *more]), None, network
            loss_of = teacher.make_loss(network, autocast)
        elif name in ("sskd", "ss_head"):
            self.views, args = VIEWS, student.parse_args(["--t-path", "-", "--s-arch", s_arch, *more])
            fixed, network = Wrapper(frozen(plain, maps=False)).to(DEVICE).eval(), Wrapper(network).to(DEVICE)
            utils.cast_once(fixed.backbone, amp)
            self.trained = network if name == "sskd" else fixed.proj_head
            loss_of = student.make_loss(args, fixed, network, autocast)
            loss_of = loss_of if name == "sskd" else student.make_ss_loss(fixed, autocast)
        else:
            args = baseline.parse_args(["--method", name, "--t-path", "-", "--s-arch", s_arch, *more])
            preact = METHODS[name].preact
            fixed = frozen(plain, preact=preact)
            utils.cast_once(fixed, amp)
            networks = baseline.Networks(network, fixed, classifier(fixed), preact, autocast)
            self.method = baseline.make_method(args, networks, self.data, t_arch)
            self.trained = set_phase(self.method, network, first)
            made = baseline.make_first_loss(networks, self.method) if first else None
            loss_of = made or baseline.make_loss(args, networks, self.method)
        self.network, self.loss_of = network, utils.compiled_loss(loss_of, compile, self.data)
        self.sgd, self.meter = utils.SGD(self.trained, 0.001, [9], args), utils.Meter(what)
        epochs = (self.data.batches("check", epoch, self.views) for epoch in itertools.count(1))
        self.batches = itertools.chain.from_iterable(epochs)
        self.trained.train()

    def step(self):
        batch = next(self.batches)
        loss, terms = self.loss_of(batch)
        self.sgd.step(loss)
        self.meter.add(len(batch.target), loss, terms)
        return loss.detach().clone()

    @property
    def state(self):
        method = {} if self.method is None else dict(self.method.named_buffers()) | dict(self.method.named_parameters())
        return {**self.network.state_dict(), **self.trained.state_dict(), **method}


WHAT = ["teacher", "ss_head", "sskd", *METHODS, "ab first", "ft first"]


@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("what", WHAT)
def test_a_step_does_not_wait_for_the_device(what, amp):
    training = Training(what, amp=amp)
    for _ in range(4):  # the first epoch and one step, which copies the second epoch's draws to the device
        training.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    training.meter.means()


@pytest.mark.parametrize(
    ("what", "pair", "amp"),
    [
        *(
            (what, "resnet14:resnet8", "off")
            for what in ("ss_head", "sskd", "crd", "dkd", "rkd", "ab first", "ft first")
        ),
        ("ab first", "wrn_16_1:wrn_16_2", "off"),
        ("sskd", "resnet14:resnet8", "bf16"),
        ("sskd", "resnet14:resnet8", "fp16"),
    ],
)
def test_replayed_graphs_compute_what_eager_steps_do(what, pair, amp):
    """Losses, weights, statistics and banks over five epochs: warm-up, recording, replay."""
    machine.set_up(student.parse_args(["--t-path", "-", "--s-arch", "resnet8", "--tf32", "off"]), DEVICE)
    torch.backends.cudnn.benchmark = False
    torch.compiler.reset()
    counters.clear()
    sides = [Training(what, *pair.split(":"), amp, compile) for compile in (False, True)]
    eager, graphs = ([side.step().item() for _ in range(15)] for side in sides)
    near = 2e-3 if amp == "off" else 5e-2
    assert graphs == pytest.approx(eager, rel=near)
    assert not counters["inductor"]["cudagraph_skips"]
    for name, value in sides[0].state.items():
        apart = (value.float() - sides[1].state[name].float()).norm() / value.float().norm().clamp(min=1e-6)
        assert apart < 10 * near, name


@pytest.mark.parametrize("pair", PAIRS)
def test_the_peak_memory_of_a_published_pair_is_printed(pair, capsys):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    training = Training("sskd", *pair.split(":"), images=64)
    for _ in range(2):
        loss = training.step()
    with capsys.disabled():
        print(f" {pair} {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB", end="")
    assert loss.isfinite()
