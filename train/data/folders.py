"""Image folders read through Grain, for data sets too large for memory.

The layout is ``FOLDER/train/CLASS/IMAGE`` and ``FOLDER/val/CLASS/IMAGE``, or ``test``
in place of ``val``; if both exist, ``val`` is used, since ImageNet's ``test`` has no
labels. Images are files that end in .jpg, .jpeg or .png, in any case; other files are
ignored, and so are hidden folders.

Only this file imports Grain, and nothing that runs without Grain imports this file.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from train.data.cifar import DataError
from train.engine import devices

try:
    import grain
    from PIL import Image

    from train.data.transforms import center_box, crop, crop_box
except ImportError as error:
    raise ImportError(
        f'Image folders need the extra `grain`: pip install -e ".[grain]" ({error}).'
    ) from error

SUFFIXES = (".jpg", ".jpeg", ".png")
LAYOUT = "FOLDER/train/CLASS/IMAGE and FOLDER/val/CLASS/IMAGE"
# Each thread holds a whole batch in memory.
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
    """The images of both parts; no file has been read."""

    train: Part
    test: Part
    class_names: tuple[str, ...]
    """The class folders of the training part, sorted."""

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)


def scan(data_dir: Path) -> FolderImages:
    """Lists the images below ``data_dir``.

    A class may have no folder of test images, but no class folder may be empty.

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
            f"that train lacks, the first being {unknown[0]!r}; use the same class "
            "names in both."
        )
    train = _part(data_dir / "train", labels)
    test = _part(data_dir / test_name, {name: labels[name] for name in test_classes})
    return FolderImages(train, test, tuple(class_names))


def without_damaged(images: FolderImages) -> tuple[FolderImages, list[str]]:
    """Reads every image once and leaves out those that cannot be read.

    Returns:
      The other images, and for each damaged one a line with its path and the reason.

    Raises:
      DataError: no image of a class folder can be read.
    """
    train, damaged_train = _intact(images.train, images.class_names)
    test, damaged_test = _intact(images.test, images.class_names)
    intact = dataclasses.replace(images, train=train, test=test)
    return intact, damaged_train + damaged_test


def _intact(part: Part, class_names: tuple[str, ...]) -> tuple[Part, list[str]]:
    # A thread pool that ends at once on Ctrl-C; Pillow decodes without the GIL.
    with ThreadPool(_default_threads()) as pool:
        errors = list(
            tqdm(
                pool.imap(partial(_damage, part), range(len(part)), chunksize=16),
                total=len(part),
                desc=f"checking {part.folder.name}",
                unit="image",
                mininterval=1,
                leave=False,
                disable=not devices.is_main(),
            )
        )
    intact = [i for i, error in enumerate(errors) if error is None]
    labels = part.labels[intact]
    for label in np.setdiff1d(part.labels, labels):
        raise DataError(
            f"No image of the class folder {part.folder / class_names[label]} can be "
            "read; replace its images, or delete the folder."
        )
    names = tuple(part.names[i] for i in intact)
    return Part(part.folder, names, labels), [error for error in errors if error]


def _damage(part: Part, index: int) -> str | None:
    """Why the image cannot be read, or None; one pixel suffices, which is fast."""
    try:
        _test_example(part, 1, index)
    except _DamagedImage as error:
        return error.reason
    return None


