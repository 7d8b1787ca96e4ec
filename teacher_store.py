"""What is kept beside a teacher's checkpoint for its next students: its trained SS head.

A file is named by all that its content depends on: for another teacher, flag or data set there is another file.
"""

from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

from record import digest, read, restoring, save
from utils import Fault, UserError

# what a trained SS head depends on beside the teacher; no labels, so --label-noise changes nothing
DEPENDS = "t_epoch", "t_lr", "t_milestones", "gamma", "momentum", "weight_decay", "batch_size", "seed", "amp", "compile"
DEPENDS += "deterministic", "dataset", "train_size", "test_size", "few_shot"


class SSHeadFile:
    """The SS head of one teacher, trained under one set of flags.

    Args:
        checkpoint, fingerprint: the teacher's file, and the name of its weights.
    """

    def __init__(self, args: Namespace, checkpoint: Path, fingerprint: str, device: torch.device):
        flags = {name: getattr(args, name) for name in DEPENDS}
        self.key = digest(flags | {"teacher": fingerprint, "device": device.type})
        self.path = checkpoint.parent / f"ss_head_{self.key}.pth"

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
            print(f"SS head: {self.path} is damaged or another and not used", flush=True)
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
