"""What scSE has alone: two products, which with ``identity_init`` are averaged."""

import jax
import jax.numpy as jnp
import numpy as np

from flax_attn import scSE
from tests.cases import normal, variables_for


def test_the_identity_of_large_half_precision_maps():
    x = jnp.full((1, 2, 2, 4), 40000.0, jnp.float16)
    module = scSE(reduction=2, identity_init=True, dtype=jnp.float16)
    y, _ = jax.jit(module.init_with_output)(jax.random.key(0), x)
    np.testing.assert_array_equal(y, x)


def test_the_start_as_the_identity_averages_the_products():
    x = normal((2, 5, 4, 20), 1)
    module = scSE(identity_init=True)
    run = jax.jit(lambda v: module.apply(v, x, mutable=["intermediates"]))
    y, state = run(variables_for(module, x))
    gates = jax.tree.leaves(state["intermediates"])
    np.testing.assert_allclose(y, (x * gates[0] + x * gates[1]) / 2, rtol=1e-5)
