"""``attention_maps``: every gate of a model for one input."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from flax.traverse_util import flatten_dict

from flax_attn.functional import Array
from flax_attn.insertion import Call, watch

COLLECTION = "intermediates"


def attention_maps(
    model: nn.Module, variables: Mapping[str, Any], x: Any, *args: Any, **kwargs: Any
) -> dict[str, Array]:
    """Returns every gate of ``model`` for the input ``x``, by its path.

    The gates come from the call that computes the output, so the block's input times
    its gates equals its output bit for bit (BAM, scSE and GlobalContext combine theirs
    differently)::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> block = flax_attn.CBAM()
      >>> variables = block.init(jax.random.key(0), x)
      >>> gates = flax_attn.inspect.attention_maps(block, variables, x)
      >>> {path: gate.shape for path, gate in gates.items()}
      {'channel/channel_gate': (2, 1, 1, 64), 'spatial/spatial_gate': (2, 8, 8, 1)}

    Gates are the values that a subclass of ``blocks.Attention`` declares in ``gates``;
    other sown values are not returned. No other collection is mutable in the call, so
    norm layers must use their running averages.

    Args:
      model: any module that calls a block, at any depth.
      variables: its variables.
      x: its input.
      *args: further arguments of the call.
      **kwargs: keyword arguments of ``model.apply``, such as ``train=False``,
        ``method="features"`` or ``rngs={"dropout": key}``.

    Returns:
      A dict from path to gate, in the order of computation (sorted under ``jax.jit``).
      Gates have the block's dtype and the shape ``(..., 1, 1, C)``, ``(..., H, W, 1)``
      or ``(..., H, W, C)``. A block that is called several times has one path per call,
      ending in ``/0``, ``/1`` and so on. Layers stacked by ``nn.scan`` or ``nn.vmap``
      have one gate, stacked along the axis in ``variable_axes``.

    Raises:
      ValueError: if there is no gate, if ``nn.scan`` or ``nn.vmap`` drops one, or if
        ``mutable`` is among the keyword arguments.
    """
    if "mutable" in kwargs:
        raise ValueError(
            f"`mutable` must be left out, got {kwargs['mutable']!r}, since only gates "
            "are collected; call model.apply for other collections."
        )
    # Gates of an earlier call among the variables would come before those of this one.
    known = {name: value for name, value in variables.items() if name != COLLECTION}
    # Dicts for the order: transformations return their collections sorted.
    made: dict[str, None] = {}
    lost: dict[str, None] = {}

    def watcher(call: Call, run: Callable[[], Any]) -> Any:
        if call.gate is not None:
            path = "/".join((*call.path, call.gate))
            stored = call.module.is_mutable_collection(COLLECTION)
            (made if stored else lost)[path] = None
        return run()

    watched = watch(model, watcher)
    _, state = watched.apply(known, x, *args, mutable=[COLLECTION], **kwargs)
    sown = flatten_dict(state.get(COLLECTION, {}), sep="/")
    gates = {
        path if len(sown[path]) == 1 else f"{path}/{i}": gate
        for path in made
        for i, gate in enumerate(sown.get(path, ()))
    }
    lost |= {path: None for path in made if path not in sown}
    if not gates or lost:
        got = f"no gate at {', '.join(sorted(lost))}" if lost else "no gate"
        raise ValueError(
            f"`model` must call an attention block and keep its gates, got {got} from "
            f"{type(model).__name__}; add a block, or, if it is inside nn.scan or "
            f'nn.vmap, keep its gates with variable_axes={{"{COLLECTION}": 0}}.'
        )
    return gates
