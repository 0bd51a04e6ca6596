"""The blocks and inputs that several test files share."""

import dataclasses
import zlib
from functools import cache, partial

import chex
import jax
import numpy as np
import pytest

from flax_attn import presets
from flax_attn.blocks import BLOCKS
from tests.references import REFERENCES

IMPLEMENTATIONS = ("fast", "plain")


def long_unless(quick):
    return () if quick else pytest.mark.long


def each_block(long=()):
    """A law's parameter, ``block``; those in ``long`` are left to the long tests."""
    names = [pytest.param(b, marks=long_unless(b not in long)) for b in BLOCKS]
    return pytest.mark.parametrize("block", names)


# The dearest to compile, of whose classes the laws run another form.
OTHER_FORMS = ("channel-conv", "cbam-conv", "ge-plus")
blocks = each_block()
forms = each_block(long=OTHER_FORMS)

# Of the others there are no weights to compare.
ARTICLE = {
    name: make
    for name, make in BLOCKS.items()
    if hasattr(presets, f"article_{name.replace('-', '_')}")
}


def normal(shape, seed):
    # RandomState's stream is frozen for good, so golden files need no inputs.
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def variables_for(module, x, seed=0):
    """Random variables of ``module``: NumPy draws in the shapes that init gives."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    draws = []
    for i, (path, leaf) in enumerate(leaves):
        fan = max(leaf.size / leaf.shape[-1], 1)
        draw = normal(leaf.shape, seed + 100 + i) / np.float32(np.sqrt(fan))
        is_variance = getattr(path[-1], "key", "") == "var"
        draws.append(np.abs(draw) if is_variance else draw)
    # Without parameters, init gives no collection.
    return {"params": {}, **jax.tree.unflatten(tree, draws)}


@cache
def has_parameters(block):
    """Whether there is anything to learn, and so to start from, in a block."""
    x = np.ones((1, 1, 1, 16), np.float32)
    # Within the trace, the key starts no backend.
    shapes = jax.eval_shape(lambda: BLOCKS[block]().init(jax.random.key(0), x))
    return bool(jax.tree.leaves(shapes))


def forward_and_gradients(module, variables, x, cotangent, *masks, jit=jax.jit):
    """The output, and the gradients of <output, cotangent> by variables and input."""

    @jit
    def run(variables, x, cotangent, *masks):
        y, pullback = jax.vjp(lambda v, x: module.apply(v, x, *masks), variables, x)
        return y, *pullback(cotangent)

    return run(variables, x, cotangent, *masks)


def fast_and_plain(make, jit=jax.jit):
    """What ``forward_and_gradients`` returns, by implementation, compiled at once.

    Args:
      make: function from the field ``implementation`` to a block.
      jit: how it is compiled.
    """

    @jit
    def run(variables, x, cotangent, mask=None):
        def of(implementation):
            module = make(implementation=implementation)
            y, pullback = jax.vjp(lambda v, x: module.apply(v, x, mask), variables, x)
            return y, *pullback(cotangent)

        return {i: of(i) for i in IMPLEMENTATIONS}

    return run


def assert_alike(results):
    """All outputs and gradients are the same, up to the rounding of float32."""
    (_, first), *others = results.items()
    chex.assert_tree_all_finite(first)
    leaves = jax.tree.leaves(first[1:])
    # A leaf far below the largest gradient has only rounding to compare.
    floor = max(1e-3, *(0.1 * np.abs(leaf).max() for leaf in leaves))
    for name, other in others:
        np.testing.assert_allclose(
            other[0], first[0], rtol=1e-6, atol=1e-6, err_msg=name
        )
        for a, b in zip(jax.tree.leaves(other[1:]), leaves, strict=True):
            atol = 1e-5 * max(np.abs(b).max(), floor)
            np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)


def assert_exact(block, variables, x, cotangent, result, dims=2, ties=False):
    """Output and gradients are those of the block's reference in float64.

    Without ``ties``, the gradient is compared along one random direction of variables
    and input together, by central differences.
    """
    reference = partial(REFERENCES[block], dims=dims)
    y, d_variables, d_x = jax.tree.map(np.float64, result)
    point = jax.tree.map(np.float64, (variables["params"], x))
    np.testing.assert_allclose(y, reference(*point), rtol=1e-5, atol=1e-5)
    if ties:
        return
    leaves, tree = jax.tree.flatten(point)
    directions = [np.float64(normal(a.shape, 7 + i)) for i, a in enumerate(leaves)]

    def objective(step):
        moved = [a + step * d for a, d in zip(leaves, directions, strict=True)]
        return (reference(*tree.unflatten(moved)) * cotangent).sum()

    numeric = (objective(1e-6) - objective(-1e-6)) / 2e-6
    gradients = jax.tree.leaves((d_variables["params"], d_x))
    analytic = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    np.testing.assert_allclose(analytic, numeric, rtol=1e-4, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class Case:
    """A block on an input, as the article would have it."""

    block: str
    shape: tuple[int, ...]
    """(N, H, W, C)."""
    ratio: int = 16
    k: int = 7

    @property
    def name(self):
        n, h, w, c = self.shape
        return f"{self.block}-{n}x{h}x{w}x{c}-r{self.ratio}-k{self.k}"

    @property
    def seed(self):
        return zlib.crc32(self.name.encode()) % 10**6

    def module(self, **fields):
        if self.block.startswith("cbam"):
            fields |= {"spatial_kernel_size": self.k}
        if self.block == "spatial":
            fields |= {"kernel_size": self.k}
        elif not self.block.endswith(("eca", "conv")):
            if hasattr(BLOCKS[self.block](), "reduction"):
                fields |= {"reduction": self.ratio}
        return BLOCKS[self.block](**fields)

    def arrays(self):
        """Variables, input and cotangent."""
        x = normal(self.shape, self.seed)
        return (
            variables_for(self.module(), x, self.seed),
            x,
            normal(self.shape, self.seed + 1),
        )


def _cases(shapes, kernels):
    return [
        Case(block, shape, ratio, k)
        for block in ARTICLE
        for shape, ratio in shapes
        for k in (kernels if "cbam" in block or block == "spatial" else (7,))
    ]


# 54 channels with r = 9 is the article's own example.
LIVE = [
    *_cases([((2, 32, 32, 54), 9), ((2, 5, 4, 64), 16), ((1, 3, 7, 512), 16)], (7,)),
    *_cases([((2, 9, 7, 16), 16), ((3, 1, 1, 16), 16)], (3, 5, 7)),
]
GOLDEN = _cases([((2, 5, 6, 54), 9), ((1, 9, 11, 16), 16), ((2, 1, 1, 16), 16)], (3, 7))
