"""harness/folders.py: untidy class folders, against torchvision's ImageFolder, Pillow and NumPy."""

import io
import shutil
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from conftest import colours
from PIL import Image
from torchvision.datasets import ImageFolder

from harness import folders
from harness.flags import UserError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
GREY = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64


def save(file, pixels=PIXELS, **settings):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **settings)
    return file


def tidy(root, names=("train", "test"), classes=("cat", "dog"), count=2):
    for half in names:
        for name in classes:
            for i in range(count):
                save(root / half / name / f"{i}.png")
    return root


def names(classes):
    return {name: [file.name for file in files] for name, files in classes.items()}


# ------------------------------------------------------------------------------------------------------- which files


def test_the_files_are_those_of_image_folder_with_links_followed(tmp_path):
    root = tidy(tmp_path / "train", names=("",))
    save(tmp_path / "elsewhere" / "deep" / "x.jpg")
    save(tmp_path / "other" / "y.webp")
    (root / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "z.png").symlink_to(tmp_path / "other" / "y.webp")
    (root / "emu").symlink_to(tmp_path / "other")
    (root / "dog" / "labels.txt").write_text("1 2 3")
    theirs = ImageFolder(root)
    found = folders.class_files(root)
    ours = [(str(file), i) for i, files in enumerate(found.classes.values()) for file in files]
    assert (list(found.classes), sorted(ours)) == (theirs.classes, sorted(theirs.samples))
    assert len(ours) == 7
    assert found.ignored == {".txt": 1}


@pytest.mark.parametrize(
    "place",
    [".ipynb_checkpoints", ".Trash-1000/files", "@eaDir", "__MACOSX", "$Recycle.Bin", "@Recycle", "a/.thumbnails"],
)
def test_what_systems_leave_behind_is_ignored(place, tmp_path):
    root = tidy(tmp_path)
    save(root / "train" / "cat" / place / "0.png")
    save(root / "train" / place / "0.png")
    save(root / "train" / "cat" / "._0.png")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (root / "train" / "cat" / name).write_bytes(b"1")
    found = folders.class_files(root / "train")
    assert names(found.classes) == {"cat": ["0.png", "1.png"], "dog": ["0.png", "1.png"]} | (
        {"a": []} if place.startswith("a/") else {}
    )
    assert not found.ignored


@pytest.mark.parametrize("end", "gif jfif jpe jp2 tga JPEG ppm tiff avif qoi mpo".split())
def test_whatever_pillow_reads_is_an_image(end, tmp_path):
    if Image.registered_extensions().get(f".{end.lower()}") not in Image.SAVE:
        pytest.skip("this Pillow does not write the format")
    settings = {"format": "JPEG"} if end in ("jfif", "jpe", "JPEG") else {}
    file = save(tmp_path / "train" / "cat" / f"a.{end}", **settings)
    assert names(folders.class_files(tmp_path / "train").classes) == {"cat": [f"a.{end}"]}
    with Image.open(file) as image:
        assert np.array_equal(folders.square(file, 32), image.convert("RGB"))


def test_the_formats_are_known_before_any_image_was_opened(monkeypatch):
    before, loaded, extensions = folders.suffixes(), dict(Image.OPEN), Image.registered_extensions()
    monkeypatch.setattr(Image, "OPEN", {})  # as in a fresh process, where Pillow loads its formats when asked for them
    monkeypatch.setattr(Image, "registered_extensions", lambda: Image.OPEN.update(loaded) or extensions)
    assert folders.suffixes() == before and ".jpg" in before


def test_other_files_are_counted_by_their_suffix(tmp_path):
    for name in ("a.csv", "b.CSV", "c.h5", "README", "movie.mpg"):
        (tidy(tmp_path) / "train" / "cat" / name).write_text("x")
    save(tmp_path / "train" / "of no class.png")
    assert folders.class_files(tmp_path / "train").ignored == {".csv": 2, ".h5": 1, "": 1, ".mpg": 1, ".png": 1}


