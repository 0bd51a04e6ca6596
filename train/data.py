"""Image sets as NumPy arrays: CIFAR from its binary files, digits from scikit-learn.

The binary layout: a record is its label bytes and then 3,072 pixel bytes, the red,
green and blue planes row by row. https://www.cs.toronto.edu/~kriz/cifar.html
"""

import dataclasses
import hashlib
import http.client
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm.auto import tqdm

TIMEOUT_SECONDS = 30


class DataError(Exception):
    """The data cannot be had; the message is one line that says the way out."""


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images ``(N, H, W, 3)`` uint8 and labels ``(N,)`` int32, in two parts."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    flip: bool
    """Whether a mirrored image still shows the same thing."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published archive: where it is, how it is known to be whole, what it holds."""

    url: str
    size: int
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

    @property
    def name(self) -> str:
        """The archive's file name."""
        return self.url.rsplit("/", 1)[-1]

    def file_size(self, file: str) -> int:
        """The exact size of a file of the archive, in bytes."""
        records = self.test_records if file in self.test_files else self.records
        return records * (self.label_bytes + 3072)


ARCHIVES = {
    "cifar10": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        size=170_052_171,
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
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        size=168_513_733,
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


def load(name: str, data_dir: Path) -> ImageSet:
    """Returns the image set ``name``: ``"digits"`` or a key of ``ARCHIVES``.

    For an archive, ``data_dir`` may be its unpacked folder, hold that folder, or hold
    the archive; where it is none of these the archive is downloaded to it.

    Raises:
      DataError: the data cannot be had.
    """
    if name == "digits":
        return load_digits()
    archive = ARCHIVES[name]
    data_dir = data_dir.expanduser()
    for folder in (data_dir, data_dir / archive.folder):
        if folder.name == archive.folder and folder.is_dir():
            return _from_folder(archive, folder)
    path = data_dir / archive.name
    if path.exists():
        _check_whole(archive, path)
    else:
        download(archive, path)
    return _from_tar(archive, path)


def load_digits() -> ImageSet:
    """Scikit-learn's 1,797 scans of digits, ``(32, 32, 3)``, in a fixed split.

    Each of the 8x8 pixels becomes a 4x4 square; 1,437 images train, 360 test.
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


def download(archive: Archive, path: Path) -> None:
    """Fetches ``archive`` to ``path``; nothing stands there until it is whole.

    Raises:
      DataError: it cannot be fetched, or what came is not the published archive.
    """
    partial = None
    made = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=archive.name, suffix=".part", delete=False
        ) as file:
            partial = Path(file.name)
            _fetch(archive, file)
        _check_whole(archive, partial)
        partial.chmod(0o644)  # A temporary file is for its owner alone.
        os.replace(partial, path)
    except (OSError, http.client.HTTPException, DataError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(
            f"Looked for {archive.folder}/ and {archive.name} in {path.parent} and "
            f"found neither; downloading {archive.url} failed ({reason}). Pass "
            "--data-dir, or --dataset digits, which needs no network."
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
        if made and path.parent.exists() and not any(path.parent.iterdir()):
            path.parent.rmdir()


def _fetch(archive: Archive, file: IO[bytes]) -> None:
    with (
        _open(archive.url) as response,
        tqdm(
            total=archive.size, unit="B", unit_scale=True, desc=archive.name
        ) as progress,
    ):
        while block := response.read(1 << 20):
            file.write(block)
            progress.update(len(block))
            if progress.n > archive.size:
                raise DataError(f"more than the published {archive.size:,} bytes came")


def _open(url: str) -> Any:
    try:
        return urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()  # It is a response too, and holds the connection.
        raise


def _check_whole(archive: Archive, path: Path) -> None:
    """Raises ``DataError`` unless ``path`` is the published archive, bit by bit."""
    way_out = "" if path.suffix == ".part" else "; delete it to download it again"
    size = path.stat().st_size
    if size != archive.size:
        raise DataError(
            f"{path} is corrupt or truncated: {size:,} bytes, not the published "
            f"{archive.size:,}{way_out}."
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != archive.sha256:
        raise DataError(
            f"{path} is corrupt: its SHA-256 is {digest}, not the published "
            f"{archive.sha256}{way_out}."
        )


def _from_tar(archive: Archive, path: Path) -> ImageSet:
    """Reads the files of a fixed list; no path in the archive is trusted."""

    def read(tar: tarfile.TarFile, name: str) -> bytes:
        member = tar.extractfile(f"{archive.folder}/{name}")
        if member is None:
            raise DataError(f"{path} is corrupt: {name} in it is not a file.")
        with member:
            return member.read(archive.file_size(name) + 1)

    try:
        with tarfile.open(path, "r:gz") as tar:
            names = (*archive.train_files, *archive.test_files)
            return _decode(archive, path, {name: read(tar, name) for name in names})
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise DataError(f"{path} is corrupt: {error}.") from error


def _from_folder(archive: Archive, folder: Path) -> ImageSet:
    try:
        names = (*archive.train_files, *archive.test_files)
        return _decode(archive, folder, {n: (folder / n).read_bytes() for n in names})
    except OSError as error:
        raise DataError(
            f"{folder} is incomplete: {error}; unpack the archive again."
        ) from error


def _decode(archive: Archive, source: Path, files: dict[str, bytes]) -> ImageSet:
    def part(names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        for name in names:
            size, expected = len(files[name]), archive.file_size(name)
            if size != expected:
                raise DataError(
                    f"{source} is corrupt or truncated: {name} has {size:,} bytes, "
                    f"not {expected:,}; put the published file there."
                )
        data = np.concatenate([np.frombuffer(files[n], np.uint8) for n in names])
        data = data.reshape(-1, archive.label_bytes + 3072)
        labels = data[:, archive.label_bytes - 1].astype(np.int32)
        if labels.max() >= archive.num_classes:
            raise DataError(
                f"{source} is corrupt: it has the label {labels.max()}, but only "
                f"{archive.num_classes} classes exist; put the published files there."
            )
        planes = data[:, archive.label_bytes :].reshape(-1, 3, 32, 32)
        return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels

    train_images, train_labels = part(archive.train_files)
    test_images, test_labels = part(archive.test_files)
    return ImageSet(
        train_images,
        train_labels,
        test_images,
        test_labels,
        archive.num_classes,
        flip=True,
    )
