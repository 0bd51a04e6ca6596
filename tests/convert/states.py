"""State dicts and helpers that the tests of conversion share."""

import math

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from flax_attn import convert
from tests.cases import normal

D_VARIANT = {"deep_stem": True, "pooled_shortcut": True}
IMAGE = np.zeros((1, 32, 32, 3), np.float32)
NORM_LEAVES = {
    "weight": "params/{}/scale",
    "bias": "params/{}/bias",
    "running_mean": "batch_stats/{}/mean",
    "running_var": "batch_stats/{}/var",
}


def norm_state(name, size=3):
    return {f"{name}.{leaf}": numbers(size) for leaf in NORM_LEAVES}


def numbers(*shape, dtype=np.float32):
    """Distinct numbers, so that any swap is noticed."""
    return np.arange(1, 1 + math.prod(shape)).reshape(shape).astype(dtype)


def flat(variables):
    return flatten_dict(variables, sep="/")


def shapes_of(module, x):
    return jax.eval_shape(module.init, jax.random.key(0), x)


def random_tree(shapes, dtype=np.float32):
    """Random variables of these shapes."""
    leaves, tree = jax.tree.flatten(shapes)
    draws = [normal(leaf.shape, i).astype(dtype) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, draws)


def assert_same(actual, expected):
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for key, array in expected.items():
        assert isinstance(actual[key], np.ndarray), key
        assert actual[key].dtype == array.dtype, key
        assert actual[key].shape == array.shape, key
        assert actual[key].tobytes() == array.tobytes(), key


# The state dict of an SE, and the shapes that it converts to.
SE_STATE = {"fc1.weight": numbers(2, 32, 1, 1), "fc2.weight": numbers(32, 2, 1, 1)}
SE_LIKE = {
    "params": {
        "reduce": {"kernel": jax.ShapeDtypeStruct((32, 2), np.float32)},
        "expand": {"kernel": jax.ShapeDtypeStruct((2, 32), np.float32)},
    }
}


def report_of(state, **options):
    with pytest.raises(convert.ConversionError) as error:
        convert.to_flax(state, **options)
    text = str(error.value).splitlines()
    for lines in vars(error.value.report).values():
        if isinstance(lines, list):
            assert all(f"  {line}" in text for line in lines)
    return error.value.report


def strange_tensors(torch):
    """Tensors without a NumPy equivalent, by what the error says about them."""
    ones = torch.ones(2, 2)
    return {
        "got torch.float8_e4m3fn, .*float": ones.to(torch.float8_e4m3fn),
        "got .* torch.sparse_coo, .*to_dense": ones.to_sparse(),
        "got torch.bfloat16, torch.sparse_coo": ones.bfloat16().to_sparse(),
        "got .* device meta; load": torch.empty(2, 2, device="meta"),
    }
