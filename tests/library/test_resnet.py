from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from flax_attn import presets
from flax_attn.resnet import (
    ATTENTIONS,
    BasicBlock,
    BottleneckBlock,
    ResNet,
    cifar_resnet,
    imagenet_resnet,
)
from flax_attn.resnet._blocks import _mean_pool
from tests.cases import has_parameters, normal, variables_for

D_VARIANT = {"deep_stem": True, "pooled_shortcut": True}
RESNEXT = partial(BottleneckBlock, groups=32)


@pytest.mark.parametrize(
    "depth, fields, parameters",
    [
        # torchvision's; the last are resnext50_32x4d, resnext101_32x8d and
        # wide_resnet50_2.
        (18, {}, 11_689_512),
        (34, {}, 21_797_672),
        (50, {}, 25_557_032),
        (101, {}, 44_549_160),
        (152, {}, 60_192_808),
        (50, {"block": partial(RESNEXT, width_per_group=4)}, 25_028_904),
        (101, {"block": partial(RESNEXT, width_per_group=8)}, 88_791_336),
        (50, {"block": partial(BottleneckBlock, width_per_group=128)}, 68_883_240),
        # timm's resnet18d, resnet50d and ecaresnet50d.
        (18, D_VARIANT, 11_708_744),
        (50, D_VARIANT, 25_576_264),
        (50, D_VARIANT | {"attention": flax_attn.ECA}, 25_576_350),
        # SENet's SE-ResNet-50, the ECA paper's 80 parameters, the official CBAM.
        (50, {"attention": presets.article_se}, 28_071_976),
        (50, {"attention": presets.article_eca}, 25_557_118),
        (50, {"attention": presets.official_se}, 28_088_024),
        (50, {"attention": presets.official_eca50}, 25_557_112),
        (50, {"attention": presets.official_cbam(train=True)}, 28_089_624),
        # C / 16 is a multiple of 8 in all four stages, so timm's SE is SENet's; its
        # CBAM adds 98 + 2 to an SE without biases, in each of 16 blocks.
        (50, {"attention": presets.timm_se}, 28_088_024),
        (50, {"attention": presets.timm_cbam(train=True)}, 28_071_976 + 16 * 100),
        # Of CIFAR, with 1x1 projection shortcuts and ten classes.
        (20, {}, 272_474),
        (20, {"attention": partial(flax_attn.SE, use_bias=True)}, 272_474 + 2_373),
        (20, {"attention": flax_attn.ECA}, 272_474 + 27),
        (20, {"attention": presets.official_cbam(train=True)}, 272_474 + 3_273),
    ],
)
def test_published_numbers_of_parameters(depth, fields, parameters):
    if depth == 20:
        model = cifar_resnet(depth, num_classes=10, **fields)
    else:
        model = imagenet_resnet(depth, num_classes=1000, **fields)
    init, images = partial(model.init, train=True), jnp.zeros((1, 64, 64, 3))
    params = jax.eval_shape(init, jax.random.key(0), images)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


def test_the_mean_pool_of_odd_maps_counts_what_is_there():
    x = normal((2, 5, 4, 3), 0)
    rows = [x[:, 0:2], x[:, 2:4], x[:, 4:5]]
    patches = [[row[:, :, j : j + 2].mean((1, 2)) for j in (0, 2)] for row in rows]
    expected = np.stack([np.stack(row, axis=1) for row in patches], axis=1)
    np.testing.assert_allclose(_mean_pool(x, 2), expected, atol=1e-6)
    np.testing.assert_array_equal(_mean_pool(x, 1), x)


@pytest.mark.parametrize("depth", [8, 20, 32, 44, 56, 110])
def test_cifar_family(depth):
    model = cifar_resnet(depth, num_classes=10)
    n = (depth - 2) // 6
    # Two convolutions in each of 3n blocks, the stem, two shortcuts; the head is dense.
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    paths = jax.tree_util.tree_leaves_with_path(variables["params"])
    kernels = [leaf for _, leaf in paths if leaf.ndim == 4]
    assert len(kernels) == 6 * n + 1 + 2


@pytest.mark.parametrize("depth", [8.0, "8", None])
def test_depths_that_are_no_integers(depth):
    with pytest.raises(ValueError, match=f"`depth` must .* got {depth!r}"):
        cifar_resnet(depth, num_classes=10)
    with pytest.raises(ValueError, match="`depth` must be one of 18, 34, 50"):
        imagenet_resnet(depth, num_classes=10)


@pytest.mark.parametrize("depth", [0, 2, 9, 19, -4])
def test_bad_depths(depth):
    with pytest.raises(ValueError, match=f"`depth` must be 6n.2 .* got {depth};"):
        cifar_resnet(depth, num_classes=10)
    with pytest.raises(ValueError, match="`depth` must be one of 18, 34, 50"):
        imagenet_resnet(depth, num_classes=10)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_takes_part(attention):
    model = cifar_resnet(8, num_classes=10, attention=ATTENTIONS[attention])
    x = normal((2, 16, 16, 3), 0)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    blocks = [p for name, p in variables["params"].items() if "_block" in name]
    learned = attention != "none" and has_parameters(attention)
    assert all(("attention" in p) == learned for p in blocks)
    apply = partial(model.apply, mutable=["intermediates"])
    _, state = jax.eval_shape(apply, variables, x)
    gates = jax.tree.leaves(state)
    two = attention.startswith(("cbam", "lcbam", "scse"))
    per_block = 0 if attention == "none" else 1 + two
    assert len(gates) == 3 * per_block


