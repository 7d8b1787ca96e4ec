"""Read a backbone from any known checkpoint: this repository's, the published SSKD's, RepDistiller's, mdistiller's."""

import argparse
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import models  # for model_dict, which does not exist yet while this module is imported

_SUFFIXES = ("", ".pth", ".pt", ".tar", ".ckpt", ".bin")
_WRAPPERS = ("module.", "_orig_mod.", "student.", "backbone.")  # DataParallel, torch.compile, distillers, our Wrapper
_KEYS = ("state_dict", "model", "student")  # under which the weights lie; the last in a student's last.pth
_NOT_BACKBONE = ("proj_head.", "teacher.")  # the SS head, and the teacher that mdistiller saves beside its student


def load(path: str | Path, arch: str | None = None, num_classes: int = 100) -> nn.Module:
    """The plain backbone (CPU, float32) with the weights at `path`, a checkpoint file or a run folder.

    The architecture comes from the checkpoint, else from the folder's name, else from `arch`.
    Raises FileNotFoundError or ValueError, in one line, where something is missing or does not fit.
    Draws no random number, so what is seeded before goes on as if nothing had been loaded.
    """
    file = find_checkpoint(path)
    checkpoint = _read(file)
    state = _backbone_state(file, checkpoint)
    arch = find_arch(file, arch, checkpoint)
    with torch.device("meta"):  # no memory and no initial values, which the checkpoint replaces
        model = models.model_dict[arch](num_classes=num_classes)
    _check_fit(f"{file}: does not fit {arch} with {num_classes} classes", model, state)
    _check_finite(file, state)
    model.to_empty(device="cpu").load_state_dict(state)
    return model


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a file; of a folder, the checkpoint with `best` in its name.

    The folder comes before its `ckpt/`; of several in one place the shortest name is taken, then the first in order.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; give a run folder or a checkpoint file")
    for folder in (path, path / "ckpt"):
        files = [file for file in folder.glob("*") if file.is_file() and file.suffix in _SUFFIXES]
        best = [file for file in files if "best" in file.name.lower()]
        if best:
            return min(best, key=lambda file: (len(file.name), file.name))
    raise FileNotFoundError(
        f"{path}: found no checkpoint with 'best' in its name, neither there nor in its ckpt/; give the file itself"
    )


def find_arch(path: str | Path, arch: str | None = None, checkpoint: object = None) -> str:
    """Name of the architecture at `path`: the checkpoint's key `arch`, else the folder's name, else `arch`.

    `checkpoint` is what the file holds, read from `path` if left out.
    """
    file = find_checkpoint(path)
    checkpoint = _read(file) if checkpoint is None else checkpoint
    told = checkpoint.get("arch") if isinstance(checkpoint, Mapping) else None
    if isinstance(told, str):
        return _known(told, f"{file} says")
    # Not resolve(): a link's own name is the one that the user chose.
    folder = Path(os.path.abspath(file)).parent
    folder = folder.parent if folder.name == "ckpt" else folder
    named = _arch_in_name(folder.name, of_teacher=file.stem == "teacher")
    if named is not None:
        return named
    if arch is not None:
        return _known(arch, "asked for")
    raise ValueError(
        f"{file}: cannot tell the architecture: the checkpoint has no key 'arch', the folder's name '{folder.name}' "
        "does not hold it as teacher_wrn_40_2_seed0 does, and no flag tells; "
        f"give --t-arch (--s-arch beside --s-path, --arch in teacher.py), one of: {_names()}"
    )


def _arch_in_name(name: str, of_teacher: bool = False) -> str | None:
    """The architecture in a run folder's name, e.g. teacher_vgg13, resnet32x4_vanilla, sskd_student_vgg8_weight0.1+...

    A student's folder ends with its teacher's: `of_teacher` asks for that one.
    """
    if name.startswith("sskd_student_") and of_teacher:
        teacher = re.search(r"_seed\d+_(.+)", name)
        return _arch_in_name(teacher[1]) if teacher else None
    name = name.removeprefix("sskd_student_").removeprefix("teacher_")
    fitting = [arch for arch in models.model_dict if name == arch or name.startswith(f"{arch}_")]
    return max(fitting, key=len, default=None)


def _names() -> str:
    return ", ".join(models.model_dict)


def _known(arch: str, who: str) -> str:
    if arch not in models.model_dict:
        raise ValueError(f"{who} architecture '{arch}', which is unknown; the known ones are: {_names()}")
    return arch


def _read(file: Path) -> object:
    """What the checkpoint file holds; nothing in it is executed."""
    # RepDistiller keeps its flags beside the weights; a Namespace only holds values.
    with file.open("rb") as opened, torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(opened, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes make the reader fail in many ways
            failure = error
    refused = re.search(r"GLOBAL (\S+)", str(failure)) if isinstance(failure, pickle.UnpicklingError) else None
    if refused:
        reason = f"holds a Python object ({refused[1]}), which is not read for safety; save its state dict alone"
    else:
        reason = "is not a PyTorch checkpoint, or is damaged or truncated; fetch or save it again"
    raise ValueError(f"{file}: {reason}")


def _backbone_state(file: Path, checkpoint: object) -> dict[str, Tensor]:
    """The backbone's tensors under their plain names, whatever the layout and the prefixes."""
    state = checkpoint
    while isinstance(state, Mapping) and (key := next((k for k in _KEYS if k in state), None)):
        state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{file}: holds no state dict, neither under 'state_dict' or 'model' nor as a whole")
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            raise ValueError(f"{file}: is no state dict: its entry {key!r} ({type(value).__name__}) is no plain tensor")
        name = key
        while prefix := next((p for p in _WRAPPERS if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        if name.startswith(_NOT_BACKBONE):
            continue
        if name.startswith("classifier.0."):  # RepDistiller's MobileNetV2
            name = name.replace(".0.", ".", 1)
        if name in plain:
            raise ValueError(f"{file}: holds '{name}' twice, under different prefixes; save one network alone")
        plain[name] = value
    return plain


def _check_fit(complaint: str, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Raise at the first tensor that differs; add the batch counters that old checkpoints lack."""
    expected = model.state_dict()
    misfit = None
    for name, tensor in expected.items():
        if name not in state and name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name not in state:
            misfit = f"it lacks '{name}'"
        elif state[name].shape != tensor.shape:
            misfit = f"'{name}' is {tuple(state[name].shape)} in it, not {tuple(tensor.shape)}"
        if misfit:
            break
    else:
        misfit = next((f"'{name}' has no place there" for name in state if name not in expected), None)
    if misfit:
        raise ValueError(
            f"{complaint}: {misfit}; the architecture is the checkpoint's, else its folder's, else the flag's; "
            "the number of classes is --dataset's"
        )


def _check_finite(file: Path, state: dict[str, Tensor]) -> None:
    spoilt = next((name for name, tensor in state.items() if not tensor.float().isfinite().all()), None)
    if spoilt:
        raise ValueError(f"{file}: '{spoilt}' holds values that are not finite, so its training diverged; take another")
