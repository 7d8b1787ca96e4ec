"""A backbone with a self-supervision head on top (Xu et al., ECCV 2020, section 3.1); the frozen teacher."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental import optimization

from models.foreign import check_contract, refusing


class Output(NamedTuple):
    logits: Tensor  # (N, C) of the backbone's classifier
    embedding: Tensor  # (N, D) of the SS head
    feature: Tensor  # (N, D) of the backbone: the input of classifier and SS head


def classifier(backbone: nn.Module) -> nn.Linear:
    """The last linear layer of a network: it turns the last feature into logits."""
    return [module for module in backbone.modules() if isinstance(module, nn.Linear)][-1]


def of_feature(classifier: nn.Linear, feature: Tensor) -> tuple[Tensor, Tensor]:
    """A stored float16 feature (N, D) → the same in the network's precision, and its logits (N, C)."""
    feature = feature.to(classifier.weight.dtype)
    return feature, classifier(feature)


class Wrapper(nn.Module):
    """A network with an SS head: a two-layer projection of its last feature.

    Args:
        backbone: a network that answers `backbone(x, is_feat=True)` with (features, logits) and whose last linear
            layer is its classifier.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        width = classifier(backbone).in_features
        self.backbone = backbone
        self.proj_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width))
        self._classifier = (classifier(backbone),)  # in a tuple, so that its weights are not listed twice

    def forward(self, x: Tensor | None, bb_grad: bool = True, feature: Tensor | None = None) -> Output:
        """(N, 3, 32, 32) → logits, embedding, feature.

        With `bb_grad=False` the backbone builds no graph: the gradient of the embedding stops at the SS head. With a
        stored `feature` (N, D) only the classifier and the SS head run, and x may be None.
        """
        with torch.set_grad_enabled(bb_grad and torch.is_grad_enabled()):
            if feature is None:
                features, logits = self.backbone(x, is_feat=True)
                feature = features[-1]
            else:
                feature, logits = of_feature(*self._classifier, feature)
        return Output(logits, self.proj_head(feature), feature)

    def unfolded_state(self, backbone: nn.Module) -> dict[str, Tensor]:
        """The state dict of a teacher with its plain `backbone`, as it was before `frozen` folded its batch norms."""
        state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
        return state | {f"proj_head.{name}": value for name, value in self.proj_head.state_dict().items()}


class _Answer(nn.Module):
    """A backbone that always answers with (features, logits): all features, or only the last one without `maps`."""

    def __init__(self, backbone: nn.Module, maps: bool, preact: bool):
        super().__init__()
        self.backbone, self.first, self.preact = backbone, 0 if maps else -1, preact

    def forward(self, x: Tensor, is_feat: bool = True) -> tuple[list[Tensor], Tensor]:
        features, logits = self.backbone(x, is_feat=True, preact=self.preact)
        return features[self.first :], logits


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Also keeps a linear layer of a class of one's own as a module, so that `classifier` finds it."""
        return isinstance(module, nn.Linear) or super().is_leaf_module(module, name)


def frozen(backbone: nn.Module, maps: bool = True, preact: bool = False) -> nn.Module:
    """A copy of a backbone for fast inference: images → (features, logits), equal up to rounding.

    A batch norm that follows a convolution becomes part of it, but not if the convolution's output is also a returned
    feature; without `maps` fewer are returned, so more are folded. A backbone that torch.fx can't trace, that uses a
    layer twice or has hooks stays as it is, and a line says so.
    """
    network = _Answer(backbone, maps, preact).eval()
    try:
        traced = fx.GraphModule(network, _Tracer().trace(network))
        layers = [traced.get_submodule(node.target) for node in traced.graph.nodes if node.op == "call_module"]
        layers = [layer for layer in layers if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
        if len(set(layers)) < len(layers):
            raise ValueError("it uses a layer twice")
        if any(layer._forward_hooks or layer._forward_pre_hooks for layer in backbone.modules()):
            raise ValueError("it has hooks")
        network = optimization.fuse(traced, no_trace=True)
    except Exception as error:  # the network's own code meets a symbol in place of a tensor
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"frozen teacher: its batch norms can't be folded into its convolutions ({reason:.100})", flush=True)
        network = copy.deepcopy(network)
    return network.requires_grad_(False)


@torch.no_grad()
def check_network(network: nn.Module, arch: str, classes: int, side: int) -> None:
    """Tries a network (CPU) on two images before it is trained, because a student would need more than its logits.

    Leaves it in eval mode, otherwise as it was.

    Raises:
        NetworkError: logits, features or classifier are not as `Wrapper` needs them.
    """
    with refusing(f"{arch} fails on two images, with is_feat=True or without"):
        check_contract(network, classes, side)
        frozen(network)(torch.zeros(2, 3, side, side))  # as a teacher it has to run without gradients, too
