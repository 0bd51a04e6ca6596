"""Conversion of variables between Linen and NNX."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

_TYPES = (nnx.Param, nnx.BatchStat)


def to_linen(module: nnx.Module) -> dict[str, Any]:
    """Returns the parameters and batch statistics of ``module`` as Linen's variables.

      >>> from flax import nnx
      >>> import flax_attn.nnx
      >>> import jax
      >>> variables = to_linen(flax_attn.nnx.ECA(64, rngs=nnx.Rngs(0)))
      >>> jax.tree.map(lambda a: a.shape, variables)
      {'params': {'conv': {'kernel': (3, 1, 1)}}}

    Args:
      module: a block, or any module; a position in a list becomes a name.

    Returns:
      Arrays by collection (``params``, and ``batch_stats`` if there are any) and path.
    """
    flat = {path: variable[...] for path, variable in _variables(module).items()}
    return unflatten_dict(flat)


def from_linen(module: nnx.Module, variables: Mapping[str, Any]) -> None:
    """Sets the parameters and batch statistics of ``module`` from Linen's variables.

    The inverse of ``to_linen``; see the example of ``flax_attn.nnx``.

    Args:
      module: a block, or any module whose names are those of ``variables``. Changed in
        place.
      variables: what Linen's ``init`` or ``flax_attn.convert`` returns, boxed or not.

    Raises:
      ValueError: a variable is missing, is unknown or has another shape; nothing is
        changed then.
    """
    own = _variables(module)
    given = flatten_dict(nn.meta.unbox(dict(variables)))
    for path in own.keys() ^ given.keys():
        got = "none" if path in own else "one that the module does not have"
        raise ValueError(
            "`variables` must have exactly the variables of `module`, got "
            f"{got} at {'/'.join(path)}; compare with flax_attn.nnx.to_linen(module)."
        )
    for path, variable in own.items():
        shape = jnp.shape(given[path])
        if shape != variable[...].shape:
            raise ValueError(
                f"`variables` must have the shapes of `module`, got {shape} instead of "
                f"{variable[...].shape} at {'/'.join(path)}; use the same fields."
            )
    for path, variable in own.items():
        # Not `variable[...] =`, which keeps the dtype.
        if hasattr(type(variable), "set_value"):
            variable.set_value(jnp.asarray(given[path]))
        else:  # Flax before 0.12.
            variable.value = jnp.asarray(given[path])


def _variables(module: nnx.Module) -> dict[tuple[str, ...], Any]:
    """The variables themselves, by collection and path."""
    found = {}
    for path, node in nnx.iter_graph(module):
        if isinstance(node, _TYPES):
            collection = nnx.variable_name_from_type(type(node))
            found[collection, *map(str, path)] = node
    return found
