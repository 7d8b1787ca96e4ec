"""Where images come from: the archives that torchvision knows, class folders, or generated shapes (shapes.py).

A data set is read once, into one `Source`. One process at a time reads a data root, so of several that start together
one downloads, unpacks and decodes, and the others find the result.
"""

import argparse
import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlretrieve

import numpy as np
import torch
from torch import Tensor

from harness import folders, processes
from harness.files import alone
from harness.flags import DATASETS, STORED, UserError, warn
from harness.shapes import SIDE, synthetic

# mean and standard deviation of each channel, in [0, 1]
STATISTICS = {
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2675, 0.2565, 0.2761)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "synthetic": ((0.1863,) * 3, (0.2018,) * 3),
}
CLASSES = {
    "cifar100": (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
        "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
        "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard "
        "lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear "
        "pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark "
        "shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone "
        "television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
    ).split(),
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "synthetic": [str(label) for label in range(100)],
}
CIFAR100 = {  # the content of its images, see `in_hash_order`
    "train": "640c97a4012a8aebfcaf57fd82a33dd43b37d2e397a02cb9b0a3d89e6d6d936d",
    "test": "a6a97df7b61bc7420bc44268696e8963d33129bc050978f2a63d8fe3420989fa",
}


class Split(NamedTuple):
    pixels: Tensor  # (N, side, side, 3) uint8
    labels: Tensor  # (N,) int64

    @property
    def side(self) -> int:
        """Height and width of the images, in pixels."""
        return self.pixels.shape[1]

    def some(self, rows: Tensor) -> "Split":
        """The images `rows` (M,)."""
        return Split(self.pixels[rows], self.labels[rows])


class Files(NamedTuple):
    """A split whose images stay in their files, see photographs.py."""

    paths: np.ndarray  # (N,) as bytes, see os.fsencode
    labels: Tensor  # (N,) int64
    side: int  # to which they will be cropped
    digest: str  # of their paths below the data root, and their sizes in bytes

    def some(self, rows: Tensor) -> "Files":
        """The images `rows` (M,)."""
        return self._replace(paths=self.paths[rows.numpy()], labels=self.labels[rows])


