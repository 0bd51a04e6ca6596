"""Validates the configuration and loads the images before the first step."""

from typing import TYPE_CHECKING, Union

from jax.sharding import Mesh

from flax_attn.resnet import check_cifar_depth, check_imagenet_depth
from train.data import cifar as data
from train.data.cifar import ImageSet
from train.data.inputs import DeviceInputs, Inputs
from train.engine import devices, logger
from train.engine.attention import check_attention
from train.engine.config import Config, Resolved, check_fields, resolve

if TYPE_CHECKING:
    from train.data.folders import FolderImages

Images = Union[ImageSet, "FolderImages"]


def validate(config: Config) -> Resolved:
    """Resolves the configuration; raises ``ValueError`` for an invalid one."""
    config = resolve(config)
    check_fields(config)
    logger.check_installed(config.logger)
    check_attention(config)
    if config.family == "cifar":
        check_cifar_depth(config.depth)
    else:
        check_imagenet_depth(config.depth)
    return config


def check_batch(config: Resolved, images: Images) -> None:
    """Raises ``ValueError`` for a batch that the images or the devices cannot fill."""
    labels = images.train_labels if isinstance(images, ImageSet) else images.train
    if config.batch_size > len(labels):
        raise ValueError(
            f"`batch_size` must be at most the {len(labels):,} training images of "
            f"{config.dataset}, got {config.batch_size:,}; pass a smaller --batch-size."
        )
    devices.check_batch_divides(config.batch_size, devices.make_mesh(config.devices))


def load(config: Resolved) -> Images:
    """Loads the images of ``config``.

    Raises:
      DataError: they cannot be loaded.
    """
    if config.loader == "grain":
        try:
            from train.data import folders
        except ImportError as error:  # Grain is an extra; the message names it.
            raise data.DataError(str(error)) from error

        images = folders.scan(config.data_dir)
        if not config.skip_damaged:
            return images
        intact, damaged = folders.without_damaged(images)
        if devices.is_main():
            for reason in damaged:
                devices.log(f"Skipped: {reason}.")
            found = len(images.train) + len(images.test)
            devices.log(
                f"{len(damaged):,} of {found:,} images are damaged and left out."
            )
        return intact
    return data.load(config.dataset, config.data_dir, config.data_url)


def make_inputs(config: Resolved, images: Images, mesh: Mesh) -> Inputs:
    """The inputs of the loop over ``images``."""
    if isinstance(images, ImageSet):
        return DeviceInputs(images, config, mesh)
    from train.data.stream import FolderInputs

    return FolderInputs(images, config, mesh)
