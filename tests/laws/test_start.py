"""Every block at its start: the identity where asked for, and gates for who reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_attn.blocks import BLOCKS
from tests.cases import (
    IMPLEMENTATIONS,
    blocks,
    forms,
    has_parameters,
    normal,
    variables_for,
)


@forms
def test_identity_that_can_learn(block):
    x = normal((2, 5, 4, 32), 1)

    def module(implementation):
        return BLOCKS[block](
            identity_init=True,
            implementation=implementation,
            bias_init=nn.initializers.ones_init(),
            use_bias=True,
        )

    @jax.jit
    def run(key):
        variables = module("fast").init(key, x)
        results = []
        for implementation in IMPLEMENTATIONS:
            apply = module(implementation).apply
            y, pullback = jax.vjp(lambda v, apply=apply: apply(v, x), variables)
            results.append((y, *pullback(2 * y)))
        return variables, results

    if not has_parameters(block):
        with pytest.raises(ValueError, match="`identity_init` must be False"):
            run(jax.random.key(0))
        return
    variables, results = run(jax.random.key(0))
    # The layers that make the logits: nothing else starts at zero here.
    last = [not np.any(leaf) for leaf in jax.tree.leaves(variables)]
    assert any(last)
    for y, gradients in results:
        np.testing.assert_array_equal(y, x)
        leaves = zip(jax.tree.leaves(gradients), last, strict=True)
        assert all(jnp.abs(leaf).max() > 0 for leaf, is_last in leaves if is_last)


# What multiplies back otherwise than by the product of the gates.
OUTPUTS = {
    "bam": lambda x, gate: x * (1 + gate),
    "gc": lambda x, shift: x + shift,
    "scse": lambda x, channel, spatial: x * channel + x * spatial,
    "scse-max": lambda x, *gates: np.maximum(*(x * gate for gate in gates)),
}
# What is sown, where it is not all that the class declares: the gates of blocks inside,
# and one of several by the fields.
SOWN = {
    "cbam": {"channel/channel_gate/0", "spatial/spatial_gate/0"},
    "cbam-conv": {"channel/channel_gate/0", "spatial/spatial_gate/0"},
    "lcbam": {"channel/channel_gate/0", "spatial/spatial_gate/0"},
    "scse": {"channel/channel_gate/0", "spatial_gate/0"},
    "scse-max": {"channel/channel_gate/0", "spatial_gate/0"},
    "gc": {"channel_shift/0"},
    "ge": {"channel_gate/0"},
    "ge-plus": {"element_gate/0"},
}


def product(x, *gates):
    for gate in gates:
        x = x * gate
    return x


@blocks
def test_sown_gates_multiply_back_to_the_output(block):
    module = BLOCKS[block]()
    x = normal((2, 5, 4, 16), 0)
    variables = variables_for(module, x)
    # Nothing is collected unless it is asked for, by init neither.
    assert set(variables) == {"params"}

    @jax.jit
    def run(x):
        return module.apply(variables, x, mutable=["intermediates"])

    y, state = run(x)
    gates = {
        jax.tree_util.keystr(path, simple=True, separator="/"): gate
        for path, gate in jax.tree.leaves_with_path(state["intermediates"])
    }
    assert set(gates) == SOWN.get(
        block, {f"{name}/0" for name in module.gates.values()}
    )
    expected = OUTPUTS.get(block, product)(x, *gates.values())
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@blocks
@pytest.mark.parametrize("sizes", [(9,), (3, 5, 4)])
def test_gates_have_the_shape_of_their_axes(block, sizes):
    dims = len(sizes)
    module = BLOCKS[block](spatial_dims=dims)
    x = jnp.ones((2, *sizes, 20))
    _, state = jax.eval_shape(
        lambda key: module.init_with_output(
            key, x, mutable=["params", "intermediates"]
        ),
        jax.random.key(0),
    )
    expected = {
        "channel_gate": (2, *(1,) * dims, 20),
        "channel_shift": (2, *(1,) * dims, 20),
        "spatial_gate": (2, *sizes, 1),
        "element_gate": x.shape,
    }
    for path, gate in jax.tree.leaves_with_path(state["intermediates"]):
        assert gate.shape == expected[path[-2].key]


@blocks
def test_a_gate_that_nobody_reads_costs_nothing(block, monkeypatch):
    module = BLOCKS[block]()
    x = normal((2, 5, 4, 16), 0)
    variables = variables_for(module, x)

    def program():
        # A new function, so that nothing comes from a cache.
        return jax.jit(lambda v, x: module.apply(v, x)).lower(variables, x).as_text()

    with_sow = program()
    monkeypatch.setattr(nn.Module, "sow", lambda *args, **kwargs: False)
    assert program() == with_sow


@blocks
def test_fewer_channels_than_the_reduction(block):
    x = jnp.ones((1, 2, 2, 1))
    variables = jax.eval_shape(BLOCKS[block]().init, jax.random.key(0), x)
    hidden = {
        leaf.shape[-1]
        for path, leaf in jax.tree.leaves_with_path(variables)
        if "reduce" in jax.tree_util.keystr(path)
    }
    assert hidden <= {1}
