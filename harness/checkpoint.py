"""Reads a network from a checkpoint of this repository, of the published SSKD, or of other repositories.

A checkpoint written here holds a dict "about" beside its weights: arch, dataset, classes (their number), names (of the
classes), side, mean and std (of the images it was trained on), tested (how many images measured its accuracy) and
held_out (the --val-fraction and --seed of its training, if images were held out). Checkpoints from elsewhere rarely say
what they are, so the names of the file and its folder count, too.
"""

import argparse
import contextlib
import datetime
import io
import math
import os
import pathlib
import pickle
import re
import textwrap
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from harness.fetch import local
from harness.files import kind_of
from harness.flags import UserError
from models import LIBRARIES, build, is_own, model_dict

_SUFFIXES = ("", ".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors")
_NOT_NETWORKS = ("last.pth", "ss_head_", "features_")  # what a run saves beside its networks
_COUNTS = ("total_ops", "total_params")
_KEYS = ("state_dict", "model_state_dict", "model", "net")  # where a checkpoint holds its weights
# Attributes that hold the network: in DataParallel, torch.compile, distillers, our Wrapper and Lightning.
_WRAPPERS = {"module", "_orig_mod", "student", "backbone", "model", "net"}
_SHORT = {"res50": "ResNet50", "mv2": "MobileNetV2", "shuv1": "ShuffleV1", "shuv2": "ShuffleV2"}  # mdistiller's names
_ABOUT = {"arch": str, "dataset": str, "classes": int, "names": list, "side": int, "mean": list, "std": list}
_ABOUT |= {"tested": int, "held_out": list}

# What stands beside the weights of healthy checkpoints and runs no code: flags (RepDistiller saves a Namespace), dates,
# paths, NumPy's scalars, arrays and random states. Modules of NumPy and pathlib have other names in other versions.
_SAFE = [argparse.Namespace, types.SimpleNamespace, set, np.ndarray, np.dtype]
_SAFE += [datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone]
_SAFE += {type(np.dtype(code)) for code in "?efdFDSUMm" + np.typecodes["AllInteger"]}
for _made in (np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]):  # scalar, _reconstruct
    _SAFE += [(_made, f"numpy.{core}.multiarray.{_made.__name__}") for core in ("core", "_core")]
for _name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
    _SAFE += [(pathlib.PurePath, f"{module}.{_name}") for module in ("pathlib", "pathlib._local")]


class Checkpoint(NamedTuple):
    """The content of a checkpoint file."""

    file: Path
    arch: str  # a name that `models.build` knows
    about: dict[str, Any]  # what the checkpoint says about itself; empty if it comes from elsewhere
    acc: float | None  # the test accuracy it reports: in percent, but some repositories save a fraction
    state: dict[str, Tensor]  # the weights, under the names in the file

    def network(self, num_classes: int | None = None, side: int | None = None) -> nn.Module:
        """The plain network (CPU, float32) with these weights; draws no random number.

        Args:
            num_classes: the number of classes; by default the checkpoint's, or 100 if it does not say.
            side: of the images, in pixels; by default the checkpoint's, or 32.

        Raises:
            UserError: the weights don't fit, or are not finite.
            NetworkError: as `models.build` says.
        """
        classes = self.about.get("classes", 100) if num_classes is None else num_classes
        with torch.random.fork_rng(devices=[]):
            network = build(self.arch, classes, side or self.about.get("side", 32))
        own, children = network.state_dict().keys(), dict(network.named_children())
        parameters = dict(network.named_parameters())
        weights = self._unwrapped(first=next(iter(own)))
        if self.arch == "MobileNetV2":  # RepDistiller's classifier is a Sequential
            weights = {name.replace("classifier.0.", "classifier."): tensor for name, tensor in weights.items()}
        # what thop counts, and what a loss has of its own
        foreign = [x for x in weights if x not in own and (x.endswith(_COUNTS) or x.split(".")[0] not in children)]
        weights = {name: tensor for name, tensor in weights.items() if name not in foreign}
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            misfit = textwrap.shorten(str(error).splitlines()[1], 200, placeholder=" …").rstrip(".")
            raise UserError(
                f"{self.file}: does not fit {self.arch} with {classes} classes: {misfit}; choose the network and the "
                f"data set that it was trained with (other repositories may call another network {self.arch})"
            ) from None
        if foreign:
            listed = textwrap.shorten(", ".join(foreign), 100, placeholder=" …")
            print(f"{self.file}: left out what is no part of {self.arch}: {listed}", flush=True)
        for name, tensor in network.state_dict().items():
            # a buffer may hold -inf on purpose, as a mask does
            if tensor.isnan().any() or (name in parameters and not tensor.isfinite().all()):
                raise UserError(f"{self.file}: '{name}' is not finite: the training diverged; give another checkpoint")
        return network

    def _unwrapped(self, first: str) -> dict[str, Tensor]:
        """The weights without the prefix that wrappers gave them, and without what lies beside the network.

        `first` is the name of the network's first tensor.
        """
        prefixes = [name.removesuffix(first) for name in self.state if name.endswith(first)]
        prefixes = [prefix for prefix in prefixes if set(prefix.split(".")) <= _WRAPPERS | {""}]
        prefix = min(prefixes, key=len, default="")
        if not all(other.startswith(prefix) for other in prefixes):  # a longer one may be the network's own attribute
            raise UserError(f"{self.file}: holds several networks, under {' and '.join(prefixes)}; save one of them")
        return {name.removeprefix(prefix): self.state[name] for name in self.state if name.startswith(prefix)}


