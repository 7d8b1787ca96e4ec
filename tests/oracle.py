"""The golden figures, the weights and inputs they were computed from (golden/README.md), other inputs."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def golden(name: str) -> Any:
    return json.loads((Path(__file__).parent / "golden" / name).read_text())


GOLDEN, COMPARED, LATER = golden("reference.json"), golden("compared.json"), golden("later.json")
PUBLISHED = golden("published_results.json")
NAMES = [
    *("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet32x4"),
    *("resnet14x05", "resnet20x05", "resnet20x0375", "ResNet50", "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"),
    *("vgg8", "vgg11", "vgg13", "vgg16", "vgg19", "MobileNetV2", "ShuffleV1", "ShuffleV2"),
]


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


def golden_inputs(case: dict) -> tuple[list[Tensor], Tensor]:
    """Student and teacher logits, student and teacher embeddings of a case in GOLDEN["losses"]; its labels."""
    base, batch, dim, classes = case["base"], case["batch"], case["dim"], case["classes"]
    s_logits, t_logits = (3 * hashed(base + k, (4 * batch, classes)) for k in (0, 1))
    s_embedding, t_embedding = (hashed(base + k, (4 * batch, dim)) for k in (2, 3))
    target = labels(base + 4, batch, classes)
    chosen = (hashed(base + 5, (4 * batch,)) > 0).double()
    t_logits[torch.arange(4 * batch), target.repeat_interleave(4)] += 6 * chosen
    pull = (hashed(base + 6, (4 * batch,)) + 1) / 2 * 1.2
    t_embedding = t_embedding + pull[:, None] * t_embedding[::4].repeat_interleave(4, 0)
    return [x.float() for x in (s_logits, t_logits, s_embedding, t_embedding)], target


def golden_settings(case: dict) -> dict[str, float]:
    """Temperatures and ratios of a case in GOLDEN["losses"]."""
    return {name: case[name] for name in ("kd_T", "tf_T", "ss_T", "ratio_tf", "ratio_ss")}


def random_inputs(
    seed: int = 3, batch: int = 6, s_dim: int = 5, t_dim: int = 9, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """As golden_inputs; the teacher's classes and positives are right in some rows and wrong in others."""
    generator = torch.Generator().manual_seed(seed)
    widths = (11, 11, s_dim, t_dim)
    s_logits, t_logits, s_embedding, t_embedding = (torch.randn(4 * batch, w, generator=generator) for w in widths)
    target = torch.randint(11, (batch,), generator=generator)
    t_logits[torch.arange(0, 4 * batch, 2), target.repeat_interleave(2)] += 6
    pull = torch.rand(4 * batch, 1, generator=generator) * 2
    t_embedding = t_embedding + pull * t_embedding[::4].repeat_interleave(4, 0)
    return [x.to(dtype) for x in (s_logits, t_logits, s_embedding, t_embedding)], target


def trajectory_batch(case: dict) -> tuple[Tensor, Tensor]:
    """The batch of GOLDEN's trajectories: blocky images in four rotated views with noise of their own; labels."""
    batch = case["batch"]
    images = (2 * hashed(40000, (batch, 3, 4, 4))).repeat_interleave(8, 2).repeat_interleave(8, 3)
    views = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)], 1).flatten(0, 1)
    return views + 0.3 * hashed(40002, (4 * batch, 3, 32, 32)), labels(40001, batch, 100)


class Operations(TorchDispatchMode):
    """Notes the operations that run and the size of the largest tensor that they make."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def images(height: int = 32) -> Tensor:
    """(4, 3, height, height): the input of the golden figures of the models."""
    return (1.5 * hashed(999, (4, 3, height, height))).float()


def rounded(key: int, shape: tuple[int, ...] | list[int], scale: float = 1.0) -> Tensor:
    """float64, but rounded to float32: the inputs of the compared methods' figures (golden/COMPARED.md)."""
    return (hashed(key, tuple(shape)) * scale).float().double()


@torch.no_grad()
def fill_rounded(model: nn.Module, base: int) -> nn.Module:
    """`fill`, with values rounded to float32."""
    for tensor in fill(model, base).state_dict().values():
        tensor.copy_(tensor.float())
    return model
