"""What the entries share while they train: the device and its precision, SGD, meters, one epoch, evaluation."""

import argparse
import contextlib
import ctypes
import functools
import os
import platform
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid
from tqdm import tqdm

from harness.flags import UserError, silent, warn


class Fault(Exception):
    """The machine or the training failed, not the user."""


# ------------------------------------------------------------------------------------------------ device and precision


def pick_device(gpu_id: int) -> torch.device:
    """CUDA `gpu_id`, else Apple's MPS, else the CPU; printed in one line.

    Raises:
        UserError: CUDA has no such device.
    """
    if torch.cuda.is_available():
        if gpu_id >= torch.cuda.device_count():
            raise UserError(f"--gpu-id {gpu_id}: this machine has CUDA devices 0 to {torch.cuda.device_count() - 1}")
        device = torch.device("cuda", gpu_id)
        torch.cuda.set_device(device)
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        if gpu_id:
            warn(f"--gpu-id {gpu_id}: PyTorch finds no CUDA device here, so this runs on the {device}")
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"device: {device} ({device_name(device)}{threads})", flush=True)
    return device


def device_name(device: torch.device) -> str:
    """What the device is sold as."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def set_up(seed: int, device: torch.device, deterministic: bool) -> None:
    """Seeds everything and chooses between fast and repeatable algorithms."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic  # shapes are static: the search for the fastest pays at once
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to repeat itself
    torch.use_deterministic_algorithms(deterministic)
    if device.type == "cpu":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Lets glibc keep what it frees, up to 1 GB.

    By itself it gives large blocks back to the system and gets them anew, page by page, at every step: of a step's time
    8 % for wrn_40_2 → wrn_16_2, 1 % for the small resnet20 → resnet8 (2 cores). Without glibc nothing changes.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, 1 << 30)


