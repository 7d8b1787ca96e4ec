"""sources.py: archives, downloads, class folders."""

import functools
import gzip
import hashlib
import http.server
import json
import pickle
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import cifar
import models
from harness import sources
import student
import teacher


def load(name, root, *flags):
    """What `cifar.load` makes of the flags of a teacher: the training and the test split."""
    args = teacher.parse_args(["--arch", "resnet8", "--dataset", name, "--data-root", str(root), *flags])
    data = cifar.load(args, "cpu")
    return data.train, data.test


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


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
        monkeypatch.setitem(sources.CIFAR100, split, (count, content_of(planes, numbers.tolist())))
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

    dataset = sources.tv.CIFAR100
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
    monkeypatch.setattr(sources, "read_images", None)
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
    with pytest.raises(cifar.DataError, match="gave something else than cifar-100-python.tar.gz: its md5 is"):
        load("cifar100", tmp_path / "data", "--data-url", mirror)
    assert listing(tmp_path / "data") == [".lock"]


def test_a_mirror_may_be_a_file(cifar100_archive, tmp_path, capfd):
    train, _ = load("cifar100", tmp_path / "data", "--data-url", cifar100_archive.as_uri())
    assert len(train) == 200
    with pytest.raises(cifar.DataError, match="name a mirror with --data-url"):
        load("cifar100", tmp_path / "other", "--data-url", cifar100_archive.as_uri() + ".bz2")
    assert listing(tmp_path / "other") == [".lock"]


def test_a_damaged_archive_is_told_and_left_alone(cifar100_archive, mirror, tmp_path, capfd):
    root = tmp_path / "data"
    root.mkdir()
    half = cifar100_archive.read_bytes()[:1000]
    (root / cifar100_archive.name).write_bytes(half)
    sums = f"its md5 is {hashlib.md5(half).hexdigest()}, not {sources.tv.CIFAR100.tgz_md5}; delete it"
    with pytest.raises(cifar.DataError, match=f"cifar-100-python.tar.gz is damaged or not all of it: {sums}"):
        load("cifar100", root, "--data-url", mirror)
    assert (root / cifar100_archive.name).read_bytes() == half


def test_a_damaged_unpacked_file_is_unpacked_again(cifar100_archive, tmp_path, capfd):
    flags = "--data-url", cifar100_archive.as_uri()
    expected, _ = load("cifar100", tmp_path, *flags)
    file = tmp_path / "cifar-100-python" / "train"
    file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(load("cifar100", tmp_path)[0].pixels, expected.pixels)


def test_of_four_first_starts_one_downloads(cifar100_archive, tmp_path, monkeypatch, capfd):
    downloads = []
    request = sources.urllib.request.urlopen
    monkeypatch.setattr(
        sources.urllib.request, "urlopen", lambda *args, **kwargs: downloads.append(args) or request(*args, **kwargs)
    )
    flags = "--data-url", cifar100_archive.as_uri()
    with ThreadPoolExecutor(4) as pool:  # each opens the lock file anew, as processes do
        got = list(pool.map(lambda _: load("cifar100", tmp_path, *flags)[0].labels, range(4)))
    assert all(torch.equal(labels, got[0]) for labels in got)
    assert len(downloads) == 1


def test_the_data_can_be_had_alone(cifar100_archive, tmp_path, capsys):
    cifar.main(["--data-root", str(tmp_path), "--data-url", cifar100_archive.as_uri()])
    told = capsys.readouterr().out
    assert "cifar100: 200 training and 100 test images, 32 × 32, 100 classes; mean 0.5071 0.4866 0.4409" in told
    with pytest.raises(SystemExit) as end:
        cifar.main(["--data-root", str(tmp_path), "--dataset", "folder"])
    assert end.value.code == 2
    assert f"{tmp_path / 'train'}: no such folder" in capsys.readouterr().err


def fashion_file(path, magic, shape, values):
    header = magic.to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in shape)
    path.write_bytes(header + values.tobytes())


