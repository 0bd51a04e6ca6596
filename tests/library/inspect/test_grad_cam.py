"""Grad-CAM against its definition, on models whose answer is known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from flax_attn.inspect import grad_cam
from tests.cases import normal, variables_for


class Model(nn.Module):
    """Logits from the means of a squashed map, whose derivative is known."""

    features: int = 4
    classes: int = 3
    remat: bool = False

    @nn.compact
    def __call__(self, x, *, scale=1.0):
        conv = nn.remat(nn.Conv) if self.remat else nn.Conv
        x = conv(self.features, (1, 1), name="conv")(x)
        x = jnp.tanh(scale * x).mean((-3, -2))
        return nn.Dense(self.classes, name="head")(x)


def by_hand(variables, x, labels, scale):
    """In float64, equations 1 and 2 of the paper."""
    params = jax.tree.map(partial(np.asarray, dtype=np.float64), variables["params"])
    kernel, head = params["conv"]["kernel"][0, 0], params["head"]["kernel"]
    maps = np.asarray(x, np.float64) @ kernel + params["conv"]["bias"]
    slopes = scale * (1 - np.tanh(scale * maps) ** 2) * head.T[labels][:, None, None]
    weights = slopes.mean((1, 2), keepdims=True) / (x.shape[1] * x.shape[2])
    return np.maximum((weights * maps).sum(-1, keepdims=True), 0)


@pytest.mark.parametrize("remat", [False, True])
def test_it_is_the_definition(remat):
    x, labels = normal((3, 5, 4, 2), 0), np.array([2, 0, 1])
    model = Model(remat=remat)
    variables = variables_for(model, x)
    run = jax.jit(partial(grad_cam, model, layer="conv", scale=0.5))
    cam = run(variables, x, label=labels)
    assert cam.shape == (3, 5, 4, 1) and cam.dtype == jnp.float32
    expected = by_hand(variables, x, labels, 0.5)
    assert (expected == 0).any() and (expected > 0).any()
    np.testing.assert_allclose(cam, expected, rtol=1e-5, atol=1e-7)


def test_the_evidence_of_each_class_lies_in_its_corner():
    """Class 0 is a red corner and class 1 a green one; a block in between is no bar."""

    class Corners(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = flax_attn.CBAM(spatial_kernel_size=1, name="attention")(x)
            return nn.Dense(2, use_bias=False, name="head")(x.mean((-3, -2)))

    image = np.zeros((6, 6, 3), np.float32)
    image[:2, :2, 0] = image[4:, 4:, 1] = 1
    params = variables_for(Corners(), image[None])["params"]
    head = np.array([[1, -1], [-1, 1], [0, 0]], np.float32)
    variables = {"params": {**params, "head": {"kernel": head}}}
    run = jax.jit(partial(grad_cam, Corners(), layer="attention"))
    for label, corner in enumerate([np.s_[:2, :2], np.s_[4:, 4:]]):
        cam = np.array(run(variables, image, label=label))
        assert cam.shape == (6, 6, 1)
        assert (cam[corner] > 0).all()
        cam[corner] = 0
        assert not cam.any()


def test_half_precision_is_averaged_in_single():
    x = normal((1, 5, 4, 2), 0).astype(jnp.bfloat16)
    model = nn.Sequential([nn.Conv(4, (1, 1), dtype=jnp.bfloat16), lambda x: x.sum(1)])
    variables = variables_for(model, x)
    cam = grad_cam(model, variables, x, "layers_0", np.zeros((1, 4), int))
    assert cam.dtype == jnp.float32


class Squashed(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(super().__call__(x))


def test_modules_at_one_path_are_one_layer():
    """A subclass that calls its base, and a block inside ``ChannelsFirst``."""

    class Model(nn.Module):
        channels_first: bool

        @nn.compact
        def __call__(self, x):
            x = Squashed(4, name="squashed")(x)
            block = flax_attn.SE(reduction=2, name="attention")
            if self.channels_first:
                x = flax_attn.ChannelsFirst(block)(jnp.moveaxis(x, -1, 1))
                x = jnp.moveaxis(x, 1, -1)
            else:
                x = block(x)
            return nn.Dense(3, name="head")(jnp.tanh(x).mean((1, 2)))

    x = normal((1, 5, 3, 2), 0)
    variables = variables_for(Model(False), x)
    for layer in ("squashed", "attention"):
        cam = grad_cam(Model(True), variables, x, layer, 1)
        assert cam.shape == (1, 5, 3, 1) and (cam > 0).any()
        expected = grad_cam(Model(False), variables, x, layer, 1)
        np.testing.assert_array_equal(cam, expected)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Conv(2, (1, 1), name="conv")(x), None


class Several(nn.Module):
    @nn.compact
    def __call__(self, x):
        twice = nn.Conv(2, (1, 1), name="twice")
        params = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        loop = nn.scan(Step, **params, length=2)(name="loop")
        x, _ = loop(twice(twice(x)), None)
        return nn.Dense(3, name="head")(x.mean((-3, -2)))


@pytest.mark.parametrize(
    "layer, says",
    [
        ("twice", "got 'twice', which is called 2 times"),
        ("loop/conv", "got 'loop/conv', which is inside nn.scan or nn.vmap"),
    ],
)
def test_a_layer_is_called_once(layer, says):
    x = normal((1, 4, 4, 2), 0)
    variables = jax.eval_shape(Several().init, jax.random.key(0), x)
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(partial(grad_cam, Several(), layer=layer, label=0), variables, x)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"layer": "conf"}, "`layer` must .* got 'conf', which is not called; .* conv"),
        ({"layer": "head"}, r"got 'head', which returns \(2, 3\); pass one of conv\."),
        ({"label": 3}, "`label` must be within 0 to 2, .* got 3"),
        ({"label": -1}, "`label` must be within 0 to 2, .* got -1"),
        ({"label": 1.0}, "`label` must be an integer .* got float32"),
        ({"label": np.zeros(3, int)}, r"of integers \(2,\), got int32 of shape \(3,\)"),
        ({"mutable": True}, "`mutable` must be left out, got True"),
    ],
)
def test_bad_arguments(options, says):
    x = normal((2, 4, 4, 2), 0)
    variables = jax.eval_shape(Model().init, jax.random.key(0), x)
    arguments = {"layer": "conv", "label": 0} | options
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(partial(grad_cam, Model(), **arguments), variables, x)
