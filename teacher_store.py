"""A trained teacher, and what is kept beside its checkpoint for its next students: its SS head, its features.

A kept file is named by all that its content depends on: another teacher, flag or data set has another file.

SSKD uses only the last feature of the frozen backbone, and an image has only 648 possible views. So the features fit
in a table. The backbone computes a view when it is first used; from then on the SS head and all students read it.
"""

import contextlib
import hashlib
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar import Batch, Data, Images
from harness import checkpoint, processes
from harness.files import alone, digest, read_state, restoring, save
from harness.flags import Fault, UserError, warn
from harness.progress import Progress
from harness.record import refuse_unfinished
from harness.rows import FileRows, Rows
from harness.sources import Source, read_for
from utils import evaluate, precision
from wrapper import classifier

# the flags on which a trained SS head depends; it uses no labels, so not --label-noise
DEPENDS = "t_epoch", "t_lr", "t_milestones", "gamma", "momentum", "weight_decay", "batch_size", "seed", "amp", "compile"
DEPENDS += "deterministic", "tf32", "train_size", "test_size", "few_shot", "val_fraction"


def read_teacher(args: Namespace) -> tuple[checkpoint.Checkpoint, Source, nn.Module, dict[str, Any]]:
    """The teacher of `--t-path`, a finished run's folder or a checkpoint, and its data.

    Returns:
        Its checkpoint, the data set as it needs it, its network (on the CPU), and what a run records of both.

    Raises:
        UserError: the run is not finished; the checkpoint or the data set can't be read, or don't fit each other.
    """
    refuse_unfinished(Path(args.t_path))
    found = checkpoint.read(args.t_path, args.t_arch)
    source = read_for(args, found.about, found.file)
    network = found.network(len(source.classes), source.side)
    return found, source, network, source.identity | {"teacher": fingerprint(network)}


def fingerprint(network: nn.Module) -> str:
    """A short name for exactly these weights (on the CPU)."""
    state = network.state_dict().items()
    bits = {name: value.contiguous().reshape(-1).view(torch.uint8).numpy() for name, value in state}
    return digest({name: hashlib.sha256(value).hexdigest() for name, value in bits.items()})


def report_teacher(found: checkpoint.Checkpoint, network: nn.Module, data: Data, autocast: Callable) -> dict[str, Any]:
    """Tests the teacher before hours are spent on it; warns if its accuracy is near chance or not what it should be.

    Args:
        found: the teacher's checkpoint; `network` is its network, on the device.

    Returns:
        What config.json and result.json of a student say of its teacher.
    """
    file, held_out = found.file, found.about.get("held_out")
    if data.about.get("held_out") not in (None, held_out):
        how = "--val-fraction {} --seed {}".format(*held_out) if held_out else "no --val-fraction, as far as it says"
        warn(f"{file}: trained with {how}: it may have seen images that choose the student's best epoch here")
    acc = evaluate(network, data.test, autocast, "test of the teacher").acc
    print(f"teacher: {file}, {found.arch}, test accuracy {acc:.2f}", flush=True)
    if doubt := doubt_about(acc, len(data.test), data.about["classes"], found.acc, found.about.get("tested", 10_000)):
        warn(f"{file}: the teacher's accuracy is {acc:.2f} here, {doubt}")
    return {"path": str(file.absolute()), "arch": found.arch, "acc": acc}


def doubt_about(acc: float, images: int, classes: int, reported: float | None, tested: int) -> str | None:
    """Why to doubt a teacher whose accuracy is `acc` (%) on so many test images of so many classes, or None.

    `reported` is the accuracy (%, in some checkpoints a share) in its checkpoint, on `tested` images.
    """
    chance, noise = 100 / classes, 150 / math.sqrt(min(images, tested))  # three standard errors of 50 %, in percent
    if images >= 1000 and acc < chance + noise:
        return f"near chance ({chance:.2f}): check its data set, class order and architecture"
    if reported is not None:
        reported = min(reported, 100 * reported, key=lambda x: abs(x - acc)) if reported <= 1 else reported
        if abs(acc - reported) > max(1, 200 / images if images == tested else noise):
            return f"but {reported:.2f} in its checkpoint: check its normalisation, data set and architecture"
    return None


# -------------------------------------------------------------------------------------------------------- its SS head


