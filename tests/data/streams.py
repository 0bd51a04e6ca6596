"""Images in folders, and the streams that read them."""

import contextlib
import itertools

import numpy as np

from train.data import folders

BATCH = 8
SIZE = 16
OPTIONS = {"batch_size": BATCH, "image_size": SIZE, "seed": 3}


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


def noise(width, height, channels=3):
    rng = np.random.default_rng([width, height])
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()
