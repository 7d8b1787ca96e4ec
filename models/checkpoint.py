"""Read a backbone from any known checkpoint: this repository's, the published SSKD's, RepDistiller's, mdistiller's."""

import argparse
import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import models  # for model_dict, which does not exist yet while this module is imported

_SUFFIXES = ("", ".pth", ".pt", ".tar", ".ckpt", ".bin")
_WRAPPERS = re.compile(r"((module|_orig_mod|student|backbone)\.)*")  # DataParallel, compile, distillers, our Wrapper
_KEYS = ("state_dict", "model", "student")  # under which the weights lie; the last in a student's last.pth
_NOT_BACKBONE = ("proj_head.", "teacher.")  # the SS head, and the teacher that mdistiller saves beside its student
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class CheckpointError(ValueError):
    """One printable line that names the file and says what to do; what is not printable is escaped.

    The names in a checkpoint are anybody's text: they may hold line ends, terminal codes and lone surrogates.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def load(path: str | Path, arch: str | None = None, num_classes: int = 100) -> nn.Module:
    """The plain backbone (CPU, float32) with the weights at `path`, a checkpoint file or a run folder.

    The architecture comes from the checkpoint, else from the folder's name, else from `arch`.
    Raises CheckpointError where something is missing, cannot be read, is damaged or does not fit.
    Draws no random number, so what is seeded before goes on as if nothing had been loaded.
    """
    file = find_checkpoint(path)
    checkpoint = _read(file)
    state = _backbone_state(file, checkpoint)
    arch = find_arch(file, arch, checkpoint)
    with torch.device("meta"):  # no memory and no initial values, which the checkpoint replaces
        model = models.model_dict[arch](num_classes=num_classes)
    counters = {name: torch.tensor(0) for name in model.state_dict() if name.endswith("num_batches_tracked")}
    state = counters | state  # old checkpoints lack them
    if fault := next(_faults(f"does not fit {arch} with {num_classes} classes", model, state), None):
        raise CheckpointError(f"{file}: {fault}")
    model.to_empty(device="cpu").load_state_dict(state)
    return model


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a file; of a folder, the checkpoint with `best` in its name.

    The folder comes before its `ckpt/`; of several in one place the shortest name is taken, then the first in order.
    Raises CheckpointError where there is none, or the folder cannot be read.
    """
    path = Path(path)
    with _reading(path):
        if path.is_file():
            return path
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such file or folder; give a run folder or a checkpoint file")
        for folder in filter(Path.is_dir, (path, path / "ckpt")):
            files = [file for file in folder.iterdir() if file.is_file() and file.suffix in _SUFFIXES]
            best = [file for file in files if "best" in file.name.lower()]
            if best:
                return min(best, key=lambda file: (len(file.name), file.name))
    raise CheckpointError(
        f"{path}: found no checkpoint with 'best' in its name, neither there nor in its ckpt/; give the file itself"
    )


def find_arch(path: str | Path, arch: str | None = None, checkpoint: object = None) -> str:
    """Name of the architecture at `path`: the checkpoint's key `arch`, else the folder's name, else `arch`.

    `checkpoint` is what the file holds, read from `path` if left out. Raises CheckpointError as `load` does.
    """
    file = find_checkpoint(path)
    checkpoint = _read(file) if checkpoint is None else checkpoint
    told = dict.get(checkpoint, "arch") if isinstance(checkpoint, dict) else None
    folder = run_folder_of(file)
    arch = told if isinstance(told, str) else _arch_in_name(folder.name, of_teacher=file.stem == "teacher") or arch
    names = ", ".join(models.model_dict)
    if arch is None:
        raise CheckpointError(
            f"{file}: cannot tell the architecture: the checkpoint has no key 'arch', the folder's name "
            f"'{folder.name}' does not hold it as teacher_wrn_40_2_seed0 does, and no flag tells; "
            f"give --t-arch (--s-arch beside --s-path, --arch in teacher.py), one of: {names}"
        )
    if arch not in models.model_dict:
        source = "its key 'arch'" if arch is told else "the flag"
        raise CheckpointError(f"{file}: {source} names '{arch:.80}', which is unknown; give one of: {names}")
    return arch


