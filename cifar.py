"""Images and labels as tensors on the device, served in batches of normalised (rotated) views.

A data set is small enough to live on the GPU as bytes (CIFAR-100: 180 MB), and a batch is cut, flipped, rotated and
normalised there in a dozen whole-tensor operations: no worker processes, no copies from the host inside an epoch.
Every draw of an epoch (order, flips, crops) is made at its start from (seed, phase, epoch) alone, on the CPU, so that
it is the same on every device and a resumed run sees what an uninterrupted one would have seen.

    python cifar.py --data-root DIR      # downloads and checks a data set, without training anything
"""

from argparse import Namespace

from harness import flags


def parse_args(argv: list[str] | None) -> Namespace:
    parser = flags.Parser("Downloads a data set, or checks the one that is there, without training anything.")
    flags.add_source(parser.add_argument)
    parser.set_defaults(train_size=None, test_size=None)
    return parser.parse_args(argv)


import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.record import entry
from harness.sources import (
    DataError,
    Split,
    alone,
    listing,
    own_folders,
    read_archive,
    read_cifar100,
    read_own_folders,
    statistics,
)

SIDE = 32  # of the named data sets; class folders may have other sides

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


def padding(side: int) -> int:
    """Width of the black border of a `side` × `side` image: 4 of 32, where crops start at 0 … 8 down and right."""
    return side // 8


class Batch(NamedTuple):
    """B images of a split in V views each, on the device."""

    # (V·B, 3, side, side) float32, normalised, channels last; the views of an image follow one another. None: not asked
    x: Tensor | None
    target: Tensor  # (B,) labels
    rows: Tensor  # (B,) which images of the split they are
    window: Tensor  # (B, V) which of the windows (648 of side 32) each view is, see `windows`
    feature: Tensor | None = None  # (V·B, D) float16, what the teacher saw in each view, if that is stored


class Draws(NamedTuple):
    """The random draws of one epoch over N images seen in V views, on the device."""

    order: Tensor  # (N,) the images in the order of their use
    window: Tensor  # (N, V) which of the windows each view is, see `windows`


