"""Files that are never half-written, and checkpoints that never run code."""

import errno
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import Fault, UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside `path`, flushes to disk, then renames: a reader finds the old file or the new, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise Fault(f"{path} could not be written: {error.strerror}; what was there before is intact") from error
    finally:
        beside.unlink(missing_ok=True)


def append(path: Path, content: bytes) -> None:
    """Adds to a file in one write, and flushes it to disk."""
    try:
        with open(path, "ab", buffering=0) as file:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
    except OSError as error:
        raise Fault(f"{path} could not be written: {error.strerror}; the checkpoints are intact") from error


def save(path: Path, checkpoint: dict) -> None:
    """`torch.save`, atomically. Serialised in memory first, for a full disk then fails in one known place."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getbuffer())


def read(path: Path) -> dict:
    """A checkpoint that `save` wrote, on the CPU. Never runs code from the file.

    Raises:
        UserError: it is not one.
    """
    with restoring(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise TypeError(type(checkpoint))
    return checkpoint


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Around the use of a checkpoint that `save` wrote: whatever does not fit becomes a UserError that names it."""
    try:
        yield
    except Exception as error:  # zipfile, pickle, torch and missing keys each raise their own
        raise UserError(f"{path} is damaged or not of this run; put a good copy back or --overwrite") from error


def digest(content: dict) -> str:
    """A short name for exactly this content: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(module: nn.Module) -> str:
    """A short name for exactly these weights."""
    tensors = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in module.state_dict().items()}
    return digest(tensors)


def state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict as a plain dict."""
    return dict(module.state_dict())
