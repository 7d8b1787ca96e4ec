"""Networks from elsewhere: `timm.NAME`, `torchvision.NAME`, and a class in a file of one's own, `FILE.py:CLASS`.

They answer like the zoo: `model(x)` with logits, `model(x, is_feat=True, preact=False)` with (features, logits), where
`features[-1]` is the input of the classifier, the last linear layer.
"""

import contextlib
import copy
import difflib
import functools
import importlib.util
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LIBRARIES = ("timm.", "torchvision.")  # how the names of their networks begin


class NetworkError(Exception):
    """A network is unknown or can't be used; the message says which and why."""


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns whatever the code of a network or a library raises into a NetworkError."""
    try:
        yield
    except Exception as error:
        raise NetworkError(f"{what}: {' '.join(str(error).split()) or type(error).__name__:.300}") from error


def check_name(name: str, zoo: Iterable[str]) -> None:
    """Raises NetworkError unless `name` is in the `zoo` or in a library, or names a class that can be imported."""
    if is_own(name):
        own_class(name)
        return
    known = list(zoo)
    others = f"; the known ones are {', '.join(known)}, timm.NAME, torchvision.NAME and, of your own, FILE.py:CLASS"
    if name.startswith("timm."):
        try:
            import timm  # an optional package
        except ImportError:
            raise NetworkError(f"{name} needs another package: `pip install timm`") from None
        known, others = [f"timm.{x}" for x in (*timm.list_models(), *timm.list_models(pretrained=True))], ""
    elif name.startswith("torchvision."):
        from torchvision import models

        known, others = [f"torchvision.{x}" for x in models.list_models(models)], ""
    if name not in known:
        like = difflib.get_close_matches(name, known, cutoff=0.7)
        hint = f"; did you mean {' or '.join(like)}?" if like else ""
        raise NetworkError(f"the network '{name}' is unknown{hint}{others}")


def build(name: str, num_classes: int, side: int, pretrained: bool) -> nn.Module:
    """A network from elsewhere, in train mode: see `models.build`."""
    with refusing(f"{name} can't be used here (images of {side} × {side} pixels)"):
        if is_own(name):
            network = own_class(name)(num_classes=num_classes)
            check_contract(network, num_classes, side)
        else:
            network = adapted(from_library(name, num_classes, side, pretrained), num_classes, side)
        return network.train()


def trial_images(side: int) -> Tensor:
    """Two images (2, 3, side, side), in the memory layout of training, in which some networks fail."""
    return (
        torch.linspace(-1, 1, 2 * 3 * side * side).view(2, 3, side, side).contiguous(memory_format=torch.channels_last)
    )


@torch.no_grad()
def check_contract(network: nn.Module, classes: int, side: int) -> None:
    """Tries a network (CPU) on two images. Leaves it in eval mode, otherwise as it was.

    Raises:
        ValueError: logits, features or classifier are not as described above. Or whatever the network raises.
    """
    logits = network.eval()(images := trial_images(side))
    features, same = network(images, is_feat=True, preact=False)
    width = features[-1].shape[1:]
    if logits.shape != (2, classes) or not torch.allclose(logits, same, rtol=1e-3, atol=1e-4):
        shapes = f"{tuple(logits.shape)}, {tuple(same.shape)}"
        raise ValueError(f"logits with and without is_feat=True should both be (2, {classes}): {shapes}")
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear or width != (linear[-1].in_features,) or linear[-1].out_features != classes:
        raise ValueError(f"its last nn.Linear is no classifier of features[-1], {tuple(width)} per image")
    if not torch.allclose(linear[-1](features[-1]), logits, rtol=1e-3, atol=1e-4):
        raise ValueError("its logits are not what its last nn.Linear gives for features[-1]")


def from_library(name: str, num_classes: int, side: int, pretrained: bool) -> nn.Module:
    """The library's own network for images of `side` pixels; torchvision's keeps its own number of classes."""
    library, _, short = name.partition(".")
    if library == "timm":
        import timm

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # offline, `refusing` says enough
        sized = {"img_size": side} if has_fixed_side(name) else {}
        return timm.create_model(short, pretrained=pretrained, num_classes=num_classes, **sized)
    from torchvision.models import get_model

    sized = {"image_size": side} if has_fixed_side(name) else {}
    return get_model(short, weights="DEFAULT" if pretrained else None, **sized)


def has_fixed_side(name: str) -> bool:
    """Whether the shapes of a library's weights depend on the side of the images."""
    if name.startswith("torchvision."):
        return name.startswith("torchvision.vit_")
    import timm

    return timm.models.get_pretrained_cfg(name.removeprefix("timm.")).fixed_input_size


