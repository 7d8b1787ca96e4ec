"""Images and labels as tensors on the device, served in batches of normalised (rotated) views.

A data set is small enough to live on the GPU as bytes (CIFAR-100: 180 MB), and a batch is cut, flipped, rotated and
normalised there in a dozen whole-tensor operations: no worker processes, no copies from the host inside an epoch.
Every draw of an epoch (order, flips, crops) is made at its start from (seed, phase, epoch) alone, on the CPU, so that
it is the same on every device and a resumed run sees what an uninterrupted one would have seen.
"""

import contextlib
import hashlib
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import datasets as tv
from tqdm import tqdm

from flags import warn

SIDE, PAD = 32, 4
SHIFTS = 2 * PAD + 1  # a crop starts at 0 … 8, downwards and to the right

# mean and standard deviation of each channel, in [0, 1]
STATISTICS = {
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2675, 0.2565, 0.2761)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "fashion_mnist": ((0.2190,) * 3, (0.3318,) * 3),  # of the images padded to 32 × 32
    "synthetic": ((0.1863,) * 3, (0.2018,) * 3),
}
NUM_CLASSES = {"cifar100": 100, "cifar10": 10, "fashion_mnist": 10, "synthetic": 100}
# what the labels mean, in their order; of a data set that is not here they are numbers
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
    "fashion_mnist": "T-shirt/top trouser pullover dress coat sandal shirt sneaker bag ankle_boot".split(),
}

# CIFAR-100's number of images and what `in_hash_order` says of their content
CIFAR100 = {
    "train": (50_000, "640c97a4012a8aebfcaf57fd82a33dd43b37d2e397a02cb9b0a3d89e6d6d936d"),
    "test": (10_000, "a6a97df7b61bc7420bc44268696e8963d33129bc050978f2a63d8fe3420989fa"),
}


class DataError(ValueError):
    """The data set can't be had as asked for; the message says what to do."""


class Batch(NamedTuple):
    """B images of a split in V views each, on the device."""

    x: Tensor  # (V·B, 3, 32, 32) float32, normalised, channels last; the views of an image follow one another
    target: Tensor  # (B,) labels
    rows: Tensor  # (B,) which images of the split they are
    window: Tensor  # (B, V) which of the 648 windows each view is, see `windows`
    feature: Tensor | None = None  # (V·B, D) float16, what the teacher saw in each view, if that is stored


class Draws(NamedTuple):
    """The random draws of one epoch over N images seen in V views, on the device."""

    order: Tensor  # (N,) the images in the order of their use
    window: Tensor  # (N, V) which of the 8 · 81 windows each view is, see `windows`


def windows() -> tuple[Tensor, Tensor]:
    """Where the pixels of every possible view lie in a padded image.

    A view is a flip (or none), a rotation by k · 90 degrees in the direction of `np.rot90`, and a crop of 32 × 32 out
    of the 40 × 40 pixels of the padded image: 2 · 4 · 9 · 9 windows, each a fixed choice of pixels.

    All crops of one flip and rotation are the same pattern, shifted; two small tables stay in the caches.

    Returns:
        int32 tables: pattern (8, 1024), row flip · 4 + k, and shift (648,), row ((flip · 4 + k) · 9 + top) · 9 + left.
        The pixels of window w are pattern[w // 81] + shift[w].
    """
    padded = SIDE + 2 * PAD
    pixel = torch.arange(padded * padded).view(padded, padded)
    views = torch.stack([torch.rot90(image, k) for image in (pixel, pixel.flip(1)) for k in range(4)])
    crops = views.int().unfold(1, SIDE, 1).unfold(2, SIDE, 1)  # 8 x top x left x 32 x 32
    pattern, corner = crops[:, 0, 0].flatten(1), crops[..., 0, 0]
    return pattern, (corner - corner[:, :1, :1]).flatten()