@dataclass(frozen=True)
class Source:
    """A data set, before the flags choose among its images."""

    name: str
    train: Split | Files
    test: Split | Files
    classes: list[str]  # their names, in the order of the labels
    mean: tuple[float, ...]  # of each channel, in [0, 1]
    std: tuple[float, ...]
    val: Split | Files | None = None  # chooses the best epoch, if the data set has such images
    ignored: dict[str, int] = field(default_factory=dict)  # how many files were no images, by suffix

    @property
    def side(self) -> int:
        """Height and width of the images, in pixels."""
        return self.train.side

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint says of its data: dataset, classes (their number), names, side, mean, std."""
        about = {"dataset": self.name, "classes": len(self.classes), "names": list(self.classes), "side": self.side}
        return about | {"mean": list(self.mean), "std": list(self.std)}

    @property
    def identity(self) -> dict[str, Any]:
        """What a run records of its data: dataset, side and, as `data`, the fingerprint."""
        return {"dataset": self.name, "side": self.side, "data": self.fingerprint}

    @cached_property
    def fingerprint(self) -> str:
        """A short name for exactly these pixels (or files), labels, class names and moments: 16 hexadecimal digits."""
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        digest.update(str((self.mean, self.std)).encode())
        for split in filter(None, (self.train, self.test, self.val)):
            if isinstance(split, Files):
                digest.update(split.digest.encode())
            for tensor in (split.labels,) if isinstance(split, Files) else split:
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()[:16]

    @property
    def counts(self) -> dict[str, Any]:
        """How many images each split has, and which files were ignored."""
        counts = {"train": len(self.train.labels), "val": len(self.val.labels) if self.val else 0}
        return counts | {"test": len(self.test.labels), "ignored": self.ignored}

    def __str__(self) -> str:
        """The counts in words."""
        counts = self.counts
        val = f", {counts['val']:,} validation" if counts["val"] else ""
        kinds = ", ".join(f"{end or 'no suffix'} {count:,}" for end, count in self.ignored.items())
        return (
            f"data: {counts['train']:,} training{val} and {counts['test']:,} test images of {len(self.classes):,} "
            f"classes, {sum(self.ignored.values()):,} files ignored{f' ({kinds})' if kinds else ''}"
        )

    def seen_by(self, about: Mapping[str, Any], file: Path | None) -> "Source":
        """The data set as a network needs it that says `about` itself what it was trained on.

        The classes are in the network's order, and its own mean and std normalise the images.

        Raises:
            UserError: the network was trained on other classes or on images of another size.
        """
        _check(about, "side", self.side, "pixels a side", self.name, file)
        names, source = about.get("names", self.classes), self
        if names != self.classes:
            there, here = (sorted(set(a) - set(b)) for a, b in ((names, self.classes), (self.classes, names)))
            if there or here:
                first = " and ".join(f"{x[0]} is only {where}" for x, where in ((there, "there"), (here, "here")) if x)
                raise UserError(f"{file}: it was trained on other classes: {first}")
            label = torch.tensor([names.index(name) for name in self.classes])
            splits = {half: getattr(self, half) for half in ("train", "test", "val") if getattr(self, half)}
            splits = {half: split._replace(labels=label[split.labels]) for half, split in splits.items()}
            source = replace(self, classes=list(names), **splits)
        _check(about, "classes", len(self.classes), "classes", self.name, file)
        if {"mean", "std"} <= about.keys():
            return replace(source, mean=tuple(about["mean"]), std=tuple(about["std"]))
        if file is not None:
            mean, std = (" ".join(f"{x:.4f}" for x in values) for values in (self.mean, self.std))
            print(f"data: normalised by mean {mean} and deviation {std}; {file} does not say its own", flush=True)
        return source


def _check(about: Mapping[str, Any], key: str, here: int, what: str, name: str, file: Path | None) -> None:
    if (there := about.get(key, here)) != here:
        raise UserError(
            f"{file}: it was trained on {about.get('dataset', 'other images')}, {there} {what}; {name} has {here}"
        )


def read(
    name: str,
    root: str | Path,
    side: int | None = None,
    url: str | None = None,
    sizes: tuple = (None, None),
    train: bool = True,
    known: Sequence[str] = (),
) -> Source:
    """The data set `name`, from the folder `root` or, for an archive that is not there, from `url` or its own server.

    Args:
        side: of the images of class folders, in pixels; 32 by default.
        sizes: how many training and test images to generate of `synthetic`; None for all.
        train: False: of class folders only the test images are read; mean and std are then 0 and 1.
        known: without `train`, the class names, if they are known: see `folders.splits`.

    Raises:
        UserError: files are missing or damaged and could not be downloaded; `side` is not for this data set.
    """
    root = Path(root)
    if name != "folder":
        if side not in (None, SIDE):
            raise UserError(f"--side {side} is for --dataset folder; the images of {name} have {SIDE} × {SIDE} pixels")
        if name == "synthetic":
            print("data: synthetic shapes; accuracy says nothing about photographs", flush=True)
            splits = [Split(*synthetic(train, size)) for train, size in zip((True, False), sizes, strict=True)]
            return Source(name, *splits, CLASSES[name], *STATISTICS[name])
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
    with processes.first_then_others(), alone(root / ".lock", f"data: waiting for another process that reads {root}"):
        if name == "folder":
            return _own_folders(root, side or SIDE, train, known)
        splits = _cifar100(root, url) if name == "cifar100" else _archive(name, root, url)
    return Source(name, *splits, CLASSES[name], *STATISTICS[name])


def read_for(
    args: argparse.Namespace, about: Mapping[str, Any], file: Path | None = None, train: bool = True
) -> Source:
    """The data set of the flags or, where they name none, of a checkpoint that says `about` itself what it is.

    It is as the network of the checkpoint needs it. Warns if the flags name another data set than the checkpoint
    `file`. Without `train` only the test images are needed.

    Raises:
        UserError: as `read` and `Source.seen_by` say; the checkpoint has a data set that is unknown here.
    """
    trained_on = about.get("dataset", args.dataset or "cifar100")
    name = args.dataset or trained_on
    if name not in DATASETS:
        raise UserError(f"{file}: it was trained on {name:.80}, a data set unknown here; give --dataset")
    if name in CLASSES:
        _check(about, "classes", len(CLASSES[name]), "classes", name, file)  # before anything is downloaded
    side = args.side
    if name != trained_on:
        warn(f"{file} says that it was trained on {trained_on:.80}, not on {name}; without --dataset that is taken")
    elif not args.dataset and name != "cifar100":
        print(f"data: {name}, because {file} was trained on it", flush=True)
    if name == "folder":
        side = side or about.get("side")
    sizes, train = (args.train_size, args.test_size), train or not {"mean", "std"} <= about.keys()
    source = read(name, args.data_root, side, args.data_url, sizes, train, about.get("names", ()))
    return source.seen_by(about, file)


# ------------------------------------------------------------------------------------------------------------ archives


def _archive(name: str, root: Path, url: str | None) -> list[Split]:
    """Training and test split of an archive, which torchvision downloads if need be, checks and unpacks."""
    from torchvision import datasets as tv  # here: it takes as long to import as PyTorch

    dataset = {"cifar100": tv.CIFAR100, "cifar10": tv.CIFAR10}[name]
    mirrored, archive = type(dataset.__name__, (dataset,), {"url": url or dataset.url}), root / dataset.filename
    try:
        if url and url.startswith("file:") and not tv.utils.check_integrity(archive, dataset.tgz_md5):
            urlretrieve(url, archive)  # torchvision reads http only
        halves = [mirrored(str(root), train=train, download=True) for train in (True, False)]
    except Exception as error:  # urllib, tarfile, pickle and torchvision each raise their own
        raise UserError(
            f"{name} could not be read from or downloaded to {root} ({error!r}); put {dataset.filename} into {root}, "
            "or name a mirror of this file with --data-url"
        ) from error
    return [Split(torch.from_numpy(half.data), torch.tensor(half.targets)) for half in halves]


def _cifar100(root: Path, url: str | None) -> list[Split]:
    """CIFAR-100 from class folders below `root`, if there are any, else from the archive; kept in root/cifar100.npz.

    Either way these are the same images in the same order, and their content is checked.
    """
    kept = root / "cifar100.npz"
    if splits := _load(kept, "checked", CIFAR100):
        return list(splits.values())
    places = [root / name for name in ("cifar100", "CIFAR-100-dataset", ".")]
    folder = next((place for place in places if all((place / half).is_dir() for half in CIFAR100)), None)
    if folder is None:
        found = _archive("cifar100", root, url)
    else:
        of_half = {half: folders.class_files(folder / half).classes for half in CIFAR100}
        for half, classes in of_half.items():
            if all(name.isdecimal() for name in classes):  # 0 … 99, whose alphabetical order is another one
                of_half[half] = {name: classes[name] for name in sorted(classes, key=int)}
        found = [_split_of(classes, SIDE, half) for half, classes in of_half.items()]
    splits = {}
    for split, (half, expected) in zip(found, CIFAR100.items(), strict=True):
        order, content = in_hash_order(split.pixels.numpy(), split.labels.numpy())
        if content != expected:
            raise UserError(
                f"{folder or root}: the {len(order):,} {half} images are not CIFAR-100's, or some lie in the wrong "
                "class; put a good copy there (for your own images: --dataset folder)"
            )
        splits[half] = Split(split.pixels[order], split.labels[order])
    _keep(kept, "checked", splits)
    return list(splits.values())


def in_hash_order(pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, str]:
    """An order of images that does not depend on where they come from, and a digest of their content.

    The images (N, 32, 32, 3) uint8 are ordered by the SHA-256 of their bytes, ties by label (N,). The digest is the
    SHA-256 over the sorted SHA-256 digests of each image's bytes and label.
    """
    keys, contents = [], []
    for image, label in zip(np.ascontiguousarray(pixels), labels.tolist(), strict=True):
        sha256 = hashlib.sha256(image)
        keys.append((sha256.digest(), label))
        sha256.update(bytes([label]))
        contents.append(sha256.digest())
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return np.array(order), hashlib.sha256(b"".join(sorted(contents))).hexdigest()


def _load(kept: Path, name: str, halves: Iterable[str]) -> dict[str, Split] | None:
    """The splits that `_keep` wrote under this name; None if there are none, or the file is damaged."""
    with contextlib.suppress(Exception), open(kept, "rb") as file, np.load(file) as saved:  # its checksums are compared
        if str(saved["name"]) == name:
            return {half: Split(*(torch.from_numpy(saved[f"{half}_{x}"]) for x in Split._fields)) for half in halves}
    return None


def _keep(kept: Path, name: str, splits: Mapping[str, Split]) -> None:
    """Keeps decoded splits for the next start, if the folder can be written to."""
    arrays = {f"{half}_{x}": getattr(split, x).numpy() for half, split in splits.items() for x in Split._fields}
    part = kept.with_name(f".{kept.stem}.part.npz")
    with contextlib.suppress(OSError):
        try:
            np.savez(part, name=np.array(name), **arrays)
            os.replace(part, kept)
        finally:
            part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- class folders


def _own_folders(root: Path, side: int, train: bool, known: Sequence[str]) -> Source:
    """The images of class folders (see folders.py): as squares, kept in the root until a file changes, or as files."""
    found = folders.splits(root, train, known)
    if side > STORED:
        splits = {half: _files_of(root, split.classes, side) for half, split in found.items()}
        pixels = _sample_of(splits["train"]) if train else None
    else:
        kept, name = root / f"class_folders_{side}{'' if train else '_test'}.npz", _digest_of(root, found)
        splits = _load(kept, name, found)
        if splits is None:
            splits = {half: _split_of(split.classes, side, half) for half, split in found.items()}
            _keep(kept, name, splits)
        pixels = splits["train"].pixels if train else None
    moments = statistics(pixels) if train else ((0.0,) * 3, (1.0,) * 3)  # the network's own will do
    ignored = dict(sum((split.ignored for split in found.values()), Counter()).most_common())
    classes = list(found["test"].classes)
    both = splits.get("train", splits["test"].some(torch.arange(0))), splits["test"]
    source = Source("folder", *both, classes, *moments, splits.get("val"), ignored)
    print(source, flush=True)
    return source


def _digest_of(root: Path, splits: Mapping[str, folders.Folder]) -> str:
    """A digest of class, path and bytes of all images: reading them is fast, decoding them is not."""
    digest = hashlib.sha256()
    for half, split in splits.items():
        for name, files in split.classes.items():
            for file in files:
                digest.update(f"{half}\0{name}\0{file.relative_to(root)}\0".encode(errors="surrogateescape"))
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _listed(classes: Mapping[str, list[Path]]) -> tuple[list[Path], Tensor]:
    """The files of all classes, and their labels (N,), which count the classes."""
    files = [file for of_class in classes.values() for file in of_class]
    labels = [label for label, of_class in enumerate(classes.values()) for _ in of_class]
    return files, torch.tensor(labels)


def _split_of(classes: Mapping[str, list[Path]], side: int, what: str) -> Split:
    """The images of all classes as squares."""
    files, labels = _listed(classes)
    return Split(torch.from_numpy(folders.decode(files, side, what)), labels)


def _files_of(root: Path, classes: Mapping[str, list[Path]], side: int) -> Files:
    """The files of all classes."""
    files, labels = _listed(classes)
    digest = hashlib.sha256()
    for file in files:
        digest.update(b"%s\0%d\0" % (os.fsencode(file.relative_to(root)), file.stat().st_size))
    return Files(np.array([os.fsencode(file) for file in files]), labels, side, digest.hexdigest())


def _sample_of(files: Files) -> Tensor:
    """The pixels (N, side, side, 3) of up to 1,000 images, evenly spaced among all."""
    count = len(files.labels)
    rows = torch.arange(min(count, 1000)) * count // min(count, 1000)
    chosen = [Path(os.fsdecode(path)) for path in files.paths[rows.numpy()]]
    return torch.from_numpy(folders.decode(chosen, files.side, "a sample of train"))


def statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of (N, side, side, 3) uint8, in [0, 1]; 1 for a constant channel."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(3)]).double()
    value = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ value
    deviation = (share @ value**2 - mean**2).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(torch.where(deviation > 1e-6, deviation, 1.0).tolist())
