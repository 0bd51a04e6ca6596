"""Checks whether an output depends on gates by perturbing them."""

from collections.abc import Callable, Iterable, Sequence

import jax.numpy as jnp
import numpy as np

from flax_attn.functional import Array
from flax_attn.insertion.selection import listed


def perturbed(gate: Array, switch: Array) -> Array:
    """``gate`` plus ``switch`` times numbers between 0.5 and 1.5.

    They differ at each element, since a norm removes a common factor.
    """
    wave = 1 + jnp.sin(jnp.arange(gate.size, dtype=jnp.float32)) / 2
    change = wave.reshape(gate.shape).astype(gate.dtype)
    return gate + switch.astype(gate.dtype) * change


def check_gates(
    model: str,
    paths: Sequence[str],
    run: Callable[[np.ndarray], Sequence[np.ndarray]],
) -> tuple[str, ...]:
    """Returns the ``paths`` of gates, each once, if the output depends on all of them.

    Args:
      model: name of the model's class.
      paths: of the modules with gates, one for each gate.
      run: the output as a function of one switch for each gate. One program for all,
        as two compilations may differ in the last bits.

    Raises:
      AssertionError: changing a gate leaves the output the same, bit for bit.
      ValueError: there is no gate, or the output is not finite.
    """
    if not paths:
        raise ValueError(
            "`model` must call a block of flax_attn or an inserted attention, got "
            f"{model}, which calls none."
        )
    expected = run(np.zeros(len(paths), np.float32))
    if not all(jnp.isfinite(x).all() for x in expected):
        raise ValueError(
            "`variables` must give a finite output, got NaN or infinity in it; pass "
            "trained variables, or smaller inputs."
        )
    dead = [
        path or "the model itself"
        for path, switches in zip(paths, np.eye(len(paths), dtype="f"), strict=True)
        if all(map(np.array_equal, run(switches), expected))
    ]
    if dead:
        raise AssertionError(
            f"The output does not depend on the gates of {listed(_unique(dead))}. "
            "Either nothing uses them, or the maps they scale are zero, for example "
            "after a norm with a zero-initialized scale; then pass trained variables."
        )
    return _unique(paths)


def _unique(paths: Iterable[str]) -> tuple[str, ...]:
    """A block with several gates has one path."""
    return tuple(dict.fromkeys(paths))
