"""A backbone with a self-supervision head on top (Xu et al., ECCV 2020, section 3.1)."""

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


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

    def forward(self, x: Tensor, bb_grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, 32, 32) → logits (N, C), embedding (N, D) of the SS head, feature (N, D) of the backbone.

        With `bb_grad=False` no graph is built for the backbone: gradients reach the head alone.
        """
        with torch.set_grad_enabled(bb_grad and torch.is_grad_enabled()):
            features, logits = self.backbone(x, is_feat=True)  # N x D, N x C
        feature = features[-1]
        return logits, self.proj_head(feature), feature


class _LastFeature(nn.Module):
    """What a Wrapper asks of a backbone, and no more: features that nothing reads would keep their batch norm."""

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
    traced = fx.symbolic_trace(_LastFeature(copy.deepcopy(teacher.backbone)).eval())
    graph, modules = traced.graph, dict(traced.named_modules())
    for node in graph.nodes:
        conv_node = node.args[0] if node.args else None
        if not isinstance(conv_node, fx.Node) or node.op != "call_module" or conv_node.op != "call_module":
            continue
        conv, norm = modules[conv_node.target], modules[node.target]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and len(conv_node.users) == 1:
            traced.set_submodule(conv_node.target, fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(conv_node)
            graph.erase_node(node)
    folded = Wrapper(fx.GraphModule(traced, graph))
    folded.backbone.requires_grad_(False)
    folded.proj_head = teacher.proj_head
    return folded.eval()
