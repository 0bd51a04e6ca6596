"""A block that a user defines as an ``Attention``: nothing else needs to know it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from flax_attn import blocks
from flax_attn.inspect import attention_maps
from tests.cases import normal, variables_for
from tests.insertion.models import KEY, Chain, X, without_attention


class Own(blocks.Attention, kw_only=True):
    """A block inside, and two gates whose names and methods differ."""

    gates = {"by_position": "position_gate", "by_level": "level_gate"}

    ignored: str = ""

    def setup(self):
        self.inner = flax_attn.SE(
            reduction=2,
            implementation=self.implementation,
            identity_init=self.identity_init,
        )
        self.logits = nn.Dense(1, use_bias=self.use_bias, **self.last_layer())
        self.levels = self.param("levels", nn.initializers.zeros, (2,))

    def by_position(self, x):
        gate = self.gate_from(self.logits(x))
        self.sow("intermediates", "position_gate", gate)
        return gate

    def by_level(self, x):
        level = jnp.where(x.shape[-1] > 3, self.levels[0], self.levels[1])
        gate = self.gate_from(jnp.full((len(x), 1, 1, x.shape[-1]), level))
        self.sow("intermediates", "level_gate", gate)
        return gate

    def __call__(self, x, mask=None):
        x = self.inner(x, mask)
        for method in (self.by_position, self.by_level):
            gate = method(x)
            x = x if method.__name__ == self.ignored else self.scaled(x, gate)
        return x


def test_it_is_inserted():
    model = flax_attn.insert(Chain(), Own(), nn.Conv, init="identity")
    # SE's two kernels, the layer of the position gate and two levels.
    counts = [site.parameters for site in flax_attn.sites(model, X)]
    assert counts == [2 * 4 * 2 + 4 + 2, 2 * 3 * 1 + 3 + 2]
    variables = jax.jit(model.init)(KEY, X)
    y = jax.jit(Chain().apply)(without_attention(variables), X)
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, X), y)

    labels = flax_attn.parameter_labels(model, X)["first"]
    assert labels["attention"]["logits"]["kernel"] == "attention"
    assert labels["attention"]["inner"]["reduce"]["kernel"] == "attention"
    assert labels["attention"]["levels"] == "attention_no_decay"
    assert labels["kernel"] == "backbone"
    gates = flax_attn.assert_active(model, variables, X)
    paths = [f"{name}/attention" for name in ("first", "second")]
    assert set(gates) == {*paths, *(f"{path}/inner" for path in paths)}


def test_it_is_found_where_a_model_uses_it():
    model = nn.Sequential([Own(), nn.relu])
    variables = variables_for(model, X)
    gates = flax_attn.assert_active(model, variables, X)
    assert set(gates) == {"layers_0", "layers_0/inner"}
    labels = flax_attn.parameter_labels(model, X)
    assert labels["layers_0"]["logits"] == {"kernel": "attention"}


@pytest.mark.parametrize("ignored", ["by_position", "by_level"])
def test_each_of_its_gates_is_checked(ignored):
    model = Own(ignored=ignored)
    variables = variables_for(model, X)
    with pytest.raises(AssertionError, match="gates of the model itself"):
        flax_attn.assert_active(model, variables, X)


def test_its_gates_are_read_under_their_names():
    model = Own()
    variables = variables_for(model, X)
    gates = attention_maps(model, variables, X)
    assert {path: gate.shape for path, gate in gates.items()} == {
        "inner/channel_gate": (2, 1, 1, 3),
        "position_gate": (2, 8, 8, 1),
        "level_gate": (2, 1, 1, 3),
    }
    product = X
    for gate in gates.values():
        product = product * gate
    np.testing.assert_array_equal(product, model.apply(variables, X))


def test_its_cost_is_that_of_the_plain_implementation():
    shape = (1, 64, 64, 8)  # Where the fast implementation has a loop.
    counted = flax_attn.cost(nn.Sequential([Own()]), shape)
    assert counted == flax_attn.cost(Own(implementation="plain"), shape)
    x = jax.ShapeDtypeStruct(shape, "float32")
    params = jax.eval_shape(Own().init, KEY, x)["params"]
    assert counted.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))


class SowsItsOwn(nn.Module):
    """Sows under the name of a gate, and is no block."""

    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "channel_gate", x)
        return Own(name="block")(x)


def test_what_is_no_gate_is_not_read():
    x = normal((2, 4, 4, 8), 1)
    gates = attention_maps(SowsItsOwn(), variables_for(SowsItsOwn(), x), x)
    assert len(gates) == 3 and all(path.startswith("block/") for path in gates)
