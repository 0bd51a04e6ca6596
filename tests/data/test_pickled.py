"""CIFAR's Python files: the same images as the binary ones; no code is run."""

import dataclasses
import hashlib
import os
import pickle

import numpy as np
import pytest

from tests.data.test_data import FILES, PYTHON, TINY, archive_of, check, member
from train.data import cifar as data
from train.data import pickled

KEYS = PYTHON.pickled_labels


def batch_of(records, **fields):
    """As NumPy's reconstruction writes it; protocol 2 would add ``_codecs.encode``."""
    batch = {
        b"data": np.ascontiguousarray(records[:, 2:]),
        b"coarse_labels": records[:, 0].tolist(),
        b"fine_labels": records[:, 1].tolist(),
        b"filenames": [b"a.png"] * len(records),
    }
    return pickle.dumps(batch | fields, protocol=4)


BATCHES = {name[0]: batch_of(array) for name, array in FILES.items()}


@pytest.fixture
def tiny(monkeypatch):
    def register(**fields):
        monkeypatch.setitem(data.ARCHIVES, "tiny", TINY)
        python = dataclasses.replace(PYTHON, **fields)
        monkeypatch.setitem(data.PYTHON_ARCHIVES, "tiny", python)

    register()
    return register


def write_folder(folder, batches=BATCHES):
    folder.mkdir()
    for name, content in batches.items():
        (folder / name).write_bytes(content)


def test_a_folder_inside_or_itself(tiny, tmp_path):
    write_folder(tmp_path / "tiny-py")
    check(data.load("tiny", tmp_path))
    check(data.load("tiny", tmp_path / "tiny-py"))


def test_an_archive(tiny, tmp_path):
    content = archive_of(*(member(f"tiny-py/{n}", b) for n, b in BATCHES.items()))
    tiny(sha256=hashlib.sha256(content).hexdigest())
    (tmp_path / "tiny-python.tar.gz").write_bytes(content)
    check(data.load("tiny", tmp_path))
    tiny(sha256="0" * 64)
    with pytest.raises(data.DataError, match="its SHA-256 is"):
        data.load("tiny", tmp_path)


def test_python_2():
    """As written by Python 2: strings that are bytes, and NumPy 1's module."""
    content = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
        b"K\x00\x85U\x01btR(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00"
        + bytes(range(256)) * 12
        + b"tbU\x06labels]K\x07au."
    )
    expected = bytes([7]) + bytes(range(256)) * 12
    assert pickled.records_of(content, (b"labels",)) == expected


class Asks:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


RECONSTRUCT = np.zeros(0).__reduce__()[0]


@pytest.mark.parametrize(
    "thing, reason",
    [
        (Asks(os.system, "touch ran"), r"it asks for (posix|nt).system"),
        (Asks(eval, "open('ran', 'w')"), "it asks for builtins.eval"),
        (Asks(getattr, "text", "upper"), "it asks for builtins.getattr"),
        (Asks(np.load, "ran"), "it asks for numpy"),
        (Asks(RECONSTRUCT, np.ndarray, (10**13,), b"b"), "asks for an array .1000"),
        (Asks(RECONSTRUCT, np.dtype, (0,), b"b"), "asks for an array"),
        (np.zeros(2, object), "it asks for an array of 'O8'"),
        (np.zeros(2, np.float64), "it asks for an array of 'f8'"),
    ],
)
def test_a_hostile_pickle(tiny, tmp_path, monkeypatch, thing, reason):
    """The error names what it asks for, which is not run."""
    monkeypatch.chdir(tmp_path)
    bad = batch_of(FILES["a.bin"], extra=thing)
    write_folder(tmp_path / "tiny-py", BATCHES | {"a": bad})
    with pytest.raises(data.DataError, match=f"hostile: a cannot .*{reason}") as error:
        data.load("tiny", tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        BATCHES["a"][:-100],
        b"\x80\x04" + b"\xff" * 50,
        pickle.dumps([1, 2]),
        pickle.dumps({b"data": 1}),
        batch_of(FILES["a.bin"][:, :9]),
        batch_of(FILES["a.bin"]).replace(b"fine_labels", b"some_labels"),
    ],
)
def test_a_damaged_pickle(content):
    with pytest.raises(ValueError):
        pickled.records_of(content, KEYS)


def test_a_batch_of_another_size(tiny, tmp_path):
    short = batch_of(FILES["a.bin"][:4])
    write_folder(tmp_path / "tiny-py", BATCHES | {"a": short})
    with pytest.raises(data.DataError, match="a has 12,296 bytes, not 15,370"):
        data.load("tiny", tmp_path)
