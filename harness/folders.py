"""Class folders: which of their files are images, which folder is which split, and what a pixel means."""

import contextlib
import io
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from harness.files import kind_of
from harness.flags import UserError
from harness.progress import Progress

SYSTEM = {  # what operating systems and storage servers put between files, in lower case
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "@synoresource", "~snapshot"),
    *("__macosx", "$recycle.bin", "recycler", "system volume information", "found.000", "lost+found", "__pycache__"),
    *("network trash folder", "temporary items", "thumbs.db", "desktop.ini", "icon\r"),
}
VAL = ("val", "valid", "validation", "dev")  # usual names of the images that choose the best epoch
PNG = b"\x89PNG\r\n\x1a\n"  # its first bytes
IDENTIFIED_ONLY = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows these formats, but can't read their pixels


def suffixes() -> set[str]:
    """The suffixes, in lower case, of all formats that Pillow reads."""
    extensions = Image.registered_extensions()  # loads all formats, so it comes first
    read = Image.OPEN.keys() - IDENTIFIED_ONLY | {"MPO"}  # Pillow opens MPO as JPEG
    return {end for end, name in extensions.items() if name in read}


# ------------------------------------------------------------------------------------------------------- which files


class Folder(NamedTuple):
    """The files of one split."""

    classes: dict[str, list[Path]]  # the image files of each class; both in alphabetical order
    ignored: Counter[str]  # how many other files there are, by suffix


def visible(folder: Path) -> list[Path]:
    """What a folder holds, in alphabetical order, without hidden files and those of operating systems.

    Raises:
        UserError: a link leads nowhere; names it.
    """
    paths = sorted(folder.iterdir())
    found = [path for path in paths if not path.name.startswith(".") and path.name.casefold() not in SYSTEM]
    for path in found:
        refuse_broken_link(path)
    return found


def refuse_broken_link(path: Path) -> None:
    """Raises UserError if `path` is a link that leads nowhere."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist: mend or remove it")


def files_below(folder: Path, above: tuple = ()) -> Iterator[Path]:
    """All visible files below a folder. Links are followed.

    Raises:
        UserError: a link leads nowhere, or to a folder above it; names it.
    """
    place = os.stat(folder)
    if (place.st_dev, place.st_ino) in above:
        link = next((path for path in (folder, *folder.parents) if path.is_symlink()), folder)
        raise UserError(f"{link} is a link to a folder that contains it: remove it")
    for path in visible(folder):
        if path.is_dir():
            yield from files_below(path, (*above, (place.st_dev, place.st_ino)))
        elif path.is_file():
            yield path


def class_files(folder: Path) -> Folder:
    """The images at any depth below folder/CLASS/, for each class; class names in Unicode's composed form (NFC)."""
    images, classes, ignored = suffixes(), {}, Counter()
    for place in visible(folder):
        if not place.is_dir():
            ignored[place.suffix.lower()] += 1  # an image here belongs to no class
            continue
        found = list(files_below(place))
        name = unicodedata.normalize("NFC", place.name)
        classes.setdefault(name, []).extend(file for file in found if file.suffix.lower() in images)
        ignored.update(file.suffix.lower() for file in found if file.suffix.lower() not in images)
    return Folder(dict(sorted(classes.items())), ignored)


# ---------------------------------------------------------------------------------------------------------- which split


def splits(root: Path, train: bool = True, known: Sequence[str] = ()) -> dict[str, Folder]:
    """The splits of class folders below `root`: train, test and, if there are three, val.

    test/ holds the test images, or val/ does if test/ is missing or its images have no classes.

    Args:
        train: whether train/ is needed. Without it, only the test split is read.
        known: without train/, the class names, which tell class folders from others.

    Raises:
        UserError: a split is missing, a class has no image, or the splits have other classes.
    """
    layout = f"--data-root {root} needs train/CLASS/ and test/CLASS/ (or val/CLASS/) with images"
    folders = {name: root / name for name in ("train", "test") if train or name == "test"}
    folders["val"] = next((root / name for name in VAL if (root / name).is_dir()), root / "val")
    for folder in folders.values():
        refuse_broken_link(folder)
    folders = {name: folder for name, folder in folders.items() if folder.is_dir()}
    found = {name: read_split(folder) for name, folder in folders.items()}
    if train and "train" not in found:
        raise UserError(f"{root / 'train'}: no such folder; {layout}")
    known = set(found["train"].classes if train else known)

    def labelled(name: str) -> bool:  # images of no class often lie in one folder, of whatever name
        classes = [place for place, files in found[name].classes.items() if files] if name in found else []
        return len(classes) > 1 or not known.isdisjoint(classes)

    if labelled("val") and not labelled("test"):
        if "test" in found:
            print(f"data: {root / 'test'} has no classes, so {root / 'val'} is the test set", flush=True)
        found["test"], folders["test"] = found.pop("val"), folders["val"]
    elif not train or not labelled("val"):
        found.pop("val", None)
    if "test" not in found:
        lacking = f"{folders['val']} has no classes" if "val" in folders else "val/ is missing, too"
        raise UserError(f"{root / 'test'}: no such folder, and {lacking}; {layout}")

    for name, split in found.items():
        if empty := [place for place, files in split.classes.items() if not files]:
            raise UserError(f"{folders[name] / empty[0]} holds no image; {layout}")
        if train and (differing := sorted(known ^ set(split.classes))):
            has, lacks = ("train", name) if differing[0] in known else (name, "train")
            more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
            have = f"class {differing[0]} is in {folders[has]} but not in {folders[lacks]}{more}"
            raise UserError(f"{have}: all splits need the same classes")
        if len(split.classes) < 2:
            raise UserError(f"{folders[name]} has {len(split.classes)} class folders, needs at least 2; {layout}")
    return found


