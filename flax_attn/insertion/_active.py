"""``assert_active``: whether every gate of a model moves its output."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_attn.functional import Array
from flax_attn.insertion._linen import Call, Path, Watcher, watch
from flax_attn.insertion.perturbation import check_gates, perturbed
from flax_attn.insertion.trees import separate_arrays

Gate = tuple[Path, str]
"""The path of a module, and its method that returns a gate."""


def assert_active(
    model: nn.Module, variables: Any, *args: Any, **kwargs: Any
) -> tuple[str, ...]:
    """Asserts that every gate of ``model`` affects its output.

    It finds the gates of all blocks (subclasses of ``blocks.Attention``), whether
    inserted or part of the model's code, and adds numbers between 0.5 and 1.5 to each
    gate in turn, in one compiled program::

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

    For an inserted module of another type, the output counts as one gate. A gate inside
    ``nn.scan`` or ``nn.vmap`` is one gate for all steps.

    Args:
      model: any Linen module.
      variables: its variables.
      *args: the arguments of ``model.apply`` after the variables.
      **kwargs: its keyword arguments, such as ``train=False`` or ``rngs``.

    Returns:
      The paths of the modules with gates, names joined by slashes.

    Raises:
      AssertionError: changing some gate leaves the output unchanged, bit for bit. This
        also happens if the gated map is zero, for example after a norm whose scale is
        initialized to zero; then pass trained variables.
      ValueError: if no gate is called, or if the output is not finite.
    """
    arrays, arguments = separate_arrays(args, kwargs)

    def outputs(watcher: Watcher, variables: Any, arrays: list[Any]) -> list[Array]:
        args, kwargs = arguments(arrays)
        return _output(watch(model, watcher), variables, args, kwargs)

    # As dicts, for their order.
    found: dict[Gate, None] = {}
    others: dict[Gate, None] = {}

    def find(call: Call, run: Callable[[], Any]) -> Any:
        if call.gate is not None:
            found[call.path, call.method] = None
        if call.site is not None:
            others[call.path, call.method] = None
        return run()

    jax.eval_shape(partial(outputs, find), variables, arrays)
    with_gates = {path[:i] for path, _ in found for i in range(len(path) + 1)}
    gates = [*found, *(gate for gate in others if gate[0] not in with_gates)]

    @jax.jit
    def run(switches: Array, variables: Any, arrays: list[Any]) -> list[Array]:
        def change(call: Call, run: Callable[[], Any]) -> Any:
            y, gate = run(), (call.path, call.method)
            return perturbed(y, switches[gates.index(gate)]) if gate in gates else y

        return outputs(change, variables, arrays)

    def switched(switches: np.ndarray) -> list[np.ndarray]:
        return jax.device_get(run(switches, variables, arrays))

    paths = ["/".join(path) for path, _ in gates]
    return check_gates(type(model).__name__, paths, switched)


def _output(model: nn.Module, variables: Any, args: Any, kwargs: Any) -> list[Array]:
    """The arrays of the output alone, without the collections that come with it."""
    result: Any = model.apply(variables, *args, **kwargs)
    with_state = kwargs.get("mutable", False) is not False
    if with_state or kwargs.get("capture_intermediates", False):
        result = result[0]
    return [jnp.asarray(x) for x in jax.tree.leaves(result)]
