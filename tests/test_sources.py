"""sources.py: archives, class folders, caches, fingerprints, and which data set is read."""

import hashlib
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import colours
from PIL import Image
from torchvision import datasets as tv

import cifar
import student
import teacher
from harness import folders, sources
from harness.flags import UserError
from harness.sources import CLASSES, Source, Split

NAMES = CLASSES["cifar100"]


def assert_equal(source, other):
    assert (source.name, source.classes, source.mean) == (other.name, other.classes, other.mean)
    for tensor, same in zip((*source.train, *source.test), (*other.train, *other.test), strict=True):
        assert torch.equal(tensor, same)


# -------------------------------------------------------------------------------------------------------------- CIFAR


@pytest.fixture
def tiny(monkeypatch):
    """The pixels and labels of two training images and one test image per class, from now on those of CIFAR-100."""
    rng, splits = np.random.default_rng(0), []
    for half, count in (("train", 200), ("test", 100)):
        pixels, labels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.permutation(count) % 100
        pixels[1] = pixels[0]  # equal images of two classes: their order is that of the labels
        digests = [hashlib.sha256(x.tobytes() + bytes([y])).digest() for x, y in zip(pixels, labels, strict=True)]
        content = hashlib.sha256(b"".join(sorted(digests))).hexdigest()
        monkeypatch.setitem(sources.CIFAR100, half, content)
        splits.append((pixels, labels))
    return splits


def expected(name, tiny):
    """The source that `tiny` should become."""
    splits = []
    for pixels, labels in tiny:
        key = lambda i, x=pixels, y=labels: (hashlib.sha256(x[i].tobytes()).digest(), y[i])  # noqa: E731
        order = np.array(sorted(range(len(labels)), key=key if name == "cifar100" else None))
        splits.append(Split(torch.from_numpy(pixels[order]), torch.from_numpy(labels[order])))
    return Source(name, *splits, CLASSES[name], *sources.STATISTICS[name])


