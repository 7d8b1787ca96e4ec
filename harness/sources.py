"""Where images come from: the archives that torchvision knows, class folders, or generated shapes (shapes.py).

A data set is read once, into one `Source`. One process at a time reads a data root, so of several that start together
one downloads, unpacks and decodes, and the others find the result.
"""

import argparse
import contextlib
import hashlib
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlretrieve

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets as tv
from torchvision.transforms import functional as tvf
from tqdm import tqdm

from harness.files import alone
from harness.flags import DATASETS, UserError, silent, warn
from harness.shapes import SIDE, synthetic

SUFFIXES = tv.folder.IMG_EXTENSIONS

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


@dataclass(frozen=True)
class Source:
    """A data set, before the flags choose among its images."""

    name: str
    train: Split
    test: Split
    classes: list[str]  # their names, in the order of the labels
    mean: tuple[float, ...]  # of each channel, in [0, 1]
    std: tuple[float, ...]

    @property
    def side(self) -> int:
        """Height and width of the images, in pixels."""
        return self.train.pixels.shape[1]

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint says of its data: dataset, classes (their number), side, mean, std."""
        statistics = {"mean": list(self.mean), "std": list(self.std)}
        return {"dataset": self.name, "classes": len(self.classes), "side": self.side, **statistics}

    @property
    def identity(self) -> dict[str, Any]:
        """What a run records of its data: dataset, side and, as `data`, the fingerprint."""
        return {"dataset": self.name, "side": self.side, "data": self.fingerprint}

    @cached_property
    def fingerprint(self) -> str:
        """A short name for exactly these pixels, labels and class names: 16 hexadecimal digits."""
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        for tensor in (*self.train, *self.test):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()[:16]


def read(
    name: str, root: str | Path, side: int | None = None, url: str | None = None, sizes: tuple = (None, None)
) -> Source:
    """The data set `name`, from the folder `root` or, for an archive that is not there, from `url` or its own server.

    Args:
        side: of the images of class folders, in pixels; 32 by default.
        sizes: how many training and test images to generate of `synthetic`; None for all.

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
    with alone(root / ".lock", f"data: waiting for another process that reads {root}"):
        if name == "folder":
            return _own_folders(root, side or SIDE)
        splits = _cifar100(root, url) if name == "cifar100" else _archive(name, root, url)
    return Source(name, *splits, CLASSES[name], *STATISTICS[name])


def read_for(args: argparse.Namespace, about: Mapping[str, Any], file: Path | None = None) -> Source:
    """The data set of the flags or, where they name none, of a checkpoint that says `about` itself what it is.

    Warns if the flags name another data set than the checkpoint `file`.

    Raises:
        UserError: as `read` says; the checkpoint has another number of classes, or a data set that is unknown here.
    """
    trained_on = about.get("dataset", args.dataset or "cifar100")
    name = args.dataset or trained_on
    if name not in DATASETS:
        raise UserError(f"{file}: it was trained on {name:.80}, a data set unknown here; give --dataset")
    if name in CLASSES:
        _check_classes(about, len(CLASSES[name]), name, file)  # before anything is downloaded
    side = args.side
    if name != trained_on:
        warn(f"{file} says that it was trained on {trained_on:.80}, not on {name}; without --dataset that is taken")
    elif not args.dataset and name != "cifar100":
        print(f"data: {name}, because {file} was trained on it", flush=True)
    if name == trained_on == "folder":
        side = side or about.get("side")
    source = read(name, args.data_root, side, args.data_url, (args.train_size, args.test_size))
    _check_classes(about, len(source.classes), name, file)
    return source


def _check_classes(about: Mapping[str, Any], found: int, name: str, file: Path | None) -> None:
    if (classes := about.get("classes", found)) != found:
        raise UserError(f"{file}: it was trained on {about.get('dataset')}, {classes} classes; {name} has {found}")


# ------------------------------------------------------------------------------------------------------------ archives


def _archive(name: str, root: Path, url: str | None) -> list[Split]:
    """Training and test split of an archive, which torchvision downloads if need be, checks and unpacks."""
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
    if splits := _load(kept, "checked"):
        return splits
    folders = [root / name for name in ("cifar100", "CIFAR-100-dataset", ".")]
    folder = next((folder for folder in folders if all((folder / half).is_dir() for half in CIFAR100)), None)
    if folder is None:
        found = _archive("cifar100", root, url)
    else:
        found = [_split_of(class_files(folder / half), SIDE, half) for half in CIFAR100]
    splits = []
    for split, (half, expected) in zip(found, CIFAR100.items(), strict=True):
        order, content = in_hash_order(split.pixels.numpy(), split.labels.numpy())
        if content != expected:
            raise UserError(
                f"{folder or root}: the {len(order):,} {half} images are not CIFAR-100's, or some lie in the wrong "
                "class; put a good copy there (for your own images: --dataset folder)"
            )
        splits.append(Split(split.pixels[order], split.labels[order]))
    _keep(kept, "checked", splits)
    return splits


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


