"""What is counted: against XLA's own analysis, by hand, and as published."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from flax_attn.cost import Cost
from flax_attn.resnet import BasicBlock, ResNet, imagenet_resnet
from tests.cases import BLOCKS

norm = partial(nn.BatchNorm, use_running_average=True)
OPTIONS = {
    **BLOCKS,
    "se, hidden, bias": partial(flax_attn.SE, hidden_features=5, use_bias=True),
    "eca, wide, circular": partial(
        flax_attn.ECA, kernel_size=9, padding="circular", use_bias=True
    ),
    "channel, gelu": partial(flax_attn.ChannelAttention, act=nn.gelu, reduction=4),
    "spatial, norm": partial(flax_attn.SpatialAttention, kernel_size=3, norm=norm),
    "cbam, official": partial(flax_attn.CBAM, use_bias=True, spatial_norm=norm),
    "cbam, hard": partial(flax_attn.CBAM, gate=nn.hard_sigmoid, spatial_kernel_size=9),
}
SHAPES = [(8, 16, 16, 32), (1, 7, 7, 256), (3, 2, 24, 20, 16)]


def lowered(module, shape, dtype=jnp.float32, **kwargs):
    """The lowered program, and the variables' shapes."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    init = partial(module.init, **kwargs)
    variables = jax.eval_shape(init, jax.random.key(0), x)
    # As arguments, since XLA folds constants.
    return jax.jit(module.apply).lower(variables, x, **kwargs), variables


def check_against_xla(module, shape, counted, **kwargs):
    program, variables = lowered(module, shape, **kwargs)
    expected = program.cost_analysis()
    np.testing.assert_allclose(counted.flops, expected["flops"], rtol=0.02)
    np.testing.assert_allclose(
        counted.transcendentals, expected.get("transcendentals", 0), rtol=0.02
    )
    sizes = [leaf.size for leaf in jax.tree.leaves(variables.get("params", {}))]
    assert counted.parameters == sum(sizes)
    return program


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", OPTIONS)
def test_counts_equal_the_tree_and_xla(block, shape):
    make = OPTIONS[block]
    counted = flax_attn.cost(make(), shape)  # Of the plain implementation.
    assert counted == flax_attn.cost(make(implementation="plain"), shape)
    check_against_xla(make(implementation="plain"), shape, counted)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["half", "single"])
@pytest.mark.parametrize("block", ["se", "cbam"])
def test_conversions_and_masks_equal_xla(block, dtype, masked):
    shape = (2, 8, 8, 32)
    kwargs = {"mask": np.ones(shape[:3], bool)} if masked else {}
    module = BLOCKS[block](dtype=jnp.bfloat16, implementation="plain")
    counted = flax_attn.cost(module, shape, dtype=dtype, **kwargs)
    program = check_against_xla(module, shape, counted, dtype=dtype, **kwargs)
    flops = program.cost_analysis()["flops"]
    np.testing.assert_allclose(counted.flops, flops, rtol=1e-3)


@pytest.mark.parametrize("block", ["se", "eca", "channel", "spatial", "cbam"])
def test_channels_first_and_half_precision(block):
    # The layout costs a transposition at each end, which is fused.
    make, shape = BLOCKS[block], (4, 8, 8, 32)
    counted = flax_attn.cost(make(), shape)
    half = flax_attn.cost(make(dtype=jnp.bfloat16), shape, dtype=jnp.bfloat16)
    first = flax_attn.cost(flax_attn.ChannelsFirst(make()), (4, 32, 8, 8))
    for field in ("parameters", "multiply_adds", "transcendentals"):
        assert getattr(half, field) == getattr(counted, field), (field, half)
    # The map is converted to float32 for the sum.
    assert half.operations >= counted.operations + np.prod(shape)
    assert first == counted
    assert 0.5 <= half.bytes / counted.bytes < 0.6
    assert counted == flax_attn.cost(nn.Sequential([make(name="inner")]), shape)


def test_counts_by_hand():
    n, h, w, c, hidden = 2, 3, 4, 16, 1
    x, gate = n * h * w * c, n * c
    assert flax_attn.cost(flax_attn.SE(), (n, h, w, c)) == Cost(
        parameters=2 * c * hidden,
        multiply_adds=n * 2 * c * hidden,
        # Mean, relu, sigmoid, product.
        operations=(x - gate) + gate + n * hidden + 3 * gate + x,
        transcendentals=gate,
        # x twice and y; both kernels; the mean, hidden layer and logits, written and
        # read.
        bytes=4 * (3 * x + 2 * c * hidden + 2 * (gate + n * hidden + gate)),
    )
    # Of 49 taps, those inside a 3 x 4 map: (2 + 3 + ... ) along H times W.
    spatial = flax_attn.cost(flax_attn.SpatialAttention(), (n, h, w, c))
    assert spatial.multiply_adds == n * 2 * (3 * 3) * (4 * 4)
    k3 = flax_attn.cost(flax_attn.SpatialAttention(kernel_size=3), (n, h, w, c))
    assert k3.multiply_adds == n * 2 * (2 + 3 + 2) * (2 + 3 + 3 + 2)


