"""Read a backbone from any known checkpoint: this repository's, the published SSKD's, those of other repositories.

A checkpoint written here says of itself what it is: beside its weights lies a dict "about" with the network (arch), the
data set, the number of classes, the side of the images, the mean and the deviation that they were normalised by, and
how many images its accuracy was tested on. Foreign ones say little, so names of files and folders are read, too.
"""

import argparse
import io
import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import models  # for model_dict, which does not exist yet while this module is imported

_SUFFIXES = ("", ".pth", ".pt", ".tar", ".ckpt", ".bin")
_KEYS = ("state_dict", "model_state_dict", "model", "net")  # where the weights lie
# what a network is kept in: DataParallel, compile, distillers, Lightning, our Wrapper
_WRAPPERS = ("module", "_orig_mod", "student", "backbone", "model", "net")
_NOT_NETWORKS = ("last.pth", "ss_head_", "features_")  # what a run keeps beside its networks
_SHORT = {"res50": "ResNet50", "mv2": "MobileNetV2", "shuv1": "ShuffleV1", "shuv2": "ShuffleV2"}  # mdistiller's
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class CheckpointError(ValueError):
    """One printable line that names the file and says what to do; what is not printable is escaped.

    The names in a checkpoint are anybody's text: they may hold line ends, terminal codes and lone surrogates.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class Checkpoint(NamedTuple):
    """What a checkpoint file holds."""

    file: Path
    arch: str
    about: dict[str, Any]  # of arch, dataset, classes, side, mean, std, tested what it says of itself
    acc: float | None  # the test accuracy that it reports, in percent (in some repositories a share)
    state: dict[str, Tensor]  # under the names in the file

    def network(self, num_classes: int | None = None) -> nn.Module:
        """The plain backbone (CPU, float32) with these weights.

        The number of classes is the checkpoint's, if it says so, else 100. Raises CheckpointError where the weights do
        not fit. Draws no random number, so what is seeded before goes on as if nothing had been loaded.
        """
        classes = self.about.get("classes", 100) if num_classes is None else num_classes
        with torch.random.fork_rng(devices=[]):  # the checkpoint replaces the initial values
            model = models.model_dict[self.arch](num_classes=classes)
        expected = model.state_dict()
        counters = {name: torch.tensor(0) for name in expected if name.endswith("num_batches_tracked")}
        found = _backbone_state(self.file, self.state, expected.keys() - counters)
        state = counters | found  # old checkpoints lack them
        if fault := next(_misfits(expected, state), None):
            hint = _hint(self.arch, expected, found)
            raise CheckpointError(f"{self.file}: does not fit {self.arch} with {classes} classes: {fault}; {hint}")
        if fault := next(_bad_values(expected, state), None):
            raise CheckpointError(f"{self.file}: {fault}")
        model.load_state_dict(state)
        return model

    def exported(self, about: dict[str, Any], file: str) -> bytes:
        """The network for a file of this name, see `models.exported`.

        `about` tells of its data set what the checkpoint does not.
        """
        about = about | self.about
        onnx = Path(file).suffix == ".onnx"
        return models.exported(self.network(about["classes"]), about["mean"], about["std"], about["side"], onnx)


def read(path: str | Path, arch: str | None = None) -> Checkpoint:
    """The checkpoint at `path`, a file or a run folder; `arch` as in `find_arch`.

    Raises CheckpointError where something is missing, cannot be read or is damaged.
    """
    file = find_checkpoint(path)
    content = _read(file)
    state = _state_dict(file, content)
    return Checkpoint(file, find_arch(file, arch, content), _about(content), _reported_acc(content), state)


def load(path: str | Path, arch: str | None = None, num_classes: int | None = None) -> nn.Module:
    """The plain backbone (CPU, float32) with the weights at `path`: `read(path, arch).network(num_classes)`."""
    return read(path, arch).network(num_classes)


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a file; of a folder, the checkpoint with `best` in its name, else the only one.

    The folder comes before its `ckpt/`; of several in one place the shortest name is taken, then the first in order.
    Raises CheckpointError where there is none, or the folder cannot be read.
    """
    path = Path(path)
    with _reading(path):
        if path.is_file():
            return path
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such file or folder; give a run folder or a checkpoint file")
        found = []
        for folder in filter(Path.is_dir, (path, path / "ckpt")):
            files = [file for file in folder.iterdir() if file.is_file() and file.suffix in _SUFFIXES]
            best = [file for file in files if "best" in file.name.lower()]
            if best:
                return min(best, key=lambda file: (len(file.name), file.name))
            found += [file for file in files if file.suffix and not file.name.startswith(_NOT_NETWORKS)]
    if len(found) == 1:
        return found[0]
    many = f", but {len(found)} others" if found else ""
    raise CheckpointError(
        f"{path}: found no checkpoint with 'best' in its name, neither there nor in its ckpt/{many}; give the file"
    )


