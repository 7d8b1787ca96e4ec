"""A trained teacher, and what is kept beside its checkpoint for its next students: its SS head, its features.

A kept file is named by all that its content depends on: for another teacher, flag or data set there is another file.

All that SSKD asks of the frozen backbone is its last feature, and an image has but 648 possible views. So the features
are a finite table, in which a view is looked up, whoever asked for it first: the SS head or any student, of any seed,
weight, temperature and batch size. The backbone runs for views that nobody has asked for.
"""

import contextlib
import errno
import hashlib
import math
import mmap
import os
import re
import shutil
import weakref
from argparse import Namespace
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import cifar
import models
from harness.flags import UserError, silent, warn
from losses import VIEWS
from harness.record import digest, fingerprint, read, refuse_unfinished, restoring, save
from utils import Fault, evaluate
from wrapper import classifier

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


def load_teacher(args: Namespace) -> TeacherCheckpoint:
    """The teacher at `args.t_path`, a finished run's folder or a checkpoint file, on the CPU.

    The data set becomes the teacher's, unless `--dataset` was given.

    Raises:
        UserError: the run is not finished, or trained on another number of classes.
        CheckpointError: there is no checkpoint, or it can't be read or does not fit.
    """
    refuse_unfinished(Path(args.t_path))
    file, arch, about, acc, _ = checkpoint = models.read(args.t_path, args.t_arch)
    cifar.use_dataset_of(args, checkpoint)
    network = checkpoint.network(cifar.num_classes(args))
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
        flags |= {"features": "stored"} if stored(args) else {}
        flags |= {name: value for name in ("side", "val_fraction") if (value := getattr(args, name)) is not None}
        self.key = digest(flags | {"teacher": teacher.fingerprint, "device": device.type} | cifar.identity(args))
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


# -------------------------------------------------------------------------------------------------------- its features


def stored(args: Namespace) -> str | None:
    """What a run notes of `--t-features`: `memory` and `disk` give the same bits, `compute` gives others."""
    return None if args.t_features == "compute" else "stored"


def look_once(
    args: Namespace, teacher: TeacherCheckpoint, backbone: nn.Module, autocast: Callable, **splits: cifar.Images
) -> None:
    """Gives each of the `splits`, by its name, its `features`, unless `--t-features` says to compute them.

    Args:
        backbone: the teacher as `wrapper.frozen` gives it, on the device of the images.
        splits: of any but `train`, only test views are looked at.

    Raises:
        UserError: there is no space for them.
    """
    if args.t_features == "compute":
        return

    def last_feature(x: Tensor) -> Tensor:
        with torch.inference_mode(), autocast():
            return backbone(x)[0][-1]

    width = classifier(backbone).in_features
    of_all = {name: getattr(args, name) for name in ("dataset", "amp", "deterministic")}
    of_all |= {"teacher": teacher.fingerprint} | cifar.identity(args)
    for split, images in splits.items():
        depends = of_all | {"device": images.labels.device.type, "split": split}
        key = digest(depends | {"statistics": [x[:3].tolist() for x in (images.mean, images.std)]})
        windows = torch.arange(len(images.windows[1])) if split == "train" else images.test_windows(VIEWS)
        file = teacher.file.parent / f"features_{key}.bin" if args.t_features == "disk" else None
        images.features = Features(key, width, images, windows, last_feature, file)


