"""The PyTorch blocks of the benchmark compute the same as the library's."""

import jax
import numpy as np
import pytest

from flax_attn.blocks import BLOCKS, create
from tests.cases import ARTICLE, forward_and_gradients, normal, variables_for
from train.study import torch_blocks


def test_the_blocks_with_a_counterpart_are_the_articles():
    assert set(filter(torch_blocks.has_counterpart, BLOCKS)) == set(ARTICLE)


def to_torch(kernel):
    """A flax kernel in PyTorch's layout."""
    if kernel.ndim == 2:
        return kernel.T
    return np.moveaxis(kernel, (-1, -2), (0, 1))


@pytest.mark.parametrize("block", ARTICLE)
def test_output_and_gradients(block):
    torch = pytest.importorskip("torch")
    # Its gradient compiles fastest.
    module, x = create(block, implementation="plain"), normal((2, 5, 6, 32), 0)
    variables, cotangent = variables_for(module, x), normal(x.shape, 1)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    # In the order of the computation: reduce before expand, channel before spatial.
    leaves.sort(key=lambda leaf: "expand" in str(leaf[0]))
    leaves.sort(key=lambda leaf: "spatial" in str(leaf[0]))
    apply, parameters = torch_blocks.make_block(block, 32)
    kernels = [to_torch(np.asarray(leaf)) for _, leaf in leaves]
    assert [tuple(p.shape) for p in parameters] == [k.shape for k in kernels]
    given = torch.tensor(np.moveaxis(x, -1, 1)).requires_grad_()
    weights = [torch.tensor(np.array(k)).requires_grad_() for k in kernels]
    y = apply(given, *weights)
    y.backward(torch.tensor(np.moveaxis(cotangent, -1, 1)))
    expected, grads, dx = forward_and_gradients(module, variables, x, cotangent)
    close = dict(rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        np.moveaxis(y.detach().numpy(), 1, -1), expected, **close
    )
    np.testing.assert_allclose(np.moveaxis(given.grad.numpy(), 1, -1), dx, **close)
    by_path = dict(jax.tree_util.tree_leaves_with_path(grads["params"]))
    for (path, _), weight in zip(leaves, weights, strict=True):
        wanted = to_torch(np.asarray(by_path[path]))
        np.testing.assert_allclose(weight.grad.numpy(), wanted, rtol=1e-3, atol=1e-4)


def test_eager_calls():
    pytest.importorskip("torch")
    name, forward, both, seconds = next(
        torch_blocks.make_calls("eca", (1, 4, 4, 16), "float32")
    )
    assert name == "torch eager" and seconds == 0
    forward()
    both()
