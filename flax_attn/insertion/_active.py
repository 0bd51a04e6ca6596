"""``assert_active``: whether every gate of a model moves its output."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_attn.functional import Array
from flax_attn.insertion._linen import Call, Path, watch
from flax_attn.insertion.perturbation import check_gates, perturbed
from flax_attn.insertion.trees import separate_arrays


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
    run = _switchable(model, variables, args, kwargs, gates)
    paths = ["/".join(gate.path) for gate in gates]
    return check_gates(type(model).__name__, paths, run)


class _Gate(NamedTuple):
    """The method of a module that returns a gate."""

    path: Path
    method: str


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
    """The output as a function of one switch for each gate; 1 changes the gate."""
    index = {gate: i for i, gate in enumerate(gates)}
    arrays, arguments = separate_arrays(args, kwargs)

    @jax.jit
    def run(switches: Array, variables: Any, arrays: list[Any]) -> Any:
        def watcher(call: Call, run: Callable[[], Any]) -> Any:
            y = run()
            i = index.get(_Gate(call.path, call.method))
            if i is None:
                return y
            return perturbed(y, switches[i])

        args, kwargs = arguments(arrays)
        return _output(watch(model, watcher), variables, args, kwargs)

    return lambda switches: jax.device_get(run(switches, variables, arrays))