class Features:
    """What the frozen teacher sees in every view of a split: called with views, it looks at those that are new to it.

    An entry of the table, of one image and window, holds `width` float16 features and a checksum of them, the entry's
    number, the image's pixels and `key`. It is known if that is right. So whatever an entry is instead, a hole of the
    file, half written by a process that was killed or is still writing, damaged or of another teacher, is looked at
    again and written anew; nothing else has to be kept in order.

    Args:
        key: a name for all that features depend on, beside the pixels.
        windows: (W,) increasing, those that views of these images have.
        last_feature: the backbone, images (n, 3, 32, 32) → (n, width).
        file: where the table is kept, for the whole split; None: in memory, for these images.
    """

    def __init__(
        self,
        key: str,
        width: int,
        images: cifar.Images,
        windows: Tensor,
        last_feature: Callable[[Tensor], Tensor],
        file: Path | None,
    ):
        self.images, self.last_feature, self.width = images, last_feature, width
        device = images.labels.device
        self.windows = windows.to(device)
        self.index = (images.index if file else torch.arange(len(images))).to(device)
        entries, whole = (count * len(windows) for count in (len(images), int(self.index.max()) + 1))
        self.table = DiskTable(file, whole, entries, width + 4) if file else MemoryTable(entries, width + 4, device)
        # one static shape, so that a view's bits are the same whatever others are looked at with it
        self.batch = 1024 if device.type == "cuda" else 64
        pixels = images.pixels.flatten(1)
        weights = hashlib.shake_256(key.encode()).digest(8 * (width + 1 + pixels.shape[1]))
        weights = torch.from_numpy(np.frombuffer(weights, np.int64) | 1).to(device)
        self.of_feature, self.of_entry, of_pixels = weights.split([width, 1, pixels.shape[1]])
        self.pixels = weighted_sum(pixels, of_pixels)

    @torch.no_grad()
    def __call__(self, rows: Tensor, window: Tensor) -> Tensor:
        """The features of the views `window` (N, V) of the images `rows` (N,): (N, V, width) float16."""
        shape, rows, window = window.shape, rows.repeat_interleave(window.shape[1]), window.flatten()
        entries = self.index[rows] * len(self.windows) + torch.searchsorted(self.windows, window)
        words = self.table.read(entries)  # N·V x (width + 4)
        features, sums = words[:, : self.width], words[:, self.width :]
        unknown = (sums != self.checksum(features, entries, rows)).any(1).nonzero().squeeze(1)
        if damaged := int(sums[unknown].any(1).sum()):
            print(
                f"features: {damaged} entries of {self.table.name} are damaged or of other images: looked at again",
                flush=True,
            )
        with tqdm(total=len(unknown), desc="the teacher looks", unit=" views", leave=False, disable=silent()) as bar:
            for i in range(0, len(unknown), self.batch):
                some = unknown[i : i + self.batch]
                seen = self.look(rows[some], window[some])
                words[some] = torch.cat([seen, self.checksum(seen, entries[some], rows[some])], 1)
                self.table.write(entries[some], words[some])
                bar.update(len(some))
        return features.view(torch.float16).unflatten(0, shape)

    def look(self, rows: Tensor, window: Tensor) -> Tensor:
        """The same of up to `batch` single views, computed: (n,), (n,) → (n, width), the words of the float16.

        Raises:
            UserError: a feature is too large for float16.
        """
        padded = torch.arange(self.batch, device=rows.device) % len(rows)
        x = self.images.views(rows[padded], window[padded].unsqueeze(1))
        feature = self.last_feature(x)[: len(rows)].half()
        if not feature.isfinite().all():
            raise UserError("a feature of the teacher is not finite in float16; use --t-features compute")
        return feature.view(torch.int16)

    def checksum(self, features: Tensor, entries: Tensor, rows: Tensor) -> Tensor:
        """(n, width), (n,), (n,) → (n, 4), the words of an odd number of 64 bits: never those of a hole."""
        total = weighted_sum(features, self.of_feature) + (entries + 1) * self.of_entry + self.pixels[rows]
        return (total | 1).unsqueeze(1).view(torch.int16)


def weighted_sum(words: Tensor, weights: Tensor) -> Tensor:
    """Σ words · weights modulo 2^64: (n, k) integers, (k,) int64 → (n,) int64.

    Of two rows that differ, fewer than one in 2^46 choices of odd weights make the same, but for the lowest bit.
    """
    parts = words.split(1024)  # of which the products stay in the caches
    return torch.cat([(part.long() * weights).sum(1) for part in parts])


