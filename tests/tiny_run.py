"""``python -m tests.tiny_run``: ``train.cifar`` in seconds.

The images are 60 of noise; the network has one residual block, since compilation takes
most of the time.
"""

import sys

import numpy as np

from flax_attn.resnet import BasicBlock, ResNet
from train import cifar
from train.data.cifar import ImageSet
from train.engine import model, setup

SIZE = 8


def network(depth, **fields):
    """Stands in for ``cifar_resnet``."""
    return ResNet((1,), BasicBlock, width=16, imagenet_stem=False, **fields)


def images(config=None):
    rng = np.random.RandomState(0)
    labels = rng.randint(0, 3, 60).astype(np.int32)
    pixels = rng.randint(0, 60, (60, SIZE, SIZE, 3)) + 80 * labels[:, None, None, None]
    pixels = pixels.astype(np.uint8)
    return ImageSet(pixels[:40], labels[:40], pixels[40:], labels[40:], 3, flip=True)


if __name__ == "__main__":
    setup.load = images
    model.cifar_resnet = network
    cifar.main([*"--depth 8 --batch-size 8".split(), *sys.argv[1:]])
