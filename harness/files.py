"""Files that are whole or not there: atomic writes, checkpoints that are checked when read, locks."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import processes
from harness.flags import Fault, UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside `path`, flushes to disk, then renames: a reader finds the old file or the new one, never a part.

    Of several processes of one run only the first writes.
    """
    if processes.RANK:
        return
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise Fault(f"{path} could not be written: {error.strerror}; what was there before is intact") from error


def save(path: Path, checkpoint: Mapping) -> None:
    """`torch.save`, atomically. It serialises in memory first, so only `write_atomically` can meet a full disk."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getbuffer())


def plain(content: Any, layout: torch.memory_format = torch.preserve_format) -> Any:
    """A copy of `content` in plain dicts, lists and CPU tensors, which every reader of checkpoints accepts."""
    if isinstance(content, Mapping):
        return {name: plain(part, layout) for name, part in content.items()}
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True, memory_format=layout)
    return [plain(part, layout) for part in content] if isinstance(content, list | tuple) else content


def read_state(path: Path) -> dict:
    """A dict that `save` wrote, on the CPU. Never runs code from the file.

    Raises:
        UserError: the file is missing, damaged, or something else.
    """
    with restoring(path):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load does not compare the checksums
                raise ValueError
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError
    return state


KINDS = {  # the first bytes of files that people give in place of others
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: `git lfs pull` fetches it",
    b"<!doctype html": "an HTML page, not the file itself: download it anew",
    b"<html": "an HTML page, not the file itself: download it anew",
    b"<?xml": "an XML page, not the file itself: download it anew",
    b"\x89hdf": "an HDF5 file, as Keras writes",
    b"\x93numpy": "a NumPy array",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"rar!": "a RAR archive: unpack it",
    b"%pdf": "a PDF file",
}


def kind_of(content: bytes) -> str | None:
    """What a file is, by its first bytes, if that is known and neither an image nor a PyTorch checkpoint."""
    start = content[:1024].lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if not content:
        return "an empty file"
    if kind := next((kind for first, kind in KINDS.items() if start.startswith(first)), None):
        return kind
    if content[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if content[:1] == b"\x08" and (b"pytorch" in start or b"onnx" in start):
        return "an ONNX file"
    with contextlib.suppress(UnicodeDecodeError):
        if all(letter.isprintable() or letter.isspace() for letter in content[:1024].decode()):
            return "a text file"
    return None


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Around the use of a run's file: turns whatever does not fit into a UserError that names the file."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # zipfile, pickle, torch and missing keys each raise their own
        advice = "put a good copy back, or delete its folder"
        raise UserError(f"{path} is damaged or belongs to another run; {advice}") from error


def digest(content: Any) -> str:
    """A short name for exactly this content of dicts, lists, strings and numbers: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def lock(path: Path, waiting: str | None = None) -> int:
    """Locks the file `path` until the descriptor that it returns is closed, or the process ends.

    If another process holds the lock: prints `waiting` and waits, or raises BlockingIOError without it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            os.close(descriptor)
            raise
        print(waiting, flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:  # ENOSYS, ENOLCK, EOPNOTSUPP: the file system has no locks
        pass
    return descriptor


@contextlib.contextmanager
def alone(path: Path, waiting: str) -> Iterator[None]:
    """One process at a time is inside; others print `waiting` and wait. Where `path` can't be written, nobody waits."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.callback(os.close, lock(path, waiting))
        yield