def window_rows(flip: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Number of the window of flip (N, 1) in {0, 1}, offsets top, left (N, V) in 0 … 8; view k is turned k times."""
    turn = torch.arange(top.shape[1], device=top.device)
    return ((flip * 4 + turn) * SHIFTS + top) * SHIFTS + left


def draw(count: int, views: int, seed: int, phase: str, epoch: int) -> Draws:
    """The order, flips and crops of a training epoch over `count` images, from (seed, phase, epoch) alone."""
    generator = _generator(seed, phase, epoch)
    order = torch.randperm(count, generator=generator)
    flip = torch.randint(2, (count, 1), generator=generator)  # shared by the views of an image
    top, left = torch.randint(SHIFTS, (2, count, views), generator=generator)  # each view's own
    return Draws(order, window_rows(flip, top, left))


def _generator(*names: int | str) -> torch.Generator:
    """Random numbers that follow from the names alone."""
    digest = hashlib.sha256(" ".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def few_shot(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices (M,), increasing, of the `fraction` of every class in `labels` (N,) that the seed draws; at least one."""
    order = torch.randperm(len(labels), generator=_generator(seed, "few shot"))
    kept = []
    for label in labels.unique():
        members = order[labels[order] == label]
        kept.append(members[: max(1, round(len(members) * fraction))])
    return torch.cat(kept).sort().values


def label_noise(labels: Tensor, fraction: float, classes: int, seed: int) -> Tensor:
    """`labels` (N,) with exactly round(N · fraction) of them replaced by another class, drawn uniformly by the seed."""
    generator = _generator(seed, "label noise")
    wrong = torch.randperm(len(labels), generator=generator)[: round(len(labels) * fraction)]
    noisy = labels.clone()
    noisy[wrong] = (labels[wrong] + torch.randint(1, classes, wrong.shape, generator=generator)) % classes
    return noisy


class Images:
    """One split of a data set on the device.

    Args:
        pixels: (N, 32, 32, 3) uint8.
        labels: (N,) int64.
        statistics: mean and standard deviation of the three channels, in [0, 1].
        batch_size: images a training step.
        seed: of every draw.
        about: what the checkpoints trained on it say of it, see `about_dataset`.
        index: (N,) int64, which images of the whole split these are; left out: its first N.

    `features` gives what the teacher sees in the views `window` (N, V) of the images `rows` (N,), as (N, V, D) float16;
    None if nothing stores that (`teacher_store.look_once`).
    """

    features: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        statistics: tuple,
        device: torch.device | str,
        batch_size: int = 64,
        seed: int = 0,
        about: dict | None = None,
        index: Tensor | None = None,
    ):
        self.batch_size, self.seed, self.about = batch_size, seed, about or {}
        self.index = (torch.arange(len(labels)) if index is None else index).to(device)
        self.pixels = pixels.to(device)
        self.labels = labels.to(device)
        # repeated for every pixel: elementwise work along one long row is vectorised, along rows of 3 it is not
        mean, std = (torch.tensor(values).repeat((SIDE + 2 * PAD) ** 2).to(device) for values in statistics)
        self.mean, self.std = mean, std
        self.windows = tuple(table.to(device) for table in windows())

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, phase: str, epoch: int, views: int, features: bool = False) -> Iterator[Batch]:
        """A training epoch, whose last batch may be smaller.

        `views` is 1 (flip and crop) or 4 (rotated by 0, 90, 180, 270 degrees, sharing their flip, not their crop).
        With `features` the batches bring the teacher's, if they are stored; it looks at what is new to it before this
        returns.
        """
        draws = draw(len(self), views, self.seed, phase, epoch)
        order, window = (x.to(self.labels.device) for x in draws)
        return self._cut_into(self.batch_size, order, window, self._looked(order, window, features))

    def test_batches(self, views: int, features: bool = False) -> Iterator[Batch]:
        """The images in their own order, not flipped, not cropped, rotated if `views` is 4; `features` as above.

        A batch has 4 · batch_size views, so that none needs more memory than a student's training step.
        """
        rows = torch.arange(len(self), device=self.labels.device)
        window = self.test_windows(views).expand(len(self), views)
        return self._cut_into(4 * self.batch_size // views, rows, window, self._looked(rows, window, features))

    def test_windows(self, views: int) -> Tensor:
        """The windows (V,) of every test image's views."""
        centre = torch.full((1, views), PAD, device=self.labels.device)
        return window_rows(torch.zeros_like(centre[:, :1]), centre, centre)[0]

    def _looked(self, order: Tensor, window: Tensor, features: bool) -> Tensor | None:
        return self.features(order, window) if features and self.features else None

    def _cut_into(self, size: int, order: Tensor, window: Tensor, features: Tensor | None) -> Iterator[Batch]:
        for i in range(0, len(order), size):
            rows, seen = order[i : i + size], window[i : i + size]
            feature = None if features is None else features[i : i + size].flatten(0, 1).contiguous()
            yield Batch(self.views(rows, seen), self.labels[rows], rows, seen, feature)

    def views(self, rows: Tensor, window: Tensor) -> Tensor:
        """Normalised views of the images `rows` (B,) as `window` (B, V) says: (V·B, 3, 32, 32), channels last."""
        return cut(self.normalise(pad(self.pixels[rows])), self.windows, window)

    def normalise(self, padded: Tensor) -> Tensor:
        """(B, 40, 40, 3) uint8 → float32 with mean 0 and deviation 1 over the data set, as torchvision computes it."""
        return padded.flatten(1).float().div_(255).sub_(self.mean).div_(self.std).view(padded.shape)

    def brightness(self, views: Tensor) -> Tensor:
        """Normalised views (N, 3, 32, 32) → the same in [0, 1], to be looked at."""
        mean, std = (x[:3].view(3, 1, 1) for x in (self.mean, self.std))
        return views * std + mean


def pad(pixels: Tensor) -> Tensor:
    """(B, 32, 32, 3) → (B, 40, 40, 3) with a black border."""
    return F.pad(pixels, (0, 0, PAD, PAD, PAD, PAD))


def cut(padded: Tensor, windows: tuple[Tensor, Tensor], window: Tensor) -> Tensor:
    """The views `window` (B, V) of padded images (B, 40, 40, 3): (V·B, 3, 32, 32), view fastest, channels last.

    One gather of whole pixels. It comes after normalising because a batch has 1600 B pixels before it and 4096 B after.
    """
    count, height, width, channels = padded.shape
    pattern, shift = windows
    first = torch.arange(count, device=padded.device, dtype=torch.int32) * (height * width)
    start = shift[window] + first.unsqueeze(1)  # B x V
    pixel = pattern[window // SHIFTS**2] + start.unsqueeze(2)  # B x V x 1024
    chosen = padded.reshape(-1, channels).index_select(0, pixel.flatten())
    return chosen.view(-1, SIDE, SIDE, channels).permute(0, 3, 1, 2)


def about_dataset(name: str) -> dict:
    """A data set in plain values: its name, number of classes, side of the images, mean and deviation."""
    mean, std = map(list, STATISTICS[name])
    return {"dataset": name, "classes": NUM_CLASSES[name], "side": SIDE, "mean": mean, "std": std}


def load(args: Namespace, device: torch.device | str) -> tuple[Images, Images]:
    """The training and the test split that the flags ask for (`flags.make_parser`, group "data").

    Raises:
        DataError: the files are missing or damaged and could not be downloaded; fewer images than asked for.
    """
    name = args.dataset
    if name == "synthetic":
        print("data: synthetic shapes; accuracy means nothing", flush=True)
    splits = []
    for train, size in ((True, args.train_size), (False, args.test_size)):
        if name == "synthetic":
            pixels, labels = synthetic(train, size)
        elif name == "cifar100":
            pixels, labels = cifar100("train" if train else "test", Path(args.data_root), args.data_url)
        else:
            pixels, labels = _read(name, args.data_root, train, args.data_url)
        if size is not None and size > len(pixels):
            flag = "--train-size" if train else "--test-size"
            raise DataError(f"{flag} {size}: {name} has {len(pixels)} such images; choose 1 to {len(pixels)}")
        pixels, labels, kept = pixels[:size], labels[:size], None
        if train and args.few_shot < 1:
            kept = few_shot(labels, args.few_shot, args.seed)
            pixels, labels = pixels[kept], labels[kept]
        about = about_dataset(name) | ({} if train else {"tested": len(pixels)})
        if train and args.label_noise > 0:
            labels = label_noise(labels, args.label_noise, NUM_CLASSES[name], args.seed)
        if train and args.batch_size > len(pixels):
            warn(f"--batch-size {args.batch_size} is more than the {len(pixels)} training images: an epoch is one step")
        splits.append(Images(pixels, labels, STATISTICS[name], device, args.batch_size, args.seed, about, kept))
    return splits[0], splits[1]


def cifar100(split: str, root: Path, url: str | None = None) -> tuple[Tensor, Tensor]:
    """CIFAR-100 from class folders below `root` if there are any, else from torchvision's archive, which it downloads.

    Either way these are the same images in the same order, and their content is checked.

    Raises:
        DataError: an image is missing, damaged, changed, in the wrong class or one too many.
    """
    folders = [root / name for name in ("cifar100", "CIFAR-100-dataset", ".")]
    folder = next((folder for folder in folders if all((folder / half).is_dir() for half in CIFAR100)), None)
    if folder is None:
        pixels, labels = _read("cifar100", root, split == "train", url)
        order, content = in_hash_order(pixels.numpy(), labels.numpy())
        if content != CIFAR100[split][1]:
            raise DataError(f"{root}: the archive's {split} split is not CIFAR-100's; put a good copy there")
        return pixels[order], labels[order]
    pixels, labels, order = _from_class_folders(folder / split, split, root / f"cifar100_{split}.npy")
    return torch.from_numpy(pixels[order]), torch.from_numpy(labels[order].astype(np.int64))


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


def _from_class_folders(folder: Path, split: str, kept: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, labels and hash order of `folder`/CLASS/*.png, kept as the one file `kept` for the next time.

    The file is checked like the images, so a damaged or half-written one is only made again.
    """
    count, expected = CIFAR100[split]
    with contextlib.suppress(OSError, ValueError):
        rows = np.load(kept)
        pixels, labels = rows[:, :-1].reshape(-1, SIDE, SIDE, 3), rows[:, -1]
        order, content = in_hash_order(pixels, labels)
        if content == expected:
            return pixels, labels, order
    try:
        images = tv.ImageFolder(str(folder))
    except FileNotFoundError as error:  # no class, or one without an image
        raise DataError(f"{folder}: {error}; CIFAR-100 has 100 classes with images in each") from error
    each = Counter(label for _, label in images.samples)
    uneven = [name for name, label in images.class_to_idx.items() if each[label] != count // 100]
    if len(images.classes) != 100 or uneven:
        what = f"{len(images.classes)} classes" if len(images.classes) != 100 else ""
        what = what or f"{each[images.class_to_idx[uneven[0]]]} images of {uneven[0]}"
        raise DataError(f"{folder} holds {what}; CIFAR-100 has 100 classes of {count // 100} images each there")
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        read = pool.map(_read_image, [path for path, _ in images.samples])
        pixels = np.stack(list(tqdm(read, f"reading {folder}", count, unit=" images", leave=False, disable=_silent())))
    labels = np.array([label for _, label in images.samples], np.uint8)
    order, content = in_hash_order(pixels, labels)
    if content != expected:
        raise DataError(f"{folder}: an image is not CIFAR-100's or lies in the wrong class; fetch the folders again")
    rows = np.concatenate([pixels.reshape(count, -1), labels[:, None]], 1)
    with contextlib.suppress(OSError):  # a root that can't be written to is read again next time
        part = kept.with_name(f".{kept.name}.{os.getpid()}.part.npy")
        np.save(part, rows)
        os.replace(part, kept)
    return pixels, labels, order


def _silent() -> bool | None:
    return True if sys.stderr is None else None  # None: silent unless stderr is a terminal


def _read_image(path: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise DataError(f"{path} cannot be read as an image; fetch it again") from error
    if pixels.shape != (SIDE, SIDE, 3):
        raise DataError(f"{path} has {pixels.shape[1]} × {pixels.shape[0]} pixels; CIFAR-100's have 32 × 32")
    return pixels


def _read(name: str, root: str | Path, train: bool, url: str | None) -> tuple[Tensor, Tensor]:
    """Pixels (N, 32, 32, 3) uint8 and labels (N,) through torchvision, which downloads and checks the files."""
    dataset = {"cifar100": tv.CIFAR100, "cifar10": tv.CIFAR10, "fashion_mnist": tv.FashionMNIST}[name]
    if url is not None:
        mirror = {"mirrors": [url.rstrip("/") + "/"]} if name == "fashion_mnist" else {"url": url}
        dataset = type(dataset.__name__, (dataset,), mirror)  # keeps the md5 sums; the name is part of the path
    try:
        data = dataset(str(root), train=train, download=True)
    except Exception as error:  # torchvision, urllib, tarfile, gzip and pickle each raise their own
        place = Path(root) / ("FashionMNIST/raw" if name == "fashion_mnist" else "")
        files = "its four files, unpacked," if name == "fashion_mnist" else dataset.filename
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name} could not be read from or downloaded to {root} ({reason}); put {files} into {place}, "
            "or name a mirror with --data-url"
        ) from error
    pixels = torch.as_tensor(data.data)
    if pixels.dim() == 3:  # grey 28 × 28 → three equal channels of 32 × 32
        pixels = F.pad(pixels, (2, 2, 2, 2)).unsqueeze(3).expand(-1, -1, -1, 3).contiguous()
    return pixels, torch.as_tensor(data.targets)


def synthetic(train: bool, size: int | None = None) -> tuple[Tensor, Tensor]:
    """A stand-in for CIFAR-100 that needs no file: accuracy on it says nothing about photographs.

    100 classes = 5 shapes × 5 hues × 4 textures, drawn at random place, size and brightness on a noisy, dark ground:
    plain enough for the demo, where a network has a few hundred steps to learn them.

    Returns:
        The first `size` of 10,000 (training) or 2,000 (test) images (N, 32, 32, 3) uint8 and their labels (N,), which
        are always the same.
    """
    count, rng = (10_000, np.random.default_rng(1)) if train else (2_000, np.random.default_rng(2))
    labels = rng.permutation(np.arange(count) % 100)[:size]
    # radius, place of the centre, phase of the texture, brightness, grey of the ground, shift of the hue
    random = rng.random((count, 7), np.float32)[:size].T[..., None, None]
    radius, wave = 9 + 4 * random[0], 2 * np.pi * random[3]
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    v, u = (
        (axis - radius - place * (SIDE - 1 - 2 * radius)) / radius for axis, place in ((y, random[1]), (x, random[2]))
    )

    shape, hue, texture = labels % 5, labels // 5 % 5, labels // 25
    distance, box = np.hypot(u, v), np.maximum(np.abs(u), np.abs(v))
    outlines = [
        distance < 1,  # disc
        box < 0.85,  # square
        (v < 0.8) & (v > 2 * np.abs(u) - 1),  # triangle
        (distance < 1) & (distance > 0.55),  # ring
        (box < 1) & (np.minimum(np.abs(u), np.abs(v)) < 0.35),  # cross
    ]
    inside = np.choose(shape[:, None, None], outlines)
    textures = [
        np.ones_like(u),
        np.sin(1.6 * y + wave),
        np.sin(1.6 * x + wave),
        np.sin(1.6 * x + wave) * np.sin(1.6 * y),
    ]
    shade = 1 - 0.5 * (1 - np.choose(texture[:, None, None], textures))

    angle = 2 * np.pi * ((hue + 0.4 * random[6, :, 0, 0])[:, None] / 5 + np.arange(3) / 3)
    colour = (0.5 + 0.45 * np.cos(angle))[:, None, None] * (1 + 0.2 * random[4, ..., None])
    ground = 0.05 + 0.15 * random[5, ..., None]
    picture = np.where(inside[..., None], shade[..., None] * colour, ground).astype(np.float32)
    picture += 0.04 * rng.standard_normal(picture.shape, np.float32)  # last: the first images do not depend on `size`
    return torch.from_numpy((picture.clip(0, 1) * 255).astype(np.uint8)), torch.from_numpy(labels)