class SSHeadFile:
    """The file of a teacher's SS head, trained with one set of flags on one kind of device.

    Args:
        file: the teacher's checkpoint, beside which it lies.
        identity: of data and teacher, see `settings`.
    """

    def __init__(self, args: Namespace, file: Path, identity: dict[str, Any], device: torch.device):
        depends = {name: getattr(args, name) for name in DEPENDS} | {"stored": args.t_features != "compute"}
        self.key = digest(depends | identity | {"device": device.type})
        self.path = file.parent / f"ss_head_{self.key}.pth"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other student reads or trains this head: of several that start together one trains it."""
        lock = self.path.with_name(f".{self.path.stem}.lock")
        waiting = f"SS head: waiting for another student that trains {self.path}"
        with contextlib.nullcontext() if processes.RANK else alone(lock, waiting):
            processes.wait()  # until the first process of this run has the lock
            yield

    def read_into(self, head: nn.Module) -> list[dict[str, Any]]:
        """Loads the file into `head`; returns the log of its training, see `Run.lines`.

        Returns no line, and leaves `head` alone, if there is no such file or it is damaged.
        """
        if not self.path.exists():
            return []
        try:
            saved = read_state(self.path)
            with restoring(self.path):
                if saved["key"] != self.key:
                    raise ValueError
                lines = list(saved["lines"])
                head.load_state_dict(saved["state_dict"])
        except UserError:
            print(f"SS head: {self.path} is damaged or belongs to something else, so it is trained again", flush=True)
            return []
        print(f"SS head: read from {self.path}, trained before on the same teacher, data and flags", flush=True)
        return lines

    def write(self, head: nn.Module, lines: list[dict[str, Any]]) -> None:
        """Keeps `head` for later students, if the teacher's folder can be written to."""
        try:
            save(self.path, {"key": self.key, "state_dict": dict(head.state_dict()), "lines": lines})
        except Fault as error:
            print(f"SS head: not kept for later students: {error}", flush=True)


# -------------------------------------------------------------------------------------------------------- its features


def features(args: Namespace, file: Path, identity: dict, images: Images, backbone: nn.Module) -> "Features | None":
    """The table of `--t-features` for the training images, beside the teacher's checkpoint `file`; None for compute."""
    if args.t_features == "compute":
        return None
    depends = {name: getattr(args, name) for name in ("amp", "deterministic", "tf32")}
    key = digest(identity | depends | {"device": images.device.type})
    autocast = precision(args.amp, images.device)
    return Features(images, backbone, autocast, key, file.parent if args.t_features == "disk" else None)


class Features:
    """The teacher's last feature of any view of the training images: computed on first use, then read from a table.

    A row of the table holds the float16 features of one image and window.

    Args:
        images: the training images.
        backbone: the teacher as `wrapper.frozen` returns it, on the device of the images.
        key: a name for all that the features depend on.
        folder: where the table is kept as a file, for the whole split; None: in memory, for these images.

    Raises:
        UserError: there is no space for the table.
    """

    def __init__(self, images: Images, backbone: nn.Module, autocast: Callable, key: str, folder: Path | None):
        self.images, self.backbone, self.autocast = images, backbone, autocast
        self.windows = len(images.windows[1])
        self.batch = 1024 if images.device.type == "cuda" else 64  # always this shape, so that no bit depends on it
        width, own = classifier(backbone).in_features, len(images) * self.windows
        if folder is None:
            self.index = torch.arange(len(images), device=images.device)
            self.table = Rows(own, width, key, images.device)
        else:
            self.index, count = images.index, (int(images.index.max()) + 1) * self.windows
            self.table = FileRows(folder / f"features_{key}.bin", count, width, key, images.device, own)

    def batches(self, phase: str, epoch: int, views: int) -> Iterator[Batch]:
        """The batches of `Images.batches`, each completed with its feature."""
        batches = self.images.batches(phase, epoch, views)
        for batch, seen in zip(batches, self.batches_without_views(phase, epoch, views), strict=True):
            yield batch._replace(feature=seen.feature)

    def batches_without_views(self, phase: str, epoch: int, views: int) -> Iterator[Batch]:
        """The same with x None, for the SS head, which reads only the feature."""
        order, window = self.images.draws(phase, epoch, views)
        size = self.images.batch_size
        own, seen = ([part[processes.share(len(part))] for part in x.split(size)] for x in (order, window))
        features = self(torch.cat(own), torch.cat(seen)).split([len(rows) for rows in own])
        for rows, feature in zip(order.split(size), features, strict=True):
            yield Batch(None, self.images.labels[rows], rows, feature.flatten(0, 1).contiguous())

    @torch.no_grad()
    def __call__(self, rows: Tensor, window: Tensor) -> Tensor:
        """The features of the views `window` (N, V) of the images `rows` (N,): (N, V, width) float16."""
        places = (self.index[rows].unsqueeze(1) * self.windows + window).flatten()
        rows, flat = rows.repeat_interleave(window.shape[1]), window.flatten()
        words, known = self.table.read(places)  # N·V x width
        unknown = (~known).nonzero().squeeze(1)
        with Progress(len(unknown), "new features", "views") as progress:
            for i in range(0, len(unknown), self.batch):
                some = unknown[i : i + self.batch]
                words[some] = self.compute(rows[some], flat[some])
                self.table.write(places[some], words[some])
                progress.add(len(some))
        return words.view(torch.float16).unflatten(0, window.shape)

    def compute(self, rows: Tensor, window: Tensor) -> Tensor:
        """The features of up to `batch` single views: (n,), (n,) → (n, width), the 16 bits of each float16.

        Raises:
            UserError: a feature is too large for float16.
        """
        padded = torch.arange(self.batch, device=rows.device) % len(rows)
        with torch.inference_mode(), self.autocast():
            features, _ = self.backbone(self.images.views(rows[padded], window[padded].unsqueeze(1)))
        feature = features[-1][: len(rows)].half()
        if not feature.isfinite().all():
            raise UserError("a feature of the teacher is not finite in float16; use --t-features compute")
        return feature.view(torch.int16)