@pytest.mark.parametrize("exponent", [-3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 10, 15])
def test_powers_equal_xla(exponent):
    module = nn.Sequential([partial(jax.lax.integer_pow, y=exponent)])
    x = jnp.ones((4, 4, 8))
    lowered = jax.jit(partial(module.apply, {})).lower(x)
    expected = lowered.cost_analysis().get("flops", 0)
    assert flax_attn.cost(module, x.shape).flops == expected


def test_shared_modules_are_counted_once():
    def chain(se):
        return nn.Sequential([nn.Conv(16, (1, 1)), se, nn.relu, nn.Sequential([se])])

    counted = flax_attn.cost(chain(flax_attn.SE(reduction=4)), (1, 4, 4, 16))
    assert counted.parameters == (16 * 16 + 16) + 2 * 16 * 4
    plain = flax_attn.SE(reduction=4, implementation="plain")
    assert counted == flax_attn.cost(chain(plain), (1, 4, 4, 16))


class Pair(NamedTuple):
    attention: nn.Module


class Nested(nn.Module):
    """A block in a field, in a container or made during the call."""

    attention: Any

    @nn.compact
    def __call__(self, x):
        block = jax.tree.leaves(self.attention, is_leaf=callable)[0]
        if not isinstance(block, nn.Module):
            block = block()
        return block(nn.Conv(16, (1, 1))(x))


@pytest.mark.parametrize("kind", ["field", "dict", "tuple", "made", "inserted"])
def test_a_block_costs_the_same_wherever_it_is(kind):
    def within(block):
        if kind == "inserted":
            model = nn.Sequential([nn.Conv(16, (1, 1))])
            return flax_attn.insert(model, block, nn.Conv)
        holders = {"dict": {"a": block}, "tuple": Pair(block), "made": type(block)}
        return Nested(holders.get(kind, block))

    shape = (1, 64, 64, 16)
    block = flax_attn.CBAM()
    plain = nn.Sequential([nn.Conv(16, (1, 1)), block])
    assert flax_attn.cost(within(block), shape) == flax_attn.cost(plain, shape)
    assert block.implementation == "fast"


class Own(nn.Module):
    implementation: str

    def __call__(self, x):
        return x + x if self.implementation == "fast" else x * x * x


def test_a_field_of_the_same_name_elsewhere_is_ignored():
    assert flax_attn.cost(Own("fast"), (1, 4)).operations == 4


class Pool(nn.Module):
    def __call__(self, x):
        return nn.max_pool(x, (2, 2), (2, 2)) + nn.avg_pool(x, (2, 2), (2, 2))


def test_windows_by_hand():
    counted = flax_attn.cost(Pool(), (1, 4, 6, 2))
    out = 2 * 3 * 2
    # A maximum or a sum of four each, the division by four, and the sum of the two.
    assert counted.operations == out * (3 + 3 + 1 + 1)
    # Both read x at once; their results are written and read, and their sum written.
    assert counted.bytes == 4 * (48 + 2 * out + 2 * out + out)


def test_a_result_that_is_stored_already_is_not_written_again():
    dense = flax_attn.cost(nn.Dense(5, use_bias=False), (2, 3))
    assert dense == Cost(15, 30, 0, 0, bytes=4 * (6 + 15 + 10))


def test_flops_are_two_for_a_multiply_add():
    counted = Cost(1, 10, 3, 7, 99)
    assert counted.flops == 23
    assert str(Cost(1234, 10, 3, 7, 99)) == (
        "1,234 parameters, 10 multiply-adds, 3 operations, 7 transcendentals, 99 bytes"
    )


@pytest.mark.parametrize(
    "block, maps",
    # Read for each squeeze and for the product, and written.
    [("se", 3), ("eca", 3), ("channel", 3), ("spatial", 3), ("cbam", 4)],
)
def test_bytes_are_passes_over_the_map(block, maps):
    shape = (4, 64, 64, 256)
    x = 4 * np.prod(shape)
    assert maps <= flax_attn.cost(BLOCKS[block](), shape).bytes / x < maps + 0.05


