"""Image sets as NumPy arrays: CIFAR from its files, digits from scikit-learn.

The binary layout: a record is its label bytes and then 3,072 pixel bytes, the red,
green and blue planes row by row. https://www.cs.toronto.edu/~kriz/cifar.html
"""

import dataclasses
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np

from train.data import download, pickled


class DataError(Exception):
    """The data cannot be loaded; the message is one line that says what to do."""


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images ``(N, H, W, 3)`` uint8 and labels ``(N,)`` int32, in two parts."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    flip: bool
    """Whether a flipped image still belongs to its class."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published archive: its addresses, its hash and its contents."""

    name: str
    """Its file name in the data folder."""
    urls: tuple[str, ...]
    """Its mirrors, in the order they are tried."""
    sha256: str
    folder: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    records: int
    """Records in each training file."""
    test_records: int
    num_classes: int
    label_bytes: int
    """Bytes before the pixels of a record; the last one is the label."""
    pickled_labels: tuple[bytes, ...] = ()
    """If the files are pickles, the keys of their labels, in the order of the bytes."""

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all its files of images."""
        return self.train_files + self.test_files

    def file_size(self, file: str) -> int:
        """The exact size of a file of the archive, in bytes."""
        records = self.test_records if file in self.test_files else self.records
        return records * (self.label_bytes + 3072)


# The SHA-256 of the binary archives are those in MLDatasets.jl and GoMLX, those of the
# Python archives those in Keras (`keras.datasets.cifar10`, `cifar100`).
ARCHIVES = {
    "cifar10": Archive(
        name="cifar-10-binary.tar.gz",
        urls=(
            "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/"
            "cifar-10-binary.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        ),
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar-10-batches-bin",
        train_files=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test_files=("test_batch.bin",),
        records=10_000,
        test_records=10_000,
        num_classes=10,
        label_bytes=1,
    ),
    "cifar100": Archive(
        name="cifar-100-binary.tar.gz",
        urls=("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        folder="cifar-100-binary",
        train_files=("train.bin",),
        test_files=("test.bin",),
        records=50_000,
        test_records=10_000,
        num_classes=100,
        label_bytes=2,
    ),
}

# The same images as pickles, which torchvision and Keras download; only read here.
PYTHON_ARCHIVES = {
    "cifar10": dataclasses.replace(
        ARCHIVES["cifar10"],
        name="cifar-10-python.tar.gz",
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        folder="cifar-10-batches-py",
        train_files=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test_files=("test_batch",),
        pickled_labels=(b"labels",),
    ),
    "cifar100": dataclasses.replace(
        ARCHIVES["cifar100"],
        name="cifar-100-python.tar.gz",
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        folder="cifar-100-python",
        train_files=("train",),
        test_files=("test",),
        pickled_labels=(b"coarse_labels", b"fine_labels"),
    ),
}


def load(name: str, data_dir: Path, urls: Sequence[str] = ()) -> ImageSet:
    """Returns the image set ``name``: ``"digits"`` or a key of ``ARCHIVES``.

    For an archive, ``data_dir`` may be its unpacked folder, hold that folder, or hold
    the archive, of the binary or of the Python files; otherwise the binary archive is
    downloaded to it.

    Args:
      name: of the image set.
      data_dir: for an archive.
      urls: http or https addresses of the archive, in place of the known ones; its
        SHA-256 must be the published one all the same.

    Raises:
      DataError: the data cannot be loaded.
    """
    for url in urls:
        if not download.is_address(url):
            raise DataError(
                f"`data_url` must be URLs that start with http:// or https://, got "
                f"{url!r}; pass another --data-url."
            )
    if name == "digits":
        return load_digits()
    data_dir = data_dir.expanduser()
    forms = ARCHIVES[name], PYTHON_ARCHIVES[name]
    for form in forms:
        for folder in (data_dir, data_dir / form.folder):
            if folder.name == form.folder and folder.is_dir():
                return _from_folder(form, folder)
    archive = next((f for f in forms if (data_dir / f.name).exists()), forms[0])
    path = data_dir / archive.name
    if not path.exists():
        _download(archive, path, urls or archive.urls)
    _verify(archive, path)
    return _from_tar(archive, path)


def load_digits() -> ImageSet:
    """Scikit-learn's 1,797 scans of digits, ``(32, 32, 3)``, in a fixed split.

    Each of the 8x8 pixels becomes a 4x4 square; 1,437 training and 360 test images.
    """
    from sklearn.datasets import load_digits as scans

    images, labels = scans(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = images.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=-1)
    labels = labels.astype(np.int32)
    # The published order has writer after writer; RandomState's stream never changes.
    order = np.random.RandomState(0).permutation(len(labels))
    train, test = order[:1437], order[1437:]
    return ImageSet(
        images[train], labels[train], images[test], labels[test], 10, flip=False
    )


def _download(archive: Archive, path: Path, urls: Sequence[str]) -> None:
    try:
        download.fetch(urls, path, archive.sha256)
    except download.DownloadError as error:
        raise DataError(
            f"{path.parent} contains neither {archive.folder}/ nor {archive.name}, and "
            f"the download failed: {error}. Pass --data-dir; to train, --data-url, or "
            "--dataset digits, which needs no download."
        ) from error


def _verify(archive: Archive, path: Path) -> None:
    """Raises ``DataError`` unless ``path`` is the published archive, bit by bit."""
    sha256 = download.sha256_of(path)
    if sha256 != archive.sha256:
        raise DataError(
            f"{path} is corrupt or truncated: its SHA-256 is {sha256}, not the "
            f"published {archive.sha256}; delete it to download it again."
        )


def _from_tar(archive: Archive, path: Path) -> ImageSet:
    """Reads the files of a fixed list into memory; no path in the tar is trusted."""
    wanted = {f"{archive.folder}/{name}": name for name in archive.files}
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = wanted.get(member.name)
                if name is None:
                    continue
                if name in files:
                    raise DataError(f"{path} is corrupt: {name} is in it twice.")
                # Before `extractfile`, which follows links.
                if not member.isreg():
                    raise DataError(f"{path} is corrupt: {name} in it is not a file.")
                if not archive.pickled_labels:
                    _verify_size(archive, path, name, member.size)
                with cast(IO[bytes], tar.extractfile(member)) as content:
                    # A pickle is a few bytes longer for each image.
                    files[name] = content.read(2 * archive.file_size(name))
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{path} is corrupt: {error}.") from error
    for member_name, name in wanted.items():
        if name not in files:
            raise DataError(f"{path} is corrupt: {member_name} is not in it.")
    return _decode(archive, path, files)


def _from_folder(archive: Archive, folder: Path) -> ImageSet:
    try:
        files = {name: (folder / name).read_bytes() for name in archive.files}
        return _decode(archive, folder, files)
    except OSError as error:
        raise DataError(
            f"{folder} is incomplete: {error}; unpack the archive again."
        ) from error


def _verify_size(archive: Archive, source: Path, name: str, size: int) -> None:
    if size != archive.file_size(name):
        raise DataError(
            f"{source} is corrupt or truncated: {name} has {size:,} bytes, not "
            f"{archive.file_size(name):,}; replace it with the published file."
        )


def _records(archive: Archive, source: Path, name: str, content: bytes) -> np.ndarray:
    if archive.pickled_labels:
        try:
            content = pickled.records_of(content, archive.pickled_labels)
        except ValueError as error:
            raise DataError(
                f"{source} is corrupt or hostile: {name} cannot be read ({error}); put "
                "the published file there."
            ) from error
    _verify_size(archive, source, name, len(content))
    return np.frombuffer(content, np.uint8).reshape(-1, archive.label_bytes + 3072)


def _decode(archive: Archive, source: Path, files: dict[str, bytes]) -> ImageSet:
    def part(names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        data = np.concatenate([_records(archive, source, n, files[n]) for n in names])
        labels = data[:, archive.label_bytes - 1].astype(np.int32)
        if labels.max() >= archive.num_classes:
            raise DataError(
                f"{source} is corrupt: it has the label {labels.max()}, but only "
                f"{archive.num_classes} classes exist; put the published files there."
            )
        planes = data[:, archive.label_bytes :].reshape(-1, 3, 32, 32)
        return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels

    train, test = part(archive.train_files), part(archive.test_files)
    return ImageSet(*train, *test, archive.num_classes, flip=True)
