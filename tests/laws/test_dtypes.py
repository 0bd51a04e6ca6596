"""Every block in half precision, and the dtypes that come out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_attn.blocks import BLOCKS
from tests.cases import (
    IMPLEMENTATIONS,
    blocks,
    forms,
    has_parameters,
    normal,
    variables_for,
)
from tests.compilation import jit_as_users_do


@blocks
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_result_dtype_is_linens(block, implementation):
    def dtype_of(x, params, field):
        module = BLOCKS[block](dtype=field, implementation=implementation)
        x = jax.ShapeDtypeStruct((1, 4, 4, 16), x)
        variables = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, params),
            jax.eval_shape(module.init, jax.random.key(0), x),
        )
        apply = partial(module.apply, mutable=["intermediates"])
        y, sown = jax.eval_shape(apply, variables, x)
        gates = jax.tree.leaves(sown)
        assert gates and all(gate.dtype == y.dtype for gate in gates)
        return y.dtype

    assert dtype_of("float32", "float32", None) == "float32"
    promoted = "float32" if has_parameters(block) else "bfloat16"
    assert dtype_of("bfloat16", "float32", None) == promoted
    assert dtype_of("bfloat16", "bfloat16", None) == "bfloat16"
    assert dtype_of("float32", "float32", jnp.bfloat16) == "bfloat16"
    assert dtype_of("float16", "float32", jnp.float16) == "float16"
    assert dtype_of("float16", "float16", jnp.float32) == "float32"


# The mean error that is allowed, of the largest value.
ERRORS = {"bfloat16": 0.1, "float16": 0.0125}


@forms
def test_half_precision_is_near_float32(block):
    x = normal((2, 12, 11, 32), 0)
    # Of one sign, or the sums over a map would cancel down to the rounding.
    cotangent = np.abs(normal(x.shape, 1))
    variables = variables_for(BLOCKS[block](), x)

    @jax.jit
    def run(variables, x, cotangent):
        def gradients(dtype, implementation):
            module = BLOCKS[block](dtype=dtype, implementation=implementation)
            y, pullback = jax.vjp(module.apply, variables, x.astype(dtype))
            return y, *pullback(cotangent.astype(dtype))

        halves = {
            dtype: [gradients(dtype, i) for i in IMPLEMENTATIONS] for dtype in ERRORS
        }
        return gradients("float32", "plain"), halves

    exact, halves = run(variables, x, cotangent)
    for dtype, half in [(d, half) for d in ERRORS for half in halves[d]]:
        assert half[0].dtype == half[2].dtype == dtype
        # BAM has seven layers, not one.
        limit = (2 if block == "bam" else 1) * ERRORS[dtype]
        for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(exact), strict=True):
            error = np.abs(np.asarray(a, np.float32) - b).mean()
            assert error / max(np.abs(b).max(), 1) < limit, dtype


@forms
def test_large_half_precision_maps_do_not_overflow(block):
    make = partial(BLOCKS[block], dtype=jnp.float16)
    # One row of the other sign, since a gate of positions may be shut for one of them.
    x = jnp.full((1, 32, 32, 64), 300, jnp.float16).at[:, 0].set(-300)
    variables = variables_for(make(), x)

    @jit_as_users_do
    def run(variables, x):
        return [make(implementation=i).apply(variables, x) for i in IMPLEMENTATIONS]

    for y in run(variables, x):
        assert jnp.isfinite(y).all() and jnp.abs(y).max() > 1
