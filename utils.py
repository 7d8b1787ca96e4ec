"""What the entries share while they train: precision and compilation, SGD, meters, evaluation."""

import argparse
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import processes
from harness.flags import Fault
from harness.progress import Progress
from harness.record import Run
from losses import VIEWS, similarity_matrix

DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of --amp

# --------------------------------------------------------------------------------------------- how the networks run


def precision(amp: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """The context in which the networks run (`--amp`): `with autocast(): …`."""
    return functools.partial(torch.autocast, device.type, dtype=DTYPES[amp], enabled=amp != "off")


def compiled(function: Callable, wanted: bool, device: torch.device) -> Callable:
    """`function` as one compiled graph if `wanted` (`--compile`).

    On CUDA the graph is replayed whole, because launching the kernels of a small network one by one takes longer than
    running them.
    """
    if not wanted:
        return function
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def compiled_loss(loss_of: Callable, wanted: bool, images: Any) -> Callable:
    """The same for a loss of a batch of `images`.

    The last, smaller batch of an epoch runs uncompiled: a graph of its own would cost minutes and memory.
    """
    graph, size = compiled(loss_of, wanted, images.device), min(images.batch_size, len(images))
    return lambda batch: (graph if len(batch.target) == size else loss_of)(batch)


def cast_once(network: nn.Module, amp: str) -> None:
    """Casts the convolutions and linear layers of a frozen network to the precision in which `--amp` runs them.

    Autocast would cast their weights in every step, with the same result.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(DTYPES[amp])


def wide(device: torch.device) -> torch.dtype:
    """The widest float of the device: Apple's MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


# ------------------------------------------------------------------------------------------------------------ training


class SGD:
    """SGD, its MultiStepLR and the gradient scaler of float16, saved and restored as one.

    A step of float16 that overflows changes nothing: neither the parameters nor running statistics and other buffers.

    Args:
        network: what trains; restored before this.
        lr, milestones: the learning rate, and the epochs after which it is multiplied by `args.gamma`.
        args: the flags `momentum`, `weight_decay`, `gamma`, `amp`.
    """

    def __init__(self, network: nn.Module, lr: float, milestones: list[int], args: argparse.Namespace):
        parameters = list(network.parameters())
        decay = {"momentum": args.momentum, "weight_decay": args.weight_decay}
        # fused: one kernel updates all parameters, and skips an overflowed step without waiting for the host
        self.optimizer = torch.optim.SGD(parameters, lr=lr, fused=True, **decay)
        if args.momentum:  # else an overflow in the first step leaves the momentum uninitialised
            self.optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in parameters})
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, milestones, args.gamma)
        # only float16 needs scaled gradients; a disabled scaler changes nothing
        self.scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=args.amp == "fp16")
        self.buffers = [x for x in network.buffers() if x.is_floating_point()] if args.amp == "fp16" else []
        self.finite_buffers = self._buffers()

    @property
    def lr(self) -> float:
        """The learning rate now."""
        return self.optimizer.param_groups[0]["lr"]

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of `loss`."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        processes.add_up(self.optimizer.param_groups[0]["params"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.buffers:
            self.finite_buffers = torch.where(loss.isfinite(), self._buffers(), self.finite_buffers)
            parts = self.finite_buffers.split([x.numel() for x in self.buffers])
            torch._foreach_copy_(self.buffers, [part.view_as(x) for part, x in zip(parts, self.buffers, strict=True)])

    def _buffers(self) -> Tensor | None:
        """A copy of all buffers in one row, None if there are none: few kernels copy them."""
        return torch.cat([x.flatten() for x in self.buffers]) if self.buffers else None

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
        self.finite_buffers = self._buffers()


def accuracy(scores: Tensor, target: Tensor, k: int = 1) -> Tensor:
    """Share of the rows of `scores` (N, C) with `target` (N,) among the `k` highest columns, in percent: a scalar."""
    best = scores.argmax(1, keepdim=True) if k == 1 else scores.topk(k).indices
    return (best == target.unsqueeze(1)).any(1).to(wide(target.device)).mean() * 100


class Meter:
    """Means of scalars over an epoch, kept on the device so that adding does not wait for it, except to show them.

    It also remembers the first step at which each scalar was not finite, and shows the progress of the epoch.

    Args:
        label: the epoch, for the progress and for errors.
        images: how many images the epoch has; None to show nothing.
        amp: fp16: steps whose loss is not finite are left out, because `SGD` skips them.
    """

    def __init__(self, label: str, images: int | None = None, amp: str = "off"):
        self.label, self.skips = label, amp == "fp16"
        self.names: list[str] = []
        self.rows = self.steps = 0
        self.skipped: Tensor | int = 0  # rows
        self.total: Tensor | int = 0
        self.finite_steps: Tensor | int = 0  # steps before the first that was not finite
        self.progress = None if images is None else Progress(images, label, "images")

    def add(self, rows: int, loss: Tensor, values: Mapping[str, Tensor]) -> None:
        """Adds scalars that are means over `rows` images, and the loss that they are parts of."""
        self.names = ["loss", *values]
        stacked = torch.stack([value.detach() for value in (loss, *values.values())]).to(wide(loss.device))
        if self.skips:
            skipped = ~torch.isfinite(stacked[0])
            stacked, self.skipped = stacked.masked_fill(skipped, 0), self.skipped + skipped * rows
        self.total = self.total + stacked * rows
        self.finite_steps = self.finite_steps + torch.isfinite(self.total)  # a total that went bad stays bad
        self.rows += rows
        self.steps += 1
        if self.progress:
            self.progress.add(rows, self.means)

    def means(self) -> dict[str, float]:
        """The means of the epoch so far; the loss is among them if it has several parts. Waits for the device.

        Raises:
            Fault: the loss was not finite (with fp16: at any step); names the epoch, the step and the terms. A term of
                weight 0 is no part of the loss and may be anything.
        """
        finite, totals, rows = self.finite_steps.tolist(), self.total.tolist(), self.rows - int(self.skipped)
        if not rows:
            finite[0] = 0
        if self.progress and (self.rows >= self.progress.total or finite[0] < self.steps):
            self.progress.close()
        if finite[0] < self.steps:
            bad = [name for name, steps in zip(self.names, finite, strict=True) if steps <= finite[0]]
            raise Fault(
                f"{self.label}, step {finite[0] + 1}: {', '.join(bad[1:]) or 'the loss'} is not finite; what was saved "
                "before is intact. A lower --lr (and for fp16: --amp bf16) helps"
            )
        means = {name: total / rows for name, total in zip(self.names, totals, strict=True)}
        if sum(name.endswith("_loss") for name in means) == 1:
            del means["loss"]
        return means


