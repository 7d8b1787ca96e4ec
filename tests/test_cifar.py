"""cifar.py against NumPy and torchvision."""

import functools
import gzip
import hashlib
import http.server
import pickle
import tarfile
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
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
    return cifar.load(args, "cpu")


def images(count=10, batch_size=4, seed=3):
    statistics = cifar.STATISTICS["cifar100"]
    return cifar.Images(random_pixels(count), torch.arange(count), statistics, "cpu", batch_size, seed)


def decode(window):
    """(flip, turn, top, left) of a window's number."""
    return int(window) // 324, int(window) // 81 % 4, int(window) // 9 % 9, int(window) % 9


def expected_view(image, flip, turn, top, left):
    """One view by torchvision and NumPy: (3, 32, 32) uint8."""
    picture = image.permute(2, 0, 1)
    if flip:
        picture = tvf.hflip(picture)
    picture = torch.from_numpy(np.rot90(picture.permute(1, 2, 0).numpy(), turn).copy()).permute(2, 0, 1)
    return tvf.crop(tvf.pad(picture, 4), top, left, 32, 32)


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("flip", range(2))
def test_every_view_is_a_flip_a_rotation_and_a_crop(flip, turn):
    pixels = random_pixels(81)
    top, left = (x.flatten() for x in torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij"))
    window = ((flip * 4 + turn) * 9 + top) * 9 + left
    views = cifar.cut(cifar.pad(pixels), cifar.windows(), window[:, None])
    for i in range(81):
        assert torch.equal(views[i], expected_view(pixels[i], flip, turn, int(top[i]), int(left[i])))


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


def test_sizes_keep_the_first_images():
    train, test = load("synthetic", "nowhere", "--train-size", "7", "--test-size", "3")
    assert torch.equal(train.pixels, cifar.synthetic(True)[0][:7])
    assert torch.equal(test.labels, cifar.synthetic(False)[1][:3])
    with pytest.raises(cifar.DataError, match="synthetic has 2000 such images"):
        load("synthetic", "nowhere", "--test-size", "2001")


CLASSES = [f"class{i:02d}" for i in range(100)]


def content_of(planes, numbers):
    """What `in_hash_order` calls the content of images (N, 3072) by channel, reckoned anew."""
    digests = []
    for plane, number in zip(planes, numbers, strict=True):
        image = plane.reshape(3, 1024).T.tobytes()  # height, width, channel
        digests.append(hashlib.sha256(image + bytes([number])).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


@pytest.fixture
def tiny_cifar100(monkeypatch):
    """{split: (planes (N, 3072), labels)} of a CIFAR-100 with two training images and a test image a class."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 200), ("test", 100)):
        planes, numbers = rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.permutation(count) % 100
        splits[split] = planes, numbers.tolist()
        monkeypatch.setitem(cifar.CIFAR100, split, (count, content_of(planes, numbers.tolist())))
    return splits


@pytest.fixture
def class_folders(tiny_cifar100, tmp_path):
    """The same as class folders of PNG files below a data root, in an order of their own; the data root."""
    root = tmp_path / "folders"
    for split, (planes, numbers) in tiny_cifar100.items():
        for i, (plane, number) in enumerate(zip(planes, numbers, strict=True)):
            place = root / "cifar100" / split / CLASSES[number]
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.ascontiguousarray(plane.reshape(3, 32, 32).transpose(1, 2, 0))
            Image.fromarray(pixels).save(place / f"{i * 7919 % 1000}.png")
    return root


@pytest.fixture
def cifar100_archive(tiny_cifar100, tmp_path, monkeypatch):
    """The same as an archive in torchvision's layout, whose md5 sums torchvision is told to expect."""
    contents = {s: pickle.dumps({"data": x, "fine_labels": y}) for s, (x, y) in tiny_cifar100.items()}
    contents["meta"] = pickle.dumps({"fine_label_names": CLASSES})
    source = tmp_path / "mirror" / "cifar-100-python"
    source.mkdir(parents=True)
    for name, content in contents.items():
        (source / name).write_bytes(content)
    archive = tmp_path / "mirror" / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, "cifar-100-python")

    def md5(content):
        return hashlib.md5(content).hexdigest()

    dataset = cifar.tv.CIFAR100
    monkeypatch.setattr(dataset, "url", "file:///nowhere/cifar-100-python.tar.gz")
    monkeypatch.setattr(dataset, "tgz_md5", md5(archive.read_bytes()))
    monkeypatch.setattr(dataset, "train_list", [["train", md5(contents["train"])]])
    monkeypatch.setattr(dataset, "test_list", [["test", md5(contents["test"])]])
    monkeypatch.setattr(dataset, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5(contents["meta"])})
    return archive


def test_an_archive_put_into_the_data_root_is_read(cifar100_archive, tiny_cifar100, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / cifar100_archive.name).write_bytes(cifar100_archive.read_bytes())
    for images, (planes, numbers) in zip(load("cifar100", root), tiny_cifar100.values(), strict=True):
        pixels = [np.ascontiguousarray(plane.reshape(3, 32, 32).transpose(1, 2, 0)) for plane in planes]
        order = sorted(range(len(pixels)), key=lambda i: hashlib.sha256(pixels[i].tobytes()).hexdigest())
        assert np.array_equal(images.pixels.numpy(), np.stack([pixels[i] for i in order]))
        assert images.labels.tolist() == [numbers[i] for i in order]


