"""cifar.py against NumPy and torchvision; what it reads is tested in test_sources.py."""

import functools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import functional as tvf

import cifar
import teacher


def random_pixels(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """The synthetic images take a second to draw; here they are drawn once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar, "synthetic", functools.cache(cifar.synthetic))
        yield


def load(name, root, *flags):
    """What `cifar.load` makes of the flags of a teacher."""
    args = teacher.parse_args(["--arch", "resnet8", "--dataset", name, "--data-root", str(root), *flags])
    data = cifar.load(args, "cpu")
    assert data.val is data.test or args.val_fraction is not None
    return data.train, data.test


def images(count=10, batch_size=4, seed=3):
    statistics = cifar.STATISTICS["cifar100"]
    return cifar.Images(random_pixels(count), torch.arange(count), statistics, "cpu", batch_size, seed)


def decode(window):
    """(flip, turn, top, left) of a window's number."""
    return int(window) // 324, int(window) // 81 % 4, int(window) // 9 % 9, int(window) % 9


def expected_view(image, flip, turn, top, left):
    """One view of a side × side image by torchvision and NumPy: (3, side, side) uint8."""
    side = len(image)
    picture = image.permute(2, 0, 1)
    if flip:
        picture = tvf.hflip(picture)
    picture = torch.from_numpy(np.rot90(picture.permute(1, 2, 0).numpy(), turn).copy()).permute(2, 0, 1)
    return tvf.crop(tvf.pad(picture, side // 8), top, left, side, side)


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("flip", range(2))
def test_every_view_is_a_flip_a_rotation_and_a_crop(flip, turn):
    pixels = random_pixels(81)
    top, left = (x.flatten() for x in torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij"))
    window = ((flip * 4 + turn) * 9 + top) * 9 + left
    views = cifar.cut(cifar.pad(pixels), cifar.windows(), window[:, None])
    for i in range(81):
        assert torch.equal(views[i], expected_view(pixels[i], flip, turn, int(top[i]), int(left[i])))


def test_images_of_64_pixels_have_17_times_17_crops():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8))
    data = cifar.Images(pixels, torch.arange(20), cifar.STATISTICS["cifar100"], "cpu")
    batch = next(data.batches("student", 1, 4))
    per_turn = 17 * 17
    assert len(data.windows[1]) == 8 * per_turn
    for row, window in enumerate(batch.window.flatten().tolist()):
        flip, turn, crop = window // per_turn // 4, window // per_turn % 4, window % per_turn
        raw = expected_view(pixels[batch.rows[row // 4]], flip, turn, crop // 17, crop % 17)
        assert torch.equal(batch.x[row], tvf.normalize(raw.float() / 255, *cifar.STATISTICS["cifar100"]))
    whole = next(data.test_batches(1)).x
    assert torch.equal(whole[3], tvf.normalize(tvf.to_tensor(pixels[3].numpy()), *cifar.STATISTICS["cifar100"]))
    assert cifar.draw(4000, 4, 0, "student", 1, side=64).window.max() > 7.9 * per_turn


@pytest.mark.parametrize("count_views", [1, 4])
def test_a_training_epoch_equals_torchvision_on_the_same_draws(count_views):
    data = images()
    draws = cifar.draw(10, count_views, seed=3, phase="student", epoch=2)
    batches = list(data.batches("student", 2, count_views))
    assert [len(batch.target) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.target for batch in batches]), draws.order)
    assert torch.equal(torch.cat([batch.rows for batch in batches]), draws.order)
    assert torch.equal(torch.cat([batch.window for batch in batches]), draws.window)
    views = torch.cat([batch.x for batch in batches])
    for row, window in enumerate(draws.window.flatten()):
        raw = expected_view(data.pixels[draws.order[row // count_views]], *decode(window))
        expected = tvf.normalize(raw.float() / 255, *cifar.STATISTICS["cifar100"])
        assert torch.equal(views[row], expected)


def test_test_views_are_whole_images_rotated_as_numpy_rotates():
    data = images()
    batches = list(data.test_batches(4))
    assert [len(batch.target) for batch in batches] == [4, 4, 2]
    views = torch.cat([batch.x for batch in batches])
    assert torch.equal(torch.cat([batch.target for batch in batches]), torch.arange(10))
    for row in range(40):
        turned = np.rot90(data.pixels[row // 4].numpy(), row % 4).copy()
        expected = tvf.normalize(tvf.to_tensor(turned), *cifar.STATISTICS["cifar100"])
        assert torch.equal(views[row], expected)


def test_a_test_batch_has_as_many_views_whether_rotated_or_not():
    assert [len(next(images().test_batches(views)).x) for views in (1, 4)] == [10, 16]
    assert len(next(images(20).test_batches(1)).x) == 16


def test_views_share_their_flip_but_not_their_crop():
    window = cifar.draw(500, 4, 0, "student", 1).window
    flips = window // 324
    assert (flips == flips[:, :1]).all()
    assert 0.4 < flips.float().mean() < 0.6
    assert torch.equal(window // 81 % 4, torch.arange(4).expand(500, 4))
    crops = window % 81
    assert set(crops.flatten().tolist()) == set(range(81))
    assert (crops != crops[:, :1]).any(1).float().mean() > 0.95


def test_padding_is_black_before_normalising():
    data = cifar.Images(torch.full((1, 32, 32, 3), 255).byte(), torch.zeros(1), cifar.STATISTICS["cifar100"], "cpu")
    view = data.views(torch.tensor([0]), torch.tensor([[0]]))[0]  # the crop that starts in the corner of the border
    mean, std = (torch.tensor(x) for x in cifar.STATISTICS["cifar100"])
    assert torch.equal(view[:, 0, 0], -mean / std)
    assert torch.equal(view[:, 31, 31], (1 - mean) / std)


def test_draws_follow_from_seed_phase_and_epoch_alone():
    torch.manual_seed(1)
    first = cifar.draw(50, 4, 0, "student", 1)
    torch.manual_seed(2)
    again = cifar.draw(50, 4, 0, "student", 1)
    assert torch.equal(first.order, again.order)
    assert torch.equal(first.window, again.window)
    for other in (
        cifar.draw(50, 4, 1, "student", 1),
        cifar.draw(50, 4, 0, "ss_head", 1),
        cifar.draw(50, 4, 0, "student", 2),
    ):
        assert not torch.equal(first.order, other.order)
        assert not torch.equal(first.window, other.window)


def test_an_epoch_sees_every_image_once():
    draws = cifar.draw(1000, 1, 0, "teacher", 1)
    assert torch.equal(draws.order.sort().values, torch.arange(1000))


def test_views_are_channels_last_float32():
    x = next(images().batches("student", 1, 4)).x
    assert x.shape == (16, 3, 32, 32)
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_synthetic_data_is_always_the_same_and_balanced():
    (pixels, labels), (again, _) = cifar.synthetic(True), cifar.synthetic.__wrapped__(True)
    assert torch.equal(pixels, again)
    assert pixels.shape == (10_000, 32, 32, 3)
    assert set(Counter(labels.tolist()).values()) == {100}
    test_pixels, test_labels = cifar.synthetic(False)
    assert test_pixels.shape == (2_000, 32, 32, 3)
    assert set(Counter(test_labels.tolist()).values()) == {20}
    assert not torch.equal(pixels[:2000], test_pixels)


def test_sizes_keep_the_first_images_of_every_class():
    train, test = load("synthetic", "nowhere", "--train-size", "7", "--test-size", "3")
    assert torch.equal(train.pixels, cifar.synthetic(True)[0][:7])
    assert torch.equal(test.labels, cifar.synthetic(False)[1][:3])
    assert len(set(train.labels.tolist())) == 7
    assert train.index.tolist() == list(range(7))
    with pytest.raises(cifar.DataError, match="synthetic has 2000 such images"):
        load("synthetic", "nowhere", "--test-size", "2001")


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_few_shot_keeps_the_same_share_of_every_class(fraction):
    train, test = load("synthetic", "nowhere", "--few-shot", str(fraction))
    assert Counter(train.labels.tolist()) == {label: round(100 * fraction) for label in range(100)}
    again, _ = load("synthetic", "nowhere", "--few-shot", str(fraction))
    assert torch.equal(train.pixels, again.pixels)
    other, _ = load("synthetic", "nowhere", "--few-shot", str(fraction), "--seed", "1")
    assert not torch.equal(train.pixels, other.pixels)
    assert torch.equal(test.pixels, cifar.synthetic(False)[0])


def test_few_shot_keeps_images_with_their_labels():
    whole, _ = load("synthetic", "nowhere")
    kept = cifar.few_shot(whole.labels, 0.25, seed=0)
    train, _ = load("synthetic", "nowhere", "--few-shot", "0.25")
    assert len(set(kept.tolist())) == len(kept) == 2500
    assert torch.equal(train.pixels, whole.pixels[kept])
    assert torch.equal(train.labels, whole.labels[kept])
    rare = torch.tensor([0] * 10 + [1])
    assert cifar.few_shot(rare, 0.1, seed=0).tolist()[-1] == 10  # at least one of each


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 1.0])
def test_label_noise_gives_exactly_that_share_another_label(fraction):
    train, test = load("synthetic", "nowhere", "--label-noise", str(fraction))
    true = cifar.synthetic(True)[1]
    changed = train.labels != true
    assert changed.sum() == 10_000 * fraction
    assert train.labels.min() >= 0
    assert train.labels.max() < 100
    shifts = Counter(((train.labels - true) % 100)[changed].tolist())
    assert set(shifts) == set(range(1, 100))  # every other class, none twice as often as it should
    assert max(shifts.values()) < 2 * changed.sum().item() / 99
    again, _ = load("synthetic", "nowhere", "--label-noise", str(fraction))
    assert torch.equal(train.labels, again.labels)
    other, _ = load("synthetic", "nowhere", "--label-noise", str(fraction), "--seed", "1")
    assert not torch.equal(train.labels, other.labels)
    assert torch.equal(train.pixels, cifar.synthetic(True)[0])
    assert torch.equal(test.labels, cifar.synthetic(False)[1])


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
    prefix = Counter(labels[:size])
    if len(prefix) == len(set(labels)) and max(prefix.values()) - min(prefix.values()) <= 1:
        assert kept == list(range(size))


def val_split(*flags):
    args = teacher.parse_args(["--arch", "resnet8", "--dataset", "synthetic", *flags])
    return cifar.load(args, "cpu")


def test_the_same_share_of_every_class_is_held_out():
    whole = val_split()
    data = val_split("--val-fraction", "0.1")
    assert Counter(data.val.labels.tolist()) == dict.fromkeys(range(100), 10)
    assert Counter(data.train.labels.tolist()) == dict.fromkeys(range(100), 90)
    assert sorted(data.train.index.tolist() + data.val.index.tolist()) == list(range(10_000))
    for images in (data.train, data.val):
        assert torch.equal(images.pixels, whole.train.pixels[images.index])
        assert torch.equal(images.labels, whole.train.labels[images.index])
    assert torch.equal(data.test.pixels, whole.test.pixels)
    assert torch.equal(val_split("--val-fraction", "0.1").val.index, data.val.index)
    assert not torch.equal(val_split("--val-fraction", "0.1", "--seed", "1").val.index, data.val.index)


def test_images_are_held_out_before_few_shot_and_label_noise():
    data = val_split("--val-fraction", "0.1")
    few = val_split("--val-fraction", "0.1", "--few-shot", "0.5", "--label-noise", "0.5")
    assert torch.equal(few.val.index, data.val.index)
    assert torch.equal(few.val.labels, data.val.labels)
    assert Counter(val_split("--val-fraction", "0.1", "--few-shot", "0.5").train.labels.tolist()) == dict.fromkeys(
        range(100), 45
    )
    assert not set(few.train.index.tolist()) & set(few.val.index.tolist())
    true = cifar.synthetic(True)[1][few.train.index]
    assert (few.train.labels != true).sum() == 2250


def test_a_class_keeps_an_image_to_train_on():
    data = val_split("--train-size", "150", "--val-fraction", "0.9")
    assert len(set(data.train.labels.tolist())) == 100
    assert len(data.val) == 50
    with pytest.raises(cifar.DataError, match="--val-fraction 0.5: no class has two training images"):
        val_split("--train-size", "100", "--val-fraction", "0.5")