@pytest.fixture
def archive(tiny, tmp_path, monkeypatch, request):
    """`tiny` as an archive of torchvision's layout, which torchvision now expects: its file, URL, name and source."""
    name = getattr(request, "param", "cifar100")
    dataset, key = (tv.CIFAR100, "fine_labels") if name == "cifar100" else (tv.CIFAR10, "labels")
    train, test = ({"data": x.transpose(0, 3, 1, 2).reshape(-1, 3072), key: y.tolist()} for x, y in tiny)
    place, sums = tmp_path / "unpacked" / dataset.base_folder, {}
    place.mkdir(parents=True)
    for part, content in {"train": train, "test": test, "meta": {"names": CLASSES[name]}}.items():
        (place / part).write_bytes(pickle.dumps(content))
        sums[part] = hashlib.md5(pickle.dumps(content)).hexdigest()
    without_suffix = tmp_path / "mirror" / dataset.filename.removesuffix(".tar.gz")
    file = Path(shutil.make_archive(without_suffix, "gztar", place.parent, place.name))
    monkeypatch.setattr(dataset, "url", "file:///nowhere")
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5(file.read_bytes()).hexdigest())
    monkeypatch.setattr(dataset, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(dataset, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(dataset, "meta", {"filename": "meta", "key": "names", "md5": sums["meta"]})
    return SimpleNamespace(file=file, url=file.as_uri(), name=name, source=expected(name, tiny))


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("archive", "by_hand"),
    [*(("cifar100", word) for word in ("archive", "unpacked", "damaged", "nothing")), ("cifar10", "nothing")],
    indirect=["archive"],
)
def test_an_archive_put_there_by_hand_is_read_and_a_good_one_is_downloaded_otherwise(by_hand, archive, root):
    url = None if by_hand in ("archive", "unpacked") else archive.url
    if by_hand == "unpacked":
        shutil.unpack_archive(archive.file, root)
    elif by_hand != "nothing":
        content = archive.file.read_bytes()
        (root / archive.file.name).write_bytes(content if by_hand == "archive" else content[:1000])
    assert_equal(sources.read(archive.name, root, url=url), archive.source)


@pytest.mark.parametrize("mirror", ["no mirror", "no such file", "other content"])
def test_an_archive_that_cannot_be_had_is_named_and_a_better_mirror_helps(mirror, archive, root):
    good = archive.file.read_bytes()
    if mirror == "other content":
        archive.file.write_bytes(good + b"more")
    url = {"no mirror": None, "no such file": f"{archive.url}.bz2", "other content": archive.url}[mirror]
    with pytest.raises(UserError, match=f"put cifar-100-python.tar.gz into {root}, or .* --data-url"):
        sources.read("cifar100", root, url=url)
    archive.file.write_bytes(good)
    assert_equal(sources.read("cifar100", root, url=archive.url), archive.source)


def test_of_four_first_starts_one_reads_the_archive(archive, root, monkeypatch):
    reads, download = [], tv.CIFAR100.download
    monkeypatch.setattr(tv.CIFAR100, "download", lambda self: reads.append(self.train) or download(self))
    with ThreadPoolExecutor(4) as pool:  # each opens the lock file anew, as processes do
        for source in pool.map(lambda _: sources.read("cifar100", root, url=archive.url), range(4)):
            assert_equal(source, archive.source)
    assert reads == [True, False]


def test_cifar_py_downloads_a_data_set_and_prints_what_it_contains(archive, root, capsys, fails):
    cifar.main(["--data-root", str(root), "--data-url", archive.url])
    printed = capsys.readouterr().out
    assert "cifar100: 200 training and 100 test images, 32 × 32, 100 classes; mean 0.5071 0.4866 0.4409" in printed
    assert f"{root / 'train'}: no such folder" in fails(cifar.main, "--data-root", root, "--dataset", "folder")


@pytest.fixture
def png_root(tiny, root):
    """`tiny` as PNG files in class folders below a data root; the data root."""
    for half, (pixels, labels) in zip(("train", "test"), tiny, strict=True):
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            place = root / "cifar100" / half / NAMES[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{i * 7919 % 1000}.png")
    return root


@pytest.mark.parametrize("place", ["cifar100", "CIFAR-100-dataset", ".", "numbers"])
def test_class_folders_of_cifar100_give_the_same_source_as_its_archive(place, png_root, archive, tmp_path):
    (png_root / "cifar100").rename(tmp_path / "moved")
    if place == ".":
        png_root.rmdir()
    elif place == "numbers":  # 0 … 99, as some copies call the classes
        for folder in (tmp_path / "moved").glob("*/*"):
            folder.rename(folder.with_name(str(NAMES.index(folder.name))))
        place = "cifar100"
    (tmp_path / "moved").rename(png_root / place)
    source = read_for({}, png_root)  # without a checkpoint and --dataset it is CIFAR-100
    assert_equal(source, archive.source)
    assert source.fingerprint == archive.source.fingerprint


def exchange(first, second):
    between = first.with_name("between")
    first.rename(between), second.rename(first), between.rename(second)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda bed, bee: bed.unlink(), "the 199 train images are not CIFAR-100's"),
        (lambda bed, bee: bed.write_bytes(bed.read_bytes()[:500]), "cannot be read as an image .*: replace it"),
        (lambda bed, bee: Image.new("RGB", (32, 32)).save(bed), "the 200 train images are not CIFAR-100's"),
        (exchange, "the 200 train images are not CIFAR-100's, or some lie in the wrong class"),
    ],
)
def test_class_folders_that_are_not_cifar100_are_refused(change, says, png_root):
    change(*(min((png_root / "cifar100" / "train" / name).iterdir()) for name in ("bed", "bee")))
    with pytest.raises(UserError, match=says):
        sources.read("cifar100", png_root)
    assert not list(png_root.glob("*.npz"))


# ---------------------------------------------------------------------------------------------- your own class folders


