"""The blocks and inputs that several test files share."""

import dataclasses
import zlib
from functools import partial

import jax
import numpy as np

from flax_attn.blocks import BLOCKS
from tests import references

IMPLEMENTATIONS = ("fast", "plain")

REFERENCES = {
    "se": references.se,
    "se-max": partial(references.se, pool="max"),
    "eca": references.eca,
    "channel": references.channel,
    "channel-conv": references.channel_conv,
    "spatial": references.spatial,
    "cbam": references.cbam,
    "cbam-conv": references.cbam_conv,
    "bam": references.bam,
    "scse": references.scse,
    "scse-max": partial(references.scse, combine=np.maximum),
}
# The article has neither BAM nor scSE, so there are no weights of theirs to compare.
ARTICLE = {n: make for n, make in BLOCKS.items() if not n.startswith(("bam", "scse"))}


def normal(shape, seed):
    # RandomState's stream is frozen for good, so golden files need no inputs.
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def variables_for(module, x, seed=0):
    """Random variables of ``module``: NumPy draws in the shapes that init gives."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    leaves, tree = jax.tree.flatten(shapes)
    fans = [max(leaf.size / leaf.shape[-1], 1) for leaf in leaves]
    draws = [
        normal(leaf.shape, seed + 100 + i) / np.float32(np.sqrt(fan))
        for i, (leaf, fan) in enumerate(zip(leaves, fans, strict=True))
    ]
    return jax.tree.unflatten(tree, draws)


def forward_and_gradients(module, variables, x, cotangent):
    """The output, and the gradients of <output, cotangent> by variables and input."""

    @jax.jit
    def run(variables, x, cotangent):
        y, pullback = jax.vjp(module.apply, variables, x)
        return y, *pullback(cotangent)

    return run(variables, x, cotangent)


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
