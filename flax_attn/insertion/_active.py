"""``assert_active``: whether every gate of a model moves its output."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_attn.functional import Array
from flax_attn.insertion._linen import Call, Path, watch
from flax_attn.insertion.trees import separate_arrays
from flax_attn.insertion.selection import listed


def assert_active(
    model: nn.Module, variables: Any, *args: Any, **kwargs: Any
) -> tuple[str, ...]:
    """Asserts that every gate of ``model`` moves its output.

    It finds the gates of all blocks, that is of subclasses of ``blocks.Attention``,
    inserted or part of the model's code. To each in turn it adds numbers between 0.5
    and 1.5, in one compiled program::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> class Forgetful(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         y = flax_attn.SE(name="kept")(x)
      ...         flax_attn.SE(name="lost")(x)
      ...         return y
      >>> x, model = jnp.ones((2, 4, 4, 8)), Forgetful()
      >>> variables = model.init(jax.random.key(0), x)
      >>> flax_attn.assert_active(model, variables, x)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      AssertionError: The output does not depend on the gates of lost. ...

    An inserted attention of another kind counts as one gate, which is its result. A
    gate inside ``nn.scan`` or ``nn.vmap`` is one gate for all steps.

    Args:
      model: any Linen module.
      variables: its variables.
      *args: the arguments of ``model.apply`` after the variables.
      **kwargs: its keyword arguments, such as ``train=False`` or ``rngs``.

    Returns:
      The paths of the modules with gates, names joined by slashes.

    Raises:
      AssertionError: if changing any gate leaves the output the same, bit for bit. A
        gate on a map of zeros does so too, for example after a normalization whose
        scale starts at zero: pass trained variables.
      ValueError: if no gate is called, or if the output is not finite.
    """
    gates = _find_gates(model, variables, args, kwargs)
    if not gates:
        raise ValueError(
            "`model` must call a block of flax_attn or an inserted attention, got "
            f"{type(model).__name__}, which calls none."
        )
    run = _switchable(model, variables, args, kwargs, gates)
    expected = run(np.zeros(len(gates), np.float32))
    if not all(jnp.isfinite(x).all() for x in expected):
        raise ValueError(
            "`variables` must give a finite output, got NaN or infinity in it; pass "
            "trained variables, or smaller inputs."
        )
    dead = [
        "/".join(gate.path) or "the model itself"
        for gate, switches in zip(gates, np.eye(len(gates), dtype="f"), strict=True)
        if all(map(np.array_equal, run(switches), expected))
    ]
    if dead:
        raise AssertionError(
            f"The output does not depend on the gates of {listed(_unique(dead))}. "
            "Either nothing uses them, or what they scale is zero, as after a scale "
            "that starts at zero; then pass trained variables."
        )
    return _unique("/".join(gate.path) for gate in gates)


class _Gate(NamedTuple):
    """The method of a module that returns a gate."""

    path: Path
    method: str


def _unique(paths: Iterable[str]) -> tuple[str, ...]:
    """A block with several gates has one path."""
    return tuple(dict.fromkeys(paths))


def _find_gates(
    model: nn.Module, variables: Any, args: Any, kwargs: Any
) -> list[_Gate]:
    # As dicts, for their order.
    gates: dict[_Gate, None] = {}
    others: dict[_Gate, None] = {}

    def watcher(call: Call, run: Callable[[], Any]) -> Any:
        if call.gate is not None:
            gates[_Gate(call.path, call.method)] = None
        if call.site is not None:
            others[_Gate(call.path, call.method)] = None
        return run()

    arrays, arguments = separate_arrays(args, kwargs)

    def apply(variables: Any, arrays: list[Any]) -> Any:
        args, kwargs = arguments(arrays)
        return _output(watch(model, watcher), variables, args, kwargs)

    jax.eval_shape(apply, variables, arrays)
    with_gates = {gate.path[:i] for gate in gates for i in range(len(gate.path) + 1)}
    return [*gates, *(other for other in others if other.path not in with_gates)]


def _output(model: nn.Module, variables: Any, args: Any, kwargs: Any) -> Any:
    """The arrays of the output alone, without the collections that come with it."""
    result: Any = model.apply(variables, *args, **kwargs)
    with_state = kwargs.get("mutable", False) is not False
    if with_state or kwargs.get("capture_intermediates", False):
        result = result[0]
    return [jnp.asarray(x) for x in jax.tree.leaves(result)]


def _switchable(
    model: nn.Module, variables: Any, args: Any, kwargs: Any, gates: Sequence[_Gate]
) -> Callable[[np.ndarray], list[np.ndarray]]:
    """The output as a function of one switch for each gate; 1 changes the gate.

    One program for all, as two compilations may differ in the last bits.
    """
    index = {gate: i for i, gate in enumerate(gates)}
    arrays, arguments = separate_arrays(args, kwargs)

    @jax.jit
    def run(switches: Array, variables: Any, arrays: list[Any]) -> Any:
        def watcher(call: Call, run: Callable[[], Any]) -> Any:
            y = run()
            i = index.get(_Gate(call.path, call.method))
            if i is None:
                return y
            # Different at each element, since a norm removes a common factor.
            wave = 1 + jnp.sin(jnp.arange(y.size, dtype=jnp.float32)) / 2
            change = wave.reshape(y.shape).astype(y.dtype)
            return y + switches[i].astype(y.dtype) * change

        args, kwargs = arguments(arrays)
        return _output(watch(model, watcher), variables, args, kwargs)

    return lambda switches: jax.device_get(run(switches, variables, arrays))
