"""One run in several processes, one on each GPU: torchrun --nproc_per_node 2 student.py …

Each process runs the networks on its share of every batch. `gathered` gives all of them the outputs of the whole batch,
from which each computes the same loss, so rankings and means are those of one process. Its graph reaches only its own
share, and `add_up` sums the gradients. Batch norms take their moments over all processes. So the run equals that of
one process up to rounding. The first process alone prints and writes.

Without torchrun there is one process, and nothing here does anything.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from harness.flags import UserError

COUNT = int(os.environ.get("WORLD_SIZE") or 1)  # torchrun sets these variables
RANK = int(os.environ.get("RANK") or 0) if COUNT > 1 else 0
_plain_batch_norm = F.batch_norm
_store: dist.Store | None = None


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Connects the processes of a run inside the block, where only the first of them prints.

    Raises:
        UserError: the environment is not that of torchrun.
    """
    global _store
    if COUNT == 1:
        yield
        return
    try:
        _store, rank, count = next(dist.rendezvous("env://"))
    except ValueError as error:
        raise UserError(f"WORLD_SIZE is {COUNT}: start with torchrun, or unset it ({error})") from error
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    long = datetime.timedelta(days=7)  # the others wait while the first downloads data or waits for an SS head
    dist.init_process_group(backend, store=_store, rank=rank, world_size=count, timeout=long)
    F.batch_norm = _batch_norm  # the batch norms of all networks, libraries' too, call it
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        if RANK:
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    dist.destroy_process_group()


def first_to_fail() -> bool:
    """Whether this process is the first of the run to fail. Only that one says why: the others fail because of it."""
    with contextlib.suppress(AttributeError, RuntimeError):  # not joined; torchrun is gone
        return _store.add("failed", 1) == 1
    return RANK == 0


def lost(error: RuntimeError) -> bool:
    """Whether an error of a collective operation says that another process has ended."""
    return COUNT > 1 and (isinstance(error, dist.DistError) or "onnection" in str(error))


def wait() -> None:
    """Returns when all processes have called it."""
    if COUNT > 1:
        dist.all_reduce(torch.zeros(1))


@contextlib.contextmanager
def first_then_others() -> Iterator[None]:
    """The first process goes through the block alone; then the others do."""
    if RANK:
        wait()
    yield
    if not RANK:
        wait()


def share(images: int) -> slice:
    """Which rows of a batch are this process's. Shares differ by one row at most; a small batch leaves some empty."""
    return slice(images * RANK // COUNT, images * (RANK + 1) // COUNT)


def gathered(x: Tensor, images: int, views: int = 1) -> Tensor:
    """This process's share of a tensor → the whole (views · images, …), in order. Gradients reach the share only."""
    if COUNT == 1:
        return x
    sizes = [views * (images * (rank + 1) // COUNT - images * rank // COUNT) for rank in range(COUNT)]
    padded = x.new_zeros(max(sizes), *x.shape[1:])  # all send the same shape
    padded[: len(x)] = x.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    return torch.cat([*parts[:RANK], x, *parts[RANK + 1 :]])


def add_up(parameters: list[Tensor]) -> None:
    """Makes the gradient of each parameter the sum of those of all processes."""
    if COUNT == 1:
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(total)
    for grad, part in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


class _Total(torch.autograd.Function):
    """The sum of a tensor over all processes. Its gradient is summed in the same way."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        # what dist.all_reduce does, which torch.compile can't trace in a backward pass
        total = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", dist.group.WORLD.group_name)
        return torch.ops._c10d_functional.wait_tensor(total)

    backward = forward


def _batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """`F.batch_norm` with the moments of the rows of all processes. nn.SyncBatchNorm works on CUDA only."""
    if not training:
        return _plain_batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    axes, shape = [axis for axis in range(x.dim()) if axis != 1], [1, -1] + [1] * (x.dim() - 2)
    d = x.to(torch.promote_types(x.dtype, torch.float32))
    if running_mean is not None:  # which is near the mean: E[d²] − E[d]² is precise, and one sum is enough
        d = d - running_mean.view(shape)
    count = d.new_full([d.shape[1]], d.numel() // d.shape[1])
    count, sums, squares = _Total.apply(torch.stack([count, d.sum(axes), d.square().sum(axes)]))
    mean = sums / count
    var = (squares / count - mean.square()).clamp(min=0)
    if running_mean is not None:
        with torch.no_grad():
            running_mean.add_(mean, alpha=momentum)
            running_var.lerp_(var * count / (count - 1).clamp(min=1), momentum)
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    return (d * scale.view(shape) + shift.view(shape)).to(x.dtype)