class Test(NamedTuple):
    """The figures of a network on a split."""

    loss: float  # cross-entropy, in nats
    acc: float  # top-1, in percent
    acc_top5: float | None  # None for five classes or fewer


@torch.inference_mode()
def evaluate(model: nn.Module, images: Any, autocast: Callable, label: str = "test") -> Test:
    """Tests `model`, images → logits, on the normal views of a split; leaves it in eval mode.

    `label` names the test in the error if the loss is not finite. Of several processes each tests its share, and all
    return the figures of the whole split.
    """
    model.eval()
    meter = Meter(label)
    for batch in images.test_batches(views=1):
        with autocast():
            logits = processes.gathered(model(batch.x), len(batch.target))
        loss = F.cross_entropy(logits.float(), batch.target)
        means = {"cls_loss": loss, "cls_acc": accuracy(logits, batch.target)}
        if logits.shape[1] > 5:
            means["cls_acc_top5"] = accuracy(logits, batch.target, k=5)
        meter.add(len(batch.target), loss, means)
    means = meter.means()
    return Test(means["cls_loss"], means["cls_acc"], means.get("cls_acc_top5"))


def test_of_best(
    model: nn.Module, checkpoint: Mapping, data: Any, autocast: Callable, network: nn.Module | None = None
) -> float | None:
    """Test accuracy (%) of the best epoch: loads its `checkpoint` into `model` and tests `model` or its part `network`.

    None if the best epoch was chosen on the test images themselves: its accuracy is known.
    """
    if data.val is data.test:
        return None
    model.load_state_dict(checkpoint["state_dict"])
    return evaluate(model if network is None else network, data.test, autocast, "test of the best epoch").acc


def sizes(side: int, network: nn.Module, teacher: nn.Module | None = None) -> dict[str, int]:
    """Parameters, and multiply-adds per image of `side` × `side` pixels, of a network and its teacher; prints them."""
    from torch.utils.flop_counter import FlopCounterMode  # takes a second to import

    found, lines = {}, []
    for whose, each in (("", network), ("teacher_", teacher)):
        if each is None:
            continue
        training, device = each.training, next(each.parameters()).device
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            each.eval()(torch.zeros(1, 3, side, side, device=device))
        each.train(training)
        params, multiply_adds = sum(p.numel() for p in each.parameters()), counter.get_total_flops() // 2
        found |= {f"{whose}params": params, f"{whose}multiply_adds": multiply_adds}
        lines.append(f"{params / 1e6:.2f} M parameters, {multiply_adds / 1e6:.1f} M multiply-adds per image")
    print(f"network: {'; its teacher: '.join(lines)}", flush=True)
    return found


# ---------------------------------------------------------------------------------------------- what TensorBoard shows


@torch.inference_mode()
def show(run: Run, epoch: int, teacher: nn.Module, student: nn.Module, data: Any, autocast: Callable) -> None:
    """Shows views of eight training images, and the similarities of teacher (left) and student on test images."""
    views = next(data.train.batches("student", epoch, VIEWS)).x[: 8 * VIEWS]
    run.show(epoch, "views", views_image(data.train.brightness(views), VIEWS))
    batch = next(data.val.test_batches(VIEWS))
    with autocast():
        embeddings = [network(batch.x).embedding for network in (teacher, student)]
    matrices = [similarity_matrix(processes.gathered(x, len(batch.target), VIEWS)) for x in embeddings]
    run.show(epoch, "similarity/teacher_and_student", similarity_image(*matrices))


def views_image(views: Tensor, per_image: int) -> Tensor:
    """Views (V·N, 3, H, W) in [0, 1] → one image: a row for each of the N images with its V = `per_image` views."""
    from torchvision.utils import make_grid  # here: it takes as long to import as PyTorch

    return make_grid(views, nrow=per_image, padding=1)


def similarity_image(teacher: Tensor, student: Tensor) -> Tensor:
    """Two similarity matrices (3B, B) side by side as an image: black at -1, white at 1, four pixels to an entry."""
    gap = teacher.new_full((len(teacher), 2), 1.0)
    both = (torch.cat([teacher, gap, student], 1) + 1) / 2
    return both.repeat_interleave(4, 0).repeat_interleave(4, 1).unsqueeze(0)
