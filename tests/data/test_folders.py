import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.streams import (
    BATCH,
    OPTIONS,
    SIZE,
    folder_of,
    joined,
    noise,
    passes,
    take,
)
from train.data import folders
from train.data.cifar import DataError

# Sorted as Python sorts strings, not as people do.
CLASSES = ("Zebra", "ant 10", "ant 9", "bär")
TRAIN_COUNTS = (60, 45, 71, 27)  # 203 in all, a prime multiple of nothing used below.
TEST_COUNTS = (11, 0, 9, 13)  # 33 in all.
SUFFIXES = (".png", ".JPEG", ".jpg", ".PNG", ".Jpg")
STEPS_PER_EPOCH = 203 // BATCH


def write_image(path, identity, rng):
    """Red and green say which image it is, on every pixel; blue is a texture."""
    height, width = rng.integers(24, 41, 2)
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0] = 8 + 16 * (identity % 16)
    pixels[..., 1] = 8 + 16 * (identity // 16)
    pixels[..., 2] = rng.integers(64, 192, (height, width))
    options = {} if path.suffix.lower() == ".png" else {"quality": 98, "subsampling": 0}
    Image.fromarray(pixels).save(path, **options)


def identities(images):
    """Which images these are, from the colors of ``(N, H, W, 3)``."""
    red, green = np.median(images[..., :2], axis=(1, 2)).astype(int).T // 16
    return red + 16 * green


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, counts in (("train", TRAIN_COUNTS), ("val", TEST_COUNTS)):
        identity = 0
        for name, count in zip(CLASSES, counts, strict=True):
            if count:
                (folder / part / name).mkdir(parents=True)
            for i in range(count):
                file = f"{i:03}{SUFFIXES[i % len(SUFFIXES)]}"
                write_image(folder / part / name / file, identity, rng)
                identity += 1
    (folder / "train" / CLASSES[1] / "notes.txt").write_text("not an image")
    (folder / "val" / CLASSES[0] / "Thumbs.db").write_bytes(b"")
    (folder / "train" / CLASSES[2] / "._000.png").write_bytes(b"\0")
    (folder / "train" / ".checkpoints").mkdir()
    (folder / "train" / "README").write_text("")
    return folder


@pytest.fixture(scope="session")
def images(root):
    return folders.scan(root)


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert set(batch) == set(other)
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], strict=True)


def digest(batches):
    parts = (b[key].tobytes() for b in batches for key in ("image", "label"))
    return hashlib.sha256(b"".join(parts)).hexdigest()


# What is in the folder.


def test_scan(root, images):
    assert images.class_names == CLASSES and images.num_classes == 4
    assert images.ignored == 2
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
            r"val has 2 of 3 classes that train lacks, the first is 'x'; give",
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


# The stream of training batches.


@pytest.fixture(scope="session")
def stream(images):
    """Two epochs and three batches."""
    return take(images, 2 * STEPS_PER_EPOCH + 3)[0]


def test_shapes(images, stream):
    for batch in stream:
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            "image": ((BATCH, SIZE, SIZE, 3), np.uint8),
            "label": ((BATCH,), np.int32),
        }


def test_an_epoch_shows_each_image_at_most_once(images, stream):
    epochs = [
        joined(stream[i * STEPS_PER_EPOCH : (i + 1) * STEPS_PER_EPOCH])
        for i in range(2)
    ]
    shown = [identities(epoch["image"]) for epoch in epochs]
    for epoch, ids in zip(epochs, shown, strict=True):
        assert len(set(ids)) == len(ids) == 200
        np.testing.assert_array_equal(epoch["label"], images.train.labels[ids])
        # A shuffle leaves about one image in its place, and classes mixed.
        assert (ids == np.arange(200)).sum() < 10
        assert len(set(epoch["label"][:30])) == 4
    assert (shown[0] == shown[1]).sum() < 10
    # The three dropped images are different ones in the next epoch.
    assert set(shown[0]) != set(shown[1])


def test_a_batch_that_divides_the_images_shows_each_once(images):
    batches, _ = take(images, 7, batch_size=29)
    ids = identities(joined(batches)["image"])
    np.testing.assert_array_equal(np.sort(ids), np.arange(203))


def test_the_seed_decides(images, stream):
    assert_same(take(images, 4)[0], stream[:4])
    other, _ = take(images, 2 * STEPS_PER_EPOCH, seed=4)
    shown, others = (identities(joined(s)["image"]) for s in (stream, other))
    assert (shown[: len(others)] == others).sum() < 20
    # Nor is one seed's stream another's, shifted by an epoch.
    assert (shown[200:400] == others[:200]).sum() < 10


def test_crops_differ_between_epochs(images):
    (first, second), _ = take(images, 2, batch_size=203)
    one, two = (b["image"][np.argsort(identities(b["image"]))] for b in (first, second))
    same = (one == two).all(axis=(1, 2, 3))
    assert same.sum() < 10


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_same_batches(images, stream, process_count):
    count = STEPS_PER_EPOCH + 2
    shares = [
        take(images, count, process_index=i, process_count=process_count)[0]
        for i in range(process_count)
    ]
    whole = [joined(rows) for rows in zip(*shares, strict=True)]
    assert_same(whole, stream[:count])


@pytest.mark.parametrize("num_threads", [0, 1, 5])
def test_threads_do_not_change_the_stream(images, stream, num_threads):
    assert_same(take(images, 9, num_threads=num_threads)[0], stream[:9])