def read_split(folder: Path) -> Folder:
    """`class_files` or, if there are none, Tiny-ImageNet's val/, whose val_annotations.txt gives the class of an image.

    Raises:
        UserError: the file does not, or names an image that is not there.
    """
    found, listed = class_files(folder), folder / "val_annotations.txt"
    if not listed.is_file():
        return found
    if any(files for name, files in found.classes.items() if name != "images"):
        # a script has moved the images into class folders, and may have left an empty one
        classes = {name: files for name, files in found.classes.items() if files or name != "images"}
        return found._replace(classes=classes)
    class_of: dict[Path, str] = {}
    for number, line in enumerate(listed.read_text("utf-8-sig", errors="replace").splitlines(), 1):
        name, *rest = line.split("\t")
        places = [place / name for place in (folder / "images", folder) if (place / name).is_file()]
        if line.strip() and not (rest and rest[0].strip()):
            raise UserError(f"{listed}, line {number}: needs the name of an image, a tab and its class")
        if line.strip() and not places:
            raise UserError(f"{listed}, line {number}: there is no image {name} in images/")
        if places:
            class_of[places[0]] = unicodedata.normalize("NFC", rest[0].strip())
    classes: dict[str, list[Path]] = {name: [] for name in sorted(set(class_of.values()))}
    for file, name in sorted(class_of.items()):
        classes[name].append(file)
    return Folder(classes, Counter(file.suffix.lower() for file in files_below(folder) if file not in class_of))


# ------------------------------------------------------------------------------------------------------ what it shows


def decode(files: Sequence[Path], side: int, what: str) -> np.ndarray:
    """The images as squares (N, side, side, 3) uint8, decoded in parallel, with the progress of reading `what`.

    Raises:
        UserError: an image can't be read; names it.
    """
    pixels = np.empty((len(files), side, side, 3), np.uint8)
    progress = Progress(len(files), f"reading {what}", "images")
    pool = ThreadPoolExecutor()  # Pillow decodes and resizes outside Python's lock
    try:
        with warnings.catch_warnings(), progress:
            warnings.simplefilter("ignore")  # they are about odd metadata
            for i, image in enumerate(pool.map(partial(square, side=side), files)):
                pixels[i] = image
                progress.add(1)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    return pixels


def square(path: Path, side: int) -> np.ndarray:
    """Any image as (side, side, 3) uint8: resizes its shorter side to `side`, then crops the centre.

    Raises:
        UserError: as `picture` says.
    """
    from torchvision.transforms import functional as tvf  # here: it takes as long to import as PyTorch

    return np.asarray(tvf.center_crop(tvf.resize(picture(path), side), side))


def picture(path: Path) -> Image.Image:
    """Any image in RGB, see `as_rgb`.

    Raises:
        UserError: it can't be read, or the meaning of its pixels is not certain; names it.
    """
    content = path.read_bytes()
    try:
        try:
            return as_rgb(content)
        except Exception:
            if not content.startswith(PNG):
                raise
            try:
                return as_rgb(without_metadata(content, b"eXIf"))
            except Exception:
                return as_rgb(without_metadata(content))
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has more pixels than Pillow accepts ({error}): make it smaller") from error
    except Exception as error:  # Pillow raises many kinds for damaged files
        reason = kind_of(content) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read as an image ({reason}): replace it, or remove it") from error


def without_metadata(png: bytes, *more: bytes) -> bytes:
    """A PNG file with only the chunks that its pixels need, and `more`: viewers ignore damaged comments, Pillow not."""
    kept, place = [PNG], len(PNG)
    while place + 12 <= len(png):
        end = place + 12 + int.from_bytes(png[place : place + 4], "big")  # length, name, content, checksum
        if png[place + 4 : place + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", *more):
            kept.append(png[place:end])
        place = end
    return b"".join(kept)


def as_rgb(content: bytes) -> Image.Image:
    """An image file in RGB, as it looks on a white page: turned as its EXIF data says, transparent over white.

    Raises:
        ValueError: the range of its numbers is unknown.
    """
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        wide = image.mode.startswith("I")  # 16 or 32 bits of grey, which Pillow would clip instead of scaling
        certain = image.format in ("PNG", "PPM", "JPEG2000")  # these say what is white
        if image.format == "TIFF":
            tags = ((258, 1), (262, 1), (339, 1), (281, 65535))  # and what they are if left out
            bits, white, signs, top = (np.atleast_1d(image.tag_v2.get(*tag)).tolist() for tag in tags)
            certain = bits == [16] and white == [1] and signs == [1] and top == [65535]
            if set(signs) != {1}:
                raise ValueError("pixels with a sign or a fraction have no known range")
        if image.mode == "F" or (wide and (not certain or "transparency" in image.info)):
            raise ValueError("the range of its pixels is not known for certain; save it with 8 bits")
        key, depth = image.info.get("transparency"), content[24]
        if image.format == "PNG" and image.mode in ("L", "RGB") and key is not None and depth != 8:
            # the transparent colour has the file's depth, and Pillow has scaled the pixels to 8 bits
            scaled = np.asarray(key) >> 8 if depth == 16 else np.asarray(key) * 255 // (2**depth - 1)
            image.info["transparency"] = tuple(scaled.tolist()) if scaled.ndim else int(scaled)
        with contextlib.suppress(Exception):  # EXIF data may be nonsense
            image = ImageOps.exif_transpose(image)
    if wide:
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