def test_a_link_to_nothing_or_to_a_folder_above_is_named(tmp_path):
    link = tidy(tmp_path) / "train" / "cat" / "x.png"
    link.symlink_to("nowhere.png")
    with pytest.raises(UserError, match="cat/x.png is a link to nowhere.png, which does not exist"):
        folders.class_files(tmp_path / "train")
    link.unlink()
    link.symlink_to("../../train")
    with pytest.raises(UserError, match="cat/x.png is a link to a folder that contains it"):
        folders.class_files(tmp_path / "train")
    (tmp_path / "test").rename(tmp_path / "val")
    (tmp_path / "test").symlink_to("elsewhere")
    with pytest.raises(UserError, match="test is a link to elsewhere, which does not exist"):
        folders.splits(tmp_path)


def test_a_class_name_is_the_same_in_every_unicode_form(tmp_path):
    for half, form in (("train", "NFC"), ("test", "NFD")):
        for name in ("café", "thé"):
            save(tmp_path / half / unicodedata.normalize(form, name) / "0.png")
    found = folders.splits(tmp_path)
    assert list(found["train"].classes) == list(found["test"].classes) == ["café", "thé"]


# ---------------------------------------------------------------------------------------------------------- which split


def flat(folder):
    return save(folder / "0.JPEG").parent


@pytest.mark.parametrize(
    ("given", "unlabelled", "found"),
    [
        (("train", "test"), None, {"train": "train", "test": "test"}),
        (("train", "val"), None, {"train": "train", "test": "val"}),
        (("train", "val"), "test", {"train": "train", "test": "val"}),  # as ImageNet
        (("train", "val"), "test/images", {"train": "train", "test": "val"}),  # as Tiny-ImageNet
        (("train", "test"), "val", {"train": "train", "test": "test"}),
        (("train", "val", "test"), None, {"train": "train", "val": "val", "test": "test"}),
        (("train", "valid", "test"), None, {"train": "train", "val": "valid", "test": "test"}),
        (("train", "validation"), None, {"train": "train", "test": "validation"}),
    ],
)
def test_the_test_images_are_those_with_classes(given, unlabelled, found, tmp_path):
    tidy(tmp_path, given)
    if unlabelled:
        flat(tmp_path / unlabelled)
    splits = folders.splits(tmp_path)
    where = {name: split.classes["cat"][0].relative_to(tmp_path).parts[0] for name, split in splits.items()}
    assert where == found


def test_tiny_imagenets_own_layout_is_read(tmp_path):
    for name in ("n01", "n02"):
        for i in range(2):
            save(tmp_path / "train" / name / "images" / f"{name}_{i}.JPEG")
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("x")
    for i in range(3):
        save(tmp_path / "val" / "images" / f"val_{i}.JPEG")
    lines = ["val_0.JPEG\tn02\t0\t32\t44\t62", "val_1.JPEG\tn01\t52\t55\t57\t59", "val_2.JPEG\tn02\t4\t0\t60\t55"]
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    flat(tmp_path / "test" / "images")
    found = folders.splits(tmp_path)
    assert names(found["train"].classes) == {n: [f"{n}_0.JPEG", f"{n}_1.JPEG"] for n in ("n01", "n02")}
    assert names(found["test"].classes) == {"n01": ["val_1.JPEG"], "n02": ["val_0.JPEG", "val_2.JPEG"]}
    assert found["test"].ignored == {".txt": 1}
    text = "\ufeff" + "\r\n".join([*lines[:2], lines[0]]) + "\r\n\r\n"  # a line twice, an image in no line
    (tmp_path / "val" / "val_annotations.txt").write_text(text, newline="")
    found = folders.splits(tmp_path)
    assert names(found["test"].classes) == {"n01": ["val_1.JPEG"], "n02": ["val_0.JPEG"]}
    assert found["test"].ignored == {".txt": 1, ".jpeg": 1}
    (tmp_path / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(UserError, match="val_annotations.txt, line 2: there is no image val_1.JPEG"):
        folders.splits(tmp_path)
    (tmp_path / "val" / "images" / "val_0.JPEG").unlink()
    (tmp_path / "val" / "images" / "val_2.JPEG").unlink()
    tidy(tmp_path / "val", [""], ["n01", "n02"])  # as scripts sort the images into classes
    assert names(folders.splits(tmp_path)["test"].classes) == {"n01": ["0.png", "1.png"], "n02": ["0.png", "1.png"]}


def test_a_test_needs_no_training_images(tmp_path):
    found = folders.splits(tidy(tmp_path, ["val"]), train=False, known=["cat", "dog"])
    assert names(found["test"].classes) == {"cat": ["0.png", "1.png"], "dog": ["0.png", "1.png"]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda root: (root / "test").rename(root / "tests"),
            "test: no such folder, and val/ is missing, too; --data-ro",
        ),
        (
            lambda root: (
                flat((root / "test").rename(root / "val")) and [shutil.rmtree(x) for x in root.glob("val/[cd]*")]
            ),
            "val has no classes",
        ),
        (lambda root: (root / "train").rename(root / "training"), "train: no such folder; --data-root .* needs"),
        (lambda root: save(root / "train/fox/a.png"), "class fox is in .*train but not in .*test"),
        (lambda root: tidy(root, ["val"], ["cat", "fox"]), "class dog is in .*train but not in .*val .and 1 more"),
        (lambda root: (root / "train/fox").mkdir(), "train/fox holds no image"),
        (
            lambda root: [tidy(root, ["val"]), tidy(root / "test", [""], ["Cat", "Dog"])],
            "class Cat is in .*test but not in",
        ),
    ],
)
def test_splits_that_do_not_fit_are_refused(change, says, tmp_path):
    change(tidy(tmp_path))
    with pytest.raises(UserError, match=says):
        folders.splits(tmp_path)


