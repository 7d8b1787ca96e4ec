"""cifar.py against NumPy and torchvision."""

from collections import Counter
from operator import attrgetter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import functional as tvf

import cifar
import teacher
from harness import sources
from harness.flags import UserError
from harness.shapes import synthetic
from harness.sources import Split

STATISTICS = sources.STATISTICS["cifar100"]


def generated(train, size=None):
    """Noise in place of the synthetic images, whose drawing takes a second."""
    count = 10_000 if train else 2_000
    pixels = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return torch.from_numpy(pixels[:size]), torch.arange(count).mul(37).remainder(100)[:size]


@pytest.fixture(autouse=True)
def drawn_fast(monkeypatch):
    monkeypatch.setattr(sources, "synthetic", generated)


def load(*words):
    """What `cifar.load` makes of the synthetic images and these flags."""
    args = teacher.parse_args(["--arch", "resnet8", "--dataset", "synthetic", *map(str, words)])
    return cifar.load(sources.read_for(args, {}), args, "cpu")


def images(count=10, side=32):
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return cifar.Images(Split(torch.from_numpy(pixels), torch.arange(count)), STATISTICS, "cpu", 4, seed=3)


def expected_view(image, window):
    """A view of a side × side image, by torchvision and NumPy: (3, side, side) uint8."""
    side = len(image)
    shifts = 2 * (side // 8) + 1
    window, left = divmod(int(window), shifts)
    window, top = divmod(window, shifts)
    flip, turn = divmod(window, 4)
    picture = image.permute(2, 0, 1)
    if flip:
        picture = tvf.hflip(picture)
    picture = torch.from_numpy(np.rot90(picture, turn, (1, 2)).copy())
    return tvf.crop(tvf.pad(picture, side // 8), top, left, side, side)


def normalised(pixels):
    return tvf.normalize(pixels.float() / 255, *STATISTICS)


def test_each_of_the_648_windows_is_a_flip_a_rotation_and_a_crop():
    data = images(1)
    views = cifar.cut(cifar.pad(data.pixels), data.windows, torch.arange(648)[None])
    for window, view in enumerate(views):
        assert torch.equal(view, expected_view(data.pixels[0], window))


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("count_views", [1, 4])
def test_a_training_epoch_equals_torchvision_on_the_same_draws(count_views, side):
    data = images(side=side)
    draws = cifar.draw(10, count_views, seed=3, phase="student", epoch=2, side=side)
    batches = list(data.batches("student", 2, count_views))
    assert [len(batch.target) for batch in batches] == [4, 4, 2]
    for name in ("target", "rows"):
        assert torch.equal(torch.cat([getattr(batch, name) for batch in batches]), draws.order)
    assert all(batch.x.is_contiguous(memory_format=torch.channels_last) for batch in batches)
    views = torch.cat([batch.x for batch in batches])
    for row, window in enumerate(draws.window.flatten()):
        raw = expected_view(data.pixels[draws.order[row // count_views]], window)
        assert torch.equal(views[row], normalised(raw))


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize(("count_views", "sizes"), [(1, [16, 4]), (4, [4] * 5)])
def test_test_views_are_whole_images_rotated_as_numpy_rotates(count_views, sizes, side):
    data = images(20, side)
    batches = list(data.test_batches(count_views))
    assert [len(batch.target) for batch in batches] == sizes
    assert torch.equal(torch.cat([batch.target for batch in batches]), torch.arange(20))
    for row, view in enumerate(torch.cat([batch.x for batch in batches])):
        turned = np.rot90(data.pixels[row // count_views], row % count_views).copy()
        assert torch.equal(view, normalised(torch.from_numpy(turned).permute(2, 0, 1)))


def test_brightness_undoes_the_normalising():
    data = images()
    whole = data.brightness(next(data.test_batches(1)).x)
    torch.testing.assert_close(whole, data.pixels.permute(0, 3, 1, 2) / 255)


@pytest.mark.parametrize(("side", "shifts"), [(32, 9), (64, 17)])
def test_views_share_their_flip_but_not_their_crop(side, shifts):
    window = cifar.draw(1000, 4, 0, "student", 1, side).window
    flip, turn, crop = window // shifts**2 // 4, window // shifts**2 % 4, window % shifts**2
    assert (flip == flip[:, :1]).all()
    assert 0.4 < flip.float().mean() < 0.6
    assert torch.equal(turn, torch.arange(4).expand(1000, 4))
    assert len(crop.unique()) == shifts**2
    assert (crop != crop[:, :1]).any(1).float().mean() > 0.95


def test_draws_follow_from_seed_phase_and_epoch_alone():
    draws = []
    for names in (0, "student", 1), (0, "student", 1), (1, "student", 1), (0, "ss_head", 1), (0, "student", 2):
        torch.manual_seed(len(draws))
        draws.append(cifar.draw(50, 4, *names))
        assert torch.equal(draws[-1].order.sort().values, torch.arange(50))
    first, again, *others = draws
    assert torch.equal(first.order, again.order)
    assert torch.equal(first.window, again.window)
    for other in others:
        assert not torch.equal(first.order, other.order)
        assert not torch.equal(first.window, other.window)


def test_synthetic_images_are_always_the_same_and_balanced():
    (pixels, labels), fewer = synthetic(True, 200), synthetic(True, 150)
    assert pixels.shape == (200, 32, 32, 3)
    assert labels.bincount().tolist() == [2] * 100
    assert torch.equal(fewer[0], pixels[:150]) and torch.equal(fewer[1], labels[:150])
    assert not torch.equal(synthetic(False, 150)[0], pixels[:150])


# ------------------------------------------------------------------------------------------------ the flags of the data


def test_sizes_keep_the_first_images_of_every_class():
    data = load("--train-size", 7, "--test-size", 3)
    assert torch.equal(data.train.pixels, generated(True)[0][:7])
    assert torch.equal(data.test.labels, generated(False)[1][:3])
    assert data.train.index.tolist() == list(range(7))
    assert data.val is data.test
    assert (data.about["dataset"], data.about["classes"], data.about["tested"]) == ("synthetic", 100, 3)
    with pytest.raises(UserError, match="--test-size 2001: synthetic has 2000 such images"):
        load("--test-size", 2001)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_few_shot_keeps_the_same_share_of_every_class(fraction):
    data, whole = load("--few-shot", fraction), load()
    assert data.train.labels.bincount().tolist() == [round(100 * fraction)] * 100
    assert len(data.train.index.unique()) == len(data.train)
    assert torch.equal(data.train.pixels, whole.train.pixels[data.train.index])
    assert torch.equal(data.train.labels, whole.train.labels[data.train.index])
    assert cifar.few_shot(torch.tensor([0] * 10 + [1]), 0.1, seed=0).tolist()[-1] == 10  # at least one of a class


@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_label_noise_gives_exactly_that_share_another_label(fraction):
    data, (pixels, true) = load("--label-noise", fraction), generated(True)
    changed = data.train.labels != true
    assert changed.sum() == 10_000 * fraction
    shifts = Counter(((data.train.labels - true) % 100)[changed].tolist())
    assert set(shifts) == set(range(1, 100))
    assert max(shifts.values()) < 2 * changed.sum() / 99  # no other class comes twice as often as it should
    assert data.train.labels.min() >= 0 and data.train.labels.max() < 100
    assert torch.equal(data.train.pixels, pixels)
    assert torch.equal(data.test.labels, generated(False)[1])


def test_the_seed_draws_what_is_kept_held_out_and_mislabelled():
    flags = ("--few-shot", 0.5, "--val-fraction", 0.1, "--label-noise", 0.5)
    first, again, other = (load(*flags, "--seed", seed) for seed in (0, 0, 1))
    for part in ("train.index", "train.labels", "val.index"):
        whole, same, changed = (attrgetter(part)(data) for data in (first, again, other))
        assert torch.equal(whole, same)
        assert not torch.equal(whole, changed)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 40))
def test_a_sample_is_fair_and_takes_the_first_images(labels, size):
    size = min(size, len(labels))
    kept = cifar.sample(torch.tensor(labels), size).tolist()
    assert kept == sorted(set(kept))
    assert len(kept) == size
    counts = Counter(labels[i] for i in kept)
    for label in set(labels):
        of_class = [i for i, x in enumerate(labels) if x == label]
        assert [i for i in kept if labels[i] == label] == of_class[: counts[label]]
        assert counts[label] == len(of_class) or counts[label] >= max(counts.values()) - 1  # all of it, or a fair share


def test_the_same_share_of_every_class_is_held_out_before_few_shot_and_label_noise():
    whole, data = load(), load("--val-fraction", 0.1)
    few = load("--val-fraction", 0.1, "--few-shot", 0.5, "--label-noise", 0.5)
    assert data.val.labels.bincount().tolist() == [10] * 100
    assert sorted(data.train.index.tolist() + data.val.index.tolist()) == list(range(10_000))
    for part in (data.train, data.val, few.val):
        assert torch.equal(part.pixels, whole.train.pixels[part.index])
        assert torch.equal(part.labels, whole.train.labels[part.index])
    assert torch.equal(few.val.index, data.val.index)
    assert set(few.train.index.tolist()) <= set(data.train.index.tolist())
    true = whole.train.labels[few.train.index]
    assert true.bincount().tolist() == [45] * 100
    assert (few.train.labels != true).sum() == 2250
    assert data.about["tested"] == 1000


def test_a_class_keeps_an_image_to_train_on():
    data = load("--train-size", 150, "--val-fraction", 0.9)
    assert len(data.train.labels.unique()) == 100
    assert len(data.val) == 50
    with pytest.raises(UserError, match="--val-fraction 0.5: no class has two training images"):
        load("--train-size", 100, "--val-fraction", 0.5)


def test_a_batch_larger_than_the_data_set_gets_a_warning(capsys):
    load("--train-size", 5, "--batch-size", 6)
    assert "--batch-size 6 is more than the 5 training images: an epoch is one step" in capsys.readouterr().err
