"""A trained teacher, and what is kept beside its checkpoint for its next students: its SS head.

A kept file is named by all that its content depends on: for another teacher, flag or data set there is another file.
"""

from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import models
from flags import UserError
from record import digest, fingerprint, read, refuse_unfinished, restoring, save
from utils import Fault

# what a trained SS head depends on beside the teacher; no labels, so --label-noise changes nothing
DEPENDS = "t_epoch", "t_lr", "t_milestones", "gamma", "momentum", "weight_decay", "batch_size", "seed", "amp", "compile"
DEPENDS += "deterministic", "dataset", "train_size", "test_size", "few_shot"


class TeacherCheckpoint(NamedTuple):
    """A trained network, to be a teacher."""

    file: Path
    folder: str  # the name of the run's folder
    network: nn.Module
    fingerprint: str  # the name of its weights


def load_teacher(path: str, arch: str | None, num_classes: int) -> TeacherCheckpoint:
    """The teacher at `path`, a finished run's folder or a checkpoint file, on the CPU.

    `arch` tells its network where neither the checkpoint nor the folder's name does.

    Raises:
        UserError: the run is not finished.
        CheckpointError: there is no checkpoint, or it can't be read or does not fit.
    """
    refuse_unfinished(Path(path))
    file = models.find_checkpoint(path)
    network = models.load(file, arch, num_classes)
    return TeacherCheckpoint(file, models.run_folder_of(file).name, network, fingerprint(network))


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