# ------------------------------------------------------------------------------------------------------ what it shows


@pytest.mark.parametrize(
    ("name", "values", "settings", "expected"),
    [
        ("a.png", GREY, {}, GREY >> 8),
        ("a.tiff", GREY, {}, GREY >> 8),
        ("a.ppm", GREY.astype(np.int32), {}, GREY >> 8),
        ("a.jp2", GREY, {"irreversible": False}, GREY >> 8),
        ("a.tiff", (GREY >> 8).astype(np.uint8), {"tiffinfo": {262: 0}}, GREY >> 8),
    ],
)
def test_grey_of_any_depth_is_scaled_to_8_bits(name, values, settings, expected, tmp_path):
    got = folders.square(save(tmp_path / name, values, **settings), 32)
    assert np.array_equal(got, np.repeat(expected[..., None], 3, 2))


@pytest.mark.parametrize(
    ("values", "tags"),
    [
        (GREY.astype(np.int32) % 200, {}),  # 32 bits
        (GREY, {262: 0}),  # 0 is white
        (GREY // 16, {281: 4095}),  # 4095 is white
        (GREY.astype(np.float32) / 65535, {}),
        ((GREY >> 8).astype(np.uint8), {339: 2}),  # with a sign
    ],
)
def test_pixels_whose_meaning_is_not_certain_are_refused(values, tags, tmp_path):
    with pytest.raises(UserError, match="a.tiff cannot be read as an image .*range"):
        folders.square(save(tmp_path / "a.tiff", values, tiffinfo=tags), 32)


COLOURS, NUMBERS = colours(32, 32), np.arange(1024).reshape(32, 32)
OF_GREY, ODD = NUMBERS[..., None].repeat(3, 2), NUMBERS[..., None] % 2
TWO = Image.fromarray((NUMBERS % 2).astype(np.uint8), "P")
TWO.putpalette([10, 20, 30, 40, 50, 60])
RGBA = Image.fromarray(np.dstack([COLOURS, ODD * 255]).astype(np.uint8))


@pytest.mark.parametrize(
    ("image", "expected", "settings"),
    [
        (Image.fromarray(COLOURS), COLOURS, {}),
        (Image.fromarray(NUMBERS.astype(np.uint8)), OF_GREY % 256, {}),
        (RGBA, np.where(ODD, COLOURS, 255), {}),
        (TWO, np.where(ODD, [40, 50, 60], [10, 20, 30]), {}),
        (TWO, np.where(ODD, [40, 50, 60], 255), {"transparency": 0}),
        (Image.fromarray(COLOURS), np.rot90(COLOURS, -1), {"exif": {0x0112: 6}}),  # to be turned clockwise
        (Image.fromarray(COLOURS), COLOURS[:, ::-1], {"exif": {0x0112: 2}}),  # to be mirrored
    ],
    ids=["RGB", "L", "RGBA", "P", "transparent P", "turned", "mirrored"],
)
def test_images_of_every_kind_become_rgb(image, expected, settings, tmp_path):
    if "exif" in settings:
        exif = Image.Exif()
        exif.update(settings["exif"])
        settings = {"exif": exif}
    image.save(tmp_path / "image.png", **settings)
    assert np.array_equal(folders.square(tmp_path / "image.png", 32), expected)


@pytest.mark.parametrize(("height", "width"), [(100, 50), (20, 31), (32, 90)])
@pytest.mark.parametrize("side", [32, 64])
def test_the_shorter_side_is_resized_and_the_centre_kept(height, width, side, tmp_path):
    Image.fromarray(colours(height, width)).save(tmp_path / "image.png")
    got = folders.square(tmp_path / "image.png", side).astype(float)
    scale = side / min(height, width)
    place = [(n - side / scale) / 2 + (np.arange(side) + 0.5) / scale for n in (height, width)]  # in the large image
    for channel, axis, length in ((0, 1, width), (1, 0, height)):  # red grows to the right, green downwards
        exact = (place[axis] - 0.5) * 255 / length
        line = got[side // 2, :, channel] if axis else got[:, side // 2, channel]
        assert np.abs(line - exact)[2:-2].max() < 255 / length * (0.5 + 1 / scale) + 1.5


def chunk(name, content, damage=0):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content) ^ damage)