def find_arch(path: str | Path, arch: str | None = None, checkpoint: object = None) -> str:
    """Name of the architecture at `path`: the checkpoint's own word, else `arch`, else the file's or folder's name.

    Prints a line where two of these differ. `checkpoint` is what the file holds, read from `path` if left out. Raises
    CheckpointError as `read` does.
    """
    file = find_checkpoint(path)
    checkpoint = _read(file) if checkpoint is None else checkpoint
    told = _about(checkpoint).get("arch") or (dict.get(checkpoint, "arch") if isinstance(checkpoint, dict) else None)
    folder = run_folder_of(file).name
    named = _arch_in_name(file.name) or _arch_in_name(folder, of_teacher=file.stem == "teacher")
    if isinstance(told, str) and told in models.model_dict:
        if arch not in (None, told):
            print(f"{file} says that it is {told}, so it is not taken for {arch}", flush=True)
        return told
    names = ", ".join(models.model_dict)
    if arch in models.model_dict:
        if named not in (None, arch):
            print(f"{file} is taken for {arch}, as asked, though its name says {named}", flush=True)
        return arch
    if arch is not None:
        raise CheckpointError(f"{file}: the flag names '{arch:.80}', which is unknown; give one of: {names}")
    if isinstance(told, str):
        raise CheckpointError(f"{file}: its key 'arch' names '{told:.80}', which is unknown; give one of: {names}")
    if named is None:
        raise CheckpointError(
            f"{file}: cannot tell the architecture: the checkpoint has no key 'arch', neither the file's nor the "
            f"folder's name '{folder}' holds it as teacher_wrn_40_2_seed0 does, and no flag tells; "
            f"give --t-arch (--s-arch beside --s-path, --arch in teacher.py), one of: {names}"
        )
    return named


def run_folder_of(file: Path) -> Path:
    """The folder of the run that a checkpoint belongs to: its own, or the one that holds its `ckpt/`."""
    folder = Path(os.path.abspath(file)).parent  # not resolve(): a link's own name is the one that the user chose
    return folder.parent if folder.name == "ckpt" else folder


def _arch_in_name(name: str, of_teacher: bool = False) -> str | None:
    """The architecture in the name of a folder or file.

    For example teacher_vgg13, resnet32x4_vanilla, crd_student_vgg8_weight0.1+…, cifar100_resnet56-f2eff4c8.pt
    (chenyaofo's), dkd,res32x4,res8x4 (mdistiller's: method, teacher, student). A student's folder ends with its
    teacher's: `of_teacher` asks for that one.
    """
    if name.startswith("sskd_student_") and of_teacher:
        teacher = re.search(r"_seed\d+_(.+)", name)
        return _arch_in_name(teacher[1]) if teacher else None
    name = re.sub(r"^([a-z]+_student_|teacher_|cifar100?_)", "", name)
    if "," in name:
        name = name.rpartition(",")[2]
        name = _SHORT.get(name, re.sub(r"^res(?=\d)", "resnet", name))
    fitting = [arch for arch in models.model_dict if re.match(re.escape(arch) + r"(?![A-Za-z0-9])", name)]
    return max(fitting, key=len, default=None)


def _about(checkpoint: object) -> dict[str, Any]:
    """What a checkpoint says of itself; an entry that can't be meant so is left out."""
    about = dict.get(checkpoint, "about") if isinstance(checkpoint, dict) else None
    if not isinstance(about, dict):
        return {}
    told = {name: about.get(name) for name in ("arch", "dataset") if isinstance(about.get(name), str)}
    for name in ("classes", "side", "tested"):
        if type(about.get(name)) is int and 0 < about[name] < 10**9:
            told[name] = about[name]
    for name in ("mean", "std"):
        values, least = about.get(name), 0 if name == "mean" else 1e-6
        if isinstance(values, list) and len(values) == 3 and all(type(x) is float and least <= x <= 1 for x in values):
            told[name] = values
    return told


def _reported_acc(checkpoint: object) -> float | None:
    if isinstance(checkpoint, dict):
        for key in ("acc", "best_acc", "accuracy"):
            try:
                acc = float(dict.get(checkpoint, key))
            except (TypeError, ValueError, RuntimeError):  # absent, or anything else than a number
                continue
            if math.isfinite(acc):
                return acc
    return None


class _DType:
    """Stands in for numpy.dtype while a file is read, for NumPy's own trusts what the file tells it of memory."""

    def __init__(self, code: str, *_: object):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def number(self, data: bytes) -> float | int | bool:
        if self.order not in ("<", ">", "|") or not re.fullmatch("[biuf][1248]", self.code):
            raise ValueError(self.code)
        return np.frombuffer(data, self.order + self.code).item()


