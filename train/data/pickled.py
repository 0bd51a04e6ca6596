"""CIFAR's Python files, which are pickles: read without running what they ask for.

The unpickler admits dicts, lists, strings, numbers and NumPy's reconstruction of bytes,
and refuses every other name. https://docs.python.org/3/library/pickle.html
"""

import io
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Returns one of the three names that an array of bytes needs."""
        names = {
            # The module as NumPy 1 and NumPy 2 write it.
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): _dtype,
        }
        if (module, name) not in names:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return names[module, name]


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    # NumPy starts from an empty array; another shape would only take memory.
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError(f"it asks for an array {shape}")
    return np.empty(0, np.uint8)


def _dtype(name: Any, *_: Any) -> np.dtype:
    if name not in (b"u1", "u1"):
        raise pickle.UnpicklingError(f"it asks for an array of {name!r}")
    return np.dtype("u1", False, True)


def records_of(content: bytes, label_keys: Sequence[bytes]) -> bytes:
    """The records of the binary file that has the images of a pickled one.

    Args:
      content: of the pickled file.
      label_keys: of the lists of labels, in the order of a record's label bytes.

    Raises:
      ValueError: it is damaged, or asks for more than an array of bytes.
    """
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        pixels = batch[b"data"]
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
            raise ValueError(f"its data are {pixels.dtype} {pixels.shape}")
        labels = [np.array(batch[key], np.uint8)[:, None] for key in label_keys]
        return np.concatenate([*labels, pixels], axis=1).tobytes()
    # A damaged pickle may raise anything.
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