def own_data(root, test="test"):
    """Three class folders of images in several sizes, formats and depths."""
    rng = np.random.default_rng(0)
    files = ["a.JPG", "b.bmp", "more/c.webp", "d.png", "e.png", "f.png"]
    for half, count in (("train", 6), (test, 3)):
        for label, name in enumerate(("cat", "dog", "emu")):
            (root / half / name / "more").mkdir(parents=True)
            for file in files[:count]:
                image = Image.fromarray(colours(*rng.integers(20, 90, 2)) // np.uint8(label + 1))
                image.save(root / half / name / file)
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    (root / "train" / "cat" / "._a.jpg").write_text("what macOS leaves")
    return root


@pytest.mark.parametrize(("side", "test"), [(32, "test"), (64, "val")])
def test_class_folders_are_read_with_their_classes_and_statistics(side, test, root, capfd):
    source = sources.read("folder", own_data(root, test), None if side == 32 else side)
    assert source.train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert source.test.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert source.train.pixels.shape == (18, side, side, 3)
    for i, file in (7, "train/dog/b.bmp"), (17, "train/emu/more/c.webp"):
        assert np.array_equal(source.train.pixels[i], folders.square(root / file, side))
    assert np.array_equal(source.test.pixels[0], folders.square(root / test / "cat" / "a.JPG", side))
    values = source.train.pixels.numpy().reshape(-1, 3) / 255
    assert source.mean == pytest.approx(values.mean(0), abs=1e-9)
    assert source.std == pytest.approx(values.std(0), abs=1e-9)
    about = {"dataset": "folder", "classes": 3, "names": ["cat", "dog", "emu"], "side": side}
    assert source.about == about | {"mean": list(source.mean), "std": list(source.std)}
    line = "data: 18 training and 9 test images of 3 classes, 1 files ignored (.txt 1)\n"
    assert capfd.readouterr() == (line, "")
    assert source.counts == {"train": 18, "val": 0, "test": 9, "ignored": {".txt": 1}}


def save(file):
    file.parent.mkdir(exist_ok=True)
    Image.new("RGB", (40, 40)).save(file)


def test_an_image_that_cannot_be_read_is_named_and_nothing_is_kept(root):
    (own_data(root) / "train/cat/b.bmp").write_bytes(b"a")
    with pytest.raises(UserError, match="b.bmp cannot be read as an image"):
        sources.read("folder", root)
    assert not list(root.glob("*.npz"))


def test_other_labels_in_tiny_imagenets_listing_are_another_data_set(root):
    own_data(root)
    for file in (root / "test/cat/a.JPG", root / "test/dog/a.JPG", root / "test/emu/a.JPG"):
        (root / "val/images").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / "val/images" / f"{file.parent.name}.JPG")
    shutil.rmtree(root / "test")
    found = []
    for classes in (["cat", "dog", "emu"], ["cat", "emu", "dog"]):
        lines = [f"{name}.JPG\t{label}" for name, label in zip(("cat", "dog", "emu"), classes, strict=True)]
        (root / "val/val_annotations.txt").write_text("\n".join(lines))
        found.append(sources.read("folder", root))
    first, second = (source.test.pixels for source in found)
    assert torch.equal(second, first[[0, 2, 1]])
    assert found[0].fingerprint != found[1].fingerprint


def test_images_in_val_choose_the_best_epoch_if_test_has_classes_too(root, capsys):
    own_data(root)
    (root / "test").rename(root / "val")
    own_data(root / "more")
    (root / "more/test").rename(root / "test")
    save(root / "val/dog/z.png")
    source = sources.read("folder", root)
    assert [len(split.labels) for split in (source.train, source.val, source.test)] == [18, 10, 9]
    assert_equal(source, sources.read("folder", root))  # from the cache
    assert replace(source, val=source.test).fingerprint != source.fingerprint
    data = cifar.load(source, teacher.parse_args(["--arch", "resnet8"]), "cpu")
    assert torch.equal(data.val.pixels, source.val.pixels) and torch.equal(data.test.pixels, source.test.pixels)
    assert len(data.train) == 18 and data.about["tested"] == 10
    with pytest.raises(UserError, match="--val-fraction: the best epoch is chosen on the images in val/"):
        cifar.load(source, teacher.parse_args(["--arch", "resnet8", "--val-fraction", "0.1"]), "cpu")


