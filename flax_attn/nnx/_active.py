"""``assert_active`` for NNX: whether every gate of a model moves its output."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from flax_attn.functional import Array
from flax_attn.insertion import Call, watch
from flax_attn.insertion.perturbation import check_gates, perturbed
from flax_attn.insertion.trees import separate_arrays
from flax_attn.nnx._blocks import Attention, Place, become, joined, modules

Gate = tuple[Place, str]
"""The path of a module, and its method that returns a gate."""
OnGate = Callable[[Gate, Any], Any]
"""From a gate and its value to the value to use instead."""


def assert_active(model: nnx.Module, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    """Asserts that every gate of ``model`` affects its output.

    Like ``flax_attn.assert_active`` for Linen, it adds numbers between 0.5 and 1.5 to
    each gate in turn, in one compiled program::

      >>> from flax import nnx
      >>> import flax_attn.nnx
      >>> import jax.numpy as jnp
      >>> class Forgetful(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.kept = flax_attn.nnx.SE(8, rngs=rngs)
      ...         self.lost = flax_attn.nnx.SE(8, rngs=rngs)
      ...     def __call__(self, x):
      ...         y = self.kept(x)
      ...         self.lost(x)
      ...         return y
      >>> model = Forgetful(nnx.Rngs(0))
      >>> assert_active(model, jnp.ones((2, 4, 4, 8)))  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      AssertionError: The output does not depend on the gates of lost. ...

    Args:
      model: any NNX module; it stays as it is.
      *args: the arguments of a call of ``model``.
      **kwargs: its keyword arguments.

    Returns:
      The paths of the modules with gates, names joined by slashes.

    Raises:
      AssertionError: changing some gate leaves the output unchanged, bit for bit; see
        ``flax_attn.assert_active``.
      ValueError: if no gate is called, or if the output is not finite.
    """
    graph, state = nnx.split(model)
    arrays, arguments = separate_arrays(args, kwargs)

    def outputs(on_gate: OnGate, state: Any, arrays: list[Any]) -> list[Array]:
        # New classes in each trace, so that a jit inside the model traces again.
        probe = _probe(nnx.merge(graph, state), on_gate)
        args, kwargs = arguments(arrays)
        return [jnp.asarray(x) for x in jax.tree.leaves(probe(*args, **kwargs))]

    gates: dict[Gate, int] = {}

    def number(gate: Gate, value: Any) -> Any:
        gates.setdefault(gate, len(gates))
        return value

    jax.eval_shape(partial(outputs, number), state, arrays)

    @jax.jit
    def run(switches: Array, state: Any, arrays: list[Any]) -> list[Array]:
        def change(gate: Gate, value: Any) -> Any:
            return perturbed(value, switches[gates[gate]])

        return outputs(change, state, arrays)

    def switched(switches: np.ndarray) -> list[np.ndarray]:
        return jax.device_get(run(switches, state, arrays))

    paths = [joined(path) for path, _ in gates]
    return check_gates(type(model).__name__, paths, switched)


def _probe(model: Any, on_gate: OnGate) -> Any:
    """``model`` with ``on_gate`` around each gate, changed in place."""
    inside = modules(model)
    blocks = {path for path, module in inside.items() if isinstance(module, Attention)}
    others = {
        (*path, name)
        for path, module in inside.items()
        for name in getattr(module, "_attention_names", ())
        if not any(block[: len(path) + 1] == (*path, name) for block in blocks)
    }
    for path in blocks:
        become(inside[path], _probed(type(inside[path]), path, on_gate))
    for path in others:
        become(inside[path], _probed_result(type(inside[path]), path, on_gate))
    return model


def _probed(kind: Any, path: Place, on_gate: OnGate) -> type:
    def watcher(call: Call, run: Callable[[], Any]) -> Any:
        value = run()
        if call.gate is None:
            return value
        return on_gate(((*path, *call.path), call.method), value)

    def callee(self: Any) -> nn.Module:
        return watch(kind._callee(self), watcher)

    return type(kind.__name__, (kind,), {"_callee": callee})


def _probed_result(kind: Any, path: Place, on_gate: OnGate) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return on_gate((path, "__call__"), kind.__call__(self, *args, **kwargs))

    return type(kind.__name__, (kind,), {"__call__": call})
