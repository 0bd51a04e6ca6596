"""The gates of models by their paths: in order, from every call, or named as lost.

``laws/test_start.py`` reads those of every block.
"""

from functools import partial

import flax
import jax
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from flax_attn.inspect import attention_maps
from flax_attn.resnet import BasicBlock, BottleneckBlock, ResNet
from tests.cases import normal, variables_for

ATTEND = ("channel/channel_gate", "spatial/spatial_gate")
# What each block sows, below its name.
PATHS = {flax_attn.SE: ("channel_gate",), flax_attn.CBAM: ATTEND}
SMALL = partial(ResNet, num_classes=3, width=4)
FAMILIES = {
    "cifar": SMALL((2, 1), BasicBlock, imagenet_stem=False),
    "imagenet": SMALL((1, 1), BottleneckBlock),
}


@pytest.mark.parametrize("family, sides", [("cifar", (16, 8)), ("imagenet", (4, 2))])
@pytest.mark.parametrize("block", PATHS)
def test_every_gate_of_both_families_by_path(family, sides, block):
    model = FAMILIES[family].clone(attention=block)
    read, x = partial(attention_maps, model, train=False), normal((2, 16, 16, 3), 1)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    gates = jax.eval_shape(read, variables, x)
    # eval_shape sorts, as jit does.
    assert list(gates) == sorted(
        f"stage{i}_block{j}/attention/{path}"
        for i, count in enumerate(model.stages, 1)
        for j in range(1, count + 1)
        for path in PATHS[block]
    )
    for path, gate in gates.items():
        stage = int(path[5]) - 1
        map_of_gate = (2, sides[stage], sides[stage], 1)
        channels = (2, 1, 1, 4 * 2**stage * model.block.expansion)
        assert gate.shape == (channels if "channel_gate" in path else map_of_gate)


class Backwards(nn.Module):
    @nn.compact
    def __call__(self, x):
        return flax_attn.ECA(name="a")(flax_attn.SE(name="b")(x))


def test_the_order_is_that_of_the_calls():
    """And not that of the names, in which 10 comes before 2."""
    x = normal((2, 4, 4, 8), 1)
    layers = [lambda x: x] * 12
    layers[2], layers[10] = Backwards(), nn.remat(Backwards)()
    layers[11] = nn.jit(Backwards)()
    model = nn.Sequential(layers)
    variables = variables_for(model, x)
    gates = attention_maps(model, variables, x)
    paths = [f"layers_{i}/{name}/channel_gate" for i in (2, 10, 11) for name in "ba"]
    assert list(gates) == paths
    product = x
    for gate in gates.values():
        product = product * gate
    np.testing.assert_array_equal(product, model.apply(variables, x))


class Several(nn.Module):
    """Sows things of its own, calls one block twice, and drops out."""

    attend: bool = True

    @nn.compact
    def __call__(self, x, times=2, *, train=True):
        self.sow("intermediates", "mean_gate", x.mean())
        self.sow("losses", "spatial_gate", x.mean())
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        block = flax_attn.SpatialAttention(name="shared")
        for _ in range(times if self.attend else 0):
            x = block(x)
        return x

    def once(self, x):
        return self(x, 1, train=False)


@pytest.fixture(scope="module")
def several():
    model, x = Several(), normal((2, 4, 4, 8), 2)
    # With intermediates, as init with mutable=True leaves them.
    variables = jax.jit(partial(model.init, mutable=True, train=False))(
        jax.random.key(0), x
    )
    assert "intermediates" in variables
    return model, variables, x


def test_a_block_called_twice_has_a_path_for_each_call(several):
    model, variables, x = several
    gates = attention_maps(model, variables, x, train=False)
    assert list(gates) == ["shared/spatial_gate/0", "shared/spatial_gate/1"]
    y = x / np.sqrt(1 + 1e-5, dtype=np.float32)
    for gate in gates.values():
        y = y * gate
    expected = model.apply(
        {"params": variables["params"]} | {"batch_stats": variables["batch_stats"]},
        x,
        train=False,
    )
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_arguments_are_passed_on_and_variables_kept(several):
    model, variables, x = several
    before = jax.tree.map(np.array, variables)
    one = attention_maps(model, variables, x, 1, train=False)
    assert list(one) == ["shared/spatial_gate"]
    for method in ("once", Several.once, Several().once, lambda m, x: m.once(x)):
        by_method = attention_maps(model, variables, x, method=method)
        np.testing.assert_array_equal(by_method["shared/spatial_gate"], *one.values())
    rngs = {"dropout": jax.random.key(3)}
    dropped = attention_maps(model, variables, x, 1, train=True, rngs=rngs)
    assert np.abs(dropped["shared/spatial_gate"] - [*one.values()][0]).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, before, variables)