def windows(side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Where the pixels of every possible view lie in a padded image. The figures are those of side 32.

    A view is a flip (or none), a rotation by k · 90 degrees in the direction of `np.rot90`, and a crop of 32 × 32 out
    of the 40 × 40 pixels of the padded image: 2 · 4 · 9 · 9 windows, each a fixed choice of pixels.

    All crops of one flip and rotation are the same pattern, shifted; two small tables stay in the caches.

    Returns:
        int32 tables: pattern (8, 1024), row flip · 4 + k, and shift (648,), row ((flip · 4 + k) · 9 + top) · 9 + left.
        The pixels of window w are pattern[w // 81] + shift[w].
    """
    padded = side + 2 * padding(side)
    pixel = torch.arange(padded * padded).view(padded, padded)
    views = torch.stack([torch.rot90(image, k) for image in (pixel, pixel.flip(1)) for k in range(4)])
    crops = views.int().unfold(1, side, 1).unfold(2, side, 1)  # 8 x top x left x 32 x 32
    pattern, corner = crops[:, 0, 0].flatten(1), crops[..., 0, 0]
    return pattern, (corner - corner[:, :1, :1]).flatten()


def window_rows(flip: Tensor, top: Tensor, left: Tensor, side: int = SIDE) -> Tensor:
    """Number of the window of flip (N, 1) in {0, 1}, offsets top, left (N, V) in 0 … 8; view k is turned k times."""
    turn, shifts = torch.arange(top.shape[1], device=top.device), 2 * padding(side) + 1
    return ((flip * 4 + turn) * shifts + top) * shifts + left


def draw(count: int, views: int, seed: int, phase: str, epoch: int, side: int = SIDE) -> Draws:
    """The order, flips and crops of a training epoch over `count` images, from (seed, phase, epoch) alone."""
    generator = _generator(seed, phase, epoch)
    order = torch.randperm(count, generator=generator)
    flip = torch.randint(2, (count, 1), generator=generator)  # shared by the views of an image
    top, left = torch.randint(2 * padding(side) + 1, (2, count, views), generator=generator)  # each view's own
    return Draws(order, window_rows(flip, top, left, side))


def _generator(*names: int | str) -> torch.Generator:
    """Random numbers that follow from the names alone."""
    digest = hashlib.sha256(" ".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def sample(labels: Tensor, size: int | None) -> Tensor:
    """Indices (size,), increasing, of a fair sample of `labels` (N,): the first images of every class.

    The classes' counts differ by at most 1 where there are enough images. All are taken if `size` is None.
    """
    everything, count = torch.arange(len(labels)), torch.bincount(labels)
    order = labels.argsort(stable=True)
    place = torch.empty_like(order)  # of an image among those of its class
    place[order] = everything - (count.cumsum(0) - count)[labels[order]]
    return place.argsort(stable=True)[:size].sort().values


def few_shot(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices (M,), increasing, of the `fraction` of every class in `labels` (N,) that the seed draws; at least one."""
    return _draw_of_each_class(labels, seed, "few shot", lambda count: max(1, round(count * fraction)))


def held_out(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """The same of the images to be held out, but one of each class stays behind."""
    share = lambda count: min(max(1, round(count * fraction)), count - 1)  # noqa: E731
    return _draw_of_each_class(labels, seed, "validation", share)


def _draw_of_each_class(labels: Tensor, seed: int, phase: str, share: Callable[[int], int]) -> Tensor:
    order = torch.randperm(len(labels), generator=_generator(seed, phase))
    kept = []
    for label in labels.unique():
        members = order[labels[order] == label]
        kept.append(members[: share(len(members))])
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
        pixels: (N, side, side, 3) uint8.
        labels: (N,) int64.
        statistics: mean and standard deviation of the three channels, in [0, 1].
        batch_size: images a training step.
        seed: of every draw.
        about: what checkpoints trained on it say of it: `dataset`, `classes` (their number), `side`, `mean`, `std`;
            and of test images `tested`, their number.
        index: (N,) int64, increasing: which images of the whole split these are; all if left out.

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
        self.side = pixels.shape[1]
        # repeated for every pixel: elementwise work along one long row is vectorised, along rows of 3 it is not
        count = (self.side + 2 * padding(self.side)) ** 2
        self.mean, self.std = (torch.tensor(values).repeat(count).to(device) for values in statistics)
        self.windows = tuple(table.to(device) for table in windows(self.side))

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, phase: str, epoch: int, views: int, features: bool = False, cut: bool = True) -> Iterator[Batch]:
        """A training epoch, whose last batch may be smaller.

        `views` is 1 (flip and crop) or 4 (rotated by 0, 90, 180, 270 degrees, sharing their flip, not their crop).
        With `features` the batches bring the teacher's, if they are stored; it looks at what is new to it before this
        returns. `cut=False` leaves the views out of these batches, for those who read nothing but the features.
        """
        draws = draw(len(self), views, self.seed, phase, epoch, self.side)
        order, window = (x.to(self.labels.device) for x in draws)
        return self._cut_into(self.batch_size, order, window, self._looked(order, window, features), cut)

    def test_batches(self, views: int, features: bool = False, cut: bool = True) -> Iterator[Batch]:
        """The images in their own order, not flipped, not cropped, rotated if `views` is 4; the rest as above.

        A batch has 4 · batch_size views, so that none needs more memory than a student's training step.
        """
        rows = torch.arange(len(self), device=self.labels.device)
        window = self.test_windows(views).expand(len(self), views)
        return self._cut_into(4 * self.batch_size // views, rows, window, self._looked(rows, window, features), cut)

    def test_windows(self, views: int) -> Tensor:
        """The windows (V,) of every test image's views."""
        centre = torch.full((1, views), padding(self.side), device=self.labels.device)
        return window_rows(torch.zeros_like(centre[:, :1]), centre, centre, self.side)[0]

    def _looked(self, order: Tensor, window: Tensor, features: bool) -> Tensor | None:
        return self.features(order, window) if features and self.features else None

    def _cut_into(
        self, size: int, order: Tensor, window: Tensor, features: Tensor | None, cut: bool
    ) -> Iterator[Batch]:
        for i in range(0, len(order), size):
            rows, seen = order[i : i + size], window[i : i + size]
            feature = None if features is None else features[i : i + size].flatten(0, 1).contiguous()
            x = self.views(rows, seen) if cut or feature is None else None
            yield Batch(x, self.labels[rows], rows, seen, feature)

    def views(self, rows: Tensor, window: Tensor) -> Tensor:
        """Normalised views of the images `rows` (B,) as `window` (B, V) says: (V·B, 3, side, side), channels last."""
        return cut(self.normalise(pad(self.pixels[rows])), self.windows, window)

    def normalise(self, padded: Tensor) -> Tensor:
        """(B, 40, 40, 3) uint8 → float32 with mean 0 and deviation 1 over the data set, as torchvision computes it."""
        return padded.flatten(1).float().div_(255).sub_(self.mean).div_(self.std).view(padded.shape)

    def brightness(self, views: Tensor) -> Tensor:
        """Normalised views (N, 3, side, side) → the same in [0, 1], to be looked at."""
        mean, std = (x[:3].view(3, 1, 1) for x in (self.mean, self.std))
        return views * std + mean


def pad(pixels: Tensor) -> Tensor:
    """(B, 32, 32, 3) → (B, 40, 40, 3), or (B, 64, 64, 3) → (B, 80, 80, 3), with a black border."""
    border = padding(pixels.shape[1])
    return F.pad(pixels, (0, 0, border, border, border, border))


def cut(padded: Tensor, windows: tuple[Tensor, Tensor], window: Tensor) -> Tensor:
    """The views `window` (B, V) of padded images (B, 40, 40, 3): (V·B, 3, 32, 32), view fastest, channels last.

    One gather of whole pixels. It comes after normalising because a batch has 1600 B pixels before it and 4096 B after.
    Of side 64 as of 32, with the tables of that side.
    """
    count, height, width, channels = padded.shape
    pattern, shift = windows
    crops, side = len(shift) // len(pattern), math.isqrt(pattern.shape[1])
    first = torch.arange(count, device=padded.device, dtype=torch.int32) * (height * width)
    start = shift[window] + first.unsqueeze(1)  # B x V
    pixel = pattern[window // crops] + start.unsqueeze(2)  # B x V x 1024
    chosen = padded.reshape(-1, channels).index_select(0, pixel.flatten())
    return chosen.view(-1, side, side, channels).permute(0, 3, 1, 2)


class Data(NamedTuple):
    """A data set in use."""

    train: Images
    val: Images  # which the best epoch is chosen on: held out by --val-fraction, or else the test images themselves
    test: Images


class Source(NamedTuple):
    """A data set as it lies there, before the flags choose among its images."""

    train: Split
    test: Split
    about: dict  # see `about_dataset`

    @property
    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the three channels, in [0, 1]."""
        return self.about["mean"], self.about["std"]


def load(args: Namespace, device: torch.device | str) -> Data:
    """The images that the flags ask for (`flags.make_parser`, group "data").

    Raises:
        DataError: the files are missing or damaged and could not be downloaded; fewer images than asked for.
    """
    source = read(args)
    for split, size, flag in ((source.train, args.train_size, "train"), (source.test, args.test_size, "test")):
        count = len(split.labels)
        if size is not None and size > count:
            raise DataError(f"--{flag}-size {size}: {args.dataset} has {count} such images; choose 1 to {count}")

    def images(split: Split, rows: Tensor, **more: int) -> Images:
        settings = args.batch_size, args.seed, source.about | more, rows
        return Images(split.pixels[rows], split.labels[rows], source.statistics, device, *settings)

    rows = sample(source.train.labels, args.train_size)
    tested = sample(source.test.labels, args.test_size)
    val = test = images(source.test, tested, tested=len(tested))
    if args.val_fraction is not None:
        held = held_out(source.train.labels[rows], args.val_fraction, args.seed)
        if not len(held):
            raise DataError(f"--val-fraction {args.val_fraction}: no class has two training images; use more of them")
        val = images(source.train, rows[held], tested=len(held))
        rows = rows[~torch.isin(rows, rows[held])]
        print(f"data: the best epoch is chosen on {len(val)} held-out training images", flush=True)
    if args.few_shot < 1:
        rows = rows[few_shot(source.train.labels[rows], args.few_shot, args.seed)]
    train = images(source.train, rows)
    if args.label_noise > 0:
        noisy = label_noise(source.train.labels[rows], args.label_noise, source.about["classes"], args.seed)
        train.labels = noisy.to(device)
    if args.batch_size > len(train):
        more = f"--batch-size {args.batch_size} is more than the {len(train)} training images"
        flags.warn(f"{more}: an epoch is one step")
    return Data(train, val, test)


def read(args: Namespace) -> Source:
    """The data set of the flags `dataset`, `data_root`, `data_url` and `side`.

    Raises:
        DataError: as `load` says.
    """
    name, root = args.dataset, Path(args.data_root)
    if name == "folder":
        folders = own_folders(root)
        with alone(root):
            splits = read_own_folders(folders, args.side or SIDE)
        classes, side = len(folders.classes), splits["train"].pixels.shape[1]
        return Source(**splits, about=_about(name, classes, side, statistics(splits["train"].pixels)))
    if args.side not in (None, SIDE):
        raise DataError(f"--side {args.side} is for --dataset folder; the images of {name} have {SIDE} × {SIDE} pixels")
    if name == "synthetic":
        print("data: synthetic shapes; accuracy says nothing about photographs", flush=True)
        splits = {"train": synthetic(True, args.train_size), "test": synthetic(False, args.test_size)}
        splits = {half: Split(*split) for half, split in splits.items()}
    else:
        url = args.data_url
        with alone(root):
            splits = read_cifar100(root, url) if name == "cifar100" else read_archive(name, root, url)
    return Source(**splits, about=about_dataset(args))


def about_dataset(args: Namespace, known: Mapping = MappingProxyType({})) -> dict:
    """The data set in plain values: its name, number of classes, side of the images, mean and deviation.

    Those of class folders are taken from what is `known`, so that no image need be read.
    """
    name = args.dataset
    if name == "folder":
        return dict(known) if "mean" in known else read(args).about
    return _about(name, NUM_CLASSES[name], SIDE, STATISTICS[name])


def _about(name: str, classes: int, side: int, moments: tuple) -> dict:
    mean, std = map(list, moments)  # and the name without its type, flags.Default: checkpoints take plain values only
    return {"dataset": str(name), "classes": classes, "side": side, "mean": mean, "std": std}


def num_classes(args: Namespace) -> int:
    """Number of classes of the data set that the flags ask for, without reading it."""
    return len(own_folders(Path(args.data_root)).classes) if args.dataset == "folder" else NUM_CLASSES[args.dataset]


def use_dataset_of(args: Namespace, checkpoint: Any) -> None:
    """Sets `args.dataset` to what a checkpoint says of itself, unless the flag was given; warns if these differ.

    Of class folders it sets `args.side`, too. `checkpoint` is what `models.read` gives.

    Raises:
        UserError: the checkpoint has another number of classes, or a data set that is unknown here.
    """
    file, told = checkpoint.file, checkpoint.about.get("dataset", args.dataset)
    if told != args.dataset and isinstance(args.dataset, flags.Default):
        if told not in flags.DATASETS:
            raise flags.UserError(f"{file}: it was trained on {told:.80}, a data set unknown here; give --dataset")
        args.dataset = told
        print(f"data: {told}, on which {file} says that it was trained", flush=True)
    if told == args.dataset == "folder":  # the classes are counted where the images are read, if they are
        if args.side is None and checkpoint.about.get("side") in flags.SIDES:
            args.side = checkpoint.about["side"]
        return
    classes = num_classes(args)
    has = checkpoint.about.get("classes", classes)
    if has != classes:
        raise flags.UserError(f"{file}: it was trained on {told:.80}, {has} classes; {args.dataset} has {classes}")
    if told != args.dataset:
        more = f"not on {args.dataset}; without --dataset that is taken"
        flags.warn(f"{file} says that it was trained on {told:.80}, {more}")


def class_names(args: Namespace) -> list[str]:
    """What the labels mean, in their order; nothing where they are numbers."""
    return own_folders(Path(args.data_root)).classes if args.dataset == "folder" else CLASSES.get(args.dataset, [])


def identity(args: Namespace) -> dict[str, str]:
    """What identifies the data beside the flags: nothing, but for somebody's class folders what lies in them."""
    return {"class_folders": listing(own_folders(Path(args.data_root)))} if args.dataset == "folder" else {}


def synthetic(train: bool, size: int | None = None) -> tuple[Tensor, Tensor]:
    """A stand-in for CIFAR-100 that needs no file: accuracy on it says nothing about photographs.

    100 classes = 5 shapes × 5 hues × 4 textures, drawn at random place, size and brightness on a noisy, dark ground:
    plain enough for the demo, where a network has a few hundred steps to learn them.

    Returns:
        The first `size` of 10,000 (training) or 2,000 (test) images (N, 32, 32, 3) uint8 and their labels (N,), which
        are always the same.
    """
    count, rng = (10_000, np.random.default_rng(1)) if train else (2_000, np.random.default_rng(2))
    labels = rng.permuted(np.tile(np.arange(100), (count // 100, 1)), axis=1).ravel()[:size]  # every 100 hold each once
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


@entry(DataError)
def main(argv: list[str] | None = None) -> None:
    """Reads a data set, which downloads and checks it, and prints what it has."""
    args = parse_args(argv)
    source = read(args)
    side, numbers = source.about["side"], [" ".join(f"{x:.4f}" for x in row) for row in source.statistics]
    print(
        f"{args.dataset}: {len(source.train.labels):,} training and {len(source.test.labels):,} test images, {side} × "
        f"{side}, {source.about['classes']} classes; mean {numbers[0]}, deviation {numbers[1]}"
    )


if __name__ == "__main__":
    main()
