"""The golden figures, and the weights and inputs they were computed from (DESIGN.md, "Golden figures")."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = json.loads((Path(__file__).parent / "golden" / "reference.json").read_text())
PUBLISHED = json.loads((Path(__file__).parent / "golden" / "published_results.json").read_text())


def hashed(key: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [-1, 1) that depend on the key and the place alone: float64 of that shape."""
    z = np.arange(math.prod(shape), dtype=np.uint64)
    z += np.uint64(key * 1_000_003 + 1)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) / 2**53 * 2 - 1).reshape(shape)


@torch.no_grad()
def fill(model: nn.Module, base: int = 0) -> nn.Module:
    """Set every tensor of the model from the hash; returns the model."""
    for k, (name, tensor) in enumerate(model.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        u = hashed(base + k, tuple(tensor.shape))
        if tensor.dim() >= 2:
            u *= math.sqrt(6 / math.prod(tensor.shape[1:]))
        elif name.endswith("running_var"):
            u = 1 + 0.5 * u
        elif name.endswith("weight"):
            u = 1 + 0.2 * u
        else:  # biases and running means
            u *= 0.1
        tensor.copy_(u)
    return model


def labels(key: int, count: int, classes: int) -> Tensor:
    """(count,) class numbers."""
    return ((hashed(key, (count,)) + 1) / 2 * classes).long().clamp(0, classes - 1)
