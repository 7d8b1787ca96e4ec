"""ShuffleNetV1 (Zhang et al., CVPR 2018) with 3 groups for CIFAR: 1x1 stem, depthwise convolutions with ReLU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import channel_shuffle, global_pool, run_stage

_STEM, _WIDTHS, _UNITS, _GROUPS = 24, (240, 480, 960), (4, 8, 4), 3


class Unit(nn.Module):
    """Grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1: (N, C, H, W) -> (N, width, H/stride, W/stride),
    before the last ReLU. With stride 2 the pooled input makes up C of the output's channels."""

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        out_width = width - in_width if stride == 2 else width
        hidden = out_width // 4
        self.groups = 1 if in_width == _STEM else _GROUPS  # the stem is too narrow to be split
        self.conv1 = nn.Conv2d(in_width, hidden, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, out_width, 1, groups=_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(out_width)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.groups > 1:
            out = channel_shuffle(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], 1)
        return out + x


class ShuffleNetV1(nn.Module):
    """Features: stem, 3 stages, pooled (960). All layers keep PyTorch's default initial values."""

    def __init__(self, num_classes: int = 100):
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.layer1, self.layer2, self.layer3 = map(self._stage, (_STEM, *_WIDTHS), _WIDTHS, _UNITS)
        self.linear = nn.Linear(_WIDTHS[-1], num_classes)

    @staticmethod
    def _stage(in_width: int, width: int, units: int) -> nn.ModuleList:
        return nn.ModuleList([Unit(in_width, width, 2), *(Unit(width, width, 1) for _ in range(units - 1))])

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        """(N, 3, H, W) -> logits (N, K), or (features, logits) with `is_feat`."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        features = [x]
        for stage in (self.layer1, self.layer2, self.layer3):
            x, feature = run_stage(stage, x, preact)
            features.append(feature)
        x = global_pool(x)
        features.append(x)
        logits = self.linear(x)
        return (features, logits) if is_feat else logits