@pytest.mark.parametrize("make, depth", [(cifar_resnet, 8), (imagenet_resnet, 50)])
def test_bfloat16(make, depth):
    model = make(depth, num_classes=7, attention=flax_attn.CBAM, dtype=jnp.bfloat16)
    x = jnp.zeros((1, 64, 64, 3))
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert logits.shape == (1, 7) and logits.dtype == jnp.bfloat16
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(variables)}
    assert dtypes == {jnp.dtype("float32")}


def test_no_classes_leave_the_pooled_features():
    model = cifar_resnet(8, num_classes=10, dtype=jnp.bfloat16)
    x = normal((2, 16, 16, 3), 0)
    variables = variables_for(model, x)
    pooled = model.apply(variables, x, method="features")[-1].mean((1, 2))
    del variables["params"]["head"]
    headless = model.clone(num_classes=0)
    y = headless.apply(variables, x)
    assert y.shape == (2, 64) and y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, pooled)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(
        np.shape, variables_for(headless, x)
    )


def test_attention_stands_between_the_last_norm_and_the_addition():
    """With a gate of zero, only the shortcut is left."""
    zero = partial(flax_attn.SE, gate=jnp.zeros_like)
    model = ResNet(
        (1,), BasicBlock, width=8, imagenet_stem=False, num_classes=2, attention=zero
    )
    x = normal((1, 8, 8, 3), 0)

    variables = variables_for(model, x)
    apply = partial(model.apply, capture_intermediates=True, mutable=True)
    _, state = jax.jit(apply)(variables, x)
    block = state["intermediates"]["stage1_block1"]["__call__"][0]
    stem = state["intermediates"]["norm_stem"]["__call__"][0]
    np.testing.assert_allclose(block, nn.relu(stem), atol=1e-6)


@pytest.mark.parametrize(
    "make, depth, size, strides",
    [(cifar_resnet, 8, 16, (1, 1, 2, 4)), (imagenet_resnet, 18, 32, (2, 4, 8, 16, 32))],
)
def test_features_are_the_maps_inside_the_network(make, depth, size, strides):
    model = make(depth, width=8, num_classes=3, attention=flax_attn.ECA)
    x = normal((2, size, size, 3), 0)
    variables = variables_for(model, x)

    @jax.jit
    def run(variables, x):
        whole = partial(model.apply, capture_intermediates=True, mutable=True)
        maps = model.apply(variables, x, method="features")
        return maps, whole(variables, x)[1]["intermediates"]

    maps, inside = run(variables, x)
    n = len(maps) - 1
    widths = [8] + [8 * 2**i for i in range(n)]
    shapes = [
        (2, size // s, size // s, c) for s, c in zip(strides, widths, strict=True)
    ]
    assert [y.shape for y in maps] == shapes
    blocks = model.stages[0]
    expected = [nn.relu(inside["norm_stem"]["__call__"][0])]
    expected += [inside[f"stage{i + 1}_block{blocks}"]["__call__"][0] for i in range(n)]
    for actual, wanted in zip(maps, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-6)

    features = jax.eval_shape(
        partial(model.init, method="features"), jax.random.key(0), x
    )
    params = {k: v for k, v in variables["params"].items() if k != "head"}
    assert jax.tree.map(jnp.shape, features["params"]) == jax.tree.map(
        jnp.shape, params
    )


def test_features_inside_a_detector():
    class Detector(nn.Module):
        backbone: nn.Module

        @nn.compact
        def __call__(self, x, *, train=False):
            maps = self.backbone.features(x, train=train)
            return [nn.Conv(2, (1, 1))(y) for y in maps[1:]]

    model = Detector(cifar_resnet(8, num_classes=10))
    x = jnp.zeros((1, 16, 16, 3))
    init = partial(model.init_with_output, train=True)
    scores, variables = jax.eval_shape(init, jax.random.key(0), x)
    assert [y.shape[1:] for y in scores] == [(16, 16, 2), (8, 8, 2), (4, 4, 2)]
    assert "head" not in variables["params"]["backbone"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"stem_features": (8, 8)}, "`stem_features` must be 1 with deep_stem=False"),
        ({"stem_pool": "sum"}, '`stem_pool` must be "max" or "mean"'),
        ({"stem_pool": "mean", "imagenet_stem": False}, "needs `imagenet_stem`"),
        ({"deep_stem": True, "imagenet_stem": False}, "`deep_stem` needs `imagenet_s"),
        ({"stages": (2, 0)}, r"`stages` must be a tuple of .* got \(2, 0\)"),
        ({"stages": 2}, "`stages` must be a tuple of integers of at least 1, got 2"),
        ({"stages": ()}, r"`stages` must be a tuple .* got \(\)"),
        ({"width": 0}, "`width` must be an integer of at least 1, got 0"),
        ({"width": 1, "deep_stem": True}, r"`stem_features` must .* got \(0, 0, 1\)"),
        ({"stem_features": 8}, "`stem_features` must be a tuple of .* got 8"),
        (
            {"attention": flax_attn.SE()},
            "`attention` must be called .* got the module SE",
        ),
        ({"attention": "se"}, "`attention` must be called .* got 'se' "),
        (
            {"attention": presets.official_cbam},
            "got <function official_cbam.* pass e.g. flax_attn.SE",
        ),
        ({"num_classes": -1}, "`num_classes` must be an integer of at least 0, got -1"),
        (
            {"num_classes": "2"},
            "`num_classes` must be an integer of at least 0, got '2'",
        ),
        (
            {"block": partial(BasicBlock, anti_alias="max")},
            "`anti_alias` must be None, 'mean' or 'blur', got 'max'",
        ),
    ],
)
def test_fields_out_of_range(fields, message):
    model = imagenet_resnet(18, width=8, num_classes=3).clone(**fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
