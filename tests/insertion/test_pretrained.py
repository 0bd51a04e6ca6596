"""Models that hold their Linen module and weights, as transformers' Flax models do."""

import jax
import numpy as np
import pytest

import flax_attn
from flax_attn.insertion import insert_pretrained
from tests.cases import variables_for
from tests.insertion.models import KEY, SE, ResNet, X


class Pretrained:
    """The module is read-only, images come as NCHW, and weights are checked."""

    def __init__(self, module, input_shape):
        self._module = module
        self.input_shape = input_shape
        self._required = jax.tree.structure(self.init_weights(KEY, input_shape))
        self.params = variables_for(module, np.zeros(input_shape, np.float32))

    @property
    def module(self):
        return self._module

    @property
    def params(self):
        return self._params

    @params.setter
    def params(self, params):
        paths = {path for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        needed = jax.tree.unflatten(self._required, range(self._required.num_leaves))
        assert {p for p, _ in jax.tree_util.tree_leaves_with_path(needed)} <= paths
        self._params = params

    def init_weights(self, key, input_shape):
        init = jax.jit(self.module.init, static_argnames="train")
        return init(key, np.zeros(input_shape, np.float32), train=False)

    def __call__(self, images, params=None):
        x = np.moveaxis(images, 1, -1)
        return self.module.apply(params or self.params, x, train=False)


BLOCKS = "ResNetBlock_*"


def test_a_copy_has_attention_and_the_weights():
    model = Pretrained(ResNet(), X.shape)
    new = insert_pretrained(model, SE(), BLOCKS)
    images = np.moveaxis(X, -1, 1)
    np.testing.assert_array_equal(new(images), model(images))
    assert np.isfinite(new(images)).all()
    assert isinstance(new, Pretrained) and type(new).__name__ == "Pretrained"
    (site,) = flax_attn.sites(new.module, X, train=False)
    assert site.path == "ResNetBlock_0"
    new_params = new.params["params"]["ResNetBlock_0"]["attention"]
    assert "attention" not in model.params["params"]["ResNetBlock_0"]
    assert type(model.module) is ResNet
    np.testing.assert_array_equal(new_params["expand"]["kernel"], 0)
    gates = flax_attn.assert_active(new.module, new.params, X, train=False)
    assert gates == ("ResNetBlock_0/attention",)
    # Once more, into the copy.
    twice = insert_pretrained(new, flax_attn.ECA(), BLOCKS, init=None, name="eca")
    assert len(flax_attn.sites(twice.module, X, train=False)) == 2
    assert not np.array_equal(twice(images), model(images))


@pytest.mark.parametrize("what", ["module", "params"])
def test_other_objects_are_refused(what):
    model = Pretrained.__new__(Pretrained)
    model._module, model.input_shape = ResNet(), X.shape
    if what == "module":
        model = ResNet()
    message = f"`model` must hold a Linen module .* without {what}.*flax_attn.insert"
    with pytest.raises(ValueError, match=message):
        insert_pretrained(model, SE(), BLOCKS)


def test_a_flax_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "FlaxResNetForImageClassification"):
        pytest.skip("transformers has no Flax models from 5 on")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"
    )
    model = transformers.FlaxResNetForImageClassification(config, (1, 32, 32, 3))
    where = "resnet/encoder/stages/*/layers/?"
    new = insert_pretrained(model, SE(), where)
    images = np.random.RandomState(0).randn(2, 3, 32, 32).astype(np.float32)
    np.testing.assert_array_equal(new(images).logits, model(images).logits)
    found = flax_attn.sites(new.module, np.moveaxis(images, 1, -1))
    assert [site.shape[-1] for site in found] == [4, 8]
    gates = flax_attn.assert_active(new.module, new.params, np.moveaxis(images, 1, -1))
    assert len(gates) == 2
