"""A trained teacher, and what is kept beside its checkpoint for its next students: its SS head.

A kept file is named by all that its content depends on: for another teacher, flag or data set there is another file.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import models
from flags import UserError, use_dataset_of, warn
from record import digest, fingerprint, read, refuse_unfinished, restoring, save
from utils import Fault, evaluate

# what a trained SS head depends on beside the teacher; no labels, so --label-noise changes nothing
DEPENDS = "t_epoch", "t_lr", "t_milestones", "gamma", "momentum", "weight_decay", "batch_size", "seed", "amp", "compile"
DEPENDS += "deterministic", "dataset", "train_size", "test_size", "few_shot"


class TeacherCheckpoint(NamedTuple):
    """A trained network, to be a teacher."""

    file: Path
    folder: str  # the name of the run's folder
    network: nn.Module
    fingerprint: str  # the name of its weights
    arch: str = ""  # the name of its network
    about: Mapping[str, Any] = {}  # what its checkpoint says of it, see models/checkpoint.py
    acc: float | None = None  # the accuracy that its checkpoint reports


def load_teacher(args: Namespace, num_classes: Mapping[str, int]) -> TeacherCheckpoint:
    """The teacher at `args.t_path`, a finished run's folder or a checkpoint file, on the CPU.

    The data set becomes the teacher's, unless `--dataset` was given. `num_classes`: of each data set.

    Raises:
        UserError: the run is not finished, or trained on another number of classes.
        CheckpointError: there is no checkpoint, or it can't be read or does not fit.
    """
    refuse_unfinished(Path(args.t_path))
    file, arch, about, acc, _ = checkpoint = models.read(args.t_path, args.t_arch)
    use_dataset_of(args, checkpoint, num_classes)
    network = checkpoint.network(num_classes[args.dataset])
    return TeacherCheckpoint(file, models.run_folder_of(file).name, network, fingerprint(network), arch, about, acc)


def report_teacher(
    args: Namespace, teacher: TeacherCheckpoint, network: nn.Module, images: Any, autocast: Callable
) -> dict[str, Any]:
    """Tests the teacher before hours are spent on it, prints its accuracy, and warns if it can't be what was meant.

    Args:
        network: the teacher's, on the device.
        images: the test split.

    Returns:
        What the student's config.json and result.json say of its teacher.

    Raises:
        UserError: it was trained on images of another size.
    """
    file, told, given = teacher.file, teacher.about, images.about
    if told.get("side", given["side"]) != given["side"]:
        raise UserError(f"{file}: it was trained on images of side {told['side']}, these have {given['side']}")
    for name in ("mean", "std"):
        if any(abs(a - b) > 0.01 for a, b in zip(told.get(name, given[name]), given[name], strict=True)):
            warn(f"{file}: its images were normalised by another {name} ({told[name]}) than these ({given[name]})")
    _, acc, _ = evaluate(network, images, autocast, "test of the teacher")
    print(f"teacher: {file}, {teacher.arch}, test accuracy {acc:.2f}", flush=True)
    whole = len(images) if args.test_size is None else None
    if doubt := doubt_about(acc, len(images), given["classes"], teacher.acc, told.get("tested", whole)):
        warn(f"{file}: the teacher's accuracy is {acc:.2f} here, {doubt}")
    return {"path": str(file.absolute()), "arch": teacher.arch, "fingerprint": teacher.fingerprint, "acc": acc}


def doubt_about(acc: float, images: int, classes: int, told: float | None, tested: int | None) -> str | None:
    """What makes one doubt a teacher whose accuracy is `acc` (%) on a test split of so many images and classes.

    It is near chance, or more than a point from the accuracy `told` by its checkpoint, which was `tested` on so many
    images (None: unknown), and that by more than sampling explains.
    """

    def error(percent: float, count: int) -> float:
        """Three standard errors, in percent, of an accuracy over `count` images; four images more keep it above 0."""
        share = (percent / 100 * count + 2) / (count + 4)
        return 300 * math.sqrt(share * (1 - share) / count)

    chance = 100 / classes
    if acc + error(acc, images) < chance + min(chance, (100 - chance) / 5):
        return f"near chance ({chance:.2f}): is it of this data set, its classes in this order, its network this one?"
    if told is not None:
        told = min((told, 100 * told) if told <= 1 else (told,), key=lambda x: abs(x - acc))  # a share, in some
        allowed = 200 / images if images == tested else error(told, min(images, tested or images))  # two images
        if abs(acc - told) > max(1, allowed):
            return f"but {told:.2f} by its checkpoint: has it another normalisation, data set or network?"
    return None


class SSHeadFile:
    """The SS head of one teacher, trained under one set of flags on one kind of device."""

    def __init__(self, args: Namespace, teacher: TeacherCheckpoint, device: torch.device):
        flags = {name: getattr(args, name) for name in DEPENDS}
        self.key = digest(flags | {"teacher": teacher.fingerprint, "device": device.type})
        self.path = teacher.file.parent / f"ss_head_{self.key}.pth"

    def read_into(self, head: nn.Module) -> list[dict[str, float]]:
        """Reads it into `head`; returns the log of its training, a line an epoch.

        Returns no line, and leaves `head` alone, if there is no such file or it is damaged.
        """
        if not self.path.exists():
            return []
        try:
            saved = read(self.path)
            with restoring(self.path):
                lines = [{str(tag): float(value) for tag, value in line.items()} for line in saved["lines"]]
                state = {name: saved["state_dict"][name] for name in head.state_dict()}
                fits = all(state[name].shape == value.shape for name, value in head.state_dict().items())
                if (
                    saved["key"] != self.key
                    or not lines
                    or not fits
                    or not all(x.isfinite().all() for x in state.values())
                ):
                    raise ValueError
        except UserError:
            print(f"SS head: {self.path} is damaged or belongs to something else: not used", flush=True)
            return []
        head.load_state_dict(state)
        print(f"SS head: read from {self.path}, trained before on the same teacher, data and flags", flush=True)
        return lines

    def write(self, head: nn.Module, lines: list[dict[str, float]]) -> None:
        """Keeps `head`, if the teacher's folder can be written to; this student needs no copy there."""
        try:
            save(self.path, {"key": self.key, "state_dict": head.state_dict(), "lines": lines})
        except Fault as error:
            print(f"SS head: not kept for later students: {error}", flush=True)
