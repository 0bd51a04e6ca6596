"""NumPy arrays from trees of JAX, PyTorch and NumPy arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict

Arrays = dict[str, np.ndarray]


def flat_arrays(field: str, state: Mapping[str, Any]) -> Arrays:
    """The arrays of a dict or a tree, by their keys joined with slashes."""
    return {key: to_numpy(key, value) for key, value in leaves_of(field, state).items()}


def leaves_of(field: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a tree, by their keys joined with slashes."""
    if not isinstance(tree, Mapping):
        raise ValueError(
            f"`{field}` must be a dict, got {type(tree).__name__}; pass a state dict, "
            "such as model.state_dict(), or variables."
        )
    leaves = flatten_dict(dict(tree))
    if other := [key for path in leaves for key in path if not isinstance(key, str)]:
        raise ValueError(
            f"`{field}` must have strings for keys, got {other[0]!r}; pass the state "
            "dict or the variables alone."
        )
    joined: dict[str, Any] = {}
    for path, value in leaves.items():
        key = "/".join(path)
        if key in joined:
            raise ValueError(
                f"`{field}` must have one leaf at {key!r}, got two, one of them by a "
                "key with a slash; leave one out."
            )
        joined[key] = meta.unbox(value)  # Partitioned parameters are boxed.
    return joined


def check_nested(field: str, tree: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for a key with a slash that is not at the top level."""
    nested = (key for path in flatten_dict(dict(tree)) if path[1:] for key in path)
    if slashed := [key for key in nested if "/" in key]:
        raise ValueError(
            f"`{field}` must have keys without slashes inside a tree, since they are "
            f"joined by slashes, got {slashed[0]!r}; rename it, or leave it out."
        )


def to_numpy(key: str, value: Any) -> np.ndarray:
    """``value`` as a NumPy array, bit for bit."""
    if hasattr(value, "detach"):
        return _array_of_tensor(key, value)
    if isinstance(value, list | tuple):
        raise ValueError(
            f"`{key}` must be an array, got {type(value).__name__}; pass a dict of its "
            "arrays, or np.asarray of its numbers."
        )
    try:
        array = np.asarray(value)
    # For random keys, deleted JAX arrays, and those of other hosts.
    except (TypeError, RuntimeError, ValueError) as error:
        got = getattr(value, "dtype", type(value).__name__)
        raise ValueError(
            f"`{key}` must be an array whose values NumPy can read, got {got} "
            f"({error}); pass a NumPy copy, or leave it out."
        ) from error
    if array.dtype.kind in "OSU":
        raise ValueError(
            f"`{key}` must be an array, got {type(value).__name__}; pass the state "
            "dict or the variables alone."
        )
    return array


def _array_of_tensor(key: str, tensor: Any) -> np.ndarray:
    import torch

    try:
        if tensor.dtype == torch.bfloat16:
            bits = tensor.detach().view(torch.int16)
            return bits.numpy(force=True).view(jnp.bfloat16)
        return tensor.numpy(force=True)
    except (TypeError, RuntimeError) as error:
        if tensor.is_meta:
            remedy = "load its values first"
        elif tensor.is_quantized:
            remedy = "pass its .dequantize()"
        elif tensor.layout != torch.strided:
            remedy = "pass its .to_dense()"
        else:
            remedy = "pass its .float()"
        raise ValueError(
            f"`{key}` must be a dense tensor of a dtype that NumPy has, got "
            f"{tensor.dtype}, {tensor.layout}, device {tensor.device}; {remedy}."
        ) from error


def holds_numbers(value: Any) -> bool:
    """Whether ``value`` is an array and not a shape alone."""
    if hasattr(value, "detach"):
        return not value.is_meta
    return isinstance(value, np.ndarray | jax.Array)
