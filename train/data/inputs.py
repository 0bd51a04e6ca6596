"""Inputs of the training loop: images on the device, or read during training.

An ``Inputs`` yields the arrays that each call of the compiled step gets, and makes
images and labels of them inside that step.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from train.data.cifar import ImageSet
from train.engine import devices
from train.engine.config import Resolved

PAD = 4


class Inputs(Protocol):
    """A training part and a test part, in batches."""

    mesh: Mesh
    steps_per_epoch: int
    """Steps of an epoch."""
    num_classes: int
    image_size: int
    test_size: int
    data: Any
    """Arrays on the device that every training step gets."""
    test_data: Any
    """The same for evaluation."""

    def train_batches(self, epoch: int, done: int, size: int) -> Iterator[Any]:
        """The batches of the epoch after ``done`` steps, ``size`` steps at a time.

        A tree of arrays, whose first axis is that of the steps.
        """

    def batch(
        self, data: Any, item: Any, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Normalized, augmented images and the labels of one step; traced.

        By default those of ``test_batch``, for images that are augmented on the host.
        """
        return self.test_batch(data, item)

    def test_batches(self) -> Iterator[tuple[Any, jax.Array]]:
        """Batches of the test part, each image once, and the weights of their rows."""

    def test_batch(self, data: Any, item: Any) -> tuple[jax.Array, jax.Array]:
        """Normalized images and labels of one batch; traced."""

    def position(self) -> Any:
        """The position in the training part, of JSON types.

        None where the seed and the epoch give it.
        """
        return None

    def set_position(self, position: Any) -> None:
        """Resumes the training part at ``position``."""
        return None

    def close(self) -> None:
        """Ends the threads that read, if there are any."""
        return None


@flax.struct.dataclass
class DeviceData:
    """One part of an image set on the device, with what normalizes its pixels."""

    images: jax.Array
    labels: jax.Array
    mean: jax.Array
    std: jax.Array


class DeviceInputs(Inputs):
    """All images on each device; a batch is their indices."""

    def __init__(self, images: ImageSet, config: Resolved, mesh: Mesh) -> None:
        """Puts the images on the devices."""
        self.mesh = mesh
        self.batch_size = config.batch_size
        self.size = len(images.train_images)
        self.steps_per_epoch = self.size // self.batch_size
        self.num_classes = images.num_classes
        self.image_size = images.train_images.shape[1]
        self.test_size = len(images.test_images)
        self.flip = images.flip
        self.data, self.test_data = to_device(images, mesh)
        self.order_key = jax.random.split(jax.random.key(config.seed), 3)[1]

    def train_batches(self, epoch: int, done: int, size: int) -> Iterator[jax.Array]:
        """Yields indices ``(steps, batch)``."""
        order = np.asarray(epoch_order(self.order_key, epoch, self.size), np.int32)
        order = order[: self.steps_per_epoch * self.batch_size]
        order = order.reshape(self.steps_per_epoch, self.batch_size)
        for start in range(done, self.steps_per_epoch, size):
            yield devices.shard(order[start : start + size], self.mesh, axis=1)

    def batch(
        self, data: DeviceData, item: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Takes the images of the indices ``item`` and augments them."""
        images = augment(data.images[item], key, flip=self.flip)
        return normalize(images, data), data.labels[item]

    def test_batches(self) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Yields indices and weights, which are 0 for the padding of the last batch."""
        for start in range(0, self.test_size, self.batch_size):
            indices = np.arange(start, start + self.batch_size, dtype=np.int32)
            weights = (indices < self.test_size).astype(np.float32)
            indices = np.minimum(indices, self.test_size - 1)
            yield devices.shard((indices, weights), self.mesh, axis=0)

    def test_batch(
        self, data: DeviceData, item: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Takes the images of the indices ``item``."""
        return normalize(data.images[item], data), data.labels[item]


def to_device(images: ImageSet, mesh: Mesh) -> tuple[DeviceData, DeviceData]:
    """Both parts on each device, with the statistics of the training part."""
    values = np.arange(256) / 255
    mean, std = np.empty((2, 1, 1, 1, 3), np.float32)
    for c in range(3):
        counts = np.bincount(images.train_images[..., c].ravel(), minlength=256)
        mean[..., c] = np.average(values, weights=counts)
        variance = np.average((values - mean[..., c].item()) ** 2, weights=counts)
        std[..., c] = np.sqrt(variance)
    train = images.train_images, images.train_labels, mean, std
    test = images.test_images, images.test_labels, mean, std
    return (
        DeviceData(*devices.replicate(train, mesh)),
        DeviceData(*devices.replicate(test, mesh)),
    )


def epoch_order(key: jax.Array, epoch: int, size: int) -> jax.Array:
    """The order of the training images, a function of the key and the epoch alone."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), size)


def augment(images: jax.Array, key: jax.Array, *, flip: bool) -> jax.Array:
    """Shifts each image by up to 4 pixels and flips it with probability 1/2.

    Args:
      images: ``(N, H, W, C)``; padded with 0.
      key: of the draws, which are independent for each image.
      flip: whether to flip at all.
    """
    shift_key, flip_key = jax.random.split(key)
    shape = images.shape[1:]
    padded = jnp.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
    corners = jax.random.randint(shift_key, (len(images), 2), 0, 2 * PAD + 1)
    images = jax.vmap(lambda x, c: lax.dynamic_slice(x, (c[0], c[1], 0), shape))(
        padded, corners
    )
    if flip:
        flipped = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(flipped, images[:, :, ::-1], images)
    return images


def normalize(images: jax.Array, data: Any) -> jax.Array:
    """Returns ``(images / 255 - data.mean) / data.std``, per channel."""
    return (images.astype(jnp.float32) / 255 - data.mean) / data.std
