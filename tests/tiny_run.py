"""``python -m tests.tiny_run``: ``train.cifar`` on 60 images of noise, in seconds."""

import sys

import numpy as np

from train import cifar
from train.data.cifar import ImageSet
from train.engine import loop

SIZE = 8


def images(config=None):
    rng = np.random.RandomState(0)
    labels = rng.randint(0, 3, 60).astype(np.int32)
    pixels = rng.randint(0, 60, (60, SIZE, SIZE, 3)) + 80 * labels[:, None, None, None]
    pixels = pixels.astype(np.uint8)
    return ImageSet(pixels[:40], labels[:40], pixels[40:], labels[40:], 3, flip=True)


if __name__ == "__main__":
    loop.load = images
    cifar.main([*"--depth 8 --batch-size 8".split(), *sys.argv[1:]])
