"""MobileNetV2 (Sandler et al., CVPR 2018) of half width for CIFAR: stem stride 2, plain ReLU instead of ReLU6."""

from torch import Tensor, nn

from .common import global_pool, init_normal

# expansion, channels at full width, units, stride of the first unit
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_LAST_WIDTH = 1280


def _conv_bn_relu(in_width: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_width, width, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection: (N, C, H, W) -> (N, width, H/stride, W/stride)."""

    def __init__(self, in_width: int, width: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_width * expansion
        self.residual = stride == 1 and in_width == width
        self.conv = nn.Sequential(
            *_conv_bn_relu(in_width, hidden, 1),
            *_conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Features: stem, after stages 1, 2, 4 and 6, pooled (1280). No ReLU ends a stage, so `preact` changes nothing."""

    def __init__(self, num_classes: int = 100):
        super().__init__()
        width = 32 // 2
        self.conv1 = nn.Sequential(*_conv_bn_relu(3, width, 3, stride=2))
        self.blocks = nn.ModuleList()
        for expansion, channels, units, stride in _STAGES:
            in_width, width = width, channels // 2
            rest = [InvertedResidual(width, width, 1, expansion) for _ in range(units - 1)]
            self.blocks.append(nn.Sequential(InvertedResidual(in_width, width, stride, expansion), *rest))
        self.conv2 = nn.Sequential(*_conv_bn_relu(width, _LAST_WIDTH, 1))
        self.classifier = nn.Linear(_LAST_WIDTH, num_classes)
        init_normal(self, classifier_std=0.01)

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        """(N, 3, H, W) -> logits (N, K), or (features, logits) with `is_feat`."""
        x = self.conv1(x)
        features = [x]
        for i, stage in enumerate(self.blocks):
            x = stage(x)
            if i in (1, 2, 4, 6):
                features.append(x)
        x = global_pool(self.conv2(x))
        features.append(x)
        logits = self.classifier(x)
        return (features, logits) if is_feat else logits
