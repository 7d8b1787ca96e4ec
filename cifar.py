"""Images and labels as tensors on the device, served in batches of normalised (rotated) views.

A data set is small enough to live on the GPU as bytes (CIFAR-100: 180 MB). A batch is cut, flipped, rotated and
normalised there in a dozen whole-tensor operations: no worker processes, no copies from the host inside an epoch. All
draws of an epoch (order, flips, crops) are made at its start from (seed, phase, epoch) alone, on the CPU, so they are
the same on every device and in a resumed run.

    python cifar.py --data-root DIR      # downloads and checks a data set, without training anything
"""

import hashlib
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import flags, processes, sources
from harness.flags import UserError, warn
from harness.progress import Progress
from harness.record import entry
from harness.sources import SIDE, Files, Source, Split

LAYOUT = torch.channels_last  # of images and networks: convolutions are fastest in it


def padding(side: int) -> int:
    """Width of the black border of a `side` × `side` image: 4 of 32, so that crops start at 0 … 8 down and right."""
    return side // 8


class Batch(NamedTuple):
    """B images of a split in V views each, on the device. Of several processes each has only its share of the views."""

    x: Tensor | None  # (V·B, 3, side, side) float32, normalised, channels last; the view is fastest
    target: Tensor  # (B,) labels
    rows: Tensor  # (B,) which images of the split they are
    feature: Tensor | None = None  # (V·B, D) what the teacher sees in each view, if `teacher_store` adds it


class Draws(NamedTuple):
    """The random draws of one epoch over N images in V views, on the device."""

    order: Tensor  # (N,) the images in the order of their use
    window: Tensor  # (N, V) the window of each view, see `windows`


