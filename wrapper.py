"""A backbone with a self-supervision head on top (Xu et al., ECCV 2020, section 3.1); the frozen teacher."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental import optimization


class Output(NamedTuple):
    logits: Tensor  # (N, C) of the backbone's classifier
    embedding: Tensor  # (N, D) of the SS head
    feature: Tensor  # (N, D) of the backbone, from which both are made


class Wrapper(nn.Module):
    """Gives a network of the zoo an SS head: a two-layer projection of its last feature.

    Args:
        backbone: a network that answers `backbone(x, is_feat=True)` with (features, logits) and whose last linear
            layer is its classifier.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        width = [module for module in backbone.modules() if isinstance(module, nn.Linear)][-1].in_features
        self.backbone = backbone
        self.proj_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width))

    def forward(self, x: Tensor, bb_grad: bool = True) -> Output:
        """(N, 3, 32, 32) → logits, embedding, feature.

        With `bb_grad=False` no graph is built for the backbone: the gradient of the embedding stops at the SS head.
        """
        with torch.set_grad_enabled(bb_grad and torch.is_grad_enabled()):
            features, logits = self.backbone(x, is_feat=True)
        return Output(logits, self.proj_head(features[-1]), features[-1])


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
    pre-activation blocks that read a sum, or a feature) stay. `backbone` itself is left as it is.
    """
    return optimization.fuse(_Asked(backbone, asked, preact).eval()).requires_grad_(False)


def fold_batch_norms(teacher: Wrapper) -> Wrapper:
    """The teacher as SSKD needs it: its backbone `frozen`, with the last feature only; the same SS head (no copy)."""
    folded = Wrapper(frozen(teacher.backbone, asked=slice(-1, None)))
    folded.proj_head = teacher.proj_head
    return folded.eval()