def _load(kept: Path, name: str) -> list[Split] | None:
    """The splits that `_keep` wrote under this name; None if there are none, or the file is damaged."""
    with contextlib.suppress(Exception), open(kept, "rb") as file, np.load(file) as saved:  # its checksums are compared
        if str(saved["name"]) == name:
            return [Split(*(torch.from_numpy(saved[f"{half}_{x}"]) for x in Split._fields)) for half in CIFAR100]
    return None


def _keep(kept: Path, name: str, splits: list[Split]) -> None:
    """Keeps decoded splits for the next start, if the folder can be written to."""
    arrays = {f"{h}_{x}": getattr(s, x).numpy() for h, s in zip(CIFAR100, splits, strict=True) for x in Split._fields}
    part = kept.with_name(f".{kept.stem}.part.npz")
    with contextlib.suppress(OSError):
        try:
            np.savez(part, name=np.array(name), **arrays)
            os.replace(part, kept)
        finally:
            part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- class folders


def class_files(folder: Path) -> dict[str, list[Path]]:
    """The image files (see `SUFFIXES`) of each class, at any depth below folder/CLASS; both in alphabetical order."""
    places = sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))

    def is_image(file: Path) -> bool:
        return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()

    return {place.name: sorted(filter(is_image, place.rglob("*"))) for place in places}


def _own_folders(root: Path, side: int) -> Source:
    """The images in root/{train, test or val}/CLASS/ as squares, kept in the root until a file changes."""
    test = "test" if (root / "test").is_dir() or not (root / "val").is_dir() else "val"
    layout = "--data-root needs train/CLASS/ and test/CLASS/ (or val/CLASS/) with images, and at least 2 classes"
    found = []
    for folder in (root / "train", root / test):
        classes = class_files(folder) if folder.is_dir() else {}
        if len(classes) < 2:
            raise UserError(f"{folder}: {'too few class folders' if folder.is_dir() else 'no such folder'}; {layout}")
        if empty := [name for name, files in classes.items() if not files]:
            raise UserError(f"{folder / empty[0]} holds no image ({' '.join(SUFFIXES)}); {layout}")
        found.append(classes)
    if differing := sorted(found[0].keys() ^ found[1].keys()):
        where, other = ("train", test) if differing[0] in found[0] else (test, "train")
        raise UserError(f"class {differing[0]} is in {root / where} but not in {root / other}: both need the same ones")

    files = [file for classes in found for of_class in classes.values() for file in of_class]
    kept, name = root / f"class_folders_{side}.npz", _digest_of(root, files)
    splits = _load(kept, name)
    if splits is None:
        splits = [_split_of(classes, side, half) for half, classes in zip(("train", test), found, strict=True)]
        _keep(kept, name, splits)
    return Source("folder", *splits, list(found[0]), *statistics(splits[0].pixels))


def _digest_of(root: Path, files: list[Path]) -> str:
    """A digest of the paths below the root and the bytes of all files: reading them is fast, decoding them is not."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root)}\0".encode(errors="surrogateescape"))
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _split_of(classes: dict[str, list[Path]], side: int, what: str) -> Split:
    """The images of all classes as squares, decoded in parallel, with a progress bar."""
    files = [file for of_class in classes.values() for file in of_class]
    labels = [label for label, of_class in enumerate(classes.values()) for _ in of_class]
    pixels = np.empty((len(files), side, side, 3), np.uint8)
    pool = ThreadPoolExecutor()  # Pillow decodes and resizes outside Python's lock
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about odd metadata
            squares = pool.map(partial(square, side=side), files)
            bar = tqdm(squares, f"reading {what}", len(files), unit=" images", leave=False, disable=silent())
            for i, image in enumerate(bar):
                pixels[i] = image
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    return Split(torch.from_numpy(pixels), torch.tensor(labels))


def square(path: Path, side: int) -> np.ndarray:
    """Any image as (side, side, 3) uint8: resizes its shorter side to `side`, then crops the centre.

    Raises:
        UserError: it can't be read; names it.
    """
    try:
        with Image.open(path) as image:
            picture = as_rgb(image)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{path} cannot be read as an image ({error!r}); fetch it again, or remove it") from error
    return np.asarray(tvf.center_crop(tvf.resize(picture, side), side))


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any kind in RGB, as it looks on a white page: turned as its EXIF data says, transparent over white.

    Raises:
        ValueError: the range of its numbers is unknown.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip instead of scaling
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() >= 1 << 16:
            raise ValueError("32-bit pixels have no known range")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of (N, side, side, 3) uint8, in [0, 1]; 1 for a constant channel."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(3)]).double()
    value = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ value
    deviation = (share @ value**2 - mean**2).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(torch.where(deviation > 1e-6, deviation, 1.0).tolist())
