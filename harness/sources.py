"""Where the images come from: archives that torchvision knows, or class folders of image files. All is checked.

One process at a time reads a data root, so that of several first starts one downloads, unpacks and decodes, and the
others find it done. What is written there appears whole or not at all.
"""

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import shutil
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets as tv
from torchvision.transforms import functional as tvf
from tqdm import tqdm

from harness.flags import silent

SUFFIXES = tv.folder.IMG_EXTENSIONS

# CIFAR-100's number of images and what `in_hash_order` says of their content
CIFAR100 = {
    "train": (50_000, "640c97a4012a8aebfcaf57fd82a33dd43b37d2e397a02cb9b0a3d89e6d6d936d"),
    "test": (10_000, "a6a97df7b61bc7420bc44268696e8963d33129bc050978f2a63d8fe3420989fa"),
}
FASHION_MNIST = {"train": 60_000, "test": 10_000}


class DataError(ValueError):
    """The data set can't be had as asked for; the message says what to do."""


class Split(NamedTuple):
    pixels: Tensor  # (N, side, side, 3) uint8
    labels: Tensor  # (N,) int64


# --------------------------------------------------------------------------------------------- archives and downloads


def read_archive(name: str, root: Path, url: str | None) -> dict[str, Split]:
    """The splits of `name` (cifar100, cifar10, fashion_mnist), downloaded from `url` or its own server if need be.

    Raises:
        DataError: the files are damaged, or missing and could not be downloaded.
    """
    fashion = name == "fashion_mnist"
    place = root / "FashionMNIST" / "raw" if fashion else root
    dataset = {"cifar100": tv.CIFAR100, "cifar10": tv.CIFAR10, "fashion_mnist": tv.FashionMNIST}[name]
    try:
        splits = _fashion_mnist(place, root, url) if fashion else _cifar(dataset, root, url)
    except DataError:
        raise
    except Exception as error:  # urllib, tarfile, gzip, pickle and torchvision each raise their own
        files = "its four files, unpacked or as .gz," if fashion else dataset.filename
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name} could not be read from or downloaded to {root} ({reason}); put {files} into {place}, "
            "or name a mirror with --data-url"
        ) from error
    return {
        half: Split(torch.as_tensor(data.data), torch.as_tensor(data.targets))
        for half, data in zip(("train", "test"), splits, strict=True)
    }


def _cifar(dataset: type, root: Path, url: str | None) -> list[tv.CIFAR10]:
    with contextlib.suppress(RuntimeError):  # it is not unpacked there, or not whole: torchvision checks each file
        return [dataset(str(root), train=train) for train in (True, False)]
    archive = root / dataset.filename
    _fetch_if_missing(archive, dataset.tgz_md5, dataset.url if url is None else url)
    return [dataset(str(root), train=train, download=True) for train in (True, False)]  # unpacks the archive


def _fashion_mnist(raw: Path, root: Path, url: str | None) -> list[tv.FashionMNIST]:
    """Unpacked files are taken as they are, whoever put them there: their numbers of images and labels must agree."""
    mirror = (tv.FashionMNIST.mirrors[0] if url is None else url).rstrip("/")
    for name, md5 in tv.FashionMNIST.resources:
        archive, file = raw / name, raw / name.removesuffix(".gz")
        if not file.exists():
            raw.mkdir(parents=True, exist_ok=True)
            _fetch_if_missing(archive, md5, f"{mirror}/{name}")
            with gzip.open(archive) as packed, _whole(file) as unpacked:
                shutil.copyfileobj(packed, unpacked)
    splits = [tv.FashionMNIST(str(root), train=train) for train in (True, False)]
    for data, (half, count) in zip(splits, FASHION_MNIST.items(), strict=True):
        images, labels = tuple(data.data.shape), tuple(data.targets.shape)
        if images != (count, 28, 28) or labels != (count,) or data.targets.max() > 9:
            raise DataError(
                f"{raw}: the {half} files hold {images[0]:,} images of {images[1]} × {images[2]} and {labels[0]:,} "
                f"labels up to {data.targets.max()}; Fashion-MNIST has {count:,} of 28 × 28 there, with labels up to "
                "9: delete them to have them downloaded, or put good ones there"
            )
        data.data = F.pad(data.data, (2, 2, 2, 2)).unsqueeze(3).expand(-1, -1, -1, 3).contiguous()  # grey 28 × 28
    return splits