# ---------------------------------------------------------------------------------------------- caches and fingerprints


@pytest.fixture(params=["folder", "cifar100"])
def once_read(request, root):
    """A data set that has been read once: its name, root, source and cache."""
    name = request.param
    own_data(root) if name == "folder" else request.getfixturevalue("png_root")
    source = sources.read(name, root)
    return SimpleNamespace(name=name, root=root, source=source, cache=next(root.glob("*.npz")))


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_cache_equals_a_fresh_read_and_a_damaged_one_is_made_again(damage, once_read, monkeypatch):
    good = once_read.cache.read_bytes()
    flipped = good[:5000] + bytes([good[5000] ^ 1]) + good[5001:]
    once_read.cache.write_bytes(flipped if damage == "flipped" else good[: len(good) // 2])
    assert_equal(sources.read(once_read.name, once_read.root), once_read.source)
    monkeypatch.setattr(folders, "decode", None)
    assert_equal(sources.read(once_read.name, once_read.root), once_read.source)


def test_a_read_only_data_root_is_read_each_time(once_read, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    once_read.cache.unlink()
    monkeypatch.setattr(np, "savez", read_only)
    assert_equal(sources.read(once_read.name, once_read.root), once_read.source)


def other_pixels(file):
    """Changes an image in place, but neither its size nor its times."""
    content, stat = file.read_bytes(), file.stat()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes(100) + content[middle + 100 :])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        lambda train: save(train / "emu/z.png"),
        lambda train: (train / "cat/a.JPG").unlink(),
        lambda train: exchange(train / "cat", train / "dog"),
        lambda train: other_pixels(train / "cat/b.bmp"),
    ],
    ids=["added", "removed", "exchanged", "changed in place"],
)
def test_class_folders_are_read_anew_when_an_image_changes(change, root):
    before = sources.read("folder", own_data(root))
    change(root / "train")
    after = sources.read("folder", root)
    assert after.fingerprint != before.fingerprint
    (root / "class_folders_32.npz").unlink()
    assert_equal(after, sources.read("folder", root))
    assert sorted(path.name for path in root.iterdir()) == [".lock", "class_folders_32.npz", "test", "train"]


def test_a_fingerprint_changes_with_any_pixel_label_or_class_name():
    train, test = (Split(*sources.synthetic(half, 6)) for half in (True, False))
    source = Source("folder", train, test, ["a", "bc", *"defgh"], (0.5,) * 3, (0.2,) * 3)
    pixels, labels = train.pixels.clone(), test.labels.clone()
    pixels[5, 31, 31, 2] ^= 1
    labels[5] += 1
    others = [
        replace(source, train=Split(pixels, train.labels)),
        replace(source, test=Split(test.pixels, labels)),
        replace(source, classes=["bc", "a", *"defgh"]),
        replace(source, classes=["ab", "c", *"defgh"]),
    ]
    assert replace(source).fingerprint == source.fingerprint
    assert len({each.fingerprint for each in (source, *others)}) == 5


# -------------------------------------------------------------------------------------------- a checkpoint's data set


def read_for(about, root, *words, **more):
    args = teacher.parse_args(["--arch", "resnet8", "--data-root", str(root), *words])
    return sources.read_for(args, about, "best.pth" if about else None, **more)


MOMENTS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def test_a_checkpoints_data_set_side_and_moments_are_taken(root, capsys):
    about = {"dataset": "folder", "classes": 3, "side": 64} | MOMENTS
    own_data(root)
    for words in [], ["--dataset", "folder"], ["--side", "64"]:
        source = read_for(about, root, *words)
        assert (source.name, source.side) == ("folder", 64)
        assert [list(source.mean), list(source.std)] == list(MOMENTS.values())
    assert capsys.readouterr().err == ""
    size = "--dataset synthetic --train-size 5 --test-size 5".split()
    assert read_for({"dataset": "cifar100", "classes": 100}, "nowhere", *size).name == "synthetic"
    printed = capsys.readouterr()
    assert "best.pth says that it was trained on cifar100, not on synthetic" in printed.err
    assert (
        "normalised by mean 0.1863 0.1863 0.1863 and deviation 0.2018 0.2018 0.2018; best.pth does not say its own"
        in printed.out
    )