@pytest.mark.parametrize("place", ["cifar100", "CIFAR-100-dataset", "."])
def test_class_folders_are_the_same_data_set_as_the_archive(place, class_folders, cifar100_archive, tmp_path, capfd):
    root = tmp_path / "data"
    root.mkdir()
    (root / cifar100_archive.name).write_bytes(cifar100_archive.read_bytes())
    archive = load("cifar100", root)
    if place == ".":
        class_folders = class_folders / "cifar100"
    else:
        (class_folders / "cifar100").rename(class_folders / place)
    capfd.readouterr()
    first, second = load("cifar100", class_folders), load("cifar100", class_folders)  # read, and read from the one file
    assert {path.name for path in class_folders.glob("*.npy")} == {"cifar100_train.npy", "cifar100_test.npy"}
    for images in zip(archive, first, second, strict=True):
        for other in images[1:]:
            assert torch.equal(images[0].pixels, other.pixels)
            assert torch.equal(images[0].labels, other.labels)
    assert capfd.readouterr() == ("", "")


def test_the_second_start_reads_no_image(class_folders, monkeypatch):
    first = load("cifar100", class_folders)
    monkeypatch.setattr(cifar, "_read_image", None)
    assert torch.equal(load("cifar100", class_folders)[0].pixels, first[0].pixels)


@pytest.mark.parametrize("damage", ["cut", "flipped", "other shape", "text"])
def test_a_damaged_file_of_all_images_is_made_again(damage, class_folders):
    expected = load("cifar100", class_folders)[0].pixels
    kept = class_folders / "cifar100_train.npy"
    good = kept.read_bytes()
    rows = np.load(kept)
    if damage == "other shape":
        np.save(kept, rows[:, :100])
    else:
        flipped = good[:5000] + bytes([good[5000] ^ 1]) + good[5001:]
        kept.write_bytes({"cut": good[: len(good) // 2], "flipped": flipped, "text": b"text"}[damage])
    assert torch.equal(load("cifar100", class_folders)[0].pixels, expected)
    assert kept.read_bytes() == good


def test_a_root_that_cannot_be_written_to_is_read_each_time(class_folders, monkeypatch):
    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(np, "save", read_only)
    assert len(load("cifar100", class_folders)[0]) == 200
    assert not list(class_folders.glob("*.npy"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("missing", "holds 1 images of class05; CIFAR-100 has 100 classes of 2 images each there"),
        ("extra", "holds 3 images of class05"),
        ("no image", "class05"),
        ("no class", "holds 99 classes"),
        ("damaged", "cannot be read as an image; fetch it again"),
        ("larger", "has 40 × 30 pixels; CIFAR-100's have 32 × 32"),
        ("changed", "an image is not CIFAR-100's or lies in the wrong class"),
        ("exchanged", "an image is not CIFAR-100's or lies in the wrong class"),
    ],
)
def test_class_folders_that_are_not_cifar100_are_told(change, says, class_folders):
    train = class_folders / "cifar100" / "train"
    first, second = sorted((train / "class05").iterdir())
    other = min((train / "class06").iterdir())
    if change == "missing":
        first.unlink()
    elif change == "extra":
        (train / "class05" / "more.png").write_bytes(other.read_bytes())
    elif change in ("no image", "no class"):
        first.unlink(), second.unlink()
        if change == "no class":
            (train / "class05").rmdir()
    elif change == "damaged":
        first.write_bytes(first.read_bytes()[:500])
    elif change == "larger":
        Image.new("RGB", (40, 30)).save(first)
    elif change == "changed":
        pixels = np.array(Image.open(first))
        pixels[3, 4, 1] ^= 1
        Image.fromarray(pixels).save(first)
    else:
        a, b = first.read_bytes(), other.read_bytes()
        first.write_bytes(b), other.write_bytes(a)
    with pytest.raises(cifar.DataError, match=says):
        load("cifar100", class_folders)
    assert not list(class_folders.glob("*.npy"))


@pytest.fixture
def mirror(cifar100_archive):
    """A web server on this machine with the archive; its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(cifar100_archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/cifar-100-python.tar.gz"
        server.shutdown()


def test_a_mirror_serves_the_archive(mirror, tmp_path, capfd):
    train, _ = load("cifar100", tmp_path / "data", "--data-url", mirror)
    assert len(train) == 200


def test_missing_data_says_where_the_archive_goes(cifar100_archive, tmp_path, capfd):
    with pytest.raises(cifar.DataError, match=r"cifar-100-python\.tar\.gz.*--data-url"):
        load("cifar100", tmp_path / "empty")


def test_a_mirror_with_other_content_is_refused(cifar100_archive, mirror, tmp_path, capfd):
    cifar100_archive.write_bytes(cifar100_archive.read_bytes() + b"more")
    with pytest.raises(cifar.DataError, match="corrupted"):
        load("cifar100", tmp_path / "data", "--data-url", mirror)


def fashion_file(path, magic, shape, values):
    header = magic.to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in shape)
    path.write_bytes(header + values.tobytes())


def test_fashion_mnist_becomes_32_pixels_and_three_equal_channels(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        fashion_file(raw / f"{split}-images-idx3-ubyte", 2051, (5, 28, 28), grey)
        fashion_file(raw / f"{split}-labels-idx1-ubyte", 2049, (5,), np.arange(5, dtype=np.uint8))
    train, _ = load("fashion_mnist", tmp_path)
    expected = np.pad(grey, ((0, 0), (2, 2), (2, 2)))
    for channel in range(3):
        assert np.array_equal(train.pixels[..., channel].numpy(), expected)
    assert train.labels.tolist() == [0, 1, 2, 3, 4]

    with gzip.open(raw / "train-images-idx3-ubyte", "wb") as file:  # not what it should be
        file.write(b"damaged")
    with pytest.raises(cifar.DataError, match="fashion_mnist could not be read"):
        load("fashion_mnist", tmp_path)


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
