"""Image folders as inputs of the training loop, read and cropped on the host."""

from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import numpy as np
from jax.sharding import Mesh

from train.data import folders
from train.data.inputs import Inputs, normalize
from train.engine import devices
from train.engine.config import Resolved

# Of ImageNet's training images (R, G, B), as in torchvision and timm.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@flax.struct.dataclass
class Scale:
    """The mean and standard deviation of pixels, per channel."""

    mean: jax.Array | np.ndarray
    std: jax.Array | np.ndarray


class FolderInputs(Inputs):
    """Batches that Grain reads; each process reads its own rows."""

    def __init__(
        self, images: folders.FolderImages, config: Resolved, mesh: Mesh
    ) -> None:
        """Starts the threads that read.

        Raises:
          ValueError: the images do not fill a batch.
        """
        self.mesh = mesh
        self.images = images
        self.image_size = config.image_size
        self.steps_per_epoch = len(images.train) // config.batch_size
        self.num_classes = images.num_classes
        self.test_size = len(images.test)
        self.options: dict[str, Any] = {
            "batch_size": config.batch_size,
            "image_size": config.image_size,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }
        self.batches = folders.train_batches(images, seed=config.seed, **self.options)
        mean, std = (np.array(s, np.float32).reshape(1, 1, 1, 3) for s in (MEAN, STD))
        scale = Scale(mean, std)
        self.data = self.test_data = devices.replicate(scale, mesh)

    def train_batches(self, epoch: int, done: int, size: int) -> Iterator[Any]:
        """Yields ``{"image": (steps, batch, H, W, 3), "label": (steps, batch)}``."""
        for start in range(done, self.steps_per_epoch, size):
            steps = min(size, self.steps_per_epoch - start)
            batches = [next(self.batches) for _ in range(steps)]
            stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
            yield devices.join_shards(stacked, self.mesh, axis=1)

    def test_batches(self) -> Iterator[tuple[dict[str, jax.Array], jax.Array]]:
        """Yields batches in order and weights, 0 for the padding of the last one."""
        batches = folders.evaluation_batches(self.images, **self.options)
        try:
            for item in batches:
                item = devices.join_shards(item, self.mesh, axis=0)
                yield item, item.pop("weight")
        finally:
            batches.close()

    def test_batch(
        self, data: Scale, item: dict[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Normalizes; the crops, in training too, were made on the host."""
        return normalize(item["image"], data), item["label"]

    def position(self) -> dict[str, Any]:
        """Grain's state, and the number of images it is for."""
        return {"state": self.batches.get_state(), "images": len(self.images.train)}

    def set_position(self, position: dict[str, Any]) -> None:
        """Sets Grain's state.

        Raises:
          ValueError: the number of images has changed.
        """
        if position["images"] != len(self.images.train):
            raise ValueError(
                f"`data_dir` contains {len(self.images.train):,} training images, but "
                f"{position['images']:,} when the run started; restore them, or start "
                "a new run with another --workdir."
            )
        self.batches.set_state(position["state"])

    def close(self) -> None:
        """Ends the threads that read."""
        self.batches.close()
