"""VGG with batch normalisation (Simonyan and Zisserman, ICLR 2015), global average pool and one linear classifier."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import global_pool, init_normal

_CONVS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_WIDTHS = (64, 128, 256, 512, 512)


@torch.fx.wrap  # the tracer cannot follow a branch on a size, so it calls this as one function
def _pool_of_large(x: Tensor, height: int) -> Tensor:
    """The fourth max-pool, which only images of 64 pixels meet."""
    return F.max_pool2d(x, 2) if height == 64 else x


def _block(in_width: int, width: int, convs: int) -> nn.Sequential:
    """Convolution, BN, ReLU, ... without the last ReLU, which the model applies."""
    layers: list[nn.Module] = []
    for i in range(convs):
        conv = nn.Conv2d(in_width if i == 0 else width, width, 3, padding=1)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class VGG(nn.Module):
    """Features: 5 blocks, pooled; with `preact`, blocks 1 to 4 before their last ReLU."""

    def __init__(self, depth: int, num_classes: int = 100):
        super().__init__()
        self.block0, self.block1, self.block2, self.block3, self.block4 = map(
            _block, (3, *_WIDTHS), _WIDTHS, _CONVS[depth]
        )
        self.classifier = nn.Linear(_WIDTHS[-1], num_classes)
        init_normal(self, classifier_std=0.01)

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        """(N, 3, H, W) -> logits (N, K), or (features, logits) with `is_feat`."""
        height = x.shape[2]
        x = F.relu(self.block0(x), inplace=True)
        features = [x]
        for block in (self.block1, self.block2, self.block3, self.block4):
            x = _pool_of_large(x, height) if block is self.block4 else F.max_pool2d(x, 2)
            before = block(x)
            x = F.relu(before, inplace=not preact)
            features.append(before if preact else x)
        x = global_pool(x)
        features.append(x)
        logits = self.classifier(x)
        return (features, logits) if is_feat else logits
