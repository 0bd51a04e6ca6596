"""Round trips of whole networks, bit for bit."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze

import flax_attn
from flax_attn import convert
from flax_attn.resnet import (
    BasicBlock,
    BottleneckBlock,
    ResNet,
    cifar_resnet,
    imagenet_resnet,
)
from tests.cases import ARTICLE
from tests.convert.states import (
    D_VARIANT,
    IMAGE,
    assert_same,
    norm_state,
    random_tree,
    shapes_of,
)

NORM = partial(nn.BatchNorm, use_running_average=True)


def networks():
    """Modules, their inputs, and a naming that covers everything in them."""
    x = np.zeros((1, 4, 4, 32), np.float32)
    official = partial(flax_attn.CBAM, use_bias=True, spatial_norm=NORM)
    for name, make in ARTICLE.items():
        yield f"article-{name}", make(), x, "article"
        yield f"article-{name}-biased", make(use_bias=True), x, "article"
        net = cifar_resnet(8, num_classes=10, attention=make)
        yield f"article-{name}-8", net, IMAGE, "article"
    timm = {"se": flax_attn.SE, "eca": flax_attn.ECA, "cbam": official}
    for name, make in timm.items():
        yield f"timm-{name}", make(), x, "timm"
        net = cifar_resnet(8, num_classes=10, attention=make)
        yield f"timm-{name}-8", net, IMAGE, "timm"
    net = imagenet_resnet(18, num_classes=10, attention=official)
    yield "timm-cbam-18", net, IMAGE, "timm"
    for naming, variant in (("torchvision", {}), ("timm", D_VARIANT)):
        for block in (BasicBlock, BottleneckBlock):
            net = ResNet((1, 2), block=block, num_classes=10, width=8, **variant)
            yield f"{naming}-{block.__name__}", net, IMAGE, naming


@pytest.mark.parametrize(
    "module, x, naming", [pytest.param(*rest, id=label) for label, *rest in networks()]
)
def test_there_and_back_bit_for_bit(module, x, naming, tmp_path):
    like = shapes_of(module, x)
    variables = random_tree(like)
    state = convert.to_torch(variables, naming=naming)
    assert all("/" not in key for key in state)
    convert.save(tmp_path / "torch.safetensors", state)
    loaded = convert.load(tmp_path / "torch.safetensors")
    assert_same(loaded, state)
    back = convert.to_flax(loaded, naming=naming, like=like)
    assert_same(back, variables)
    convert.save(tmp_path / "flax.safetensors", back)
    assert_same(convert.load(tmp_path / "flax.safetensors"), variables)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_dtypes_survive(dtype, tmp_path):
    net = cifar_resnet(8, num_classes=10, attention=flax_attn.CBAM)
    variables = random_tree(shapes_of(net, IMAGE), dtype)
    path = tmp_path / "net.safetensors"
    convert.save(path, convert.to_torch(variables))
    back = convert.to_flax(convert.load(path))
    assert_same(back, variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype(dtype)}


def test_numbers_that_compare_unequal_to_themselves():
    weight = np.array([np.nan, -np.nan, -0.0, np.inf], np.float32)
    weight.view(np.uint32)[0] |= 1
    state = {"fc.weight": weight.reshape(2, 2)}
    assert_same(convert.to_torch(convert.to_flax(state)), state)


def test_results_are_copies():
    state = norm_state("bn1")
    variables = convert.to_flax(state)
    state["bn1.weight"][:] = 0
    assert variables["params"]["norm_stem"]["scale"].tolist() == [1, 2, 3]
    back = convert.to_torch(variables)
    back["bn1.weight"][:] = 0
    assert variables["params"]["norm_stem"]["scale"].tolist() == [1, 2, 3]


def test_arrays_of_jax_and_frozen_trees():
    variables = flax_attn.SE().init(jax.random.key(0), jnp.ones((1, 2, 2, 16)))
    state = convert.to_torch(freeze(variables))
    assert_same(convert.to_flax(state), jax.tree.map(np.asarray, variables))


def test_partitioned_parameters_are_taken_out_of_their_boxes():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    module = flax_attn.SE(kernel_init=init)
    boxed = module.init(jax.random.key(0), np.ones((1, 4, 4, 16), np.float32))
    plain = nn.unbox(boxed)
    state = convert.to_torch(boxed)
    assert all((state[k] == v).all() for k, v in convert.to_torch(plain).items())
    chex.assert_trees_all_equal(convert.to_flax(state, like=boxed), plain)