# The plain maximum looks for NaN in a pass of its own.
@pytest.mark.parametrize("block", ["se", "eca"])
@pytest.mark.parametrize("shape", [(8, 16, 16, 32), (2, 32, 32, 64)], ids=str)
def test_bytes_equal_the_compiled_program_with_one_squeeze(block, shape):
    """With two, XLA on CPU reads the map for each: see ``cost``."""
    program, _ = lowered(BLOCKS[block](implementation="plain"), shape)
    expected = program.compile().cost_analysis()["bytes accessed"]
    counted = flax_attn.cost(BLOCKS[block](), shape)
    np.testing.assert_allclose(counted.bytes, expected, rtol=0.02)


class Mixed(nn.Module):
    """Strides, dilations, groups, pooling, a transposed convolution, a residual."""

    @nn.compact
    def __call__(self, x, *, train):
        y = nn.Conv(8, (3, 3), strides=2, use_bias=False)(x)
        y = nn.Conv(8, (5, 3), kernel_dilation=2, feature_group_count=4)(y)
        y = nn.BatchNorm(use_running_average=not train)(y)
        x = nn.relu(y + nn.avg_pool(nn.Conv(8, (1, 1))(x), (2, 2), (2, 2)))
        x = nn.ConvTranspose(4, (3, 3), strides=(2, 2))(x)
        x = flax_attn.CBAM(implementation="plain")(nn.max_pool(x, (2, 2)))
        return nn.softmax(nn.Dense(10)(x.mean((-3, -2))))


@pytest.mark.parametrize("train", [False, True])
def test_whole_networks(train):
    mutable = ["batch_stats"] if train else False
    counted = flax_attn.cost(Mixed(), (2, 12, 10, 4), train=train)
    model, x = Mixed(), jax.ShapeDtypeStruct((2, 12, 10, 4), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=train), jax.random.key(0), x)
    apply = jax.jit(partial(model.apply, train=train, mutable=mutable))
    expected = apply.lower(variables, x).cost_analysis()
    np.testing.assert_allclose(counted.flops, expected["flops"], rtol=0.02)


def test_a_residual_network_has_no_more_traffic_with_each_block():
    """A sum that is used twice is stored, and not computed from all before it."""

    def count(blocks):
        model = ResNet(
            (blocks,), BasicBlock, num_classes=3, width=16, imagenet_stem=False
        )
        return flax_attn.cost(model, (1, 16, 16, 3))

    costs = [count(n) for n in (2, 3, 4)]
    for field in ("parameters", "multiply_adds", "operations", "bytes"):
        first, second, third = (getattr(c, field) for c in costs)
        assert second - first == third - second > 0, field


def test_resnet50_is_the_published_one():
    """25,557,032 parameters and 4.09 billion multiply-adds with the taps on zeros."""
    network = imagenet_resnet(50, num_classes=1000)
    counted = flax_attn.cost(network, (1, 224, 224, 3), train=False)
    assert counted.parameters == 25_557_032
    assert 0.95 * 4.09e9 < counted.multiply_adds < 4.09e9


class Fast(nn.Module):
    def __call__(self, x):
        return flax_attn.functional.squeeze_channels(x)


class Loop(nn.Module):
    def __call__(self, x):
        return jax.lax.scan(lambda c, _: (c * 2, None), x, length=3)[0]


class Draw(nn.Module):
    def __call__(self, x):
        return x + jax.random.normal(jax.random.key(0), x.shape)


@pytest.mark.parametrize(
    "module, shape, says",
    [
        (flax_attn.SE(), (1, 0, 4, 4), r"`shape` must .* got \(1, 0, 4, 4\)"),
        (flax_attn.SE(), (1, 4.0, 4, 4), r"`shape` must .* got \(1, 4.0, 4, 4\)"),
        (flax_attn.SE(), 5, "`shape` must .* got 5; pass"),
        (flax_attn.SE, (1, 4, 4, 4), r"`module` must .* got <class.*; call .*SE\(\)"),
        (flax_attn.presets.timm_se, (1, 4, 4, 4), "`module` must .* got functools"),
        (flax_attn.SE(), (4, 4), r"`x` must have at least 3 axes"),
        (Fast(), (1, 64, 64, 8), 'pass implementation="plain" to functions'),
        (Loop(), (1, 4, 4, 8), "`module` must .* got `scan`"),
        (Draw(), (4, 4), "`module` must .* got `random_"),
        (nn.Dropout(0.5, deterministic=False), (4, 4), "`module` must .* a random dr"),
    ],
)
def test_cost_raises(module, shape, says):
    with pytest.raises(ValueError, match=says):
        flax_attn.cost(module, shape)
