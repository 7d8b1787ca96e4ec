"""What several families share: pooling, shuffling, running a stage, initial values. Shapes are (N, C, H, W).

Everything here keeps the channels_last memory format, forward and backward: a tensor that falls back to NCHW costs a
copy at the next convolution.
"""

import math
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn


def global_pool(x: Tensor) -> Tensor:
    """Average over the pixels: (N, C, H, W) -> (N, C)."""
    # mean((2, 3)) and adaptive pooling give the same value, but their gradient comes back in NCHW, and 2 to 6 times
    # slower (measured on a CPU).
    return x.permute(0, 2, 3, 1).mean((1, 2))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Deal the channels of `groups` equal groups out in turn: (a1 a2 b1 b2) -> (a1 b1 a2 b2)."""
    x = x.permute(0, 2, 3, 1).unflatten(-1, (groups, -1))  # N, H, W, groups, C/groups
    return x.transpose(-1, -2).flatten(-2).permute(0, 3, 1, 2)


def run_stage(blocks: Iterable[nn.Module], x: Tensor, preact: bool) -> tuple[Tensor, Tensor]:
    """Run residual blocks, each of which returns its output before the last ReLU.

    Returns the stage's output and its feature: the same tensor, or, with `preact`, the one before the last ReLU.
    """
    feature = x
    for block in blocks:
        feature = block(x)
        x = F.relu(feature, inplace=not preact)  # in place unless the value before is asked for
    return x, feature if preact else x


def init_kaiming(model: nn.Module) -> None:
    """Initial convolutions of the resnets; the classifier keeps PyTorch's default."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def init_normal(model: nn.Module, classifier_std: float | None = None) -> None:
    """Normal convolutions with std sqrt(2 / (k*k*out)) and zero biases; the classifier's weight too if a std is given.

    Unlike kaiming's fan_out, depthwise convolutions count all their output channels.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))
        elif isinstance(module, nn.Linear) and classifier_std is not None:
            nn.init.normal_(module.weight, std=classifier_std)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
