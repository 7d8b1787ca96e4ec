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


class _LastFeature(nn.Module):
    """A backbone that gives its last feature alone: a batch norm whose output is a feature could not be folded."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor, is_feat: bool = True) -> tuple[list[Tensor], Tensor]:
        features, logits = self.backbone(x, is_feat=True)
        return features[-1:], logits


def fold_batch_norms(teacher: Wrapper) -> Wrapper:
    """The frozen teacher for fast inference: the same outputs up to rounding, and the same SS head (not a copy).

    Each batch norm that alone reads a convolution's output becomes part of that convolution; the others (those of
    pre-activation blocks that read a sum) stay. Only the last feature is kept. `teacher` itself is left as it is.
    """
    folded = Wrapper(optimization.fuse(_LastFeature(teacher.backbone).eval()))
    folded.backbone.requires_grad_(False)
    folded.proj_head = teacher.proj_head
    return folded.eval()
