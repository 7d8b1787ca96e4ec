"""The model zoo: 25 networks for 3x32x32 images, with the names, initial values and outputs of the published code.

    from models import build, load, model_dict

    model = model_dict["wrn_40_2"](num_classes=100)
    logits = model(x)                                 # (N, 3, 32, 32) -> (N, 100)
    features, logits = model(x, is_feat=True)         # features[-1]: (N, D), the classifier's input
    features, logits = model(x, is_feat=True, preact=True)  # features before the last ReLU of their stage
    teacher = load("experiments/teacher_wrn_40_2_seed0")
    model = build("timm.resnet18", num_classes=100)   # one of the zoo, timm.NAME, torchvision.NAME or FILE.py:CLASS

All keep channels_last if given it, and can be traced by torch.fx and torch.compile.
"""

from functools import partial
from pathlib import Path

from torch import nn

from . import foreign
from .foreign import LIBRARIES, NetworkError, check_name, has_fixed_side, is_own, weights_of
from .mobilenetv2 import MobileNetV2
from .resnet import ResNet
from .resnet50 import ResNet50
from .shufflenetv1 import ShuffleNetV1
from .shufflenetv2 import ShuffleNetV2
from .vgg import VGG
from .wrn import WideResNet

__all__ = ["LIBRARIES", "NetworkError", "build", "check_name", "folder_name", "is_own", "load", "model_dict"]
__all__ += ["has_fixed_side", "weights_of"]

_X1, _X4, _X05, _X0375 = (16, 16, 32, 64), (32, 64, 128, 256), (8, 8, 16, 32), (6, 6, 12, 24)

model_dict = {
    "resnet8": partial(ResNet, 8, _X1),
    "resnet14": partial(ResNet, 14, _X1),
    "resnet20": partial(ResNet, 20, _X1),
    "resnet32": partial(ResNet, 32, _X1),
    "resnet44": partial(ResNet, 44, _X1),
    "resnet56": partial(ResNet, 56, _X1),
    "resnet110": partial(ResNet, 110, _X1),
    "resnet8x4": partial(ResNet, 8, _X4),
    "resnet32x4": partial(ResNet, 32, _X4),
    "resnet14x05": partial(ResNet, 14, _X05),
    "resnet20x05": partial(ResNet, 20, _X05),
    "resnet20x0375": partial(ResNet, 20, _X0375),
    "ResNet50": ResNet50,
    "wrn_16_1": partial(WideResNet, 16, 1),
    "wrn_16_2": partial(WideResNet, 16, 2),
    "wrn_40_1": partial(WideResNet, 40, 1),
    "wrn_40_2": partial(WideResNet, 40, 2),
    "vgg8": partial(VGG, 8),
    "vgg11": partial(VGG, 11),
    "vgg13": partial(VGG, 13),
    "vgg16": partial(VGG, 16),
    "vgg19": partial(VGG, 19),
    "MobileNetV2": MobileNetV2,
    "ShuffleV1": ShuffleNetV1,
    "ShuffleV2": ShuffleNetV2,
}


def build(name: str, num_classes: int = 100, side: int = 32, pretrained: bool = False) -> nn.Module:
    """A new network for images of `side` pixels: of the zoo, or timm.NAME, torchvision.NAME, FILE.py:CLASS.

    With `pretrained` it has the library's weights, but for the classifier if the number of classes is another one.

    Raises:
        NetworkError: the name is unknown, the network doesn't fit, or its weights can't be had.
    """
    if name in model_dict:
        return model_dict[name](num_classes=num_classes)
    check_name(name, model_dict)
    return foreign.build(name, num_classes, side, pretrained)


def folder_name(name: str) -> str:
    """A network's name as a part of a folder's: dir/mine.py:Net is mine.Net there."""
    return name.rpartition("/")[2].replace(".py:", ".")


def load(path: str | Path, arch: str | None = None, num_classes: int | None = None) -> nn.Module:
    """The plain network (CPU, float32) with the weights at `path`, a run folder or a checkpoint file.

    `harness.checkpoint.read` tells what else the checkpoint holds, and what is raised.
    """
    from harness.checkpoint import read  # here, because harness needs `model_dict`

    return read(path, arch).network(num_classes)
