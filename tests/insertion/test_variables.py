"""``merge`` and ``parameter_labels``."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import flax_attn
from flax_attn.inspect import attention_maps
from tests.cases import normal, variables_for
from tests.insertion.models import CBAM, SE, Gated, X, shapes


def test_merge_lists_mismatches():
    new = {"params": {"a": {"kernel": np.ones((2, 3))}, "b": {"bias": np.ones(4)}}}
    old = {"params": {"a": {"kernel": np.zeros((3, 2))}, "c": np.zeros(5)}}
    message = (
        r"params/a/kernel \(3, 2\) instead of \(2, 3\), params/c \(5,\) is missing"
    )
    with pytest.raises(ValueError, match=message):
        flax_attn.merge(old, new)
    half = {"params": {"b": {"bias": np.zeros(4, np.float16)}}}
    merged, added = flax_attn.merge(half, new)
    assert added == ("params/a/kernel",)
    assert merged["params"]["a"]["kernel"] is new["params"]["a"]["kernel"]
    assert merged["params"]["b"]["bias"] is half["params"]["b"]["bias"]
    assert flax_attn.merge({}, new)[1] == ("params/a/kernel", "params/b/bias")
    merged, added = flax_attn.merge({}, {"params": {"a": {}}, "batch_stats": {}})
    assert merged == {"params": {"a": {}}, "batch_stats": {}} and added == ()


def test_merge_keeps_the_metadata_of_the_new_variables():
    old = {"params": {"kernel": np.zeros((2, 3))}}
    box = nn.Partitioned(np.ones((2, 3)), names=(None, "model"))
    merged, _ = flax_attn.merge(old, {"params": {"kernel": box}})
    kernel = merged["params"]["kernel"]
    assert kernel.names == (None, "model") and kernel.value.sum() == 0


def test_labels_select_what_is_trained():
    inserted = flax_attn.insert(Gated(), SE(use_bias=True), "used", name="extra")
    variables = variables_for(inserted, X, seed=2)
    params = variables["params"]
    labels = flax_attn.parameter_labels(inserted, X)
    decayed, spared = "attention", "attention_no_decay"
    dense = {"kernel": decayed, "bias": spared}
    mlp = {"reduce": {"kernel": decayed}, "expand": {"kernel": decayed}}
    assert labels == {
        "used": {
            "channel": mlp,
            "spatial": {"conv": {"kernel": decayed}},
            "extra": {"reduce": dense, "expand": dense},
        },
        "second": mlp,
        "GroupNorm_0": {"scale": "backbone", "bias": "backbone"},
    }
    optimizer = optax.multi_transform(
        {
            "attention": optax.chain(optax.add_decayed_weights(0.5), optax.scale(-0.1)),
            "attention_no_decay": optax.scale(-0.1),
            "backbone": optax.set_to_zero(),
        },
        labels,
    )

    def loss(params):
        y = inserted.apply({"params": params}, X)
        return jnp.sum(y * normal(y.shape, 3))

    @jax.jit
    def step(params):
        gradients = jax.grad(loss)(params)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return gradients, optax.apply_updates(params, updates)

    gradients, new = step(params)

    def check(label, p, g, q):
        decay = 0.5 * p if label == "attention" else 0
        rate = 0 if label == "backbone" else 0.1
        np.testing.assert_allclose(q, p - rate * (g + decay), atol=1e-6)

    jax.tree.map(check, labels, params, gradients, new)
    moved = jax.tree.map(lambda g: bool(np.abs(g).max() > 0), gradients)
    assert all(jax.tree.leaves(moved)), moved
    mask = jax.tree.map(lambda label: label == "attention", labels)
    optax.adamw(1e-3, mask=mask).init(params)


def test_gates_and_labels_of_bam_and_scse():
    model = nn.Sequential([flax_attn.BAM(), flax_attn.scSE()])
    variables = variables_for(model, X)
    gates = flax_attn.assert_active(model, variables, X)
    assert set(gates) == {"layers_0", "layers_1", "layers_1/channel"}
    labels = flax_attn.parameter_labels(model, X)
    assert labels["layers_1"]["spatial"] == {"kernel": "attention"}
    assert labels["layers_0"]["spatial_conv1"]["bias"] == "attention_no_decay"


class Remat(nn.Module):
    """Transforms a call of a part of ``module`` before it is called itself."""

    module: nn.Module

    def setup(self):
        nn.share_scope(self, self.module)

    def __call__(self, x):
        first, *others = self.module.layers
        x = nn.remat(lambda first, x: first(x))(first, x)
        for layer in others:
            x = layer(x)
        return x


def jitted(chain):
    return flax_attn.ChannelsFirst(nn.jit(nn.Sequential)(chain.layers))


@pytest.mark.parametrize("wrapper", [flax_attn.ChannelsFirst, Remat, jitted])
def test_paths_under_share_scope_are_those_of_the_variables(wrapper):
    # Linen's own paths start with the name of the field, module/layers_0.
    model = wrapper(nn.Sequential([nn.Conv(3, (1, 1)), CBAM()]))
    x = normal((2, 3, 4, 3), 0)
    gates = ["layers_1/channel/channel_gate", "layers_1/spatial/spatial_gate"]
    assert list(attention_maps(model, variables_for(model, x), x)) == gates
    labels = flax_attn.parameter_labels(model, x)
    assert set(jax.tree.leaves(labels["layers_0"])) == {"backbone"}
    assert set(jax.tree.leaves(labels["layers_1"])) == {"attention"}

    model = flax_attn.insert(model, SE(), "layers_0")
    (site,) = flax_attn.sites(model, x)
    assert site[:2] == ("layers_0", "Conv") and site.parameters == 6
    variables = variables_for(model, x)
    gates = ["layers_0/attention/channel_gate", *gates]
    assert list(attention_maps(model, variables, x)) == gates
    active = flax_attn.assert_active(model, variables, x)
    assert active == ("layers_0/attention", "layers_1/channel", "layers_1/spatial")
    labels = flax_attn.parameter_labels(model, x)["layers_0"]
    assert labels["kernel"] == labels["bias"] == "backbone"
    assert set(jax.tree.leaves(labels["attention"])) == {"attention"}

    # An insertion inside, whose paths are relative to its model.
    part = flax_attn.insert(nn.Sequential([nn.Conv(3, (1, 1))]), SE(), "layers_0")
    params = shapes(wrapper(nn.Sequential([part])), x)["params"]
    assert set(params["layers_0"]["layers_0"]) == {"kernel", "bias", "attention"}
