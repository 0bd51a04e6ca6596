"""``sites``: where attention is inserted, with shapes and parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from flax_attn.insertion._linen import Call, Path, watch
from flax_attn.insertion.trees import parameter_shapes


class Site(NamedTuple):
    """A place where attention was inserted.

    Attributes:
      path: path of the submodule, names joined by slashes.
      type: name of the submodule's class.
      shape: shape of its output, which is the input of the attention.
      parameters: number of parameters that the attention adds.
    """

    path: str
    type: str
    shape: tuple[int, ...]
    parameters: int


class Sites(tuple[Site, ...]):
    """Sites in the order of their first calls; ``str`` returns a table."""

    @property
    def parameters(self) -> int:
        """The number of parameters that all sites add."""
        return sum(site.parameters for site in self)

    def __str__(self) -> str:
        """One line for each site, and the total."""
        rows = [("path", "type", "output", "parameters")]
        rows += [(s.path, s.type, str(s.shape), f"{s.parameters:,}") for s in self]
        rows += [("total", "", "", f"{self.parameters:,}")]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def sites(model: nn.Module, *args: Any, **kwargs: Any) -> Sites:
    """Returns where attention is inserted in ``model``, with shapes and parameters.

    Nothing is computed, and ``print`` shows the result as a table::

      >>> import flax_attn, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> chain = nn.Sequential([nn.Conv(64, (3, 3)), nn.relu, nn.Conv(128, (3, 3))])
      >>> model = flax_attn.insert(chain, flax_attn.ECA(), nn.Conv)
      >>> found = flax_attn.sites(model, jnp.ones((2, 8, 8, 3)))
      >>> print(found)
      path      type  output           parameters
      layers_0  Conv  (2, 8, 8, 64)             3
      layers_2  Conv  (2, 8, 8, 128)            5
      total                                     8
      >>> found[0]
      Site(path='layers_0', type='Conv', shape=(2, 8, 8, 64), parameters=3)

    Args:
      model: a module that ``insert`` returned, or one with such modules inside.
      *args: the arguments of ``model.init`` after the keys; ``jax.ShapeDtypeStruct`` is
        enough.
      **kwargs: its keyword arguments.

    Returns:
      A tuple of ``Site``. Inside ``nn.scan`` and ``nn.vmap`` the shape is that of one
      step, while the parameters are those of all.

    Raises:
      ValueError: nothing is inserted in ``model``. Errors of its call are passed on.
    """
    found: dict[Path, tuple[str, tuple[int, ...]]] = {}

    def watcher(call: Call, run: Callable[[], Any]) -> Any:
        if call.site is not None:
            found.setdefault(call.path, (call.site, call.args[0].shape))
        return run()

    params = parameter_shapes(watch(model, watcher), args, kwargs)
    if not found:
        raise ValueError(
            "`model` must have attention inserted, got "
            f"{type(model).__name__} with none; make it with flax_attn.insert."
        )
    return Sites(
        Site("/".join(path[:-1]), kind, shape, _count(params, path))
        for path, (kind, shape) in found.items()
    )


def _count(params: Any, path: Path) -> int:
    for name in path:
        params = params.get(name, {})
    return sum(leaf.size for leaf in jax.tree.leaves(params))