def precision(amp: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """The context in which the networks run (`--amp`): `with autocast(): …`."""
    dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return functools.partial(torch.autocast, device.type, dtype=dtype, enabled=amp != "off")


def compiled(function: Callable, wanted: bool, device: torch.device) -> Callable:
    """`function` as one compiled graph if `wanted` (`--compile`).

    Shapes are static but for an epoch's last batch, which gets a graph of its own. On CUDA the graphs are replayed
    whole, since launching the kernels of small networks one by one takes longer than running them.
    """
    if not wanted:
        return function
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def wide(device: torch.device) -> torch.dtype:
    """The widest float of the device: Apple's MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


# ------------------------------------------------------------------------------------------------------------ training


class SGD:
    """The published optimisation as one thing to save and restore: SGD, its MultiStepLR, and the scaler of float16.

    Args:
        parameters: what is trained.
        lr, milestones: the learning rate, and the epochs after which it is multiplied by `args.gamma`.
        args: `momentum`, `weight_decay`, `gamma`, `amp`.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, milestones: list[int], args: argparse.Namespace):
        parameters = list(parameters)
        decay = {"momentum": args.momentum, "weight_decay": args.weight_decay}
        # fused: one kernel updates all parameters, and skips an overflowed step without asking the host
        self.optimizer = torch.optim.SGD(parameters, lr=lr, fused=True, **decay)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, milestones, args.gamma)
        # only float16 needs its gradients scaled away from zero; a disabled scaler passes everything through
        self.scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=args.amp == "fp16")

    @property
    def lr(self) -> float:
        """The learning rate now."""
        return self.optimizer.param_groups[0]["lr"]

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of `loss`."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def end_epoch(self) -> None:
        self.scheduler.step()

    def state_dict(self) -> dict:
        """Tensors, numbers, lists and dicts."""
        epochs = self.scheduler.last_epoch
        return {"optimizer": self.optimizer.state_dict(), "epochs": epochs, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.last_epoch = state["epochs"]
        self.scaler.load_state_dict(state["scaler"])


def accuracy(scores: Tensor, target: Tensor) -> Tensor:
    """Share of the rows of `scores` (N, C) whose highest column is `target` (N,), in percent: a scalar."""
    return (scores.argmax(1) == target).to(wide(target.device)).mean() * 100


def accuracy_top5(scores: Tensor, target: Tensor) -> Tensor:
    """The same for the five highest columns; equal scores rank in the order of their columns, as in `argmax`."""
    five = scores.argsort(dim=1, descending=True, stable=True)[:, :5]
    return (five == target.unsqueeze(1)).any(1).to(wide(target.device)).mean() * 100


class Meter:
    """Means of scalars over an epoch, kept on the device so that adding never waits for it.

    It also remembers, there, the first step at which each scalar was not finite.
    """

    def __init__(self, label: str):
        self.label = label  # which epoch of what
        self.names: list[str] = []
        self.rows = self.steps = 0
        self.total: Tensor | int = 0
        self.finite_steps: Tensor | int = 0  # before the first that was not

    def add(self, rows: int, loss: Tensor, values: dict[str, Tensor]) -> None:
        """Adds scalars that are means over `rows` rows, beside the loss that they are parts of."""
        self.names = ["loss", *values]
        stacked = torch.stack([value.detach() for value in (loss, *values.values())]).to(wide(loss.device))
        self.total = self.total + stacked * rows
        self.finite_steps = self.finite_steps + torch.isfinite(self.total)  # a total that went bad stays bad
        self.rows += rows
        self.steps += 1

    def means(self) -> dict[str, float]:
        """The means of the values so far. This is a sync point: once an epoch, or for a progress line.

        Raises:
            Fault: the loss was not finite; names the epoch, the step and the terms. A term that is not part of the
                loss, its weight being 0, may be anything.
        """
        finite, totals = self.finite_steps.tolist(), self.total.tolist()
        if finite[0] < self.steps:
            bad = [name for name, steps in zip(self.names, finite, strict=True) if steps <= finite[0]]
            raise Fault(
                f"{self.label}, step {finite[0] + 1}: {', '.join(bad[1:]) or 'the loss'} is not finite; what was saved "
                "before is intact. A lower --lr (and for fp16: --amp bf16) helps"
            )
        return {name: total / self.rows for name, total in zip(self.names[1:], totals[1:], strict=True)}


def train_epoch(
    module: nn.Module, loss_of: Callable, batches: Iterator, sgd: SGD, images: int, label: str
) -> dict[str, float]:
    """Trains `module` on the batches of one epoch over `images` images; returns the means of what is logged.

    `loss_of(batch)` gives the loss and {name: scalar} to log. On a terminal a bar named `label` shows images per
    second, the time left and, every 20 steps, the means.
    """
    module.train()
    meter = Meter(label)
    with tqdm(total=images, desc=label, unit=" images", leave=False, dynamic_ncols=True, disable=silent()) as bar:
        for batch in batches:
            loss, logged = loss_of(batch)
            sgd.step(loss)
            meter.add(len(batch.target), loss, logged)
            if not bar.disable and meter.steps % 20 == 0:
                bar.set_postfix({name: f"{mean:.3f}" for name, mean in meter.means().items()}, refresh=False)
            bar.update(len(batch.target))
    return meter.means()


class Test(NamedTuple):
    """What a network reached on a split."""

    loss: float  # cross-entropy, in nats
    acc: float  # top-1, in percent
    acc_top5: float | None  # None where there are no more than five classes


@torch.inference_mode()
def evaluate(model: nn.Module, images: Any, autocast: Callable, label: str = "test") -> Test:
    """Tests `model` on the normal views of a split; leaves it in eval mode.

    `label` says what is tested, if the loss should not be finite.
    """
    model.eval()
    meter = Meter(label)
    for batch in images.test_batches(views=1):
        with autocast():
            logits = model(batch.x)
        loss = F.cross_entropy(logits.float(), batch.target)
        means = {"cls_loss": loss, "cls_acc": accuracy(logits, batch.target)}
        if logits.shape[1] > 5:
            means["cls_acc_top5"] = accuracy_top5(logits, batch.target)
        meter.add(len(batch.target), loss, means)
    means = meter.means()
    return Test(means["cls_loss"], means["cls_acc"], means.get("cls_acc_top5"))


@torch.inference_mode()
def class_accuracies(model: nn.Module, images: Any, autocast: Callable) -> list[tuple[int, int, float]]:
    """For every class that a split has: its label, its number of images, and the accuracy on them in percent."""
    model.eval()
    right = []
    for batch in images.test_batches(views=1):
        with autocast():
            right.append(model(batch.x).argmax(1) == batch.target)
    right = torch.cat(right)
    rows = []
    for label in images.labels.unique().tolist():
        of_class = right[images.labels == label]
        rows.append((label, len(of_class), of_class.float().mean().item() * 100))
    return rows


def test_of_best(
    model: nn.Module, checkpoint: Mapping, data: Any, autocast: Callable, network: nn.Module | None = None
) -> float | None:
    """Test accuracy (%) of the best epoch's `checkpoint`, read into `model`, or of the part `network` of it.

    None if the best epoch was chosen on the test images themselves: its accuracy is known.
    """
    if data.val is data.test:
        return None
    model.load_state_dict(checkpoint["state_dict"])
    return evaluate(model if network is None else network, data.test, autocast, "test of the best epoch").acc


@torch.no_grad()
def size_of(network: nn.Module, side: int = 32) -> tuple[int, int]:
    """Parameters, and multiply-adds of the convolutions and linear layers for one image of `side` × `side` pixels."""
    counts = []

    def count(module: nn.Module, _: Any, out: Tensor) -> None:
        counts.append(out.numel() * module.weight[0].numel())  # each output is a sum over one filter's weights

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    training = network.training
    network.eval()(torch.zeros(1, 3, side, side, device=next(network.parameters()).device))
    network.train(training)
    for hook in hooks:
        hook.remove()
    return sum(parameter.numel() for parameter in network.parameters()), sum(counts)


# ---------------------------------------------------------------------------------------------- what TensorBoard shows


def views_image(views: Tensor, per_image: int) -> Tensor:
    """Views (V·N, 3, H, W) in [0, 1] → one image, a row for each of the N with its V = `per_image` views."""
    return make_grid(views, nrow=per_image, padding=1)


def similarity_image(teacher: Tensor, student: Tensor) -> Tensor:
    """Two similarity matrices (3B, B) side by side as an image: black at -1, white at 1, four pixels to an entry."""
    gap = teacher.new_full((len(teacher), 2), 1.0)
    both = (torch.cat([teacher, gap, student], 1) + 1) / 2
    return both.repeat_interleave(4, 0).repeat_interleave(4, 1).unsqueeze(0)
