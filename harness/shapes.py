"""Generated images, for trying things out without any data."""

import numpy as np
import torch
from torch import Tensor

SIDE = 32  # of the images of every named data set


def synthetic(train: bool, size: int | None = None) -> tuple[Tensor, Tensor]:
    """A stand-in for CIFAR-100 that needs no file: accuracy on it says nothing about photographs.

    100 classes = 5 shapes × 5 hues × 4 textures, at random places, sizes and brightness on a noisy, dark ground: simple
    enough to learn in a few hundred steps. Returns the first `size` of 10,000 (training) or 2,000 (test) images
    (N, 32, 32, 3) uint8 and their labels (N,), which are always the same.
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