class MemoryTable:
    """Rows of int16 words, zero at first: on the device or, if that is too small, in RAM."""

    name = "memory"

    def __init__(self, count: int, width: int, device: torch.device):
        size, free = 2 * count * width, _available_memory()
        if device.type == "cuda" and size <= 0.75 * torch.cuda.mem_get_info(device)[0]:  # the rest is for training
            self.words = torch.zeros(count, width, dtype=torch.int16, device=device)
        elif size <= 0.75 * free:
            # takes memory only where it is written; NumPy's zeros would be huge pages, soon all of them written to
            mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.words = torch.frombuffer(mapped, dtype=torch.int16).view(count, width)
        else:
            raise UserError(
                f"--t-features memory: the features take {_gb(size)}, and of the {_gb(free)} of memory that are free "
                "training needs a part; use --t-features disk or compute"
            )
        print(f"features: up to {_gb(size)} in the memory of {self.words.device}", flush=True)

    def read(self, rows: Tensor) -> Tensor:
        return self.words[rows.to(self.words.device)].to(rows.device)

    def write(self, rows: Tensor, words: Tensor) -> None:
        self.words[rows.to(self.words.device)] = words.to(self.words.device)


class DiskTable:
    """The same in a sparse file, which any number of processes read and write at once.

    Args:
        count: how many rows it holds at least.
        own: how many of them this process may write.
    """

    def __init__(self, path: Path, count: int, own: int, width: int):
        self.name, size = path, 2 * count * width
        try:
            there = path.stat().st_blocks * 512 if path.exists() else 0
            left, free = max(0, min(2 * own * width, size - there)), shutil.disk_usage(path.parent).free
            if left > free:
                raise UserError(
                    f"--t-features disk: {path} will grow by {_gb(left)}, and {_gb(free)} are free there; make room, "
                    "or use --t-features memory or compute"
                )
            self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            weakref.finalize(self, os.close, self.file)
            if os.fstat(self.file).st_size < size:
                os.pwrite(self.file, b"\0", size - 1)  # not ftruncate, which might cut off what another has just added
            mapped = mmap.mmap(self.file, size, access=mmap.ACCESS_READ)
            mapped.madvise(mmap.MADV_RANDOM)  # else the system reads on behind each entry, and fills memory with holes
        except OSError as error:
            raise UserError(f"{path} cannot be used: {error.strerror}; --t-features memory needs no file") from error
        self.words = np.frombuffer(mapped, np.int16).reshape(count, width)
        print(f"features: {path}, {_gb(there)} of up to {_gb(size)}", flush=True)

    def read(self, rows: Tensor) -> Tensor:
        ascending, order = rows.cpu().sort()
        with ThreadPoolExecutor(16) as pool:  # what a disk has to be asked for comes 10 times as fast so
            parts = pool.map(lambda part: self.words.take(part, 0), np.array_split(ascending.numpy(), 16))
            words = torch.from_numpy(np.concatenate(list(parts)))
        return torch.empty_like(words).index_copy_(0, order, words).to(rows.device)

    def write(self, rows: Tensor, words: Tensor) -> None:
        try:
            for row, content in zip(rows.tolist(), words.cpu().numpy(), strict=True):
                # not through the mapping: there a full disk would kill the process
                if os.pwrite(self.file, content, row * content.nbytes) < content.nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise Fault(f"{self.name} could not be written: {error.strerror}; what it holds stays of use") from error


def _available_memory() -> int:
    """Bytes of RAM that may be taken without swapping; where the system does not tell, all of it."""
    with contextlib.suppress(OSError):
        return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _gb(size: int) -> str:
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB") if size >= 1e6 else (1e3, "kB")
    return f"{size / unit:.{1 if size < 10 * unit else 0}f} {name}"