POSITIONS = (
    0,
    1,
    7,
    STEPS_PER_EPOCH - 1,
    STEPS_PER_EPOCH,
    STEPS_PER_EPOCH + 1,
    2 * STEPS_PER_EPOCH,
)


def test_resume_from_a_state(images, stream):
    for position in POSITIONS:
        start, state = take(images, position)
        assert_same(start, stream[:position])
        state = json.loads(json.dumps(state))
        assert_same(take(images, 3, state)[0], stream[position : position + 3])
    # By another number of processes and threads.
    options = {"process_index": 1, "process_count": 2, "num_threads": 0}
    share, _ = take(images, 3, state, **options)
    rows = [{k: v[BATCH // 2 :] for k, v in b.items()} for b in stream[position:]]
    assert_same(share, rows)


def test_a_state_does_not_count_what_is_read_ahead(images, stream):
    batches = folders.train_batches(images, **OPTIONS, num_threads=4)
    with contextlib.closing(batches):
        assert_same([next(batches) for _ in range(5)], stream[:5])
        state = batches.get_state()
        assert_same([next(batches) for _ in range(4)], stream[5:9])
        # Back and forth in one iterator.
        batches.set_state(state)
        assert_same([next(batches) for _ in range(4)], stream[5:9])


PROGRAM = """
import contextlib, hashlib, json, sys
from pathlib import Path
from tests.data.streams import (
 BATCH,OPTIONS,SIZE,folder_of,joined,noise,passes,take,
)
from train.data import folders

images = folders.scan(Path(sys.argv[1]))
options = json.loads(sys.argv[2])
for state in json.loads(sys.argv[3]):
    with contextlib.closing(folders.train_batches(images, **options)) as batches:
        batches.set_state(state)
        parts = [b[k].tobytes() for b, _ in zip(batches, "123") for k in sorted(b)]
        print(hashlib.sha256(b"".join(parts)).hexdigest())
"""


def test_resume_from_a_state_in_a_fresh_process(root, images, stream):
    states = [take(images, position)[1] for position in POSITIONS]
    arguments = json.dumps(OPTIONS), json.dumps(states)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, root, *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [digest(stream[p : p + 3]) for p in POSITIONS]
    assert not run.stderr


# Damaged images.


def damage(path, content):
    good = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content(good))


def test_damaged_images_are_named_and_left_out(root, images, tmp_path):
    """Truncated, emptied, deleted, or not an image at all; in both parts."""
    copy = tmp_path / "images"
    shutil.copytree(root, copy)
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
    assert [
        reason.split("' cannot be read as an image (")[0] for reason in reasons
    ] == [f"'{copy / name}" for name in bad]
    assert "truncated" in reasons[0] and "FileNotFoundError" in reasons[3]
    for part, whole, count in (
        (intact.train, found.train, 3),
        (intact.test, found.test, 2),
    ):
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


# The pass over the test images.


@pytest.mark.parametrize("batch_size", [8, 11, 48])
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_a_pass_shows_each_image_once(images, batch_size, process_count):
    batch_size -= batch_size % process_count
    shares = [
        passes(
            images,
            batch_size=batch_size,
            process_index=i,
            process_count=process_count,
        )
        for i in range(process_count)
    ]
    whole = [joined(rows) for rows in zip(*shares, strict=True)]
    assert len(whole) == -(-33 // batch_size)
    everything = joined(whole)
    assert everything["image"].shape == (len(whole) * batch_size, SIZE, SIZE, 3)
    assert everything["image"].dtype == np.uint8
    assert everything["label"].dtype == np.int32
    weights = everything["weight"]
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, np.arange(len(weights)) < 33)
    np.testing.assert_array_equal(identities(everything["image"][:33]), np.arange(33))
    np.testing.assert_array_equal(everything["label"][:33], images.test.labels)
    assert not everything["image"][33:].any() and not everything["label"][33:].any()


# What is refused.


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
    message = (
        rf"{re.escape(str(tmp_path))}/.*/a/004.png' cannot be read as .*\({reason}"
    )
    for read in (
        lambda: take(found, 3, batch_size=2, num_threads=num_threads),
        lambda: passes(found, batch_size=2, num_threads=num_threads),
    ):
        with pytest.raises(DataError, match=message) as error:
            read()
        assert "\n" not in str(error.value)
        assert "replace the file, or start a new run with --skip-dam" in str(
            error.value
        )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"image_size": 0}, "`image_size` must be at least 1, got 0"),
        ({"process_count": 0}, "`process_count` must be at least 1, got 0"),
        ({"process_count": 2, "process_index": 2}, r"in \[0, 2\), .* got 2"),
        ({"process_index": -1}, r"`process_index` must be in \[0, 1\), .* got -1"),
        ({"process_count": 3}, r"multiple of the 3 processes, got 8; .* is 3 \* 3"),
    ],
)
@pytest.mark.parametrize("read", [lambda *a, **k: take(a[0], 1, **k), passes])
def test_arguments_out_of_range(images, read, options, message):
    with pytest.raises(ValueError, match=message):
        read(images, **options)


def test_a_batch_that_the_images_cannot_fill(images):
    with pytest.raises(ValueError, match="at most the 203 training images.* got 204"):
        take(images, 1, batch_size=204)
    with pytest.raises(ValueError, match="non-negative"):
        take(images, 1, seed=-1)


def test_without_grain(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    spec = importlib.util.spec_from_file_location("without_grain", folders.__file__)
    with pytest.raises(ImportError, match=r'extra `grain`: pip install -e "\.\[grain'):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
