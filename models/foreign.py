"""Networks from elsewhere: `timm.NAME`, `torchvision.NAME`, or a class in a file of one's own, `FILE.py:CLASS`.

They answer like the zoo: `model(x)` with logits, `model(x, is_feat=True, preact=False)` with (features, logits), where
`features[-1]` is the classifier's input. This module is imported only for a name that `model_dict` lacks.
"""

import contextlib
import copy
import difflib
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from harness.flags import UserError
from models import LIBRARIES, is_own
from models.contract import check_contract


def check_name(name: str, zoo: Iterable[str]) -> None:
    """Raises UserError, with the names most like it, unless `name` is one of a library, or a class that can be read."""
    if is_own(name):
        own_class(name)
        return
    known = names_like(name) or list(zoo)
    if name in known:
        return
    by_lower = {word.lower(): word for word in known}
    like = [by_lower[word] for word in difflib.get_close_matches(name.lower(), by_lower, cutoff=0.7)]
    hint = f"; did you mean {' or '.join(like)}?" if like else ""
    others = f"; the known ones are {', '.join(zoo)}, timm.NAME, torchvision.NAME and, of your own, FILE.py:CLASS"
    raise UserError(f"the network '{name}' is unknown{hint}{'' if name.startswith(LIBRARIES) else others}")


def names_like(name: str) -> list[str]:
    """The names of all classifiers of the library that `name` begins with; timm's also with the tags of weights."""
    if name.startswith("torchvision."):
        return [f"torchvision.{x}" for x in torchvision.models.list_models(torchvision.models)]
    if not name.startswith("timm."):
        return []
    try:
        import timm  # an optional package
    except ImportError:
        raise UserError(f"{name} needs another package: `pip install timm`") from None
    return [f"timm.{x}" for x in (*timm.list_models(), *timm.list_models(pretrained=True))]


def name_in(text: str) -> str | None:
    """The longest name of a library's network that `text` begins with, up to a dot, an underscore or its end."""
    with contextlib.suppress(UserError):
        known = set(names_like(text))
        return next(
            (text[: end.start()] for end in [*re.finditer(r"[._]|$", text)][::-1] if text[: end.start()] in known), None
        )
    return None


def build(name: str, num_classes: int, side: int, pretrained: bool) -> nn.Module:
    """The network of this name (see `check_name`) in train mode, for images of `side` pixels.

    Raises:
        UserError: it fails, or its logits are not what its last linear layer gives for one vector an image.
    """
    library, _, short = name.partition(".")
    with refusing(f"{name} can't be used here (images of {side} × {side} pixels)"):
        if is_own(name):
            network = own_class(name)(num_classes=num_classes)
            check_contract(network, name, num_classes, side)
            return network.train()
        return adapted(from_library(library, short, num_classes, side, pretrained), num_classes, side)


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns what the code of a network or library raises into one line."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {' '.join(str(error).split()) or type(error).__name__:.300}") from error


# ----------------------------------------------------------------------------------------------------------- libraries


def from_library(library: str, name: str, num_classes: int, side: int, pretrained: bool) -> nn.Module:
    """The library's own network, whose last linear layer gives `num_classes` logits."""
    if library == "timm":
        import timm

        fixed = timm.models.get_pretrained_cfg(name).fixed_input_size
        sized = {"img_size": side} if fixed else {}
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **sized)
    sized = {"image_size": side} if name.startswith("vit_") else {}
    if not pretrained:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **sized)
    body = torchvision.models.get_model(name, weights="DEFAULT", **sized)
    path, linear = last_linear(body)
    if linear.out_features != num_classes:
        body.set_submodule(path, nn.Linear(linear.in_features, num_classes))
    return body


def weights_of(name: str) -> dict[str, Any]:
    """What a library's weights for a network were trained on: classes (their number), side, mean and std of the images.

    Raises:
        UserError: it has none, or the name is unknown.
    """
    check_name(name, [])
    library, _, short = name.partition(".")
    if library == "timm":
        import timm

        if not (weights := timm.models.get_pretrained_cfg(short)).has_weights:
            raise UserError(f"{name}: timm has no weights for this network")
        classes, side, mean, std = weights.num_classes, weights.input_size[-1], weights.mean, weights.std
    else:
        weights = torchvision.models.get_model_weights(short).DEFAULT  # each of its networks has some
        images = weights.transforms()
        classes, side, mean, std = len(weights.meta["categories"]), images.crop_size[0], images.mean, images.std
    return {"classes": classes, "side": side, "mean": list(mean), "std": list(std)}


def last_linear(network: nn.Module) -> tuple[str, nn.Linear]:
    """The last linear layer of a network, and its name there."""
    return [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]


class Foreign(nn.Module):
    """A library's network, answering like the zoo: its features are its last map, if it has one, and the pooled vector.

    Args:
        body: the network, images → logits. The last of its linear layers becomes the `classifier` beside it, and the
            identity takes its place.
    """

    def __init__(self, body: nn.Module):
        super().__init__()
        path, linear = last_linear(body)
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
            last = self.body.avgpool.take() if hasattr(self.body, "avgpool") else feature
        logits = self.classifier(feature)
        if not is_feat:
            return logits
        return [last, feature] if self.has_map else [feature], logits


class _Strided(nn.Conv2d):
    """A 1×1 convolution that takes its pixels beforehand: see models/resnet.py (oneDNN's issue 6035)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride[0], :: self.stride[1]]
        return nn.functional.conv2d(x, self.weight, self.bias, 1, self.padding, 1, self.groups)


class _Noting(nn.Module):
    """A pooling layer that hands out its input, the last map."""

    def __init__(self, pool: nn.Module):
        super().__init__()
        self.pool, self.seen = pool, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [x]
        return self.pool(x)

    def take(self) -> Tensor:
        (x,), self.seen = self.seen, []
        return x


@torch.no_grad()
def adapted(body: nn.Module, num_classes: int, side: int) -> Foreign:
    """A library's network as `Foreign`, after a trial on two images; draws no random number.

    Raises:
        ValueError: it is no single linear layer on one vector an image. Or whatever else the network raises.
    """
    images = torch.linspace(-1, 1, 2 * 3 * side * side).view(2, 3, side, side)
    with torch.random.fork_rng(devices=[]):
        expected, fits = body.eval()(images), False
        with contextlib.suppress(Exception):
            network = Foreign(body).eval()
            (last, *_), logits = network(images, is_feat=True)
            network.has_map = last.dim() == 4 and getattr(body, "output_fmt", "NCHW") == "NCHW"
            trained = copy.deepcopy(network).train()(images)  # some answer with several logits then
            fits = trained.shape == (2, num_classes) and torch.allclose(logits, expected, rtol=1e-3, atol=1e-4)
    if not fits:
        raise ValueError("its classifier is not one linear layer, behind one vector an image; choose another network")
    return network.train()


# ------------------------------------------------------------------------------------------------- a file of one's own


def own_class(name: str) -> Callable[..., nn.Module]:
    """The class that `FILE.py:CLASS` means; runs the file once."""
    file, _, attribute = name.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise UserError(f"{name}: there is no file {file}; a network of your own is FILE.py:CLASS")
    with refusing(f"{name}: {file} can't be imported"):
        module = _module(path)
    if not callable(getattr(module, attribute, None)):
        raise UserError(f"{name}: {file} has no class {attribute}")
    return getattr(module, attribute)


@functools.cache
def _module(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.parent))  # it may import what lies beside it
    spec.loader.exec_module(module)
    return module
