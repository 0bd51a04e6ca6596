"""Folders of images: what is in them, and what is damaged."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.data.streams import (
    CLASSES,
    TEST_COUNTS,
    TRAIN_COUNTS,
    folder_of,
    noise,
    passes,
    take,
)
from train.data import folders
from train.data.cifar import DataError


def test_scan(root, images):
    assert images.class_names == CLASSES and images.num_classes == 4
    assert len(images.train) == 203 and len(images.test) == 33
    assert images.train.names[:2] == ("Zebra/000.png", "Zebra/001.JPEG")
    assert images.train.labels.dtype == np.int32
    assert np.bincount(images.train.labels).tolist() == list(TRAIN_COUNTS)
    assert np.bincount(images.test.labels).tolist() == list(TEST_COUNTS)
    assert list(images.train.names) == sorted(images.train.names)
    assert images.test.folder == root / "val"
    for part in images.train, images.test:
        names = [CLASSES[label] for label in part.labels]
        assert names == [name.split("/")[0] for name in part.names]


def write(root, *paths):
    for path in paths:
        path = root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if path.name.startswith("folder") else path.write_bytes(b"")


def test_test_in_place_of_val(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/1.png", "test/b/2.png")
    found = folders.scan(tmp_path)
    assert found.test.names == ("b/2.png",) and found.test.labels.tolist() == [1]
    # ImageNet's test images have no labels.
    write(tmp_path, "val/a/3.png", "test/4.png")
    assert folders.scan(tmp_path).test.names == ("a/3.png",)


@pytest.mark.parametrize(
    "paths, message",
    [
        (["a.png"], r"holds no folder train; pass another --data-dir, or arrange"),
        (["train/a/1.png"], r"holds no folder val \(or test\)"),
        (["train/a/1.png", "val"], r"holds no folder val \(or test\)"),
        (["train/1.png", "val/a/1.png"], r"train holds no class folder; arrange"),
        (["train/a/1.png", "val/1.png"], r"val holds no class folder"),
        (["train/a/1.gif", "val/a/1.png"], r"train/a holds no image \(.jpg, .jpeg,"),
        (["train/a/1.png", "val/a/folder"], r"val/a holds the folder 'folder'; move"),
        (["train/a/1.png", "val/a/1.txt"], r"val/a holds no image"),
        (
            ["train/a/1.png", "val/a/1.png", "val/x/1.png", "val/y/1.png"],
            r"val has 2 of 3 classes that train lacks, the first being 'x'; use",
        ),
    ],
)
def test_folders_with_another_layout(tmp_path, paths, message):
    write(tmp_path, *paths)
    with pytest.raises(DataError, match=message) as error:
        folders.scan(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match="none cannot be read .*No such file.*data-dir"):
        folders.scan(tmp_path / "none")


# Damaged images.


def damage(path, content):
    good = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content(good))


def test_damaged_images_are_named_and_left_out(root, images, tmp_path):
    """Truncated, emptied, deleted, or not an image at all; in both parts."""
    copy = shutil.copytree(root, tmp_path / "images")
    found = folders.scan(copy)
    bad = {
        "train/Zebra/002.jpg": lambda good: good[: len(good) // 2],
        "train/ant 9/000.png": lambda good: good[:-30],
        "train/bär/001.JPEG": lambda good: b"",
        "val/Zebra/003.PNG": None,
        "val/bär/004.Jpg": lambda good: b"not an image",
    }
    for name, content in bad.items():
        damage(copy / name, content)
    intact, reasons = folders.without_damaged(found)
    for name, reason in zip(bad, reasons, strict=True):
        assert reason.startswith(f"'{copy / name}' cannot be read as an image (")
    assert "truncated" in reasons[0] and "FileNotFoundError" in reasons[3]
    parts = (intact.train, found.train, 3), (intact.test, found.test, 2)
    for part, whole, count in parts:
        left = [
            (name, label)
            for name, label in zip(whole.names, whole.labels, strict=True)
            if f"{whole.folder.name}/{name}" not in bad
        ]
        assert len(part) == len(whole) - count
        assert list(zip(part.names, part.labels, strict=True)) == left
        assert part.labels.dtype == np.int32 and part.folder == whole.folder
    assert intact.class_names == found.class_names
    assert len(take(intact, 25)[0]) == 25 and len(passes(intact)) == 4
    same, reasons = folders.without_damaged(images)
    assert reasons == [] and same.train.names == images.train.names


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_of_damaged_images_is_refused(part, tmp_path):
    found = folder_of(tmp_path, *(Image.fromarray(noise(9, 9)) for _ in range(2)))
    for path in (tmp_path / part / "a").iterdir():
        damage(path, lambda good: good[:-30])
    message = f"No image of the class folder {tmp_path / part / 'a'} can be read; repl"
    with pytest.raises(DataError, match=re.escape(message)):
        folders.without_damaged(found)


# Broken files.


@pytest.mark.parametrize("num_threads", [0, 3])
@pytest.mark.parametrize(
    "content, reason",
    [
        (lambda good: good[: len(good) // 2], "OSError: .*truncated"),
        (lambda good: b"", "UnidentifiedImageError"),
        (lambda good: b"not an image\n", "UnidentifiedImageError"),
        (lambda good: good[:40] + b"\0" * 9 + good[49:], r"\w+Error"),
        (None, "FileNotFoundError"),
    ],
)
def test_a_broken_file_stops_the_stream(tmp_path, num_threads, content, reason):
    found = folder_of(tmp_path, *(Image.fromarray(noise(30, 30)) for _ in range(6)))
    for part in "train", "val":
        damage(tmp_path / part / "a" / "004.png", content)
    path = rf"{re.escape(str(tmp_path))}/.*/a/004.png"
    message = (
        rf"{path}' cannot be read as .*\({reason}.*replace the file, or start a new"
    )
    for read in (
        lambda: take(found, 3, batch_size=2, num_threads=num_threads),
        lambda: passes(found, batch_size=2, num_threads=num_threads),
    ):
        with pytest.raises(DataError, match=message) as error:
            read()
        assert "\n" not in str(error.value)
        assert "with --skip-damaged" in str(error.value)