def _fetch_if_missing(archive: Path, md5: str, url: str) -> None:
    """Makes sure that `archive` is there and has this md5 sum.

    Raises:
        DataError: the archive, or what the server gave, is another or damaged.
    """
    if archive.exists():
        if (found := _md5(archive)) != md5:
            raise DataError(
                f"{archive} is damaged or not all of it: its md5 is {found}, not {md5}; delete it to have it "
                f"downloaded, or put {archive.name} into {archive.parent} again"
            )
        return
    print(f"data: downloading {url}", flush=True)
    request = urllib.request.Request(url, headers={"User-Agent": "python"})
    with _whole(archive) as file, urllib.request.urlopen(request, timeout=60) as answer:
        size = int(answer.headers.get("Content-Length") or 0) or None
        with tqdm(total=size, desc=archive.name, unit="B", unit_scale=True, leave=False, disable=silent()) as bar:
            while block := answer.read(1 << 16):
                bar.update(file.write(block))
        file.flush()
        if (found := _md5(Path(file.name))) != md5:
            raise DataError(f"{url} gave something else than {archive.name}: its md5 is {found}, not {md5}")


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _whole(path: Path) -> Iterator:
    """A file to write to, which becomes `path` at the end, or vanishes if anything goes wrong."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Around the reading of a data root: other processes wait, for it may have to be downloaded or decoded first."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # nothing can be written there, or the file system has no locks
            root.mkdir(parents=True, exist_ok=True)
            lock = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"data: waiting for another process that reads {root}", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------------------------------------------ class folders


def class_files(folder: Path) -> dict[str, list[Path]]:
    """The image files (see `SUFFIXES`) of each class, at any depth below folder/CLASS; both in alphabetical order."""
    places = sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))
    return {
        place.name: sorted(
            file
            for file in place.rglob("*")
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
        )
        for place in places
    }


def read_images(paths: list[Path], side: int, read: Callable[[Path, int], np.ndarray], what: str) -> np.ndarray:
    """What `read(path, side)` makes of each image: (N, side, side, 3) uint8. In parallel, with a progress bar.

    Raises:
        DataError: one or more can't be read; names them.
    """
    pixels = np.empty((len(paths), side, side, 3), np.uint8)

    def read_one(i: int) -> str | None:
        try:
            pixels[i] = read(paths[i], side)
        except DataError:
            raise
        except Exception as error:  # Pillow raises many kinds for damaged files
            return f"{paths[i]} ({' '.join(str(error).split()) or type(error).__name__})"
        return None

    pool = ThreadPoolExecutor()  # Pillow decodes and resizes outside Python's lock
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata; whatever matters raises
            done = pool.map(read_one, range(len(paths)))
            bar = tqdm(done, f"reading {what}", len(paths), unit=" images", leave=False, disable=silent())
            bad = [fault for fault in bar if fault]
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError(f"{', '.join(bad[:3])}{more}: cannot be read as an image; fetch it again, or remove it")
    return pixels


def square(path: Path, side: int) -> np.ndarray:
    """Any image as (side, side, 3) uint8: its shorter side resized to `side`, then the centre."""
    with Image.open(path) as image:
        picture = as_rgb(image)
    return np.asarray(tvf.center_crop(tvf.resize(picture, side), side))


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any kind in RGB, as it looks on a white page: turned as its EXIF data says, transparent over white.

    Raises:
        ValueError: its numbers have no known range, or its colours no known meaning.
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


class Folders(NamedTuple):
    """Somebody's class folders: what lies there."""

    root: Path
    classes: list[str]
    files: dict[str, list[Path]]  # by split
    labels: dict[str, list[int]]


def own_folders(root: Path) -> Folders:
    """What lies in root/{train, test or val}/CLASS/.

    Raises:
        DataError: a split is missing, a class has no image, or the splits have other classes.
    """
    layout = f"--data-root is to hold train/CLASS/ and test/CLASS/ (or val/CLASS/) with images ({' '.join(SUFFIXES)})"
    test = root / ("test" if (root / "test").is_dir() or not (root / "val").is_dir() else "val")
    for folder in (root / "train", test):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; {layout}")
    found = {half: class_files(folder) for half, folder in (("train", root / "train"), ("test", test))}
    if differing := sorted(set(found["train"]) ^ set(found["test"])):
        where, other = (root / "train", test) if differing[0] in found["train"] else (test, root / "train")
        more = f" (so are {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise DataError(f"class {differing[0]} is in {where} but not in {other}{more}: both need the same classes")
    for folder, classes in ((root / "train", found["train"]), (test, found["test"])):
        if empty := [name for name, files in classes.items() if not files]:
            raise DataError(f"{folder / empty[0]} holds no image; {layout}")
    if len(found["train"]) < 2:
        raise DataError(f"{root / 'train'} has {len(found['train'])} class folders, needs at least 2; {layout}")
    files, labels = {}, {}
    for half, classes in found.items():
        files[half] = [file for of_class in classes.values() for file in of_class]
        labels[half] = [label for label, of_class in enumerate(classes.values()) for _ in of_class]
    return Folders(root, list(found["train"]), files, labels)


def listing(folders: Folders, times: bool = False) -> str:
    """A name for what lies there: a digest of the paths below the root and the sizes of all files.

    With `times` of when they were changed, too, which a copy of the folders need not keep.
    """
    lines = []
    for files in folders.files.values():
        for file in files:
            status = file.stat()
            lines.append([str(file.relative_to(folders.root)), status.st_size, status.st_mtime_ns if times else 0])
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]