def windows(side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Where the pixels of every possible view lie in a padded image. The numbers below are those of side 32.

    A view is a flip (or none), a rotation by k · 90 degrees in the direction of `np.rot90`, and a crop of 32 × 32 from
    the 40 × 40 pixels of the padded image: 2 · 4 · 9 · 9 = 648 windows, each a fixed choice of pixels.

    All crops of one flip and rotation are the same pattern, shifted, so two small tables suffice.

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
    """The windows (N, V) of flip (N, 1) in {0, 1} and offsets top, left (N, V) in 0 … 8; view k is rotated k times."""
    turn, shifts = torch.arange(top.shape[1], device=top.device), 2 * padding(side) + 1
    return ((flip * 4 + turn) * shifts + top) * shifts + left


def draw(count: int, views: int, seed: int, phase: str, epoch: int, side: int = SIDE) -> Draws:
    """The order, flips and crops of a training epoch over `count` images, from (seed, phase, epoch) alone."""
    generator = seeded(seed, phase, epoch)
    order = torch.randperm(count, generator=generator)
    flip = torch.randint(2, (count, 1), generator=generator)  # shared by the views of an image
    top, left = torch.randint(2 * padding(side) + 1, (2, count, views), generator=generator)  # each view's own
    return Draws(order, window_rows(flip, top, left, side))


def seeded(*names: int | str) -> torch.Generator:
    """A generator whose numbers follow from the names alone."""
    digest = hashlib.sha256(" ".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def sample(labels: Tensor, size: int | None) -> Tensor:
    """Indices (size,), increasing, of the first images of every class in `labels` (N,); all if `size` is None.

    The classes' counts differ by at most 1 if there are enough images.
    """
    everything, count = torch.arange(len(labels)), torch.bincount(labels)
    order = labels.argsort(stable=True)
    place = torch.empty_like(order)  # of an image among those of its class
    place[order] = everything - (count.cumsum(0) - count)[labels[order]]
    return place.argsort(stable=True)[:size].sort().values


def few_shot(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices (M,), increasing, of a `fraction` of every class in `labels` (N,), at least one; drawn by the seed."""
    return _draw_of_each_class(labels, seed, "few shot", lambda count: max(1, round(count * fraction)))


def held_out(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """The same for the images to hold out, but at least one of each class stays."""
    share = lambda count: min(max(1, round(count * fraction)), count - 1)  # noqa: E731
    return _draw_of_each_class(labels, seed, "validation", share)


def _draw_of_each_class(labels: Tensor, seed: int, phase: str, share: Callable[[int], int]) -> Tensor:
    order = torch.randperm(len(labels), generator=seeded(seed, phase))
    kept = []
    for label in labels.unique():
        members = order[labels[order] == label]
        kept.append(members[: share(len(members))])
    return torch.cat(kept).sort().values


def label_noise(labels: Tensor, fraction: float, classes: int, seed: int) -> Tensor:
    """`labels` (N,) with exactly round(N · fraction) of them replaced by another class, drawn uniformly by the seed."""
    generator = seeded(seed, "label noise")
    wrong = torch.randperm(len(labels), generator=generator)[: round(len(labels) * fraction)]
    noisy = labels.clone()
    noisy[wrong] = (labels[wrong] + torch.randint(1, classes, wrong.shape, generator=generator)) % classes
    return noisy


class Images:
    """One split of a data set, or some of its images, on the device.

    Args:
        split: pixels (N, side, side, 3) uint8 and labels (N,).
        statistics: mean and standard deviation of the three channels, in [0, 1].
        batch_size: images per training step.
        seed: of every draw.
        index: (N,) int64, increasing: which images of the whole split these are; all if left out.
    """

    def __init__(
        self,
        split: Split,
        statistics: tuple,
        device: torch.device | str,
        batch_size: int = 64,
        seed: int = 0,
        index: Tensor | None = None,
    ):
        self.batch_size, self.seed = batch_size, seed
        self.pixels, self.labels = (x.to(device) for x in split)
        self.index = (torch.arange(len(self.labels)) if index is None else index).to(device)
        self.side = self.pixels.shape[1]
        # repeated for every pixel: elementwise work along one long row is vectorised, along rows of 3 it is not
        count = (self.side + 2 * padding(self.side)) ** 2
        self.mean, self.std = (torch.tensor(values).repeat(count).to(device) for values in statistics)
        self.windows = tuple(table.to(device) for table in windows(self.side))

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def __len__(self) -> int:
        return len(self.labels)

    def draws(self, phase: str, epoch: int, views: int) -> Draws:
        """The order and the views of a training epoch."""
        draws = draw(len(self), views, self.seed, phase, epoch, self.side)
        return Draws(*(x.to(self.device) for x in draws))

    def batches(self, phase: str, epoch: int, views: int) -> Iterator[Batch]:
        """A training epoch, whose last batch may be smaller.

        `views` is 1 (flip and crop) or 4 (rotated by 0, 90, 180, 270 degrees, with one flip and a crop each).
        """
        order, window = self.draws(phase, epoch, views)
        for rows, seen in zip(order.split(self.batch_size), window.split(self.batch_size), strict=True):
            own = processes.share(len(rows))
            yield Batch(self.views(rows[own], seen[own]), self.labels[rows], rows)

    def test_batches(self, views: int) -> Iterator[Batch]:
        """All images in their own order, without flip and crop, rotated if `views` is 4.

        A batch has 4 · batch_size views, so that none needs more memory than a student's training step.
        """
        centre = torch.full((1, views), padding(self.side), device=self.device)
        window = window_rows(torch.zeros_like(centre[:, :1]), centre, centre, self.side)
        for rows in torch.arange(len(self), device=self.device).split(4 * self.batch_size // views):
            own = rows[processes.share(len(rows))]
            yield Batch(self.views(own, window.expand(len(own), views)), self.labels[rows], rows)

    def views(self, rows: Tensor, window: Tensor) -> Tensor:
        """Normalised views of the images `rows` (B,) as `window` (B, V) says: (V·B, 3, side, side) in `LAYOUT`."""
        views = cut(self.normalise(pad(self.pixels[rows])), self.windows, window)
        return views.contiguous(memory_format=LAYOUT)

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

    One gather of whole pixels. Normalising comes first, because a batch has 1600 B pixels before the gather and 4096 B
    after it. With the tables of side 64 the same holds for that side.
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
    val: Images  # the best epoch is chosen on these: held-out images, the data set's own val/, else the test images
    test: Images
    about: dict  # what a checkpoint says of its data: see harness/checkpoint.py


def images_of(split: Split | Files, *more: Any, workers: int = 0) -> Images:
    """The images of a split; `more` is what `Images` takes beside it. `workers` processes read those in files."""
    if isinstance(split, Files):
        from photographs import Photographs  # which needs this module

        return Photographs(split, *more, workers=workers)
    return Images(split, *more)


def _some(source: Source, args: Namespace, device: torch.device | str, split: Split | Files, rows: Tensor) -> Images:
    more = (source.mean, source.std), device, args.batch_size, args.seed, rows
    return images_of(split.some(rows), *more, workers=args.workers)


def _check_size(source: Source, count: int, size: int | None, which: str) -> None:
    if size is not None and size > count:
        raise UserError(f"--{which}-size {size}: {source.name} has {count} such images; choose 1 to {count}")


def test_images(source: Source, args: Namespace, device: torch.device | str) -> Images:
    """The test images that the flags ask for: test_size.

    Raises:
        UserError: there are fewer images than asked for.
    """
    _check_size(source, len(source.test.labels), args.test_size, "test")
    return _some(source, args, device, source.test, sample(source.test.labels, args.test_size))


def load(source: Source, args: Namespace, device: torch.device | str) -> Data:
    """The images that the flags ask for: train_size, test_size, val_fraction, few_shot, label_noise.

    Raises:
        UserError: there are fewer images than asked for.
    """

    images = partial(_some, source, args, device)
    _check_size(source, len(source.train.labels), args.train_size, "train")
    rows, about = sample(source.train.labels, args.train_size), dict(source.about)
    val = test = test_images(source, args, device)
    if source.val is not None:
        if args.val_fraction is not None:
            raise UserError("--val-fraction: the best epoch is chosen on the images in val/; leave the flag out")
        val = images(source.val, torch.arange(len(source.val.labels)))
        print("data: the best epoch is chosen on the images in val/, and tested once at the end", flush=True)
    if args.val_fraction is not None:
        about["held_out"] = [args.val_fraction, args.seed]
        held = held_out(source.train.labels[rows], args.val_fraction, args.seed)
        if not len(held):
            raise UserError(f"--val-fraction {args.val_fraction}: no class has two training images; use more of them")
        val = images(source.train, rows[held])
        rows = rows[~torch.isin(rows, rows[held])]
        print(f"data: the best epoch is chosen on {len(val)} held-out training images", flush=True)
    if args.few_shot < 1:
        rows = rows[few_shot(source.train.labels[rows], args.few_shot, args.seed)]
    train = images(source.train, rows)
    if args.label_noise > 0:
        noisy = label_noise(source.train.labels[rows], args.label_noise, len(source.classes), args.seed)
        train.labels = noisy.to(device)
    if (size := min(args.batch_size, len(train))) < processes.COUNT:
        raise UserError(f"a batch of {size} images is too small for {processes.COUNT} processes; start fewer of them")
    if args.batch_size > len(train):
        more = f"--batch-size {args.batch_size} is more than the {len(train)} training images"
        warn(f"{more}: an epoch is one step")
    return Data(train, val, test, about | {"tested": len(val)})


@entry
def main(argv: list[str] | None = None) -> None:
    """Reads a data set, which downloads and checks it, and prints what it contains."""
    parser = flags.Parser("Downloads a data set, or checks the one that is there, without training anything.")
    flags.add_source(parser.add_argument)
    args = parser.parse_args(argv)
    source = sources.read(args.dataset or "cifar100", args.data_root, args.side, args.data_url)
    statistics = source.mean, source.std
    for split in filter(None, (source.train, source.val, source.test)):
        if isinstance(split, Files):  # which were not decoded yet
            images = images_of(split, statistics, "cpu", workers=args.workers)
            with Progress(len(images), "reading", "images") as progress:
                for batch in images.test_batches(views=1):
                    progress.add(len(batch.target))
    mean, std = (" ".join(f"{x:.4f}" for x in values) for values in statistics)
    print(
        f"{source.name}: {len(source.train.labels):,} training and {len(source.test.labels):,} test images, "
        f"{source.side} × {source.side}, {len(source.classes)} classes; mean {mean}, deviation {std}"
    )


if __name__ == "__main__":
    main()
