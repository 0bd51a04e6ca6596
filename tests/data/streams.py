"""Images in folders, and the streams that read them."""

import contextlib
import itertools

import numpy as np
from PIL import Image

from train.data import folders

BATCH = 8
SIZE = 16
OPTIONS = {"batch_size": BATCH, "image_size": SIZE, "seed": 3}
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


def take(images, count, state=None, **options):
    """``count`` training batches from ``state`` on, and the state behind them."""
    batches = folders.train_batches(images, **OPTIONS | options)
    with contextlib.closing(batches):
        if state is not None:
            batches.set_state(state)
        return list(itertools.islice(batches, count)), batches.get_state()


def passes(images, **options):
    options = {"batch_size": BATCH, "image_size": SIZE} | options
    with contextlib.closing(folders.evaluation_batches(images, **options)) as batches:
        return list(batches)


def joined(batches):
    return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


def folder_of(root, *pictures):
    """A folder with these images, in both parts."""
    for part in "train", "val":
        (root / part / "a").mkdir(parents=True)
        for i, picture in enumerate(pictures):
            picture.save(root / part / "a" / f"{i:03}.png")
    return folders.scan(root)


def noise(width, height):
    rng = np.random.default_rng([width, height])
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