def test_state_is_not_changed():
    x = normal((2, 4, 4, 8), 6)
    norm = partial(nn.BatchNorm, use_running_average=False)
    model = flax_attn.SpatialAttention(norm=norm)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        attention_maps(model, variables, x)


class Layers(nn.Module):
    axes: tuple

    @nn.compact
    def __call__(self, x):
        layer = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0} | dict.fromkeys(self.axes, 0),
            split_rngs={"params": True},
            length=3,
        )
        return layer(flax_attn.SE(name="se"), x, None)[0]


def test_scanned_layers_are_stacked():
    x = normal((2, 4, 4, 16), 4)
    model = Layers(axes=("intermediates",))
    variables = variables_for(model, x)
    gates = attention_maps(model, variables, x)
    assert {path: gate.shape for path, gate in gates.items()} == {
        "se/channel_gate": (3, 2, 1, 1, 16)
    }
    product = x
    for gate in gates["se/channel_gate"]:
        product = product * gate
    np.testing.assert_array_equal(product, model.apply(variables, x))
    with pytest.raises(ValueError, match="variable_axes="):
        attention_maps(Layers(axes=()), variables, x)


JitLayers = nn.jit(Layers)


class Two(nn.Module):
    """A block whose gate is stored, and layers in nn.jit whose gates may be lost."""

    axes: tuple = ()

    @nn.compact
    def __call__(self, x):
        x = flax_attn.CBAM(reduction=4, name="kept")(x)
        return JitLayers(self.axes, name="layers")(x)


class Nested(nn.Module):
    """Applies a block by itself, whose gates the model does not return."""

    @nn.compact
    def __call__(self, x):
        x = flax_attn.SE(reduction=4)(x)
        return flax_attn.SimAM(parent=None).apply({}, x, mutable=["intermediates"])[0]


def test_a_gate_of_a_nested_apply_is_named():
    x = normal((2, 4, 4, 8), 1)
    variables = variables_for(Nested(), x)
    with pytest.raises(ValueError, match="got no gate at element_gate from Nested"):
        attention_maps(Nested(), variables, x)


def test_a_lost_gate_beside_others_is_named():
    x = normal((2, 4, 4, 16), 4)
    variables = variables_for(Two(), x)
    for _ in range(2):  # The second time nn.jit has compiled the layers already.
        with pytest.raises(ValueError, match="no gate at layers/se/channel_gate from"):
            attention_maps(Two(), variables, x)
    gates = attention_maps(Two(("intermediates",)), variables, x)
    kept = [f"kept/{path}" for path in ATTEND]
    assert list(gates) == [*kept, "layers/se/channel_gate"]


class Again(nn.Module):
    """A block that is called outside of a scan, and inside, where its gate is lost."""

    make: type = flax_attn.SpatialAttention

    @nn.compact
    def __call__(self, x):
        block = self.make(name="shared")
        scan = nn.scan(
            lambda block, x, _: (block(x), None), variable_broadcast="params", length=2
        )
        return scan(block, block(x), None)[0]


def test_a_gate_that_is_lost_in_one_of_two_calls_is_named():
    x = normal((2, 4, 4, 8), 4)
    with pytest.raises(ValueError, match="no gate at shared/spatial_gate from Again"):
        attention_maps(Again(), variables_for(Again(), x), x)


def test_channels_first_keeps_the_paths():
    x = normal((2, 16, 4, 4), 5)
    model = flax_attn.ChannelsFirst(flax_attn.CBAM())
    gates = attention_maps(model, variables_for(model, x), x)
    assert tuple(gates) == ATTEND
    assert gates[ATTEND[1]].shape == (2, 4, 4, 1)


def test_attention_maps_raises(several):
    _, variables, x = several
    with pytest.raises(
        ValueError, match="`model` must call an attention block .* no gate from Several"
    ):
        attention_maps(Several(attend=False), variables, x, train=False)
    with pytest.raises(ValueError, match="`mutable` must be left out, got True"):
        attention_maps(Several(), variables, x, mutable=True)


def test_the_standard_module_is_not_shadowed():
    assert flax_attn.inspect.attention_maps is attention_maps
    assert "inspect" not in flax_attn.__all__
