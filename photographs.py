"""Images above 64 pixels, read from their files while a network trains: decoded, cropped and handed over as bytes.

Worker processes decode each image once and cut one random crop from it; flip, rotations and normalisation follow on
the device. So the four views of an image cost one decoding. All draws follow from (seed, phase, epoch, image): any
number of workers gives the same batches, and so does a resumed run.
"""

import contextlib
import ctypes
import math
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import io
from torchvision.transforms import functional as tvf

from cifar import LAYOUT, Batch, Images, seeded
from harness import folders, processes
from harness.flags import UserError
from harness.sources import Files

CHUNK = 16  # images that a worker hands over at once
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a training crop: its share of the image, width ÷ height
RESIZE = 0.875  # a test image is the centre of one whose shorter side is side ÷ 0.875


class Photographs(Images):
    """One split of a data set, or some of its images, in files; the arguments are those of `Images`.

    Args:
        workers: how many processes read the files; 0: this one does.
    """

    def __init__(
        self,
        split: Files,
        statistics: tuple,
        device: torch.device | str,
        batch_size: int = 64,
        seed: int = 0,
        index: Tensor | None = None,
        workers: int = 0,
    ):
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.paths, self.side, self.labels = split.paths, split.side, split.labels.to(device)
        self.index = (torch.arange(len(self.labels)) if index is None else index).to(device)
        self.mean, self.std = (torch.tensor(values).to(device) for values in statistics)

    def batches(self, phase: str, epoch: int, views: int) -> Iterator[Batch]:
        """A training epoch, whose last batch may be smaller; 4 `views` are one crop and flip, rotated."""
        generator = seeded(self.seed, phase, epoch)
        order = torch.randperm(len(self), generator=generator)
        flip = torch.randint(2, (len(self),), generator=generator)
        seeds = torch.randint(2**31, (len(self),), generator=generator)  # of the crops
        batches = order.split(self.batch_size)
        shares = [rows[processes.share(len(rows))] for rows in batches]
        for rows, own, pixels in zip(batches, shares, self.read(shares, seeds), strict=True):
            flipped = torch.where(flip[own].to(self.device).view(-1, 1, 1, 1) > 0, pixels.flip(2), pixels)
            yield self.batch(rows, flipped, views)

    def test_batches(self, views: int) -> Iterator[Batch]:
        """All images in their own order, their centres, rotated if `views` is 4. A batch has 4 · batch_size views."""
        batches = torch.arange(len(self)).split(4 * self.batch_size // views)
        shares = [rows[processes.share(len(rows))] for rows in batches]
        for rows, pixels in zip(batches, self.read(shares), strict=True):
            yield self.batch(rows, pixels, views)

    def batch(self, rows: Tensor, pixels: Tensor, views: int) -> Batch:
        """Normalised, rotated views of pixels (n, side, side, 3): all images `rows` (B,), or this process's share."""
        image = pixels.float().div_(255).sub_(self.mean).div_(self.std)
        turned = torch.stack([image.rot90(k, (1, 2)) for k in range(views)], 1).flatten(0, 1)
        rows = rows.to(self.device)
        return Batch(turned.permute(0, 3, 1, 2).contiguous(memory_format=LAYOUT), self.labels[rows], rows)

    def read(self, batches: Sequence[Tensor], seeds: Tensor | None = None) -> Iterator[Tensor]:
        """The pixels (B, side, side, 3) uint8, on the device, of each of the `batches`: numbers of images (B,).

        `seeds` (N,) draw the crops of all images; without them the centres are read.

        Raises:
            UserError: an image can't be read; names it.
        """
        # Workers write into shared memory: at most two tasks each, while this process reads the result of another.
        count, uint8 = 2 * self.workers + 1, {"dtype": torch.uint8}
        slots = torch.empty(count, CHUNK, self.side, self.side, 3, **uint8).share_memory_()
        chunks = enumerate(rows for batch in batches for rows in batch.split(CHUNK))
        tasks = ((rows.tolist(), None if seeds is None else seeds[rows].tolist(), i % count) for i, rows in chunks)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of more workers than cores, of forking beside other threads
            loader = iter(
                DataLoader(
                    Crops(self.paths, slots),
                    batch_size=None,  # the tasks are batches already
                    sampler=tasks,
                    num_workers=self.workers,
                    prefetch_factor=2 if self.workers else None,
                    worker_init_fn=end_with_parent,
                    multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
                    generator=torch.Generator(),  # else it draws from the one that dropout uses
                )
            )
        try:
            for batch in batches:
                pixels = torch.empty(len(batch), *slots.shape[2:], **uint8, pin_memory=self.device.type == "cuda")
                for part in pixels.split(CHUNK):
                    slot = next(loader)
                    if isinstance(slot, Exception):
                        raise slot
                    part.copy_(slots[slot, : len(part)])
                yield pixels.to(self.device, non_blocking=True)
            next(loader, None)  # ends the workers
        finally:
            del loader  # ends them after an error, too, although its traceback still holds this frame


class Crops(Dataset):
    """What the workers do: crops of the images `paths`, written into `slots` (M, CHUNK, side, side, 3) uint8."""

    def __init__(self, paths: np.ndarray, slots: Tensor):
        self.paths, self.slots = paths, slots

    def __getitem__(self, task: tuple[list[int], list[int] | None, int]) -> int | Exception:
        """Fills a slot and returns its number, or an error: raised, it would lose its type on the way."""
        (rows, seeds, slot), side = task, self.slots.shape[2]
        for i, row in enumerate(rows):
            try:
                image = decode(Path(os.fsdecode(self.paths[row])))
            except (UserError, OSError) as error:
                return error
            cut = centre(image, side) if seeds is None else crop(image, side, seeds[i])
            self.slots[slot, i] = cut.permute(1, 2, 0)
        return slot


def end_with_parent(worker: int) -> None:
    """Prepares a worker process: it leaves Ctrl-C to its parent, and ends with it even if that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # another status would look like a fault of its own
    if sys.platform == "linux":  # a forked worker also holds its parent's locks, which the next start needs
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libjpeg's remarks on images that it can read


def decode(path: Path) -> Tensor:
    """An image file as (3, H, W) uint8, with the meaning that folders.py gives it.

    torchvision decodes JPEG files twice as fast as Pillow, to the same pixels. Pillow decodes all other files, and JPEG
    files that may have to be turned, and says which are damaged. torchvision 0.29 announced that its decoder will be
    removed; Pillow will then decode all files.

    Raises:
        UserError: it can't be read; names it.
    """
    content = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, and of that removal
        if content.startswith(b"\xff\xd8") and b"Exif" not in content and b"Orientation" not in content:
            with contextlib.suppress(RuntimeError, AttributeError):  # damaged; removed
                image = io.decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
                if len(image) < 4:  # else CMYK
                    return image.expand(3, -1, -1)
        return tvf.pil_to_tensor(folders.picture(path))


def crop(image: Tensor, side: int, seed: int) -> Tensor:
    """A random crop of an image (3, H, W), resized to (3, side, side): torchvision's RandomResizedCrop."""
    top, left, height, width = crop_box(*image.shape[1:], random.Random(seed))
    return resize(image[:, top : top + height, left : left + width], side, side)


def crop_box(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop: the first of ten tries that fits, else the largest centre."""
    for _ in range(10):
        area, ratio = height * width * rng.uniform(*AREA), math.exp(rng.uniform(*map(math.log, RATIO)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def centre(image: Tensor, side: int) -> Tensor:
    """The centre (3, side, side) of an image (3, H, W) whose shorter side was resized to side ÷ 0.875."""
    scale = round(side / RESIZE) / min(image.shape[1:])
    height, width = (round(length * scale) for length in image.shape[1:])
    return tvf.center_crop(resize(image, height, width), side)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear with antialiasing, as Pillow resizes; in channels last it is twice as fast."""
    image = image.unsqueeze(0).contiguous(memory_format=LAYOUT)
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0]
