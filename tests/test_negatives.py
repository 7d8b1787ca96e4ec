"""methods/negatives.py against Python's integers and statistics."""

import math

import numpy as np
import pytest
import torch

from methods.negatives import draw_negatives, random_bits


def splitmix64(z):
    """The finaliser of SplitMix64 in Python's integers."""
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2**64
    return z ^ z >> 31


@pytest.mark.parametrize("when", [(0, 1, 0), (7, 240, 781), (2**32 - 1, 3, 5)])
def test_random_bits_are_those_of_splitmix64(when):
    start = 0
    for part in when:
        start = splitmix64((start + part) % 2**64)
    words = np.array([splitmix64((start + i) % 2**64) for i in range(6)], dtype=np.uint64)
    halves = words.astype("<u8").view("<i4").reshape(2, 6)
    assert random_bits(torch.tensor(when), 2, 6).tolist() == halves.tolist()
    assert random_bits(torch.tensor(when), 2, 5).tolist() == halves[:, :5].tolist()


def draws(class_of, target, count, replace, steps):
    """The negatives of so many steps: (steps · B, count)."""
    return torch.cat([draw_negatives(class_of, target, count, replace, torch.tensor([3, 5, i])) for i in range(steps)])


def chi_square(counts, expected):
    """The χ² statistic, standardised: for a uniform draw its mean is 0 and its variance about 1."""
    counts, free = np.asarray(counts), len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free)


@pytest.mark.parametrize(("images", "classes", "count", "replace"), [(501, 7, 150, False), (50, 7, 60, True)])
def test_negatives_are_images_of_other_classes_and_distinct_if_there_are_enough(images, classes, count, replace):
    class_of, target = torch.arange(images) % classes, torch.arange(20) % classes
    drawn = draws(class_of, target, count, replace, steps=3)
    assert drawn.shape == (60, count)
    assert (class_of[drawn] != target.repeat(3)[:, None]).all()
    assert replace or all(len(set(row)) == count for row in drawn.tolist())


def test_all_sets_of_negatives_are_equally_likely_and_rows_and_steps_are_independent():
    class_of = torch.arange(8) % 4  # 6 images of other classes: 20 sets of 3
    steps, rows = 100, 400
    drawn = draws(class_of, torch.zeros(rows, dtype=torch.long), 3, False, steps).numpy()
    _, sets = np.unique((1 << drawn).sum(1), return_inverse=True)
    assert sets.max() == 19
    assert abs(chi_square(np.bincount(sets), len(sets) / 20)) < 4
    sets = sets.reshape(steps, rows)
    for a, b in ((sets[:, ::2], sets[:, 1::2]), (sets[::2], sets[1::2])):
        pairs = np.bincount((20 * a + b).flatten(), minlength=400)
        assert abs(chi_square(pairs, a.size / 400)) < 4


def test_negatives_repeat_only_in_rows_with_too_few_images_of_other_classes():
    class_of = torch.tensor([0] * 5 + [1] * 3)
    drawn = draws(class_of, torch.tensor([0, 1] * 50), 4, True, steps=100)
    few, enough = drawn[::2], drawn[1::2]  # rows with 3 and with 5 images of another class
    assert (few.min(), enough.max()) == (5, 4)
    assert all(len(set(row)) == 4 for row in enough.tolist())
    assert abs(chi_square(np.bincount(few.flatten() - 5), few.numel() / 3)) < 4
    assert abs(chi_square(np.bincount((few[:, 0] - 5) * 3 + few[:, 1] - 5), len(few) / 9)) < 4
    assert abs(chi_square(np.bincount(enough.flatten()), enough.numel() / 5)) < 4