def test_fashion_mnist_becomes_32_pixels_and_three_equal_channels(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FASHION_MNIST", {"train": 5, "test": 5})
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


@pytest.mark.parametrize("images, labels, top", [(3, 5, 4), (5, 3, 4), (5, 5, 10)])
def test_fashion_mnist_put_there_by_hand_is_counted(images, labels, top, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FASHION_MNIST", {"train": 5, "test": 5})
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n, m, label in (("train", 5, 5, 4), ("t10k", images, labels, top)):
        fashion_file(raw / f"{split}-images-idx3-ubyte", 2051, (n, 28, 28), np.zeros((n, 28, 28), np.uint8))
        fashion_file(raw / f"{split}-labels-idx1-ubyte", 2049, (m,), np.full(m, label, np.uint8))
    with pytest.raises(cifar.DataError, match=f"test files hold {images} images of 28 × 28 and {labels} labels up to"):
        load("fashion_mnist", tmp_path)


def test_packed_fashion_mnist_files_are_checked_and_unpacked(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sources, "FASHION_MNIST", {"train": 5, "test": 5})
    mirror, resources = tmp_path / "mirror", []
    mirror.mkdir()
    for name, _ in sources.tv.FashionMNIST.resources:
        file = mirror / name.removesuffix(".gz")
        shape = (5, 28, 28) if "images" in name else (5,)
        fashion_file(file, 2048 + len(shape), shape, np.ones(shape, np.uint8))
        packed = gzip.compress(file.read_bytes())
        (mirror / name).write_bytes(packed)
        resources.append((name, hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(sources.tv.FashionMNIST, "resources", resources)
    train, _ = load("fashion_mnist", tmp_path / "data", "--data-url", mirror.as_uri())
    assert train.labels.tolist() == [1] * 5
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    (raw / "train-images-idx3-ubyte").unlink()
    (raw / "train-images-idx3-ubyte.gz").write_bytes(packed[:-1])
    with pytest.raises(cifar.DataError, match="train-images-idx3-ubyte.gz is damaged or not all of it"):
        load("fashion_mnist", tmp_path / "data")


# anybody's class folders


def colours(height, width):
    """An image whose every pixel differs from its neighbours: (height, width, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 128 // (height + width)], 2).astype(np.uint8)


COLOURS = colours(32, 32)
GREY = np.arange(1024).reshape(32, 32)  # 10 bits


def exif(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


def image_in_mode(mode):
    """An image of 32 × 32, how to save it, and its pixels in RGB."""
    image = Image.fromarray(COLOURS)
    if mode == "L":
        return image.convert("L"), {}, np.asarray(image.convert("L"))[..., None].repeat(3, 2)
    if mode == "P":
        index = np.arange(1024, dtype=np.uint8).reshape(32, 32) % 3
        palette = Image.fromarray(index, "P")
        palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
        return palette, {}, np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]], np.uint8)[index]
    if mode == "transparent P":
        index = np.arange(1024, dtype=np.uint8).reshape(32, 32) % 2
        palette = Image.fromarray(index, "P")
        palette.putpalette([10, 20, 30, 40, 50, 60])
        return palette, {"transparency": 0}, np.array([[255, 255, 255], [40, 50, 60]], np.uint8)[index]
    if mode == "I;16":
        return Image.fromarray((GREY * 64).astype(np.uint16)), {}, (GREY // 4).astype(np.uint8)[..., None].repeat(3, 2)
    if mode == "RGBA":
        alpha = np.where(GREY % 2, 255, 0).astype(np.uint8)
        rgba = Image.fromarray(np.dstack([COLOURS, alpha]))
        return rgba, {}, np.where(alpha[..., None] > 0, COLOURS, 255)
    if mode == "1":
        bits = GREY % 3 == 0
        return Image.fromarray(bits), {}, (bits * 255).astype(np.uint8)[..., None].repeat(3, 2)
    if mode == "turned":
        return image, {"exif": exif(6)}, np.rot90(COLOURS, -1)  # 6: to be turned by 90 degrees clockwise
    if mode == "mirrored":
        return image, {"exif": exif(2)}, COLOURS[:, ::-1]
    return image, {}, COLOURS


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "transparent P", "I;16", "RGBA", "1", "turned", "mirrored"])
def test_images_of_every_kind_become_rgb(mode, tmp_path):
    image, settings, expected = image_in_mode(mode)
    image.save(tmp_path / "image.png", **settings)
    assert np.array_equal(sources.square(tmp_path / "image.png", 32), expected)


def test_cmyk_is_ink_on_paper(tmp_path):
    flat = np.zeros((32, 32, 4), np.uint8)
    flat[..., 1] = 255  # magenta
    Image.fromarray(flat, "CMYK").save(tmp_path / "image.jpg", quality=95)
    assert np.abs(sources.square(tmp_path / "image.jpg", 32).astype(int) - [255, 0, 255]).max() < 5


@pytest.mark.parametrize(("height", "width"), [(50, 100), (100, 50), (20, 31), (32, 90), (640, 33)])
@pytest.mark.parametrize("side", [32, 64])
def test_the_shorter_side_is_resized_and_the_centre_kept(height, width, side, tmp_path):
    Image.fromarray(colours(height, width)).save(tmp_path / "image.png")
    got = sources.square(tmp_path / "image.png", side).astype(float)
    scale = side / min(height, width)
    place = [(n - side / scale) / 2 + (np.arange(side) + 0.5) / scale for n in (height, width)]  # in the large image
    for channel, axis, length in ((0, 1, width), (1, 0, height)):  # red grows to the right, green downwards
        expected = (place[axis] - 0.5) * 255 / length
        line = got[side // 2, :, channel] if axis else got[:, side // 2, channel]
        inner = slice(2, -2)
        assert np.abs(line - expected)[inner].max() < 255 / length * (0.5 + 1 / scale) + 1.5


def own_data(root, classes=("cat", "dog", "emu"), test="test"):
    """Class folders of mixed sizes and formats."""
    rng = np.random.default_rng(0)
    for half, count in (("train", 6), (test, 3)):
        for label, name in enumerate(classes):
            place = root / half / name
            place.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(20, 90, 2)
                image = Image.fromarray((colours(height, width) // (label + 1)).astype(np.uint8))
                if i == 0:
                    image.save(place / "a.JPG")
                elif i == 1:
                    image.convert("L").save(place / "b.jpeg", exif=exif(8))
                elif i == 2:
                    image.convert("P").save(place / "c.png")
                else:
                    image.save(place / f"d{i}.webp", lossless=True)
    (root / "train" / classes[0] / "notes.txt").write_text("not an image")
    (root / "train" / classes[0] / "._a.jpg").write_text("what macOS leaves")
    return root


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("test", ["test", "val"])
def test_class_folders_are_read_with_their_classes_and_statistics(side, test, tmp_path, capfd):
    own_data(tmp_path, test=test)
    train, tested = load("folder", tmp_path, "--side", str(side), "--batch-size", "8")
    assert train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert tested.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert train.pixels.shape == (18, side, side, 3)
    assert np.array_equal(train.pixels[8], sources.square(tmp_path / "train" / "dog" / "c.png", side))
    values = train.pixels.numpy().reshape(-1, 3) / 255
    for images in (train, tested):
        assert images.about["mean"] == pytest.approx(values.mean(0), abs=1e-9)
        assert images.about["std"] == pytest.approx(values.std(0), abs=1e-9)
        assert (images.about["dataset"], images.about["classes"], images.about["side"]) == ("folder", 3, side)
    views = torch.cat([batch.x for batch in train.test_batches(1)])
    assert views.shape == (18, 3, side, side)
    assert views.mean((0, 2, 3)).abs().max() < 1e-5
    assert capfd.readouterr() == ("", "")


def test_class_folders_are_decoded_once_until_they_change(tmp_path, monkeypatch):
    own_data(tmp_path)
    first, _ = load("folder", tmp_path)
    kept = tmp_path / "class_folders_32.npz"
    good = kept.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(sources, "square", None)
        assert torch.equal(load("folder", tmp_path)[0].pixels, first.pixels)
    kept.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    assert torch.equal(load("folder", tmp_path)[0].pixels, first.pixels)
    Image.new("RGB", (40, 40)).save(tmp_path / "train" / "dog" / "e.png")
    assert len(load("folder", tmp_path)[0]) == 19
    assert listing(tmp_path) == [".lock", "class_folders_32.npz", "test", "train"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("no test", "test: no such folder; --data-root is to hold train/CLASS/ and test/CLASS/"),
        ("other class", "class fox is in .*train but not in .*test"),
        ("class only in test", "class fox is in .*test but not in .*train"),
        ("empty class", "train/cat holds no image"),
        ("one class", "has 1 class folders, needs at least 2"),
        ("broken", r"a\.JPG \(.*\), .*b\.jpeg \(.*\): cannot be read as an image"),
        ("floats", r"f\.tiff \(floating-point pixels have no known range\)"),
        ("side", "--side 64 is for --dataset folder"),
    ],
)
def test_class_folders_that_do_not_do_are_told(change, says, tmp_path):
    own_data(tmp_path)
    dataset, cat = "folder", tmp_path / "train" / "cat"
    if change == "no test":
        (tmp_path / "test").rename(tmp_path / "tests")
    elif change in ("other class", "class only in test"):
        place = tmp_path / ("train" if change == "other class" else "test") / "fox"
        place.mkdir()
        Image.new("RGB", (9, 9)).save(place / "a.png")
    elif change == "empty class":
        for file in cat.iterdir():
            file.unlink()
    elif change == "one class":
        for half in ("train", "test"):
            for name in ("dog", "emu"):
                (tmp_path / half / name).rename(tmp_path / f"{half}_{name}")
    elif change == "broken":
        (cat / "a.JPG").write_bytes((cat / "a.JPG").read_bytes()[:200])
        (cat / "b.jpeg").write_bytes(b"")
    elif change == "floats":
        Image.fromarray(np.ones((32, 32), np.float32)).save(cat / "f.tiff")
    else:
        dataset = "synthetic"
    with pytest.raises(cifar.DataError, match=says):
        load(dataset, tmp_path, *(["--side", "64"] if change == "side" else []))
    assert not list(tmp_path.glob("*.npz"))


def test_own_images_are_trained_distilled_evaluated_and_exported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ["--dataset", "folder", "--data-root", str(own_data(tmp_path / "own")), "--side", "64"]
    data += ["--val-fraction", "0.3"]
    flags = [*data, "--batch-size", "8", "--epoch", "1", "--milestones", "1"]
    teacher.main(["--arch", "resnet8", *flags])
    folder = tmp_path / "experiments" / "teacher_resnet8_val0.3_seed0"
    student.main(
        [
            "--t-path",
            str(folder),
            "--s-arch",
            "resnet14x05",
            *flags,
            "--t-epoch",
            "1",
            "--t-milestones",
            "1",
            "--export",
            "s.pt2",
        ]
    )
    (distilled,) = (tmp_path / "experiments").glob("sskd_student_resnet14x05_*_val0.3_*")
    capsys.readouterr()
    teacher.main(["--evaluate", str(distilled), "--data-root", str(tmp_path / "own")])  # it says the rest itself
    tested = json.loads((distilled / "result.json").read_text())["test_acc"]
    assert f"test accuracy {tested:.2f} %" in capsys.readouterr().out
    network = models.load(distilled, num_classes=3).eval()
    images = cifar.load(teacher.parse_args(["--arch", "resnet8", *data]), "cpu").test
    exported = torch.export.load("s.pt2").module()
    x = next(images.test_batches(1)).x
    torch.testing.assert_close(exported(images.pixels.permute(0, 3, 1, 2) / 255), network(x), rtol=1e-4, atol=1e-4)
    (tmp_path / "own").rename(tmp_path / "gone")
    student.main(["--s-path", str(distilled), "--export", "again.pt2"])  # needs no image
    assert (tmp_path / "again.pt2").exists()


def test_a_run_is_not_continued_on_other_images(tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    own_data(tmp_path / "own")
    flags = ["--arch", "resnet8", "--dataset", "folder", "--data-root", "own", "--batch-size", "8", "--epoch", "1"]
    flags += ["--milestones", "1"]
    teacher.main(flags)
    (tmp_path / "own").rename(tmp_path / "moved")
    flags[5] = "moved"
    teacher.main(flags)  # finished, wherever the images lie now
    Image.new("RGB", (40, 40)).save(tmp_path / "moved" / "train" / "dog" / "e.png")
    assert "class_folders was" in fails(teacher.main, *flags)
