"""ShuffleNetV2 (Ma et al., ECCV 2018) of width 1 for CIFAR: 1x1 stem, no max-pool."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import global_pool

_STEM, _WIDTHS, _UNITS, _LAST_WIDTH = 24, (116, 232, 464), (3, 7, 3), 1024


def _interleave(a: Tensor, b: Tensor) -> Tensor:
    """Concatenate two halves and shuffle them in one copy: (a1 a2), (b1 b2) -> (a1 b1 a2 b2), channels_last."""
    return torch.stack([a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)], -1).flatten(-2).permute(0, 3, 1, 2)


def _depthwise(width: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)


class DownUnit(nn.Module):
    """Two branches with stride 2, each giving half of the output: (N, C, H, W) -> (N, width, H/2, W/2)."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        half = width // 2
        self.conv1 = _depthwise(in_width, 2)  # left branch
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv2 = nn.Conv2d(in_width, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_width, half, 1, bias=False)  # right branch
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _depthwise(half, 2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return _interleave(left, right)


class BasicUnit(nn.Module):
    """Passes the first half of the channels on and works on the second: (N, width, H, W) -> two halves,
    the second one before its last ReLU."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _depthwise(half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, out = x.chunk(2, 1)
        out = F.relu(self.bn1(self.conv1(out)), inplace=True)
        out = self.bn2(self.conv2(out))
        return kept, self.bn3(self.conv3(out))


class ShuffleNetV2(nn.Module):
    """Features: stem, 3 stages, pooled (1024). With `preact`, the halves of a stage's last unit before its ReLU and
    shuffle. All layers keep PyTorch's default initial values."""

    def __init__(self, num_classes: int = 100):
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.layer1, self.layer2, self.layer3 = map(self._stage, (_STEM, *_WIDTHS), _WIDTHS, _UNITS)
        self.conv2 = nn.Conv2d(_WIDTHS[-1], _LAST_WIDTH, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(_LAST_WIDTH)
        self.linear = nn.Linear(_LAST_WIDTH, num_classes)

    @staticmethod
    def _stage(in_width: int, width: int, basic_units: int) -> nn.ModuleList:
        return nn.ModuleList([DownUnit(in_width, width), *(BasicUnit(width) for _ in range(basic_units))])

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        """(N, 3, H, W) -> logits (N, K), or (features, logits) with `is_feat`."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        features = [x]
        for down, *basic in (self.layer1, self.layer2, self.layer3):
            x = down(x)
            for unit in basic:
                kept, out = unit(x)
                x = _interleave(kept, F.relu(out, inplace=not preact))
            features.append(torch.cat([kept, out], 1) if preact else x)
        x = global_pool(F.relu(self.bn2(self.conv2(x)), inplace=True))
        features.append(x)
        logits = self.linear(x)
        return (features, logits) if is_feat else logits
