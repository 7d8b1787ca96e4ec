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
    when = torch.tensor([3, 5, 0])
    drawn = []
    for step in range(steps):
        when[2] = step
        drawn.append(draw_negatives(class_of, target, count, replace, when))
    return torch.cat(drawn)


def chi_square(counts, expected):
    """The χ² statistic, standardised: for a uniform draw its mean is 0 and its variance about 1."""
    counts, free = np.asarray(counts), len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free)


def test_negatives_are_distinct_images_of_other_classes():
    class_of = torch.arange(501) % 7
    target = torch.arange(20) % 7
    drawn = draws(class_of, target, 150, False, steps=3)
    assert drawn.shape == (60, 150)
    assert (class_of[drawn] != target.repeat(3)[:, None]).all()
    assert all(len(set(row)) == 150 for row in drawn.tolist())


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


def test_among_many_images_those_of_other_classes_are_drawn_equally_often():
    images, k, rows, steps = 5000, 1600, 64, 20
    class_of = torch.arange(images) % 100
    drawn = draws(class_of, torch.full((rows,), 42), k, False, steps)
    counts = np.bincount(drawn.flatten().numpy(), minlength=images)[(class_of != 42).numpy()]
    share = k / len(counts)
    expected = rows * steps * share
    # without replacement the variance of a count is 1 − share times that with replacement
    assert abs(chi_square(expected + (counts - expected) / math.sqrt(1 - share), expected)) < 4


def test_negatives_repeat_only_in_rows_with_too_few_images_of_other_classes():
    class_of = torch.tensor([0] * 5 + [1] * 3)
    drawn = draws(class_of, torch.tensor([0, 1] * 50), 4, True, steps=100)
    few, enough = drawn[::2], drawn[1::2]  # rows with 3 and with 5 images of another class
    assert few.min() == 5
    assert enough.max() == 4
    assert all(len(set(row)) == 4 for row in enough.tolist())
    assert abs(chi_square(np.bincount(few.flatten() - 5), few.numel() / 3)) < 4
    assert abs(chi_square(np.bincount((few[:, 0] - 5) * 3 + few[:, 1] - 5), len(few) / 9)) < 4
    assert abs(chi_square(np.bincount(enough.flatten()), enough.numel() / 5)) < 4
    just_enough = draws(class_of, torch.tensor([1]), 5, True, steps=20)
    assert just_enough.sort().values.tolist() == [list(range(5))] * 20


def test_more_negatives_than_images_are_all_of_other_classes():
    class_of, target = torch.arange(50) % 10, torch.arange(6)
    drawn = draws(class_of, target, 60, True, steps=1)
    assert drawn.shape == (6, 60)
    assert (class_of[drawn] != target[:, None]).all()
