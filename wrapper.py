"""A backbone with a self-supervision head on top (Xu et al., ECCV 2020, section 3.1); the frozen teacher."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental import optimization


class Output(NamedTuple):
    logits: Tensor  # (N, C) of the backbone's classifier
    embedding: Tensor  # (N, D) of the SS head
    feature: Tensor  # (N, D) of the backbone, from which both are made


def classifier(backbone: nn.Module) -> nn.Linear:
    """The layer that makes the logits of the last feature."""
    return [module for module in backbone.modules() if isinstance(module, nn.Linear)][-1]


def of_feature(classifier: nn.Linear, feature: Tensor) -> tuple[Tensor, Tensor]:
    """A stored last feature (N, D) in the precision of the network again, and the logits (N, C) made of it."""
    feature = feature.to(classifier.weight.dtype)
    return feature, classifier(feature)


class Wrapper(nn.Module):
    """Gives a network of the zoo an SS head: a two-layer projection of its last feature.

    Args:
        backbone: a network that answers `backbone(x, is_feat=True)` with (features, logits) and whose last linear
            layer is its classifier.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        width = classifier(backbone).in_features
        self.backbone = backbone
        self.proj_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width))
        self._classifier = (classifier(backbone),)  # in a tuple: it is a part of the backbone, not another one

    def forward(self, x: Tensor | None, bb_grad: bool = True, feature: Tensor | None = None) -> Output:
        """(N, 3, 32, 32) → logits, embedding, feature.

        With `bb_grad=False` no graph is built for the backbone: the gradient of the embedding stops at the SS head.
        Where a stored `feature` (N, D) says what the backbone sees, only its classifier runs and x may be None.
        """
        with torch.set_grad_enabled(bb_grad and torch.is_grad_enabled()):
            if feature is None:
                features, logits = self.backbone(x, is_feat=True)
                feature = features[-1]
            else:
                feature, logits = of_feature(*self._classifier, feature)
        return Output(logits, self.proj_head(feature), feature)


class _Asked(nn.Module):
    """A backbone that gives only the features that are asked for: a batch norm that reads one could not be folded."""

    def __init__(self, backbone: nn.Module, asked: slice, preact: bool):
        super().__init__()
        self.backbone, self.asked, self.preact = backbone, asked, preact

    def forward(self, x: Tensor, is_feat: bool = True) -> tuple[list[Tensor], Tensor]:
        features, logits = self.backbone(x, is_feat=True, preact=self.preact)
        return features[self.asked], logits


def frozen(backbone: nn.Module, asked: slice = slice(None), preact: bool = False) -> nn.Module:
    """A backbone for fast inference: images → the `asked` of its features (a list), logits; the same up to rounding.

    Each batch norm that alone reads a convolution's output becomes part of that convolution; the others (those of
    pre-activation blocks that read a sum, or a feature) stay. `backbone` itself is left as it is. One that torch.fx
    can't trace is used as it is, with a line that says so.
    """
    network = _Asked(backbone, asked, preact).eval()
    try:
        network = optimization.fuse(network)
    except Exception as error:  # whatever the network's own code raises when it meets a symbol for a tensor
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"frozen teacher: its batch norms stay, for torch.fx can't trace it ({reason:.100})", flush=True)
        network = copy.deepcopy(network)
    return network.requires_grad_(False)


class NetworkError(ValueError):
    """A network is not as a teacher or student has to be; the message says in what."""


@torch.no_grad()
def check_network(network: nn.Module, arch: str, classes: int, side: int) -> None:
    """Tries a network (CPU) on two images, since what it lacks would show only when it has become a teacher.

    Raises NetworkError where logits, features or classifier are not as `Wrapper` needs them; prints a line where
    torch.fx can't trace it. Leaves it in eval mode, otherwise as it was.
    """
    images = torch.linspace(-1, 1, 2 * 3 * side * side).view(2, 3, side, side)
    try:
        logits = network.eval()(images)
        features, same = network(images, is_feat=True, preact=False)
        width = features[-1].shape[1:]
    except Exception as error:  # whatever the network's own code raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NetworkError(f"{arch} fails on two images, with is_feat=True or without: {reason}") from error
    if logits.shape != (2, classes) or not torch.allclose(logits, same, rtol=1e-3, atol=1e-4):
        shapes = f"{tuple(logits.shape)}, {tuple(same.shape)}"
        raise NetworkError(f"{arch} gives for two images not twice the same logits (2, {classes}): {shapes}")
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear or width != (linear[-1].in_features,) or linear[-1].out_features != classes:
        raise NetworkError(f"{arch}: its last nn.Linear is no classifier of features[-1], {tuple(width)} an image")
    if not torch.allclose(linear[-1](features[-1]), logits, rtol=1e-3, atol=1e-4):
        raise NetworkError(f"{arch}: its logits are not what its last nn.Linear gives for features[-1]")
    frozen(network)


def fold_batch_norms(teacher: Wrapper) -> Wrapper:
    """The teacher as SSKD needs it: its backbone `frozen`, with the last feature only; the same SS head (no copy)."""
    folded = Wrapper(frozen(teacher.backbone, asked=slice(-1, None)))
    folded.proj_head = teacher.proj_head
    return folded.eval()
