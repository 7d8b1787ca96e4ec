"""ResNet50 with a stem for small images: 3x3, stride 1, no max-pool."""

import torch.nn.functional as F
from torch import Tensor, nn

from .common import global_pool, init_kaiming, run_stage


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions: (N, C, H, W) -> (N, 4*width, H/stride, W/stride),
    before the last ReLU."""

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        out_width = 4 * width
        self.conv1 = nn.Conv2d(in_width, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_width)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_width != out_width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_width, out_width, 1, stride, bias=False),
                nn.BatchNorm2d(out_width),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return self.bn3(self.conv3(out)) + self.shortcut(x)


class ResNet50(nn.Module):
    """Features: stem, 4 stages, pooled (2048)."""

    def __init__(self, num_classes: int = 100):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = self._stage(64, 64, blocks=3, stride=1)
        self.layer2 = self._stage(256, 128, blocks=4, stride=2)
        self.layer3 = self._stage(512, 256, blocks=6, stride=2)
        self.layer4 = self._stage(1024, 512, blocks=3, stride=2)
        self.linear = nn.Linear(2048, num_classes)
        init_kaiming(self)

    @staticmethod
    def _stage(in_width: int, width: int, blocks: int, stride: int) -> nn.ModuleList:
        rest = [Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)]
        return nn.ModuleList([Bottleneck(in_width, width, stride), *rest])

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        """(N, 3, H, W) -> logits (N, K), or (features, logits) with `is_feat`."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        features = [x]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x, feature = run_stage(stage, x, preact)
            features.append(feature)
        x = global_pool(x)
        features.append(x)
        logits = self.linear(x)
        return (features, logits) if is_feat else logits