def _part(folder: Path, classes: Mapping[str, int]) -> Part:
    names: list[str] = []
    labels: list[int] = []
    for name, label in classes.items():
        inner, files = _listing(folder / name)
        if inner:
            raise DataError(
                f"The class folder {folder / name} holds the folder {inner[0]!r}; move "
                "its images up into the class folder, or delete it."
            )
        images = [file for file in files if file.lower().endswith(SUFFIXES)]
        if not images:
            raise DataError(
                f"The class folder {folder / name} holds no image "
                f"({', '.join(SUFFIXES)}); add some, or delete the folder."
            )
        names += [f"{name}/{image}" for image in images]
        labels += [label] * len(images)
    return Part(folder, tuple(names), np.array(labels, np.int32))


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

    An epoch has ``len(images.train) // batch_size`` batches; the remaining images,
    different ones in each epoch, are dropped. The order depends on the seed and the
    epoch; the crop and the flip of an image, on the seed, the epoch and its position.
    So the concatenated rows of all processes are the same batch for any number of
    processes, provided that all of them see the same files.

    ``get_state()`` returns a dict of JSON types. ``set_state()`` resumes exactly there,
    with any number of processes and threads; the images, ``batch_size`` and ``seed``
    must be the same. ``close()`` ends the threads.

    Args:
      images: what to read.
      batch_size: images per batch of all processes together.
      image_size: height and width of the crops, in pixels.
      seed: of the order and the crops, at least 0.
      process_index: of this process, which reads its rows of each batch.
      process_count: how many processes share a batch; it divides ``batch_size``.
      num_threads: how many batches are made in parallel and prefetched; 0 makes each on
        demand (default: one per core, at most 16).

    Returns:
      An iterator over ``{"image": (B, image_size, image_size, 3) uint8, "label": (B,)
      int32}`` with ``B = batch_size // process_count``. It raises ``DataError`` for a
      damaged file.

    Raises:
      ValueError: the images do not fill a batch.
    """
    if batch_size > len(images.train):
        raise ValueError(
            f"`batch_size` must be at most the {len(images.train):,} training images "
            f"in {images.train.folder}, got {batch_size:,}."
        )
    # Grain shuffles by seed + epoch, so the orders of seeds 0 and 1 would overlap.
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

    The short side is resized to ``round(image_size * 256 / 224)`` pixels and the center
    is cropped. The last batch is padded with black images of weight 0, so that all
    batches have the same shape and all processes have the same number of batches.

    The arguments are those of ``train_batches`` without ``seed``. The dicts have the
    same entries and ``"weight": (B,) float32``: 1 for an image, 0 for padding.
    """
    batches = -(-len(images.test) // batch_size)
    return _iterator(
        grain.MapDataset.range(batches * batch_size)
        .map(partial(_test_example, images.test, image_size))
        .batch(batch_size // process_count)[process_index::process_count],
        num_threads,
    )


def _iterator(
    batches: grain.MapDataset, num_threads: int | None
) -> grain.DatasetIterator:
    threads = _default_threads() if num_threads is None else num_threads
    # Grain prefetches whole batches, so its state is the number of batches taken, which
    # does not depend on the number of processes.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return iter(batches.to_iter_dataset(options))


def _default_threads() -> int:
    return min(os.cpu_count() or 1, MAX_THREADS)


def _train_example(
    part: Part, size: int, index: int, rng: np.random.Generator
) -> dict[str, Any]:
    flip = rng.random() < 0.5
    image = _read(part, index, size, partial(crop_box, rng=rng))
    return {"image": image[:, ::-1] if flip else image, "label": part.labels[index]}


def _test_example(part: Part, size: int, index: int) -> dict[str, Any]:
    if index < len(part):
        image = _read(part, index, size, partial(center_box, size=size))
        label, weight = part.labels[index], 1
    else:
        image, label, weight = np.zeros((size, size, 3), np.uint8), np.int32(0), 0
    return {"image": image, "label": label, "weight": np.float32(weight)}


def _read(part: Part, index: int, size: int, box: Callable[..., Any]) -> np.ndarray:
    """The pixels of an image in ``box(width, height)``, resized to ``size``."""
    path = part.folder / part.names[index]
    try:
        with Image.open(path) as file:
            return crop(file, box(*file.size), size)
    # Damaged files make Pillow raise errors of many types.
    except Exception as error:
        raise _DamagedImage(path, error) from error


class _DamagedImage(DataError):
    def __init__(self, path: Path, error: Exception) -> None:
        kind = type(error).__name__
        self.reason = f"{str(path)!r} cannot be read as an image ({kind}: {error})"
        super().__init__(
            f"{self.reason}; replace the file, or start a new run with --skip-damaged, "
            "which skips all images that cannot be read."
        )
