"""The blocks' own fields: what each changes, the parameters, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_attn import (
    BAM,
    CBAM,
    ECA,
    ESE,
    SE,
    ChannelAttention,
    CoordinateAttention,
    GatherExcite,
    GlobalContext,
    SimAM,
    SpatialAttention,
    scSE,
)
from tests import references
from tests.cases import normal, variables_for


def tree(module, features=64):
    x = jnp.ones((1, 4, 4, features))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(jnp.shape, variables["params"])


@pytest.mark.parametrize("use_bias", [False, True])
def test_parameter_trees(use_bias):
    def layers(**kernels):
        return {
            name: {"kernel": k} | ({"bias": k[-1:]} if use_bias else {})
            for name, k in kernels.items()
        }

    mlp = layers(reduce=(64, 4), expand=(4, 64))
    spatial = layers(conv=(7, 7, 2, 1))
    conv = {"channel": layers(conv=(3, 1, 1)), "spatial": spatial}
    b = {"use_bias": use_bias}
    assert tree(SE(**b)) == tree(ChannelAttention(**b)) == mlp
    assert tree(ECA(**b), 128) == layers(conv=(5, 1, 1))
    assert tree(SpatialAttention(**b)) == spatial
    assert tree(CBAM(**b)) == {"channel": mlp, "spatial": spatial}
    assert tree(CBAM(excite="conv", **b)) == conv
    small = CBAM(excite="conv", kernel_size=5, spatial_kernel_size=3, **b)
    assert tree(small) == {
        "channel": layers(conv=(5, 1, 1)),
        "spatial": layers(conv=(3, 3, 2, 1)),
    }


def is_shape(node):
    return isinstance(node, tuple)


def test_parameter_counts_of_the_papers():
    """BAM: C/r (2 C + 9 C/r 2 + 2) and biases; scSE: C^2 + C."""

    def count(module):
        shapes = tree(module, 64)
        return sum(map(np.prod, jax.tree.leaves(shapes, is_leaf=is_shape)))

    c, h = 64, 4
    weights = c * h + h * c + c * h + 9 * h * h + 9 * h * h + h
    assert count(BAM()) == weights + (h + c + h + h + h + 1)
    assert count(scSE()) == c * c + c


@pytest.mark.parametrize(
    "features, fields, width",
    [
        (54, {"reduction": 16}, 3),
        (54, {"reduction": 9}, 6),
        (54, {"hidden_features": 5}, 5),
        (20, {"hidden_features": lambda c: c // 5}, 4),
        (54, {"reduction": 1 / 16}, 3),
        (54, {"reduction": 1 / 4}, 14),  # 13.5, halves up.
        (100, {"reduction": 0.29}, 29),  # 28.999999999999996 in floating point.
        (4, {"reduction": 1 / 16}, 1),
        (4, {"reduction": 16}, 1),
        (200, {"reduction": 16, "divisor": 8}, 16),
        (200, {"reduction": 1 / 16, "divisor": 8}, 16),
        (191, {"reduction": 16, "divisor": 8}, 8),
        (191, {"divisor": 1}, 12),
        (4, {"divisor": 8}, 8),
    ],
)
def test_hidden_widths(features, fields, width):
    mlp = {"reduce": {"kernel": (features, width)}}
    mlp |= {"expand": {"kernel": (width, features)}}
    for block in (SE, ChannelAttention):
        assert tree(block(**fields), features) == mlp
    assert tree(CBAM(**fields), features)["channel"] == mlp


def test_kernel_widths_of_20_channels():
    kernel = ECA(kernel_size=lambda c: c - 9)
    assert tree(kernel, 20) == {"conv": {"kernel": (11, 1, 1)}}
    assert tree(ECA(gamma=1, b=3), 20) == {"conv": {"kernel": (7, 1, 1)}}


def test_an_extent_may_be_an_integer_of_numpy():
    block = GatherExcite(extent=np.int64(4), extra_params=True)
    assert list(tree(block, 20)) == ["gather1", "gather2"]


def test_fields_reach_the_computation():
    """No option is ignored: each changes the output."""
    x = normal((2, 6, 5, 64), 0)
    conv = partial(ChannelAttention, excite="conv")
    plus = partial(GatherExcite, extent=4, extra_params=True)
    changes = [
        (SE, {"pool": "max"}),
        (SE, {"pool": "avg+max"}),
        (SE, {"hidden_norm": nn.LayerNorm}),
        (SE, {"act": nn.gelu}),
        (SE, {"gate": nn.hard_sigmoid}),
        (ECA, {"pool": "max"}),
        (ECA, {"pool": "avg+max"}),
        (ECA, {"padding": "circular"}),
        (ECA, {"gate": nn.tanh}),
        (ESE, {"pool": "max"}),
        (conv, {"padding": "circular"}),
        (conv, {"pool": "avg+max"}),
        (SpatialAttention, {"pool": "avg+max"}),
        (CBAM, {"act": nn.gelu}),
        (CBAM, {"gate": nn.hard_sigmoid}),
        (BAM, {"act": nn.gelu}),
        (BAM, {"dilation": 1}),
        (BAM, {"gate": nn.hard_sigmoid}),
        (scSE, {"act": nn.gelu}),
        (scSE, {"combine": "max"}),
        (scSE, {"gate": nn.hard_sigmoid}),
        (BAM, {"combine": "multiply"}),
        (BAM, {"spatial_act": nn.relu}),
        (SimAM, {"lam": 1.0}),
        (SimAM, {"ddof": 1}),
        (GlobalContext, {"fuse": "scale"}),
        (GlobalContext, {"act": nn.gelu}),
        (GlobalContext, {"epsilon": 1.0}),
        (CoordinateAttention, {"act": nn.relu}),
        (GatherExcite, {"extent": 2}),
        (plus, {"act": nn.gelu}),
        (plus, {"extent": 2}),
    ]

    @jax.jit
    def run(x):
        def output(module):
            return module.apply(variables_for(module, x), x)

        return [(output(make()), output(make(**fields))) for make, fields in changes]

    for (_, fields), (before, after) in zip(changes, run(x), strict=True):
        assert np.abs(after - before).max() > 1e-3, fields


def test_initializers_and_their_dtype():
    module = SE(
        use_bias=True,
        kernel_init=nn.initializers.ones,
        bias_init=nn.initializers.constant(2.0),
        param_dtype=jnp.bfloat16,
    )
    reduce = module.init(jax.random.key(0), jnp.ones((1, 2, 2, 16)))["params"]["reduce"]
    assert reduce["kernel"].dtype == jnp.bfloat16
    assert (reduce["kernel"] == 1).all() and (reduce["bias"] == 2).all()


@pytest.mark.parametrize(
    "module, message",
    [
        (SE(reduction=0), "`reduction` .* an integer of at least 1, or .* got 0"),
        (SE(reduction=1.0), "`reduction` .* got 1.0; pass e.g. 16 or 1 / 16"),
        (SE(divisor=0), "`divisor` must be an integer of at least 1, got 0"),
        (SE(reduction=-4), "`reduction` .* got -4"),
        (CBAM(reduction=2.5), "`reduction` .* got 2.5"),
        (BAM(reduction=0), "`reduction` must be an integer of at least 1"),
        (SE(hidden_features=0), "`hidden_features` .* got 0"),
        (SE(pool="mean"), "`pool` must be \"avg\" or .* got 'mean'"),
        (SE(pool=lambda x, **_: x), r"`pool` .* got shape \(1, 4, 4, 64\) inst"),
        (CBAM(pool="avg"), '`pool` must be "both" or "avg\\+max", got \'avg\''),
        (SpatialAttention(pool="avg"), '`pool` must be "both" or'),
        (
            ChannelAttention(excite="conv", hidden_norm=nn.LayerNorm),
            '`excite` must be "mlp", got "conv"; leave `hidden_norm` out',
        ),
        (ECA(pool=None), "`pool` must be .* got None"),
        (ECA(kernel_size=4), "`kernel_size` must be an odd .* got 4.* as 5"),
        (ECA(kernel_size=-3), "`kernel_size` must be an odd .* got -3"),
        (ECA(padding="same"), "`padding` must be .* got 'same'"),
        (ECA(gamma=0), "`gamma` must not be 0"),
        (ChannelAttention(excite="fc"), "`excite` must be .* got 'fc'"),
        (CBAM(excite="FC"), "`excite` must be .* got 'FC'"),
        (SpatialAttention(kernel_size=2), "`kernel_size` must be an odd"),
        (CBAM(spatial_kernel_size=0), "`spatial_kernel_size` must be an odd"),
        (CBAM(implementation="slow"), "`implementation` must be .* 'slow'"),
        (BAM(dilation=0), "`dilation` must be an integer of at least 1"),
        (scSE(combine="mul"), '`combine` must be "add" or "max"'),
        (ECA(identity_init=True, gate=nn.relu), "`gate` must be 0.5 at 0, got 0.0"),
        (
            CBAM(identity_init=True, gate=nn.PReLU()),
            "`gate` must be a function .* got the module PReLU",
        ),
        # Functions by name, and modules made already.
        (CBAM(gate="sigmoid"), "`gate` must"),
        (CBAM(act="relu"), "`act` must"),
        (CBAM(spatial_norm=nn.BatchNorm(True)), "`spatial_norm` must make"),
        (SpatialAttention(norm=nn.BatchNorm(True)), "`norm` must make a module"),
        (BAM(spatial_act="relu"), "`spatial_act` must be a function"),
        (GatherExcite(hidden_norm="bn"), "`hidden_norm` follows the convolutions"),
        (GlobalContext(epsilon=-1.0), "`epsilon` must be a positive number, got -1.0"),
        (GlobalContext(epsilon="a"), "`epsilon` must be a positive number, got 'a'"),
        (
            SE(identity_init=True, gate=nn.softmax),
            "`gate` must be 0.5 at 0, got 0.0156",
        ),
        (BAM(hidden_norm="bn"), "`hidden_norm` must make a module"),
        (SE(hidden_norm=0), "`hidden_norm` must make a module"),
        (CoordinateAttention(hidden_norm="bn"), "`hidden_norm` must make a module"),
        (SimAM(lam=0), "`lam` must be a positive number, got 0"),
        (SimAM(lam="1e-4"), "`lam` must be a positive number, got '1e-4'"),
        (SimAM(ddof=2), "`ddof` must be 0 or 1, got 2"),
        (GlobalContext(fuse="mul"), '`fuse` must be "add" or "scale"'),
        (CoordinateAttention(reduction=0), "`reduction` must be an integer of at"),
        (GatherExcite(extent=1), "`extent` must be an integer of at least 2, or 0"),
        (GatherExcite(extent=2.0), "`extent` must be .* got 2.0"),
        (GatherExcite(extra_params=True), "`extent` must be .* got 0"),
        (GatherExcite(extra_params=True, extent=6), "`extent` must be a power of 2"),
        (BAM(combine="max"), '`combine` must be "add" or "multiply"'),
        (CBAM(hidden_features=lambda c: 2.0), "`hidden_features`"),
        (CBAM(hidden_features=lambda c: None), "`hidden_features`"),
        (CBAM(hidden_features=lambda c: 0), "`hidden_features`"),
    ],
)
def test_bad_fields(module, message):
    with pytest.raises(ValueError, match=message):
        tree(module)


def test_the_identity_with_a_gate_of_all_channels():
    module = SE(identity_init=True, gate=lambda z: z.shape[-1] / 2 * nn.softmax(z))
    x = normal((2, 4, 3, 8), 0)
    start = jax.jit(module.init)(jax.random.key(0), x)
    np.testing.assert_array_equal(module.apply(start, x), x)


def test_a_gate_that_is_a_module():
    """Its parameters are the block's; both halves of CBAM share one."""
    gate = nn.PReLU()
    assert tree(SE(gate=gate))["gate"] == {"negative_slope": ()}
    block = CBAM(gate=gate)
    slopes = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(tree(block, 16), is_leaf=is_shape)
        if path[-1].key == "negative_slope"
    ]
    assert slopes == [()]
    x = normal((2, 4, 4, 16), 0)
    y, _ = jax.jit(block.init_with_output)(jax.random.key(0), x)
    assert np.isfinite(y).all()


def test_a_squeeze_of_your_own():
    """As jnp.std is called; in a padded map, over what is valid."""
    x = normal((2, 5, 4, 16), 0)
    padded = np.pad(x, [(0, 1), (0, 2), (0, 3), (0, 0)], constant_values=np.nan)
    mask = ~np.isnan(padded[..., 0])
    block = SE(pool=jnp.std)
    variables = variables_for(block, x)
    y, in_padded = jax.jit(
        lambda x, p: (block.apply(variables, x), block.apply(variables, p, mask))
    )(x, padded)
    s = x.std((1, 2), keepdims=True)
    expected = x * references.sigmoid(references.mlp(variables["params"], s))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(in_padded[mask], y.reshape(-1, 16), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(in_padded[~mask], 0)
