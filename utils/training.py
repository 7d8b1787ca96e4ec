"""The device, its precision, the optimizer, and the meters of a training loop."""

import argparse
import contextlib
import ctypes
import functools
import os
import platform
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .errors import Fault, UserError


def pick_device(gpu_id: int) -> torch.device:
    """CUDA `gpu_id`, else Apple's MPS, else the CPU; printed in one line."""
    if torch.cuda.is_available():
        if gpu_id >= torch.cuda.device_count():
            raise UserError(f"--gpu-id {gpu_id}: this machine has CUDA devices 0 to {torch.cuda.device_count() - 1}")
        device = torch.device("cuda", gpu_id)
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name(device)
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"device: {device} ({name})", flush=True)
    return device


def set_up_torch(seed: int, device: torch.device, deterministic: bool) -> None:
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

    By itself it gives large blocks back to the system and gets them anew, page by page, at every step: a tenth of a
    step's time on a CPU. Elsewhere than with glibc nothing changes.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, 1 << 30)


class Precision:
    """The context in which the networks run, and the update that goes with it (`--amp`)."""

    def __init__(self, amp: str, device: torch.device):
        dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=amp != "off")
        # only float16 needs its gradients scaled away from zero; a disabled scaler passes everything through
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """One step down the gradient of `loss`. A fused optimizer skips an overflowed step without asking the host."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()


def make_sgd(
    parameters: Iterable[Tensor], args: argparse.Namespace, lr: float, milestones: list[int]
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.MultiStepLR]:
    """The published optimizer and schedule; fused: one kernel updates all parameters."""
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, args.gamma)


def compiled(function: Callable, wanted: bool, device: torch.device) -> Callable:
    """`function` as one compiled graph if `wanted` (`--compile`).

    Shapes are static but for an epoch's last batch, which gets a graph of its own. On CUDA the graphs are replayed
    whole, since launching the kernels of small networks one by one takes longer than running them.
    """
    if not wanted:
        return function
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def optimizer_state(optimizer: torch.optim.Optimizer, scheduler: Any, precision: Precision) -> dict:
    """What continues an optimisation, as tensors, numbers, lists and dicts."""
    schedule = {name: value for name, value in scheduler.state_dict().items() if name != "milestones"}  # a Counter
    return {"optimizer": optimizer.state_dict(), "scheduler": schedule, "scaler": precision.scaler.state_dict()}


def restore_optimizer(saved: dict, optimizer: torch.optim.Optimizer, scheduler: Any, precision: Precision) -> None:
    """Undoes `optimizer_state`."""
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    if saved["scaler"]:
        precision.scaler.load_state_dict(saved["scaler"])


def wide(device: torch.device) -> torch.dtype:
    """The widest float of the device: Apple's MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def accuracy(scores: Tensor, target: Tensor) -> Tensor:
    """Share of the rows of `scores` (N, C) whose highest column is `target` (N,), in percent: a scalar."""
    return (scores.argmax(1) == target).to(wide(target.device)).mean() * 100


class Meter:
    """Means of scalars over an epoch, kept on the device so that adding never waits for it.

    It also remembers, there, the first step at which each scalar was not finite.
    """

    def __init__(self, device: torch.device, label: str):
        self.label = label  # which epoch of what
        self.names: list[str] = []
        self.rows = 0
        self.total = torch.zeros((), dtype=wide(device), device=device)
        self.steps = 0
        self.finite_steps = torch.zeros((), dtype=torch.int64, device=device)  # before the first that was not

    def add(self, rows: int, **values: Tensor) -> None:
        """Adds scalars that are means over `rows` rows."""
        self.names = list(values)
        stacked = torch.stack([value.detach() for value in values.values()]).to(self.total.dtype)
        self.total = self.total + stacked * rows
        self.finite_steps = self.finite_steps + torch.isfinite(self.total)  # a total that went bad stays bad
        self.rows += rows
        self.steps += 1

    def means(self) -> dict[str, float]:
        """The means so far. This is a sync point: once an epoch, or for a progress line.

        Raises:
            Fault: a scalar was not finite; names it, the epoch and the step.
        """
        for name, finite in zip(self.names, self.finite_steps.tolist(), strict=True):
            if finite < self.steps:
                raise Fault(
                    f"{self.label}, step {finite + 1}: {name} is not finite; the checkpoint before it is intact. "
                    "A lower --lr (and for fp16: --amp bf16) helps"
                )
        return {name: total / self.rows for name, total in zip(self.names, self.total.tolist(), strict=True)}


@torch.inference_mode()
def evaluate(model: nn.Module, images: Any, batch_size: int, precision: Precision) -> tuple[float, float]:
    """Cross-entropy (nats) and accuracy (%) of `model` on the unrotated images of a split; leaves it in eval mode."""
    model.eval()
    meter = Meter(images.labels.device, "test")
    for x, target in images.test_batches(batch_size, views=1):
        with precision.autocast():
            logits = model(x)
        meter.add(len(target), loss=F.cross_entropy(logits.float(), target), accuracy=accuracy(logits, target))
    means = meter.means()
    return means["loss"], means["accuracy"]


def progress(batches: Iterator, total: int, meter: Meter) -> Iterator:
    """Passes the batches on; on a terminal a bar shows images per second, time left and the means every 20 steps."""
    if not sys.stderr.isatty():
        yield from batches
        return
    with tqdm(total=total, desc=meter.label, unit=" images", leave=False, dynamic_ncols=True) as bar:
        for step, (views, target) in enumerate(batches, 1):
            yield views, target
            if step % 20 == 0:
                bar.set_postfix({name: f"{mean:.3f}" for name, mean in meter.means().items()}, refresh=False)
            bar.update(len(target))
