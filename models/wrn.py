"""Wide ResNets (Zagoruyko and Komodakis, BMVC 2016): depth 6n+4, pre-activation blocks, three stages."""

import torch.nn.functional as F
from torch import Tensor, nn

from .common import global_pool, init_normal


class PreactBlock(nn.Module):
    """BN, ReLU and convolution, twice, and a shortcut: (N, C, H, W) -> (N, width, H/stride, W/stride)."""

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.convShortcut = None
        if in_width != width:
            self.convShortcut = nn.Conv2d(in_width, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        out = F.relu(self.bn2(self.conv1(activated)), inplace=True)
        # Where the width changes, the shortcut too starts from the activated input.
        return self.conv2(out) + (x if self.convShortcut is None else self.convShortcut(activated))


class Stage(nn.Module):
    """Blocks under the published name `layer`; the first one carries the stride."""

    def __init__(self, in_width: int, width: int, blocks: int, stride: int):
        super().__init__()
        rest = [PreactBlock(width, width, 1) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(PreactBlock(in_width, width, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Features: stem, 3 stages, pooled. With `preact`, a stage's feature is the next BN's output, before its ReLU; in
    train mode that BN then counts the batch twice, as in the published code."""

    def __init__(self, depth: int, widen: int, num_classes: int = 100):
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = Stage(16, 16 * widen, blocks, stride=1)
        self.block2 = Stage(16 * widen, 32 * widen, blocks, stride=2)
        self.block3 = Stage(32 * widen, 64 * widen, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        init_normal(self)

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        """(N, 3, H, W) -> logits (N, K), or (features, logits) with `is_feat`."""
        x = self.conv1(x)
        features = [x]
        for stage in (self.block1, self.block2, self.block3):
            x = stage(x)
            features.append(x)
        if preact:
            next_bns = (self.block2.layer[0].bn1, self.block3.layer[0].bn1, self.bn1)
            features[1:] = [bn(feature) for bn, feature in zip(next_bns, features[1:], strict=True)]
        x = global_pool(F.relu(self.bn1(x), inplace=True))
        features.append(x)
        logits = self.fc(x)
        return (features, logits) if is_feat else logits