def test_classes_in_another_order_are_brought_into_the_networks_order(root):
    """A network learnt the classes under other numbers."""
    own = sources.read("folder", own_data(root))
    seen = read_for({"dataset": "folder", "names": ["emu", "cat", "dog"]} | MOMENTS, root)
    assert seen.classes == ["emu", "cat", "dog"]
    for ours, theirs in ((own.train, seen.train), (own.test, seen.test)):
        assert [own.classes[i] for i in ours.labels] == [seen.classes[i] for i in theirs.labels]
        assert torch.equal(ours.pixels, theirs.pixels)
    assert seen.fingerprint != own.fingerprint


def test_a_test_needs_no_training_images(root):
    whole = sources.read("folder", own_data(root))
    shutil.rmtree(root / "train")
    about = whole.about | MOMENTS
    seen = read_for(about, root, train=False)
    assert torch.equal(seen.test.pixels, whole.test.pixels) and torch.equal(seen.test.labels, whole.test.labels)
    assert seen.about == about and len(seen.train.labels) == 0
    with pytest.raises(UserError, match="train: no such folder"):  # their mean and deviation are needed
        read_for({"dataset": "folder", "classes": 3}, root, train=False)


@pytest.mark.parametrize(
    ("about", "words", "says"),
    [
        ({"dataset": "folder", "classes": 4}, [], "best.pth: it was trained on folder, 4 classes; folder has 3"),
        ({"dataset": "imagenet", "classes": 1000}, [], "imagenet, a data set unknown here; give --dataset"),
        ({"dataset": "folder", "side": 64}, ["--side", "32"], "trained on folder, 64 pixels a side; folder has 32"),
        (
            {"dataset": "folder", "names": ["cat", "cow", "dog"]},
            [],
            "on other classes: cow is only there and emu is only here",
        ),
        ({"dataset": "folder", "names": ["cat", "dog"]}, [], "on other classes: emu is only here"),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused(about, words, says, root):
    own_data(root)
    with pytest.raises(UserError, match=says):
        read_for(about, root, *words)


# ----------------------------------------------------------------------------------------------------- with the scripts


def test_own_images_are_trained_distilled_and_evaluated_and_other_images_are_another_run(
    tmp_path, monkeypatch, capsys, fails
):
    monkeypatch.chdir(tmp_path)
    own_data(tmp_path / "own")
    flags = "--dataset folder --data-root own --side 64 --val-fraction 0.3 --batch-size 8 --epoch 1 --milestones 1"
    teacher.main(["--arch", "resnet8", *flags.split()])
    words = "--t-path experiments/teacher_resnet8_val0.3_seed0 --s-arch resnet8 --t-epoch 1 --t-milestones 1"
    student.main([*words.split(), *flags.split()])
    (distilled,) = (tmp_path / "experiments").glob("sskd_student_resnet8_*_val0.3_*")
    capsys.readouterr()
    teacher.main(["--evaluate", str(distilled), "--data-root", "own"])  # the checkpoint says the rest
    tested = json.loads((distilled / "result.json").read_text())["test_acc"]
    assert f"test accuracy {tested:.2f} %" in capsys.readouterr().out
    (tmp_path / "own/train").rename("elsewhere")  # a test needs no training images
    teacher.main(["--evaluate", str(distilled), "--data-root", "own", "--val-fraction", "0.3", "--few-shot", "0.5"])
    printed = capsys.readouterr()
    assert f"test accuracy {tested:.2f} %" in printed.out and printed.err == ""
    Path("elsewhere").rename("own/train")
    save(tmp_path / "own/train/dog/z.png")
    assert "holds a run with other flags: data was" in fails(teacher.main, "--arch", "resnet8", *flags.split())
