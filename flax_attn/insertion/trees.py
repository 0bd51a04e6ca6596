"""Trees of arguments and of variables."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn


def separate_arrays(
    args: Any, kwargs: Any
) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays among the arguments, and a function from arrays to all arguments."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    kinds = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, kinds)]

    def arguments(arrays: list[Any]) -> Any:
        filled = list(leaves)
        for i, leaf in zip(places, arrays, strict=True):
            filled[i] = leaf
        return jax.tree.unflatten(tree, filled)

    return [leaves[i] for i in places], arguments


def parameter_shapes(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """The shapes of the parameters that ``model.init`` gives."""
    arrays, arguments = separate_arrays(args, kwargs)

    def init(arrays: list[Any]) -> Any:
        args, kwargs = arguments(arrays)
        return model.init(jax.random.key(0), *args, **kwargs)

    return jax.eval_shape(init, arrays).get("params", {})


def to_dicts(tree: Any) -> Any:
    """``tree`` with FrozenDict and other mappings as dicts."""
    if isinstance(tree, Mapping):
        return {str(key): to_dicts(value) for key, value in tree.items()}
    return tree
