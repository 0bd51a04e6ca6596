"""``nnx.assert_active``, and attention in models as users write them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_attn.nnx
from tests.cases import normal
from tests.nnx.cases import create, drawn

List = getattr(nnx, "List", list)  # Flax 0.11 tracks plain lists.


class Bottleneck(nnx.Module):
    def __init__(self, in_features, features, strides=1, *, rngs):
        def conv(in_features, features, size, **fields):
            fields |= {"use_bias": False, "rngs": rngs}
            return nnx.Conv(in_features, features, (size, size), **fields)

        out = 2 * features
        self.conv1 = conv(in_features, features, 1)
        self.bn1 = nnx.BatchNorm(features, rngs=rngs)
        self.conv2 = conv(features, features, 3, strides=strides, padding=1)
        self.bn2 = nnx.BatchNorm(features, rngs=rngs)
        self.conv3 = conv(features, out, 1)
        self.bn3 = nnx.BatchNorm(out, rngs=rngs)
        self.downsample = nnx.Sequential(
            conv(in_features, out, 1, strides=strides), nnx.BatchNorm(out, rngs=rngs)
        )

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        return nnx.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nnx.Module):
    """Stages are lists of blocks; ``train`` is a Python bool."""

    def __init__(self, *, rngs):
        self.stem = nnx.Sequential(
            nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs),
            nnx.BatchNorm(4, rngs=rngs),
            nnx.relu,
        )
        blocks = Bottleneck(4, 4, rngs=rngs), Bottleneck(8, 8, 2, rngs=rngs)
        self.stages = List([List([block]) for block in blocks])
        self.fc = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x, train=False):
        if train:
            self.train()
        else:
            self.eval()
        x = self.stem(x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.fc(x.mean((1, 2)))


class DoubleConv(nnx.Module):
    def __init__(self, in_features, features, *, rngs):
        self.conv1 = nnx.Conv(in_features, features, (3, 3), rngs=rngs)
        self.norm1 = nnx.GroupNorm(features, num_groups=2, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), rngs=rngs)
        self.norm2 = nnx.GroupNorm(features, num_groups=2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(x)))


class UNet(nnx.Module):
    """Skip connections, and modules in lists."""

    def __init__(self, *, rngs):
        def modules(make, sizes, *more):
            return List([make(*size, *more, rngs=rngs) for size in sizes])

        self.encoder = modules(DoubleConv, [(3, 4), (4, 8)])
        self.bottom = DoubleConv(8, 16, rngs=rngs)
        self.up = modules(nnx.ConvTranspose, [(16, 8), (8, 4)], (2, 2), 2)
        self.decoder = modules(DoubleConv, [(16, 8), (8, 4)])
        self.logits = nnx.Conv(4, 1, (1, 1), rngs=rngs)

    def __call__(self, x):
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
            x = nnx.max_pool(x, (2, 2), (2, 2))
        x = self.bottom(x)
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(jnp.concatenate([skips.pop(), up(x)], axis=-1))
        return self.logits(x)


X = normal((2, 8, 8, 3), 1)
MODELS = {
    "resnet": (
        ResNet,
        Bottleneck,
        partial(flax_attn.nnx.CBAM, spatial_norm=nnx.BatchNorm),
        ["stages/0/0", "stages/1/0"],
        {"train": False},
    ),
    "unet": (
        UNet,
        DoubleConv,
        flax_attn.nnx.SE,
        ["encoder/0", "encoder/1", "bottom", "decoder/0", "decoder/1"],
        {},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_users(name):
    make, where, attention, paths, kwargs = MODELS[name]
    model = drawn(lambda: make(rngs=nnx.Rngs(0)))
    before = flax_attn.nnx.to_linen(model)

    def insert(model):
        return flax_attn.nnx.insert(
            model, attention, where, X, rngs=nnx.Rngs(1), init="identity", **kwargs
        )

    made = drawn(lambda: (model := make(rngs=nnx.Rngs(0)), insert(model))[0])
    sites = insert(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    assert [site.path for site in sites] == paths

    @nnx.jit
    def run(plain):
        inserted = nnx.clone(plain)
        insert(inserted)
        wrt = flax_attn.nnx.attention_params(inserted)

        def loss(model):
            y = model(X, **kwargs)
            return (y**2).sum(), y

        d, y = nnx.grad(loss, argnums=nnx.DiffState(0, wrt), has_aux=True)(inserted)
        return plain(X, **kwargs), y, d, flax_attn.nnx.to_linen(inserted)

    expected, y, gradients, after = run(model)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    # The variables keep their paths, and the new ones learn.
    kept = jax.tree_util.tree_leaves_with_path(after)
    old = dict(jax.tree_util.tree_leaves_with_path(before))
    assert all(np.array_equal(a, old.pop(p)) for p, a in kept if p in old) and not old
    assert all("attention" in str(path) for path in nnx.to_flat_state(gradients).paths)
    assert any(np.abs(d).max() > 0 for d in jax.tree.leaves(gradients))

    active = flax_attn.nnx.assert_active(made, X, **kwargs)
    parts = ["/channel", "/spatial"] if name == "resnet" else [""]
    assert active == tuple(f"{p}/attention{part}" for p in paths for part in parts)


class Gated(nnx.Module):
    """``broken`` makes the second block inactive."""

    def __init__(self, broken, *, rngs):
        self.used = flax_attn.nnx.CBAM(16, rngs=rngs)
        self.second = flax_attn.nnx.SE(16, rngs=rngs)
        self.broken = broken

    def __call__(self, x):
        y = self.used(x)
        # Traced once for each set of classes.
        z = nnx.jit(lambda block, y: block(y))(self.second, y)
        return z * 0 if self.broken == "zero" else y if self.broken else z


@pytest.mark.parametrize("broken", ["", "result", "zero"])
def test_inactive_gates_are_found(broken):
    x = normal((2, 4, 4, 16), 0)
    model = drawn(lambda: Gated(broken, rngs=nnx.Rngs(0)))
    before = nnx.split(model)[0]
    run = partial(flax_attn.nnx.assert_active, model, x)
    if not broken:
        assert run() == ("used/channel", "used/spatial", "second")
    else:
        dead = "second" if broken == "result" else "used/channel, used/spatial, second"
        with pytest.raises(AssertionError, match=f"on the gates of {dead}\\. "):
            run()
    assert nnx.split(model)[0] == before and type(model.used) is flax_attn.nnx.CBAM


class Foreign(nnx.Module):
    """An attention block that is no ``Attention``."""

    def __init__(self, features, *, rngs):
        self.scale = nnx.Param(np.zeros(features, np.float32))

    def __call__(self, x):
        return x * nnx.sigmoid(self.scale[...].reshape(1, 1, 1, -1))


def test_an_attention_of_another_kind():
    model = drawn(lambda: nnx.Sequential(nnx.Conv(3, 4, (1, 1), rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match="`model` must call .* got Sequential, which"):
        flax_attn.nnx.assert_active(model, X)
    flax_attn.nnx.insert(model, Foreign, nnx.Conv, X, rngs=nnx.Rngs(0))
    assert flax_attn.nnx.assert_active(model, X) == ("layers/0/attention",)


def test_a_block_itself():
    x = normal((2, 4, 4, 16), 0)
    assert flax_attn.nnx.assert_active(create("se"), x) == ("",)
    with pytest.raises(ValueError, match="must give a finite output"):
        flax_attn.nnx.assert_active(create("se"), x * np.nan)
