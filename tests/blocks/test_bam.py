"""What BAM has alone: the width of its holes."""

import jax
import numpy as np

from flax_attn import BAM
from tests import references
from tests.cases import normal, variables_for


def test_without_holes():
    x = normal((2, 9, 6, 20), 1)
    module = BAM(dilation=1, reduction=5)
    variables = variables_for(module, x)
    params = jax.tree.map(np.float64, variables["params"])
    expected = references.bam(params, np.float64(x), dilation=1)
    y = jax.jit(module.apply)(variables, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_the_start_as_the_identity_sows_the_gate_that_multiplies():
    x = normal((2, 5, 4, 20), 1)
    module = BAM(identity_init=True)
    run = jax.jit(lambda v: module.apply(v, x, mutable=["intermediates"]))
    y, state = run(variables_for(module, x))
    (gate,) = state["intermediates"]["element_gate"]
    np.testing.assert_allclose(y, x * gate, rtol=1e-6)