def png_with(extra):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()[:33] + extra + file.getvalue()[33:]


LONG = zlib.compress(b"x" * 100_000_000)


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"Comment\0\0" + LONG),
        chunk(b"iCCP", b"profile\0\0" + LONG),
        chunk(b"tEXt", b"Comment\0text", damage=1),
        chunk(b"eXIf", b"nonsense"),
        chunk(b"gAMA", b"\0\0"),
    ],
    ids=["long comment", "long profile", "wrong checksum", "EXIF", "short gamma"],
)
def test_damaged_metadata_does_not_keep_a_png_from_being_read(extra, tmp_path):
    (tmp_path / "a.png").write_bytes(png_with(extra))
    assert np.array_equal(folders.square(tmp_path / "a.png", 32), PIXELS)


@pytest.mark.parametrize(
    ("depth", "kind", "row", "key"),
    [
        (2, 0, b"\x90", (1,)),
        (4, 0, b"\x96\x12", (6,)),
        (16, 2, struct.pack(">12H", *range(0, 48000, 4000)), (12000, 16000, 20000)),
    ],
)  # the second of four pixels is transparent
def test_a_transparent_colour_of_any_depth_is_over_white(depth, kind, row, key, tmp_path):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, depth, kind, 0, 0, 0))
    transparent, pixels = (
        chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)),
        chunk(b"IDAT", zlib.compress((b"\0" + row) * 4)),
    )
    (tmp_path / "a.png").write_bytes(folders.PNG + head + transparent + pixels + chunk(b"IEND", b""))
    white = (folders.square(tmp_path / "a.png", 4) == 255).all(2)
    assert white.tolist() == [[False, True, False, False]] * 4


def test_a_png_with_a_damaged_comment_is_still_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = png_with(chunk(b"eXIf", exif.tobytes()[6:]) + chunk(b"tEXt", b"Comment\0text", damage=1))
    (tmp_path / "a.png").write_bytes(content)
    assert np.array_equal(folders.square(tmp_path / "a.png", 32), np.rot90(PIXELS, -1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"])
def test_nonsense_exif_does_not_keep_a_jpeg_from_being_read(exif, tmp_path):
    file = save(tmp_path / "a.jpg", exif=exif)
    with Image.open(file) as image:
        assert np.array_equal(folders.square(file, 32), image.convert("RGB"))


@pytest.mark.parametrize("cut", [40, 400])
def test_damaged_pixels_are_refused(cut, tmp_path):
    whole = png_with(b"")
    for content in (whole[:-cut], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(UserError, match="a.png cannot be read as an image"):
            folders.square(tmp_path / "a.png", 32)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\n<!DOCTYPE html><html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"", "an empty file"),
        (b"404: Not Found", "a text file"),
    ],
)
def test_a_file_that_is_something_else_is_told_what_it_is(content, says, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match=f"a.jpg cannot be read as an image .{says}"):
        folders.square(tmp_path / "a.jpg", 32)


def test_a_picture_above_pillows_limit_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(UserError, match="a.png has more pixels than Pillow accepts"):
        folders.square(save(tmp_path / "a.png"), 32)