def run_folder_of(file: Path) -> Path:
    """The folder of the run that a checkpoint belongs to: its own, or the one that holds its `ckpt/`."""
    folder = Path(os.path.abspath(file)).parent  # not resolve(): a link's own name is the one that the user chose
    return folder.parent if folder.name == "ckpt" else folder


def _arch_in_name(name: str, of_teacher: bool = False) -> str | None:
    """The architecture in a run folder's name, e.g. teacher_vgg13, resnet32x4_vanilla, crd_student_vgg8_weight0.1+...

    A student's folder ends with its teacher's: `of_teacher` asks for that one.
    """
    if name.startswith("sskd_student_") and of_teacher:
        teacher = re.search(r"_seed\d+_(.+)", name)
        return _arch_in_name(teacher[1]) if teacher else None
    name = re.sub(r"^[a-z]+_student_", "", name).removeprefix("teacher_")
    fitting = [arch for arch in models.model_dict if name == arch or name.startswith(f"{arch}_")]
    return max(fitting, key=len, default=None)


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
    # RepDistiller keeps its flags beside the weights; a Namespace only holds values.
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
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


def _backbone_state(file: Path, checkpoint: object) -> dict[str, Tensor]:
    """The backbone's tensors under their plain names, whatever the layout and the prefixes."""
    state, advice = checkpoint, "save a network's state_dict()"
    for _ in range(4):  # the keys may lie in one another, but a checkpoint may also contain itself
        if isinstance(state, dict):
            state = next((state[key] for key in _KEYS if key in state), state)
    if not isinstance(state, dict) or not state or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{file}: is no state dict, and holds none under 'state_dict' or 'model'; {advice}")
    plain: dict[str, Tensor] = {}
    # dict.items and Tensor.detach by their classes: a file may give its objects attributes that hide their methods.
    for key, value in dict.items(state):
        dense = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_nested
        if not dense or value.is_meta:
            entry = f"its entry '{key:.80}' ({type(value).__name__})"
            raise CheckpointError(f"{file}: is no state dict: {entry} is no plain tensor; {advice}")
        name = key[_WRAPPERS.match(key).end() :]
        if name.startswith(_NOT_BACKBONE):
            continue
        if name.startswith("classifier.0."):  # RepDistiller's MobileNetV2
            name = name.replace(".0.", ".", 1)
        if name in plain:
            raise CheckpointError(f"{file}: holds '{name:.80}' twice, under different prefixes; save one network alone")
        plain[name] = Tensor.detach(value)
    return plain


def _faults(misfit: str, model: nn.Module, state: dict[str, Tensor]) -> Iterator[str]:
    """What keeps `state` from being the model's; the first is to be told, for later ones build on its absence."""
    advice = "the architecture is the checkpoint's, else its folder's, else the flag's; the classes are --dataset's"
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            yield f"{misfit}: it lacks '{name}'; {advice}"
        elif state[name].shape != tensor.shape:
            yield f"{misfit}: '{name}' is {tuple(state[name].shape)} in it, not {tuple(tensor.shape)}; {advice}"
    yield from (f"{misfit}: '{name:.80}' has no place there; {advice}" for name in state if name not in expected)
    for name, tensor in state.items():
        kind, dtypes = ("floats", _FLOATS) if expected[name].is_floating_point() else ("integers", _INTEGERS)
        if tensor.dtype not in dtypes:
            yield f"'{name}' is {tensor.dtype} where {kind} are expected; save the network as it was trained"
        elif not tensor.float().isfinite().all():
            yield f"'{name}' holds values that are not finite, so its training diverged; take another"
