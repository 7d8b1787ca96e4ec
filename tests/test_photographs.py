"""photographs.py against torchvision and Pillow, and runs on images above 64 pixels."""

import functools
import io
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import colours, contents, end_of, run_script, stop_at
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tvf

import baseline
import cifar
import photographs
import student
import teacher
from harness import folders, sources
from harness.flags import UserError

SIDE = 96
SHORT = f"--dataset folder --side {SIDE} --batch-size 4 --epoch 2 --milestones 1".split()


def own_data(root, train=4, test=2):
    """Photographs of two classes: JPEG files of many sizes, and a PNG."""
    for half, count in (("train", train), ("test", test)):
        for label, name in enumerate(("cat", "dog")):
            (root / half / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(colours(100 + 9 * i, 140 - 3 * i) // np.uint8(label + 1))
                image.save(root / half / name / f"{i}.{'png' if i == 1 else 'jpg'}", quality=95)
    return root


@pytest.fixture
def root(tmp_path):
    return own_data(tmp_path / "data")


@functools.cache
def read(root, side=SIDE):
    return sources.read("folder", root, side)


def images(root, workers=0, seed=0, half="train"):
    source = read(root)
    return cifar.images_of(getattr(source, half), (source.mean, source.std), "cpu", 4, seed, workers=workers)


def epoch(data, phase="student", number=1, views=4):
    x, target, rows, _ = zip(*data.batches(phase, number, views), strict=True)
    return torch.cat(x), torch.cat(target), torch.cat(rows)


def test_any_number_of_workers_gives_the_same_batches_and_every_epoch_others(root):
    x, target, rows = epoch(images(root))
    assert sorted(rows.tolist()) == list(range(8)) and target.tolist() == [row // 4 for row in rows]
    assert x.shape == (32, 3, SIDE, SIDE) and x.is_contiguous(memory_format=torch.channels_last)
    for workers in (1, 2):
        assert all(map(torch.equal, epoch(images(root, workers)), (x, target, rows)))
    for other in (epoch(images(root), number=2), epoch(images(root), "first"), epoch(images(root, seed=1))):
        assert not torch.equal(other[2], rows)
        assert not torch.equal(other[0][::4][other[2] == 0], x[::4][rows == 0])  # the crop of image 0


def test_the_views_of_an_image_are_one_crop_turned_and_flipped_half_the_time(root):
    data = images(root)
    (views, _, rows), (single, _, same) = epoch(data), epoch(data, views=1)
    assert torch.equal(rows, same) and torch.equal(views[::4], single)
    for k in (1, 2, 3):
        assert np.array_equal(views[k::4], np.rot90(single, k, (2, 3)))
    seen = torch.cat([epoch(data, number=number, views=1)[0] for number in range(10)])  # red grows to the right
    flipped = seen[:, 0, :, 0].mean(1) > seen[:, 0, :, -1].mean(1)
    assert 20 < flipped.sum() < 60


@pytest.mark.parametrize(("height", "width"), [(300, 400), (500, 100), (1, 9), (9, 1)])
def test_crops_lie_as_torchvision_draws_them(height, width):
    rng, image = random.Random(0), torch.randint(256, (3, height, width), dtype=torch.uint8)
    ours = torch.tensor([photographs.crop_box(height, width, rng) for _ in range(500)]).double()
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(image, photographs.AREA, photographs.RATIO) for _ in range(500)]
    theirs = torch.tensor(theirs).double()
    assert (ours[:, :2] + ours[:, 2:] <= torch.tensor([height, width])).all() and (ours[:, 2:] >= 1).all()
    assert (ours.amin(0) - theirs.amin(0)).abs().max() <= 0.06 * max(height, width)
    assert (ours.mean(0) - theirs.mean(0)).abs().max() <= 0.04 * max(height, width)
    assert (ours.std(0) - theirs.std(0)).abs().max() <= 0.04 * max(height, width)
    box = photographs.crop_box(height, width, random.Random(5))
    resized = tvf.resized_crop(image, *box, [SIDE, SIDE])
    assert (photographs.crop(image, SIDE, 5).int() - resized.int()).abs().max() <= 1


def test_test_images_are_the_centres_of_resized_ones(root):
    data = images(root, half="test")
    batches = list(data.test_batches(1))
    assert torch.cat([batch.rows for batch in batches]).tolist() == list(range(4))
    got = data.brightness(torch.cat([batch.x for batch in batches])) * 255
    for place, name in ((0, "cat/0.jpg"), (1, "cat/1.png"), (3, "dog/1.png")):
        picture = tvf.center_crop(tvf.resize(folders.picture(root / "test" / name), 110), SIDE)  # 96 ÷ 0.875
        assert np.abs(got[place].permute(1, 2, 0).numpy() - np.asarray(picture)).max() < 2


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


@pytest.mark.parametrize(
    ("mode", "end", "settings"),
    [
        *[(mode, "jpg", {}) for mode in ("RGB", "L", "CMYK", "1")],
        *[("RGB", "jpg", {"exif": orientation(value)}) for value in range(1, 9)],
        ("RGB", "jpg", {"exif": b"Exif\0\0nonsense"}),
        ("RGB", "jpg", {"xmp": b'<x tiff:Orientation="6"/>'}),
        ("RGB", "jpg", {"progressive": True, "subsampling": 1}),
        *[(mode, "png", {}) for mode in ("RGBA", "P", "I;16", "LA")],
        ("RGB", "webp", {"lossless": True}),
    ],
)
def test_an_image_means_what_it_means_at_other_sides(mode, end, settings, tmp_path):
    image = Image.fromarray(colours(50, 70)).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    image.save(tmp_path / f"a.{end}", **settings)
    expected = np.asarray(folders.as_rgb((tmp_path / f"a.{end}").read_bytes())).astype(int)
    got = photographs.decode(tmp_path / f"a.{end}").permute(1, 2, 0).numpy()
    assert got.shape == expected.shape and np.abs(got - expected).max() <= 1


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_cut_off_image_is_named(share, tmp_path):
    file = io.BytesIO()
    Image.fromarray(colours(50, 70)).save(file, "JPEG")
    (tmp_path / "a.jpg").write_bytes(file.getvalue()[: int(share * len(file.getvalue()))])
    with pytest.raises(UserError, match="a.jpg cannot be read"):
        photographs.decode(tmp_path / "a.jpg")


def test_the_fingerprint_is_of_paths_classes_and_sizes(root, tmp_path):
    before = read(root)
    assert before.about.items() >= {"dataset": "folder", "classes": 2, "side": SIDE, "names": ["cat", "dog"]}.items()
    pixels = sources.read("folder", root, 64).train.pixels.flatten(0, 2) / 255.0
    assert before.mean == pytest.approx(pixels.mean(0), abs=0.03) and before.std == pytest.approx(
        pixels.std(0), abs=0.03
    )
    moved = shutil.copytree(root, tmp_path / "moved")
    assert sources.read("folder", moved, SIDE).fingerprint == before.fingerprint
    assert sources.read("folder", moved, 128).fingerprint != before.fingerprint
    changes = [
        lambda train: (train / "cat" / "0.jpg").rename(train / "cat" / "00.jpg"),
        lambda train: (train / "cat" / "3.jpg").rename(train / "dog" / "4.jpg"),
        lambda train: shutil.copy(train / "dog" / "3.jpg", train / "cat" / "2.jpg"),
    ]
    prints = {before.fingerprint}
    for change in changes:
        change(moved / "train")
        prints.add(sources.read("folder", moved, SIDE).fingerprint)
    assert len(prints) == 4


# ---------------------------------------------------------------------------------------------------------------- runs


def flags_of(root, where, workers=0):
    return [*SHORT, "--data-root", str(root), "--workers", str(workers), "--experiments", str(where)]


@pytest.fixture
def trained(root, tmp_path):
    """The flags of students, whose teacher is trained."""
    teacher.main(["--arch", "resnet8", *flags_of(root, tmp_path), "--val-fraction", "0.3"])
    t_path = tmp_path / "teacher_resnet8_val0.3_seed0"
    return ["--t-path", str(t_path), "--s-arch", "resnet14x05", "--val-fraction", "0.3"]


def test_students_train_on_photographs_and_a_stopped_one_continues_with_other_workers(
    trained, root, tmp_path, monkeypatch, capfd
):
    flags = [*trained, *"--t-epoch 1 --t-milestones 1 --few-shot 0.7 --label-noise 0.2".split()]
    student.main([*flags, *flags_of(root, tmp_path / "whole")])
    with monkeypatch.context() as patch:
        stop_at(2, patch)  # in the student's second epoch
        assert end_of(student.main, [*flags, *flags_of(root, tmp_path / "stopped")]) == 1
    student.main([*flags, *flags_of(root, tmp_path / "stopped", workers=2)])
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert "stopped by the test" in capfd.readouterr().err
    baseline.main([*trained, "--method", "crd", *flags_of(root, tmp_path)])
    teacher.main(["--evaluate", str(next(tmp_path.glob("crd*"))), "--data-root", str(root), "--workers", "0"])
    assert "test accuracy" in capfd.readouterr().out.splitlines()[-1]


def test_stored_features_are_refused(trained, root, tmp_path, fails):
    line = fails(student.main, *trained, *flags_of(root, tmp_path / "new"), "--t-features", "memory")
    assert "--t-features memory: with --side 96" in line and not (tmp_path / "new").exists()


def test_a_damaged_image_ends_a_run_and_the_check_in_a_line_that_names_it(root, tmp_path, fails):
    flags = flags_of(root, tmp_path, workers=2)
    file = root / "test" / "dog" / "0.jpg"
    file.write_bytes(file.read_bytes()[:500])
    assert f"{file} cannot be read as an image" in fails(teacher.main, "--arch", "resnet8", *flags)
    checked = ["--dataset", "folder", "--side", SIDE, "--data-root", root]
    assert f"{file} cannot be read as an image" in fails(cifar.main, *checked, "--workers", 1)
    file.unlink()
    cifar.main(list(map(str, checked)))


@pytest.mark.parametrize("of_parent", [False, True])
def test_killed_workers_end_a_run_in_one_line(of_parent, root, tmp_path, monkeypatch, fails):
    def killed(self, task):
        if of_parent:  # as when a scheduler ends the whole group
            os.kill(os.getppid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM if of_parent else signal.SIGKILL)

    monkeypatch.setattr(photographs.Crops, "__getitem__", killed)
    status = 128 + signal.SIGTERM if of_parent else 1
    line = fails(teacher.main, "--arch", "resnet8", *flags_of(root, tmp_path, workers=1), status=status)
    assert ("stopped by SIGTERM" if of_parent else "fewer --workers") in line


@pytest.mark.slow
def test_a_run_killed_at_any_moment_continues_bit_for_bit(tmp_path):
    own_data(tmp_path / "data", train=20, test=6)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    flags = ["--arch", "resnet8", *flags_of(tmp_path / "data", "experiments", workers=2), "--epoch", "3"]
    done = run_script("teacher.py", *flags, cwd=tmp_path / "whole")
    assert (done.returncode, done.stderr) == (0, "")
    done = run_script("tests/killer.py", "3,7,1.5,12,2.5,5", "teacher.py", *flags, cwd=tmp_path / "killed")
    *statuses, last = map(int, done.stdout.splitlines()[-1].split())
    assert last == 0 and statuses.count(-signal.SIGKILL) >= 2, done.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