def weights_of(name: str) -> dict[str, Any]:
    """What the library's weights were trained on: classes (their number), side, mean and std of the images."""
    library, _, short = name.partition(".")
    if library == "timm":
        import timm

        found = timm.models.get_pretrained_cfg(short)
        about = {"classes": found.num_classes, "side": found.input_size[-1]}
        return about | {"mean": list(found.mean), "std": list(found.std)}
    from torchvision.models import get_model_weights

    found = get_model_weights(short).DEFAULT
    images, classes = found.transforms(), len(found.meta["categories"])
    return {"classes": classes, "side": images.crop_size[0], "mean": images.mean, "std": images.std}


class Foreign(nn.Module):
    """A library's network that answers like the zoo: its features are its last map, if it has one, and its last vector.

    Args:
        body: the network, images → logits. Its last linear layer becomes the `classifier` beside it.
    """

    def __init__(self, body: nn.Module):
        super().__init__()
        path, linear = [(path, layer) for path, layer in body.named_modules() if isinstance(layer, nn.Linear)][-1]
        body.set_submodule(path, nn.Identity())
        for conv in body.modules():
            if type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) != conv.stride and conv.in_channels < 16:
                conv.__class__ = _Strided
        if isinstance(getattr(body, "avgpool", None), nn.Module):  # torchvision
            body.avgpool = _Noting(body.avgpool)
        self.body, self.classifier, self.has_map = body, linear, True

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        if hasattr(self.body, "forward_head"):  # timm
            last = self.body.forward_features(x)
            feature = self.body.forward_head(last)
        else:
            feature = self.body(x)
            last = self.body.avgpool.seen.pop() if hasattr(self.body, "avgpool") else feature
        logits = self.classifier(feature)
        if not is_feat:
            return logits
        return [last, feature] if self.has_map else [feature], logits


class _Strided(nn.Conv2d):
    """A 1×1 convolution that subsamples first: see models/resnet.py (oneDNN's issue 6035)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride[0], :: self.stride[1]]
        return nn.functional.conv2d(x, self.weight, self.bias, 1, self.padding, 1, self.groups)


class _Noting(nn.Module):
    """A pooling layer that notes its input, the last map."""

    def __init__(self, pool: nn.Module):
        super().__init__()
        self.pool, self.seen = pool, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.pool(x)


@torch.no_grad()
def adapted(body: nn.Module, num_classes: int, side: int) -> Foreign:
    """A library's network as `Foreign`, with a new classifier if the number of classes differs.

    Raises:
        ValueError: its classifier is not one linear layer. Or whatever the library's network raises.
    """
    images = trial_images(side)
    with torch.random.fork_rng(devices=[]):  # this trial draws no random number
        expected, fits = body.eval()(images), False
        with contextlib.suppress(Exception):
            network = Foreign(body).eval()
            (last, *_), logits = network(images, is_feat=True)
            network.has_map = last.dim() == 4 and getattr(body, "output_fmt", "NCHW") == "NCHW"
            trained = copy.deepcopy(network).train()(images)  # some answer with several logits then
            fits = trained.shape == logits.shape and torch.allclose(logits, expected, rtol=1e-3, atol=1e-4)
    if not fits:
        raise ValueError("its classifier is not one linear layer behind one vector an image; choose another network")
    if network.classifier.out_features != num_classes:
        network.classifier = nn.Linear(network.classifier.in_features, num_classes)
    return network


def is_own(name: str) -> bool:
    """Whether a name means a class in a file of one's own."""
    return ".py:" in name


@functools.cache
def own_class(name: str) -> type[nn.Module]:
    """The class that `FILE.py:CLASS` means; runs the file."""
    file, _, attribute = name.rpartition(":")
    path = Path(file).resolve()
    with refusing(name):
        if path.suffix != ".py":
            raise ValueError("a network of your own is FILE.py:CLASS")
        spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        sys.path.append(str(path.parent))  # it may import what lies beside it
        spec.loader.exec_module(module)
        return getattr(module, attribute)
