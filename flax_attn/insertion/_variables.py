"""Variables of a model with attention: ``merge`` and ``parameter_labels``."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.core import meta

from flax_attn.blocks import Attention
from flax_attn.insertion._linen import Call, Path, watch
from flax_attn.insertion.selection import listed
from flax_attn.insertion.trees import parameter_shapes, to_dicts


def merge(pretrained: Any, variables: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns ``variables`` with the values of ``pretrained``, and the new paths.

    For a model with inserted attention and the variables of the model without it::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> x, model = jnp.ones((2, 8, 8, 3)), nn.Sequential([nn.Conv(16, (3, 3))])
      >>> pretrained = model.init(jax.random.key(0), x)
      >>> inserted = flax_attn.insert(model, flax_attn.SE(), nn.Conv, init="identity")
      >>> fresh = inserted.init(jax.random.key(1), x)
      >>> variables, new = flax_attn.merge(pretrained, fresh)
      >>> print(*new, sep="\\n")
      params/layers_0/attention/expand/kernel
      params/layers_0/attention/reduce/kernel
      >>> y = model.apply(pretrained, x)
      >>> bool((inserted.apply(variables, x) == y).all())
      True

    Args:
      pretrained: variables by collection, ``{"params": ...}``; parts of the model or
        a collection such as ``"batch_stats"`` may be absent.
      variables: variables of the new model, which include all paths of ``pretrained``.

    Returns:
      The new tree, of plain dicts, and the sorted paths that are not in ``pretrained``.
      Check these paths: they also show a forgotten collection. Pretrained values keep
      their dtype.

    Raises:
      ValueError: values of ``pretrained`` are missing from ``variables`` or have a
        different shape; the message lists them all.
    """
    old = traverse_util.flatten_dict(to_dicts(pretrained))
    new = traverse_util.flatten_dict(to_dicts(variables), keep_empty_nodes=True)
    wrong = [
        f"{'/'.join(path)} {_shape(value)} "
        + (f"instead of {_shape(new[path])}" if path in new else "is missing")
        for path, value in old.items()
        if path not in new or _shape(value) != _shape(new[path])
    ]
    if wrong:
        raise ValueError(
            "`pretrained` must have paths and shapes that `variables` has too, got "
            f"{listed(wrong)}; pass variables of the same model, and remove from "
            "`pretrained` what the new model does not have, such as another head."
        )
    merged = {
        path: _replaced(value, old[path]) if path in old else value
        for path, value in new.items()
    }
    added = sorted(
        "/".join(path)
        for path, value in new.items()
        if path not in old and value is not traverse_util.empty_node
    )
    return traverse_util.unflatten_dict(merged), tuple(added)


def _shape(value: Any) -> tuple[int, ...]:
    return np.shape(meta.unbox(value))


def _replaced(value: Any, pretrained: Any) -> Any:
    # A box holds metadata such as the sharding, which the new model decides.
    if isinstance(value, meta.AxisMetadata):
        return value.replace_boxed(meta.unbox(pretrained))
    return meta.unbox(pretrained)


def parameter_labels(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Returns a tree with a label for each parameter, for an optimizer.

    The labels are ``"attention"`` for the kernels of all blocks (subclasses of
    ``blocks.Attention``) and of all inserted attention, ``"attention_no_decay"`` for
    their other parameters, such as biases, and ``"backbone"`` for everything else::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> x, model = jnp.ones((2, 8, 8, 3)), nn.Sequential([nn.Conv(16, (3, 3))])
      >>> model = flax_attn.insert(model, flax_attn.ECA(use_bias=True), nn.Conv)
      >>> labels = flax_attn.parameter_labels(model, x)
      >>> labels["layers_0"]["attention"]["conv"]
      {'bias': 'attention_no_decay', 'kernel': 'attention'}
      >>> labels["layers_0"]["kernel"]
      'backbone'

    With optax, this trains the attention and freezes the backbone::

      optax.multi_transform(
          {
              "attention": optax.adamw(1e-3, weight_decay=1e-4),
              "attention_no_decay": optax.adam(1e-3),
              "backbone": optax.set_to_zero(),
          },
          labels,
      )

    For a mask for ``optax.adamw`` or ``optax.masked``, use ``jax.tree.map(lambda label:
    label == "attention", labels)``.

    Args:
      model: any Linen module.
      *args: the arguments of ``model.init`` after the keys; ``jax.ShapeDtypeStruct`` is
        enough.
      **kwargs: its keyword arguments.

    Returns:
      A tree of strings with the structure of ``model.init(key, ...)["params"]``.

    Raises:
      ValueError: ``model`` calls no attention. Errors of its call are passed on.
    """
    roots: set[Path] = set()

    def watcher(call: Call, run: Callable[[], Any]) -> Any:
        if isinstance(call.module, Attention) or call.site is not None:
            roots.add(call.path)
        return run()

    params = parameter_shapes(watch(model, watcher), args, kwargs)
    if not roots:
        raise ValueError(
            "`model` must call a block of flax_attn or an inserted attention, got "
            f"{type(model).__name__}, which calls none."
        )

    def label(keys: Any, leaf: Any) -> str:
        path = tuple(k.key for k in keys if isinstance(k, jax.tree_util.DictKey))
        if not any(path[:i] in roots for i in range(len(path) + 1)):
            return "backbone"
        return "attention" if path[-1] == "kernel" else "attention_no_decay"

    return jax.tree_util.tree_map_with_path(label, params)
