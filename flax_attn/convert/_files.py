"""Weight files: safetensors is read and written, PyTorch's format is only read."""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from flax_attn.convert._arrays import Arrays, check_nested, flat_arrays, to_numpy
from flax_attn.convert._unwrap import unwrap

TORCH_SUFFIXES = (".pth", ".pt", ".pth.tar", ".bin", ".ckpt")


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a file of arrays.

    Args:
      path: a ``.pth``, ``.pt``, ``.pth.tar``, ``.bin`` or ``.ckpt`` file is read by
        PyTorch 2.6 or newer with ``weights_only=True``; any other is safetensors. From
        a PyTorch checkpoint, the dict ``state_dict`` or ``model`` is used, and a line
        is printed.

    Returns:
      A dict from keys to NumPy arrays. Keys with slashes, as in Flax files, become a
      tree, so a Flax file returns variables.

    Raises:
      ValueError: the file is damaged, or contains anything other than named arrays, two
        dicts that may be the weights, or a dtype that NumPy lacks, such as float8.
      OSError: the file cannot be opened.
      ImportError: safetensors, or PyTorch for its files, is not installed.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"`path` must be a file, got {path}.")
    # So that a missing file raises OSError, whatever the libraries raise.
    with path.open("rb"):
        arrays = _load_torch(path) if _is_torch(path) else _load_safetensors(path)
    _check_keys(str(path), arrays)
    return unflatten_dict(arrays, sep="/")


def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes a state dict or variables to a safetensors file, atomically.

    Args:
      path: the file. It must not have a PyTorch suffix such as ``.pth``.
      state: a dict or a tree of arrays; the keys of a tree are joined by slashes.
      overwrite: whether to replace an existing file (default: False).

    Raises:
      ValueError: the file has a PyTorch suffix, or ``load`` could not read a dtype, or
        would return another tree.
      FileExistsError: the file exists and ``overwrite`` is False.
      OSError: the file cannot be written.
      ImportError: safetensors is not installed.
    """
    path = Path(path)
    check_output(path, overwrite)
    safetensors = _safetensors()
    # safetensors ignores strides.
    flat = {
        key: np.array(x, order="C") for key, x in flat_arrays("state", state).items()
    }
    check_nested("state", state)
    _check_keys("`state`", flat)
    for key, array in flat.items():
        # safetensors writes these, but cannot read them into NumPy.
        if array.dtype.name.startswith(("float8", "float4")):
            raise ValueError(
                f"`{key}` must be of a dtype that NumPy has, got {array.dtype}; pass "
                "its .astype(np.float32)."
            )
    try:
        data = safetensors.numpy.save(flat)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error
    # safetensors.numpy.save_file would make it readable by its owner alone.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path: Path, overwrite: bool) -> None:
    """Raises what ``save`` does for ``path``, before the work."""
    if _is_torch(path):
        raise ValueError(
            f"`path` must not have a PyTorch suffix ({', '.join(TORCH_SUFFIXES)}), got "
            f"{path}; the output format is safetensors, so name it *.safetensors."
        )
    if path.is_dir():
        raise IsADirectoryError(f"`path` must be a file, got the folder {path}.")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists; `overwrite=True` (--overwrite) replaces it."
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} for {path.name}.")


def _is_torch(path: Path) -> bool:
    return path.name.lower().endswith(TORCH_SUFFIXES)


def _check_keys(source: str, arrays: Arrays) -> None:
    trees = {key[: slash.start()] for key in arrays for slash in re.finditer("/", key)}
    if clash := sorted(trees & arrays.keys()):
        raise ValueError(f"{source} holds {clash[0]!r} both as an array and as a tree.")


def _load_safetensors(path: Path) -> Arrays:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {key: _read(file, key, path) for key in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file, or is truncated ({error})."
        ) from error


def _read(file: Any, key: str, path: Path) -> np.ndarray:
    try:
        return file.get_tensor(key)
    # safetensors raises it for a dtype that NumPy lacks.
    except AttributeError as error:
        raise ValueError(
            f"`{path}: {key}` must be of a dtype that NumPy has, got "
            f"{file.get_slice(key).get_dtype()}; save its .float() with "
            "safetensors.torch.save_file."
        ) from error


def _load_torch(path: Path) -> Arrays:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} needs PyTorch: pip install torch. Or save the state dict with "
            f"safetensors.torch.save_file where PyTorch is installed ({error})."
        ) from error
    # https://github.com/advisories/GHSA-53q9-r3pm-6pq6: before, `weights_only` did not
    # keep code from running.
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise ImportError(
            f"{path} needs PyTorch 2.6 or newer, which can load it without running "
            f"code, got {torch.__version__}."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    # PyTorch does not document what a damaged file raises.
    except Exception as error:
        raise ValueError(
            f"{path} is damaged, or contains more than arrays, which is not loaded "
            "since it might be code. Save only the state dict, preferably with "
            f"safetensors.torch.save_file ({type(error).__name__})."
        ) from error
    state = unwrap(str(path), state)
    others = [type(state).__name__]
    if isinstance(state, Mapping):
        rest = {key: x for key, x in state.items() if not torch.is_tensor(x)}
        others = [f"{key} ({type(x).__name__})" for key, x in rest.items()]
    if others:
        raise ValueError(
            f"{path} must hold a dict of tensors, got {', '.join(others)}; save only "
            "the state dict."
        )
    return {
        str(key): to_numpy(f"{path}: {key}", tensor) for key, tensor in state.items()
    }


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            f"Weight files need safetensors: pip install safetensors ({error})."
        ) from error
    return safetensors