_NUMPY = [(_DType, "numpy.dtype")]
_NUMPY += [(_DType.number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # NumPy 1, NumPy 2


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; make it readable, or give another") from None


def _read(file: Path) -> object:
    """What the checkpoint file holds; nothing in it is executed."""
    with _reading(file):
        content = file.read_bytes()
    # RepDistiller keeps its flags beside the weights, a Namespace, which only holds values; others NumPy's scalars.
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace, *_NUMPY]):
        warnings.simplefilter("ignore")  # they are about kinds of file and tensor that are refused anyway
        try:
            if content.startswith(b"PK\x03\x04"):  # from PyTorch 1.6 on; older files have no checksums
                archive = zipfile.ZipFile(io.BytesIO(content))
                # torch.load compares no checksum, and leaves memory unset for a member marked as a folder (0x10).
                if archive.testzip() or any(member.external_attr & 0x10 for member in archive.infolist()):
                    raise zipfile.BadZipFile
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes make the reader fail in many ways
            failure = error
    reason = "is not a PyTorch checkpoint, or is damaged or truncated; fetch or save it again"
    refused = re.search(r"GLOBAL (\S+)", str(failure)) if isinstance(failure, pickle.UnpicklingError) else None
    if refused:
        reason = f"holds a Python object ({refused[1]:.80}), which is not read for safety; save its state dict alone"
    raise CheckpointError(f"{file}: {reason}")


def _state_dict(file: Path, checkpoint: object) -> dict[str, Tensor]:
    """The tensors of a checkpoint, whatever they lie in."""
    if isinstance(checkpoint, dict) and "parts" in checkpoint and file.name == "last.pth":
        raise CheckpointError(f"{file}: is what its run goes on from, no network; give the run's folder")
    state, advice = checkpoint, "save a network's state_dict()"
    for _ in range(4):  # the keys may lie in one another, but a checkpoint may also contain itself
        if isinstance(state, dict):
            state = next((state[key] for key in _KEYS if isinstance(dict.get(state, key), dict)), state)
    if not isinstance(state, dict) or not state or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{file}: is no state dict, and holds none under 'state_dict' or 'model'; {advice}")
    tensors: dict[str, Tensor] = {}
    # dict.items and Tensor.detach by their classes: a file may give its objects attributes that hide their methods.
    for key, value in dict.items(state):
        dense = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_nested
        if not dense or value.is_meta:
            entry = f"its entry '{key:.80}' ({type(value).__name__})"
            raise CheckpointError(f"{file}: is no state dict: {entry} is no plain tensor; {advice}")
        tensors[key] = Tensor.detach(value)
    return tensors


def _backbone_state(file: Path, state: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """The backbone's tensors under its own names: those in the file if they fit, else those in its wrappers."""
    while True:
        # RepDistiller's MobileNetV2 has another name for its classifier
        renamed = {re.sub(r"^classifier\.0\.", "classifier.", name): tensor for name, tensor in state.items()}
        for plain in (state, renamed):
            if expected <= plain.keys():
                return plain
        inner = _unwrapped(file, state)
        if not inner:
            return state
        state = inner


def _unwrapped(file: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What lies in the outermost wrapper; what lies beside it (an SS head, a teacher, a loss) is not the network's."""
    inner: dict[str, Tensor] = {}
    for key, tensor in state.items():
        wrapper, _, name = key.partition(".")
        if wrapper in _WRAPPERS and name:
            if name in inner:
                advice = "save one network alone"
                raise CheckpointError(f"{file}: holds '{name:.80}' twice, under different prefixes; {advice}")
            inner[name] = tensor
    return inner


def _misfits(expected: dict[str, Tensor], state: dict[str, Tensor]) -> Iterator[str]:
    for name, tensor in expected.items():
        if name not in state:
            yield f"it lacks '{name}'"
        elif state[name].shape != tensor.shape:
            yield f"'{name}' is {tuple(state[name].shape)} in it, not {tuple(tensor.shape)}"
    yield from (f"'{name:.80}' has no place there" for name in state if name not in expected)


def _hint(arch: str, expected: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """What to do about weights that do not fit."""
    same = sum(name in state and state[name].shape == tensor.shape for name, tensor in expected.items())
    if 2 * same < len(expected):
        shared = f"it has {same} of the {len(expected)} tensors of {arch} here"
        return f"this is another network, perhaps of the same name: {shared}"
    return "the architecture is the checkpoint's, else the flag's, else told by its name; the classes are --dataset's"


def _bad_values(expected: dict[str, Tensor], state: dict[str, Tensor]) -> Iterator[str]:
    for name, tensor in state.items():
        kind, dtypes = ("floats", _FLOATS) if expected[name].is_floating_point() else ("integers", _INTEGERS)
        if tensor.dtype not in dtypes:
            yield f"'{name}' is {tensor.dtype} where {kind} are expected; save the network as it was trained"
        elif not tensor.float().isfinite().all():
            yield f"'{name}' holds values that are not finite, so its training diverged; take another"
