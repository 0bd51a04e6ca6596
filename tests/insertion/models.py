"""Blocks, models and helpers that the tests of insertion share."""

from functools import partial

import jax
from flax import linen as nn

import flax_attn
from tests.cases import normal

X = normal((2, 8, 8, 3), 0)
# Compiles faster than the default generator.
KEY = jax.random.key(0, impl="rbg")
CBAM = partial(flax_attn.CBAM, reduction=4, spatial_kernel_size=3)
SE = partial(flax_attn.SE, reduction=2)


def without_attention(tree):
    if not isinstance(tree, dict):
        return tree
    return {k: without_attention(v) for k, v in tree.items() if k != "attention"}


def shapes(model, *args, **kwargs):
    variables = jax.eval_shape(partial(model.init, **kwargs), KEY, *args)
    return jax.tree.map(lambda leaf: leaf.shape, variables)


class Chain(nn.Module):
    """Two layers of a class that tests transform."""

    layer: type = nn.Conv

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.layer(4, (3, 3), name="first")(x))
        return self.layer(3, (1, 1), name="second")(x)


def by_hand(params, x, attend=("first", "second")):
    """Chain with SE after the layers in ``attend``, module by module."""
    for name, layer in (
        ("first", nn.Conv(4, (3, 3))),
        ("second", nn.Conv(3, (1, 1))),
    ):
        own = {k: v for k, v in params[name].items() if k != "attention"}
        x = layer.apply({"params": own}, x)
        if name in attend:
            x = SE().apply({"params": params[name]["attention"]}, x)
        if name == "first":
            x = nn.relu(x)
    return x


class Odd(nn.Module):
    """Submodules that return no feature map, or use the name already."""

    @nn.compact
    def __call__(self, x):
        pair = Pair(name="pair")(x)
        y = Named(name="named")(pair["a"] + pair["b"])
        return nn.Dense(2, name="head")(y.mean((1, 2)))


class Pair(nn.Module):
    def __call__(self, x):
        return {"a": x, "b": 2 * x}


class Named(nn.Module):
    def setup(self):
        self.attention = nn.Conv(3, (1, 1))

    def __call__(self, x):
        return self.attention(x)


class Halves(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x[..., ::2, :] * self.param("scale", nn.initializers.ones, ())


class Gated(nn.Module):
    """A model that uses blocks; ``broken`` makes the second one inactive."""

    broken: str = ""

    @nn.compact
    def __call__(self, x):
        y = CBAM(name="used")(x)
        z = flax_attn.SE(reduction=1, name="second")(y)
        if self.broken == "result":
            z = y
        if self.broken == "zero":
            z = z * 0
        # Removes a factor of the whole map.
        return nn.GroupNorm(num_groups=1)(z)
