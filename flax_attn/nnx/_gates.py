"""Reading the gates of an NNX model."""

from typing import Any

from flax import nnx
from flax.traverse_util import flatten_dict

from flax_attn.functional import Array
from flax_attn.nnx._blocks import Attention, joined, modules


def attention_maps(
    model: nnx.Module, x: Any, *args: Any, **kwargs: Any
) -> dict[str, Array]:
    """Returns every gate of ``model`` for the input ``x``, by its path.

    Like ``flax_attn.inspect.attention_maps`` for Linen.
    ``flax_attn.inspect.statistics`` and ``overlay`` accept the result::

      >>> from flax import nnx
      >>> import flax_attn.nnx
      >>> import jax.numpy as jnp
      >>> block = flax_attn.nnx.CBAM(64, rngs=nnx.Rngs(0))
      >>> gates = attention_maps(block, jnp.ones((2, 8, 8, 64)))
      >>> {path: gate.shape for path, gate in gates.items()}
      {'channel/channel_gate': (2, 1, 1, 64), 'spatial/spatial_gate': (2, 8, 8, 1)}

    The model runs in its current mode and is not changed: norm statistics and random
    streams keep their state.

    Args:
      model: any module that calls a block, at any depth.
      x: its input.
      *args: further arguments of the call.
      **kwargs: its keyword arguments.

    Returns:
      A dict from path to gate, as for ``flax_attn.inspect.attention_maps``, but in the
      order of the paths.

    Raises:
      ValueError: no block is called.
    """
    model = nnx.clone(model)
    nnx.pop(model, nnx.Intermediate)
    roots = [path for path, m in modules(model).items() if isinstance(m, Attention)]
    if hasattr(nnx, "capture"):
        _, state = nnx.capture(model, nnx.Intermediate)(x, *args, **kwargs)
    else:
        model.set_attributes(sow_gates=True, raise_if_not_found=False)
        model(x, *args, **kwargs)
        state = nnx.pop(model, nnx.Intermediate)
    gates = {}
    for path, values in flatten_dict(nnx.to_pure_dict(state)).items():
        if any(path[: len(root)] == root for root in roots):
            name = joined(path)
            for i, gate in enumerate(values):
                gates[name if len(values) == 1 else f"{name}/{i}"] = gate
    if not gates:
        raise ValueError(
            "`model` must call an attention block, got no gate from "
            f"{type(model).__name__}; add a block, such as flax_attn.nnx.SE."
        )
    return gates