def read(path: str | Path, arch: str | None = None) -> Checkpoint:
    """Reads the checkpoint at `path`, a file or a run folder; executes no code in it.

    The network's name is the one that the checkpoint gives, else `arch`, else the one in the name of the file or
    folder. Prints a line if two of them differ.

    Raises:
        UserError: there is no checkpoint, it is damaged or no network, or nothing names its network.
        OSError: the file can't be read.
    """
    file = find_checkpoint(path)
    content = state = _load(file)
    while inner := next((state[key] for key in _KEYS if isinstance(state.get(key), dict)), None):
        state = inner
    state = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not state:
        advice = "save a network's state_dict(), alone or as 'state_dict'"
        if file.name == "last.pth":
            advice = "a run resumes from it; give the run's folder"
        raise UserError(f"{file}: holds no state dict of a network: {advice}")
    about = content.get("about")
    about = about if isinstance(about, dict) else {}
    about = {key: value for key, value in about.items() if isinstance(value, _ABOUT.get(key, object))}
    arch = _choose_arch(file, about.get("arch", content.get("arch")), arch)
    return Checkpoint(file, arch, about, _reported_acc(content), state)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at `path`: the file itself; in a folder, the one with 'best' in its name, else the only one.

    A folder is searched before its `ckpt/`. The shortest name comes first, then the first in alphabetical order.
    An address or a library's weights are fetched first, see `harness.fetch`.

    Raises:
        UserError: there is none, or there are several and none is called best.
        OSError: the folder can't be read.
    """
    path = local(str(path), check=_load)
    if path.is_file():
        return path
    if not path.is_dir():
        arch = next(filter(None, map(_arch_in_name, reversed(path.parts))), "NETWORK")
        train = f"python teacher.py --arch {arch}"
        raise UserError(f"{path}: no such file or folder; give a run folder or a checkpoint file, or train it: {train}")
    found = []
    for folder in filter(Path.is_dir, (path, path / "ckpt")):
        files = [file for file in folder.iterdir() if file.suffix in _SUFFIXES and not file.name.startswith(".")]
        files = [file for file in files if file.is_file()]
        if best := [file for file in files if "best" in file.name.lower()]:
            return min(best, key=lambda file: (len(file.name), file.name))
        found += [file for file in files if file.suffix and not file.name.startswith(_NOT_NETWORKS)]
    if len(found) == 1:
        return found[0]
    others = f", but {len(found)} others" if found else ""
    raise UserError(f"{path}: found no checkpoint with 'best' in its name, here or in ckpt/{others}; give the file")


def run_folder_of(file: Path) -> Path:
    """The folder of the run that a checkpoint belongs to: its own folder, or the parent of its `ckpt/`."""
    folder = Path(os.path.abspath(file)).parent  # not resolve(), because the user chose the name of a link
    return folder.parent if folder.name == "ckpt" else folder


def teacher_name(file: Path) -> str:
    """The name that a teacher's checkpoint gives its students' folders: its run's folder.

    A folder of several checkpoints, which are not named after networks but for their files, needs the file's name, too.
    """
    folder = run_folder_of(file)
    own = file.parent.name == "ckpt" or _arch_in_name(folder.name)
    return folder.name if own else f"{folder.name}_{file.stem}"


def _load(file: Path) -> dict:
    """The content of a file that torch.save or safetensors wrote; empty if it is no dict."""
    data = file.read_bytes()
    if data[8:10] == b'{"':
        return _safetensors(file, data)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_SAFE):
            warnings.simplefilter("ignore")  # NumPy warns about scalars that an older NumPy saved
            # torch.load doesn't compare checksums; files from before PyTorch 1.6 are no archives and have none
            if data.startswith(b"PK") and zipfile.ZipFile(io.BytesIO(data)).testzip() is not None:
                raise zipfile.BadZipFile
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes fail in many ways
        refused = isinstance(error, pickle.UnpicklingError) and re.search(
            r"(?:GLOBAL |got <class ')([^\s']+)", str(error)
        )
        reason = "is not a PyTorch checkpoint, or is damaged or truncated; download or save it again"
        if kind := _kind_of_archive(data) or kind_of(data):
            reason = f"is {kind}; give a checkpoint, such as a run's folder"
        elif "Unsupported operand" in str(error):
            reason = "was saved with another pickle protocol, which can't be read safely; leave torch.save its own"
        elif refused:
            plainly = "save the state dict alone: torch.save(network.state_dict(), FILE)"
            reason = f"holds a Python object ({refused[1]}), which could run code; {plainly}"
        raise UserError(f"{file}: {reason}") from None
    return content if isinstance(content, dict) else {}


def _safetensors(file: Path, data: bytes) -> dict:
    try:
        import safetensors.torch  # an optional package
    except ImportError:
        raise UserError(f"{file}: to read this format, `pip install safetensors`") from None
    try:
        return safetensors.torch.load(data)
    except Exception:  # the package's own kind of error
        raise UserError(f"{file}: is damaged or truncated; download or save it again") from None


def _kind_of_archive(data: bytes) -> str | None:
    """What a zip archive holds, if it is no checkpoint."""
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        if any(name.endswith("models/model.json") for name in names):
            return "an exported network (.pt2)"
        if any("/code/" in name for name in names):
            return "a TorchScript program"
        if any(name.endswith(".npy") for name in names):
            return "an archive of NumPy arrays"
        if not any(name.endswith("data.pkl") for name in names):
            return "a zip archive: unpack it"
    return None


def _choose_arch(file: Path, told: object, arch: str | None) -> str:
    """The network's name: `told` by the checkpoint, else `arch`, else from the name of the file or folder."""
    known = ", ".join(model_dict)
    if arch is None and isinstance(told, str) and is_own(told):  # a file must not run code that its user does not name
        flags = f"--t-arch {told} (--s-arch beside --s-path, --arch in teacher.py)"
        raise UserError(f"{file}: its network is the class {told}, which runs only if you name it, too: give {flags}")
    folder = run_folder_of(file).name
    if file.name == "teacher.pth" and "_student_" in folder:  # a student's folder ends with its teacher's
        folder = re.sub(r".*?_seed\d+_", "", folder, count=1)
    words = {"the checkpoint says": told, "the flag says": arch}
    words["its name says"] = _arch_in_name(file.name) or _arch_in_name(folder)
    words = {says: word for says, word in words.items() if isinstance(word, str) and (word == arch or not is_own(word))}
    words = {says: word for says, word in words.items() if word in (*model_dict, arch) or word.startswith(LIBRARIES)}
    if not words:
        own = f"its key 'arch' says '{told}', which is unknown here" if told else "it has no key 'arch'"
        raise UserError(
            f"{file}: can't tell the network: {own}, neither the file nor the folder '{folder}' is named after one as "
            f"teacher_wrn_40_2_seed0 is, and no flag names it; give --t-arch (--s-arch beside --s-path, --arch in "
            f"teacher.py), one of: {known}"
        )
    chosen = next(iter(words.values()))
    if len(set(words.values())) > 1:
        print(f"{file}: {', '.join(f'{says} {word}' for says, word in words.items())}; using {chosen}", flush=True)
    return chosen


def _arch_in_name(name: str) -> str | None:
    """The network in the name of a file or folder.

    For example teacher_vgg13, resnet32x4_vanilla, crd_student_vgg8_weight0.1+…, cifar100_resnet56-f2eff4c8.pt
    (chenyaofo), and dkd,res32x4,res8x4 (mdistiller's method, teacher and student).
    """
    name = re.sub(r"^([a-z]+_student_|teacher_|cifar100?_)", "", name.rpartition(",")[2])
    name = _SHORT.get(name, re.sub(r"^res(?=\d)", "resnet", name))
    fitting = [arch for arch in model_dict if re.match(re.escape(arch) + r"(?![A-Za-z0-9])", name)]
    return max(fitting, key=len, default=None)


def _reported_acc(content: dict) -> float | None:
    for key in ("acc", "best_acc", "accuracy"):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # absent, or not a single number
            if math.isfinite(acc := float(content.get(key))):
                return acc
    return None
