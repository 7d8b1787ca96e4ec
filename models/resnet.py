"""ResNets for CIFAR (He et al., CVPR 2016): depth 6n+2, basic blocks, three stages."""

import torch.nn.functional as F
from torch import Tensor, nn

from .common import global_pool, init_kaiming, run_stage


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, C, H, W) -> (N, width, H/stride, W/stride), before the last ReLU."""

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        # Of fewer channels than a CPU's vectors have numbers, a 1x1 convolution with a stride takes its pixels
        # beforehand: in channels_last its gradient would be wrong, or end the process (oneDNN's issue 6035).
        self.taken = stride if in_width < 16 else 1
        self.downsample = None
        if stride != 1 or in_width != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_width, width, 1, stride // self.taken, bias=False),
                nn.BatchNorm2d(width),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.taken > 1:
            x = F.avg_pool2d(x, 1, self.taken)
        return out + (x if self.downsample is None else self.downsample(x))


class ResNet(nn.Module):
    """`widths`: channels of the stem and of the three stages. Features: stem, 3 stages, pooled."""

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int = 100):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = self._stage(widths[0], widths[1], blocks, stride=1)
        self.layer2 = self._stage(widths[1], widths[2], blocks, stride=2)
        self.layer3 = self._stage(widths[2], widths[3], blocks, stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        init_kaiming(self)

    @staticmethod
    def _stage(in_width: int, width: int, blocks: int, stride: int) -> nn.ModuleList:
        rest = [BasicBlock(width, width, 1) for _ in range(blocks - 1)]
        return nn.ModuleList([BasicBlock(in_width, width, stride), *rest])

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        """(N, 3, H, W) -> logits (N, K), or (features, logits) with `is_feat`."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        features = [x]
        for stage in (self.layer1, self.layer2, self.layer3):
            x, feature = run_stage(stage, x, preact)
            features.append(feature)
        x = global_pool(x)
        features.append(x)
        logits = self.fc(x)
        return (features, logits) if is_feat else logits