def read_own_folders(folders: Folders, side: int) -> dict[str, Split]:
    """The images of both splits as squares, kept as one file in the root until the folders change."""
    kept, name = folders.root / f"class_folders_{side}.npz", listing(folders, times=True)
    pixels = {}
    with contextlib.suppress(Exception), np.load(kept) as saved:  # it has checksums: a damaged one is made again
        if str(saved["listing"]) == name:
            pixels = {half: saved[half] for half in folders.files}
    if not pixels:
        for half, files in folders.files.items():
            pixels[half] = read_images(files, side, square, str(files[0].relative_to(folders.root).parts[0]))
        with contextlib.suppress(OSError), _whole(kept) as file:  # a root that can't be written to is read each time
            np.savez(file, listing=np.array(name), **pixels)
    return {half: Split(torch.from_numpy(pixels[half]), torch.tensor(folders.labels[half])) for half in folders.files}


def statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of (N, side, side, 3) uint8, in [0, 1]; of a constant channel 1."""
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for part in pixels.split(1000):
        for channel, values in enumerate(part.flatten(0, 2).unbind(1)):
            counts[channel] += torch.bincount(values, minlength=256)
    value = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ value
    deviation = (share @ value**2 - mean**2).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(torch.where(deviation > 1e-6, deviation, 1.0).tolist())


# --------------------------------------------------------------------------------------------------------- CIFAR-100


def read_cifar100(root: Path, url: str | None = None) -> dict[str, Split]:
    """CIFAR-100 from class folders below `root` if there are any, else from torchvision's archive, which it downloads.

    Either way these are the same images in the same order, and their content is checked.

    Raises:
        DataError: an image is missing, damaged, changed, in the wrong class or one too many.
    """
    folders = [root / name for name in ("cifar100", "CIFAR-100-dataset", ".")]
    folder = next((folder for folder in folders if all((folder / half).is_dir() for half in CIFAR100)), None)
    archive = read_archive("cifar100", root, url) if folder is None else None
    splits = {}
    for half in CIFAR100:
        if folder is None:
            pixels, labels = (part.numpy() for part in archive[half])
            order, content = in_hash_order(pixels, labels)
            if content != CIFAR100[half][1]:
                raise DataError(f"{root}: the archive's {half} split is not CIFAR-100's; put a good copy there")
        else:
            pixels, labels, order = _from_class_folders(folder / half, half, root / f"cifar100_{half}.npy")
        splits[half] = Split(torch.from_numpy(pixels[order]), torch.from_numpy(labels[order].astype(np.int64)))
    return splits


def in_hash_order(pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, str]:
    """An order of images that any source of them gives alike, and a name for their content.

    Args:
        pixels: (N, 32, 32, 3) uint8.
        labels: (N,) below 256.

    Returns:
        The order by the SHA-256 of an image's bytes, ties by label: (N,). The SHA-256 over the sorted SHA-256 digests
        of each image's bytes and label.
    """
    keys, contents = [], []
    for image, label in zip(np.ascontiguousarray(pixels), labels.tolist(), strict=True):
        sha256 = hashlib.sha256(image)
        keys.append((sha256.digest(), label))
        sha256.update(bytes([label]))
        contents.append(sha256.digest())
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return np.array(order), hashlib.sha256(b"".join(sorted(contents))).hexdigest()


def _from_class_folders(folder: Path, half: str, kept: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, labels and hash order of `folder`/CLASS/*.png, kept as the one file `kept` for the next time.

    The file is checked like the images, so a damaged or half-written one is only made again.
    """
    count, expected = CIFAR100[half]
    with contextlib.suppress(OSError, ValueError):
        rows = np.load(kept)
        pixels, labels = rows[:, :-1].reshape(-1, 32, 32, 3), rows[:, -1]
        order, content = in_hash_order(pixels, labels)
        if content == expected:
            return pixels, labels, order
    classes = class_files(folder)
    uneven = [name for name, files in classes.items() if len(files) != count // 100]
    if len(classes) != 100 or uneven:
        what = f"{len(classes)} classes" if len(classes) != 100 else f"{len(classes[uneven[0]])} images of {uneven[0]}"
        raise DataError(
            f"{folder} holds {what}; CIFAR-100 has 100 classes of {count // 100} images each there "
            "(your own images: --dataset folder)"
        )
    pixels = read_images([file for files in classes.values() for file in files], 32, _of_cifar100, str(folder))
    labels = np.arange(100, dtype=np.uint8).repeat(count // 100)
    order, content = in_hash_order(pixels, labels)
    if content != expected:
        raise DataError(f"{folder}: an image is not CIFAR-100's or lies in the wrong class; fetch the folders again")
    with contextlib.suppress(OSError), _whole(kept) as file:  # a root that can't be written to is read again next time
        np.save(file, np.concatenate([pixels.reshape(count, -1), labels[:, None]], 1))
    return pixels, labels, order


def _of_cifar100(path: Path, side: int) -> np.ndarray:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    if pixels.shape != (side, side, 3):
        raise DataError(f"{path} has {pixels.shape[1]} × {pixels.shape[0]} pixels; CIFAR-100's have 32 × 32")
    return pixels
