"""Every block at its start: the identity where asked for, and gates for who reads."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from flax_attn.blocks import BLOCKS
from flax_attn.inspect import attention_maps
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


@blocks
def test_tabulate_counts_operations(block):
    """For which Flax runs each method of its own that it knows as a call."""
    x = np.ones((2, 4, 3, 16), np.float32)
    table = nn.tabulate(BLOCKS[block](), jax.random.key(0), compute_flops=True)(x)
    assert type(BLOCKS[block]()).__name__ in table and "functools" not in table


# What multiplies back otherwise than by the product of the gates.
OUTPUTS = {
    "bam": lambda x, gate: x * (1 + gate),
    "gc": lambda x, shift: x + shift,
    "scse": lambda x, channel, spatial: x * channel + x * spatial,
    "scse-max": lambda x, *gates: np.maximum(*(x * gate for gate in gates)),
}
CBAM = {"channel/channel_gate", "spatial/spatial_gate"}
# What is sown, where it is not all that the class declares: the gates of blocks inside,
# and one of several by the fields.
SOWN = {
    **dict.fromkeys(["cbam", "cbam-conv", "lcbam"], CBAM),
    **dict.fromkeys(["scse", "scse-max"], {"channel/channel_gate", "spatial_gate"}),
    "gc": {"channel_shift"},
    "ge": {"channel_gate"},
    "ge-plus": {"element_gate"},
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
        y, state = module.apply(variables, x, mutable=["intermediates"])
        return y, state["intermediates"], attention_maps(module, variables, x)

    y, sown, gates = run(x)
    assert set(gates) == SOWN.get(block, set(module.gates.values()))
    # Each once, and nothing else.
    expected = {tuple(path.split("/")): (gate,) for path, gate in gates.items()}
    chex.assert_trees_all_equal(sown, unflatten_dict(expected))
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
