"""Image folders read through Grain, for sets that no device and no memory holds.

The layout is ``FOLDER/train/CLASS/IMAGE`` and ``FOLDER/val/CLASS/IMAGE``, or ``test``
in place of ``val``; of both it is ``val``, since the ``test`` of ImageNet has no
labels. Images are the files that end in .jpg, .jpeg or .png in any case; other files
are ignored and counted, hidden files and folders ignored.

Only this file knows Grain, and nothing that runs without it imports this file.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from train.data.cifar import DataError

try:
    import grain
    from PIL import Image

    from train.data.transforms import center_box, crop_box, cut
except ImportError as error:
    raise ImportError(
        f'Image folders need the extra `grain`: pip install -e ".[grain]" ({error}).'
    ) from error

SUFFIXES = (".jpg", ".jpeg", ".png")
LAYOUT = "FOLDER/train/CLASS/IMAGE and FOLDER/val/CLASS/IMAGE"
# A thread makes a whole batch, so more of them also hold more memory.
MAX_THREADS = 16


@dataclasses.dataclass(frozen=True)
class Part:
    """The images of one part, ordered by class and then by name."""

    folder: Path
    names: tuple[str, ...]
    """``CLASS/FILE`` of each image, below ``folder``."""
    labels: np.ndarray
    """``(N,)`` int32, indices into ``FolderImages.class_names``."""

    def __len__(self) -> int:
        """The number of images."""
        return len(self.names)


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """The images of both parts, none of them read yet."""

    train: Part
    test: Part
    class_names: tuple[str, ...]
    """The class folders of the training part, sorted."""
    ignored: int
    """How many visible files in class folders are no images by their names."""

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)


def scan(data_dir: Path) -> FolderImages:
    """Lists the images below ``data_dir``.

    A class may lack test images, but no class folder may be empty.

    Raises:
      DataError: the folder does not have the layout above.
    """
    data_dir = data_dir.expanduser()
    parts, _ = _listing(data_dir)
    test_name = "val" if "val" in parts else "test"
    for name, missing in (("train", "train"), (test_name, "val (or test)")):
        if name not in parts:
            raise DataError(
                f"The folder {data_dir} holds no folder {missing}; pass another "
                f"--data-dir, or arrange it as {LAYOUT}."
            )
    class_names, _ = _listing(data_dir / "train")
    test_classes, _ = _listing(data_dir / test_name)
    for name, classes in (("train", class_names), (test_name, test_classes)):
        if not classes:
            raise DataError(
                f"The folder {data_dir / name} holds no class folder; arrange the "
                f"images as {LAYOUT}."
            )
    labels = {name: label for label, name in enumerate(class_names)}
    unknown = [name for name in test_classes if name not in labels]
    if unknown:
        raise DataError(
            f"{data_dir / test_name} has {len(unknown)} of {len(test_classes)} classes "
            f"that train lacks, the first is {unknown[0]!r}; name the class folders of "
            "both alike."
        )
    train, ignored = _part(data_dir / "train", labels)
    test, ignored_test = _part(
        data_dir / test_name, {name: labels[name] for name in test_classes}
    )
    return FolderImages(train, test, tuple(class_names), ignored + ignored_test)


def _part(folder: Path, classes: Mapping[str, int]) -> tuple[Part, int]:
    names: list[str] = []
    labels: list[int] = []
    ignored = 0
    for name, label in classes.items():
        inner, files = _listing(folder / name)
        if inner:
            raise DataError(
                f"The class folder {folder / name} holds the folder {inner[0]!r}; move "
                "its images up beside it, or delete it."
            )
        images = [file for file in files if file.lower().endswith(SUFFIXES)]
        if not images:
            raise DataError(
                f"The class folder {folder / name} holds no image "
                f"({', '.join(SUFFIXES)}); add some, or delete the folder."
            )
        ignored += len(files) - len(images)
        names += [f"{name}/{image}" for image in images]
        labels += [label] * len(images)
    return Part(folder, tuple(names), np.array(labels, np.int32)), ignored


def _listing(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the visible folders and files in ``folder``, each sorted."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise DataError(
            f"The folder {folder} cannot be read ({error.strerror}); pass --data-dir "
            f"FOLDER with {LAYOUT}."
        ) from error
    return sorted(folders), sorted(files)


def train_batches(
    images: FolderImages,
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> grain.DatasetIterator:
    """The endless training batches of one process.

    An epoch is ``len(images.train) // batch_size`` batches; the images left over,
    different ones in each epoch, are dropped. The order is a function of the seed and
    the epoch, the crop and the flip of an image of the seed, the epoch and its position
    in it. So the rows of the processes, concatenated, are the same batch for any number
    of processes, provided that all of them see the same files.

    ``get_state()`` is a dict of JSON types. ``set_state()`` resumes exactly there, with
    any number of processes and threads; the images, ``batch_size`` and ``seed`` must be
    those of the state. ``close()`` ends the threads.

    Args:
      images: what to read.
      batch_size: images per batch of all processes together.
      image_size: height and width of the crops, in pixels.
      seed: of the order and the crops, at least 0.
      process_index: which rows to read.
      process_count: how many processes share a batch.
      num_threads: how many batches are made at a time, and how many wait at most; 0
        makes each on demand (default: one for each core, at most 16).

    Returns:
      An iterator over ``{"image": (B, image_size, image_size, 3) uint8, "label": (B,)
      int32}`` with ``B = batch_size // process_count``. It raises ``DataError`` for a
      broken file.

    Raises:
      ValueError: an argument is out of its range.
    """
    _check_shares(batch_size, image_size, process_index, process_count)
    if batch_size > len(images.train):
        raise ValueError(
            f"`batch_size` must be at most the {len(images.train):,} training images "
            f"in {images.train.folder}, got {batch_size:,}."
        )
    # Grain shuffles by seed + epoch: seed 1 itself would begin with the second epoch of
    # seed 0.
    order_seed, crop_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    steps_per_epoch = len(images.train) // batch_size
    return _iterator(
        grain.MapDataset.range(len(images.train))
        .shuffle(seed=order_seed)[: steps_per_epoch * batch_size]
        .random_map(partial(_train_example, images.train, image_size), seed=crop_seed)
        .batch(batch_size // process_count)[process_index::process_count]
        .repeat(),
        num_threads,
    )


def evaluation_batches(
    images: FolderImages,
    *,
    batch_size: int,
    image_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> grain.DatasetIterator:
    """One pass over the test images of one process, in order, each image once.

    The short side becomes ``round(image_size * 256 / 224)`` pixels, of which the center
    is cropped. The last batch is padded with black images of weight 0, so that all
    batches have one shape and all processes the same number of them.

    Args:
      images: what to read.
      batch_size: images per batch of all processes together.
      image_size: height and width of the result, in pixels.
      process_index: which rows to read.
      process_count: how many processes share a batch.
      num_threads: as for ``train_batches``.

    Returns:
      An iterator over what ``train_batches`` has and ``"weight": (B,) float32``, 1 for
      an image and 0 for padding.

    Raises:
      ValueError: an argument is out of its range.
    """
    _check_shares(batch_size, image_size, process_index, process_count)
    batches = -(-len(images.test) // batch_size)
    return _iterator(
        grain.MapDataset.range(batches * batch_size)
        .map(partial(_test_example, images.test, image_size))
        .batch(batch_size // process_count)[process_index::process_count],
        num_threads,
    )


def _check_shares(
    batch_size: int, image_size: int, process_index: int, process_count: int
) -> None:
    for name, value in (
        ("batch_size", batch_size),
        ("image_size", image_size),
        ("process_count", process_count),
    ):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"`process_index` must be in [0, {process_count}), the number of "
            f"processes, got {process_index}."
        )
    if batch_size % process_count:
        raise ValueError(
            f"`batch_size` must be a multiple of the {process_count} processes, got "
            f"{batch_size}; the next one is {-(-batch_size // process_count)} * "
            f"{process_count}."
        )


def _iterator(
    batches: grain.MapDataset, num_threads: int | None
) -> grain.DatasetIterator:
    if num_threads is None:
        num_threads = min(os.cpu_count() or 1, MAX_THREADS)
    # The elements that Grain prefetches are batches, so that its state is the number of
    # batches taken, which does not depend on the number of processes.
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=num_threads
    )
    return iter(batches.to_iter_dataset(options))


def _train_example(
    part: Part, size: int, index: int, rng: np.random.Generator
) -> dict[str, Any]:
    flip = rng.random() < 0.5

    def pixels(file: Image.Image) -> np.ndarray:
        crop = cut(file, crop_box(*file.size, rng), size)
        return crop[:, ::-1] if flip else crop

    return {"image": _read(part, index, pixels), "label": part.labels[index]}


def _test_example(part: Part, size: int, index: int) -> dict[str, Any]:
    if index >= len(part):
        return {
            "image": np.zeros((size, size, 3), np.uint8),
            "label": np.int32(0),
            "weight": np.float32(0),
        }

    def pixels(file: Image.Image) -> np.ndarray:
        return cut(file, center_box(*file.size, size), size)

    return {
        "image": _read(part, index, pixels),
        "label": part.labels[index],
        "weight": np.float32(1),
    }


def _read(
    part: Part, index: int, pixels: Callable[[Image.Image], np.ndarray]
) -> np.ndarray:
    path = part.folder / part.names[index]
    try:
        with Image.open(path) as file:
            return pixels(file)
    # Damaged files make Pillow raise errors of many kinds.
    except Exception as error:
        raise DataError(
            f"{str(path)!r} cannot be read as an image ({type(error).__name__}: "
            f"{error}); replace the file, or delete it and start a new run."
        ) from error
