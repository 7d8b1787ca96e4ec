"""A table of rows that several processes fill as they need them, in memory or in a file.

A row holds 16-bit words, and a checksum of them and of the row's number. A row with a wrong checksum is unknown: it may
be new, half written by a process that was killed, or damaged.
"""

import errno
import math
import mmap
import os
import re
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.flags import Fault, UserError

CHECKSUM = 4  # words


class Rows:
    """Rows in memory, all unknown at first.

    Args:
        count: the number of rows, each of `width` words.
        key: a name (hexadecimal) for all that the content depends on; what was written with another key is unknown.
        device: where the rows are given and taken.

    Raises:
        UserError: there is no space for the table.
    """

    def __init__(self, count: int, width: int, key: str, device: torch.device):
        self.width = width
        generator = torch.Generator().manual_seed(int(key[:15], 16))
        self.factors = torch.randint(-(2**63), 2**63 - 1, (width + 1,), generator=generator).to(device) | 1
        self.open(count, device)

    def read(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The words (n, width) int16 of the rows at `places` (n,), and which rows are known (n,)."""
        rows = self.get(places)
        return rows[:, : self.width], (rows[:, self.width :] == self.checksum(rows, places)).all(1)

    def write(self, places: Tensor, words: Tensor) -> None:
        """Writes `words` (n, width) int16 to the rows at `places` (n,).

        Raises:
            Fault: the disk is full.
        """
        self.put(places, torch.cat([words, self.checksum(words, places)], 1))

    def checksum(self, words: Tensor, places: Tensor) -> Tensor:
        """Words (n, width or more), row numbers (n,) → the checksums (n, 4): an odd number of 64 bits, so never 0."""
        parts = zip(words.split(4096), places.split(4096), strict=True)  # their products fit in the caches
        sums = [(x[:, : self.width] * self.factors[1:]).sum(1) + (n + 1) * self.factors[0] for x, n in parts]
        return (torch.cat(sums) | 1).unsqueeze(1).view(torch.int16)

    def open(self, count: int, device: torch.device) -> None:
        """Makes the table."""
        size, free = 2 * count * (self.width + CHECKSUM), math.inf
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        elif (info := Path("/proc/meminfo")).exists():  # Linux: what can be used without swapping
            free = int(re.search(r"MemAvailable:\s+(\d+)", info.read_text())[1]) * 1024
        if size > 0.75 * free:  # the rest is for training
            raise UserError(
                f"--t-features memory: the features take {size / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free "
                f"on the {device}, and training needs some; use --t-features disk or compute"
            )
        print(f"features: up to {size / 1e9:.1f} GB in the memory of the {device}", flush=True)
        self.table = torch.zeros(count, self.width + CHECKSUM, dtype=torch.int16, device=device)

    def get(self, places: Tensor) -> Tensor:
        """Whole rows (n, width + 4)."""
        return self.table[places]

    def put(self, places: Tensor, rows: Tensor) -> None:
        """Takes whole rows (n, width + 4)."""
        self.table[places] = rows


class FileRows(Rows):
    """Rows in a sparse file, which several processes read and write at once.

    Args:
        path: the file, which grows to `count` rows if it is shorter.
        own: how many rows this process writes at most.
    """

    def __init__(self, path: Path, count: int, width: int, key: str, device: torch.device, own: int):
        self.path, self.own = path, own
        super().__init__(count, width, key, device)

    def open(self, count: int, device: torch.device) -> None:
        """Maps the file for reading, and opens it for writing."""
        path, words = self.path, self.width + CHECKSUM
        size = 2 * count * words
        try:
            there = path.stat().st_blocks * 512 if path.exists() else 0
            growth, free = max(0, min(2 * self.own * words, size - there)), shutil.disk_usage(path.parent).free
            if growth > free:
                raise UserError(
                    f"--t-features disk: {path} will grow by {growth / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free "
                    "there; make room, or use --t-features memory or compute"
                )
            self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            weakref.finalize(self, os.close, self.file)
            if os.fstat(self.file).st_size < size:
                os.pwrite(self.file, b"\0", size - 1)  # ftruncate might cut off what another process has just added
            mapped = mmap.mmap(self.file, size, access=mmap.ACCESS_READ)
            mapped.madvise(mmap.MADV_RANDOM)  # else the system reads ahead, and fills memory with unused rows
        except OSError as error:
            raise UserError(f"{path} cannot be used: {error.strerror}; --t-features memory needs no file") from error
        print(f"features: {path}, {there / 1e9:.1f} of up to {size / 1e9:.1f} GB", flush=True)
        self.table = np.frombuffer(mapped, np.int16).reshape(count, words)

    def get(self, places: Tensor) -> Tensor:
        ascending, order = places.cpu().sort()
        with ThreadPoolExecutor(16) as pool:  # parallel requests make a disk 10 times as fast
            parts = pool.map(lambda part: self.table.take(part, 0), np.array_split(ascending.numpy(), 16))
            rows = torch.from_numpy(np.concatenate(list(parts)))
        return torch.empty_like(rows).index_copy_(0, order, rows).to(places.device)

    def put(self, places: Tensor, rows: Tensor) -> None:
        try:
            for place, content in zip(places.tolist(), rows.cpu().numpy(), strict=True):
                # not through the mapping: on a full disk that would kill the process
                if os.pwrite(self.file, content, place * content.nbytes) < content.nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise Fault(f"{self.path} could not be written: {error.strerror}; what it holds stays valid") from error
