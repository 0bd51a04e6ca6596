"""Every block where users have it: behind other layers, in one compiled program.

XLA computes a cheap producer again in each loop that reads it, and may round it
differently in each. So the gradient of every parameter is compared with the one that is
computed operation by operation, at sizes that are no powers of two.
"""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_attn.blocks import BLOCKS
from tests.cases import IMPLEMENTATIONS, OTHER_FORMS, long_unless, normal, variables_for
from tests.compilation import jit_as_users_do

SHAPES = (
    (2, 14, 14, 32),
    (3, 8, 8, 32),
    (1, 28, 28, 20),
    (3, 4, 4, 33),
    (8, 14, 14, 96),
    (2, 11, 9, 24),
    (3, 13, 7, 40),
)

BEFORE: dict[str, Callable[..., jax.Array]] = {
    "norm": lambda y, x: y,
    "relu": lambda y, x: nn.relu(y),
    "silu": lambda y, x: nn.silu(y),
    "residual": lambda y, x: nn.relu(y + 0.3 * x),
    "affine": lambda y, x: y * 1.1 + 0.37,
    # Constants that the compiler knows, among them the first element.
    "padding": lambda y, x: jnp.pad(nn.relu(y), ((0, 0), (1, 0), (2, 0), (0, 0))),
    "zeros": lambda y, x: y.at[:, :, :2].set(0),
}


class Program(nn.Module):
    """A convolution, BatchNorm in training, one more layer, the block, a head."""

    block: str
    before: str
    features: int
    dtype: jnp.dtype
    implementation: str = "fast"

    @nn.compact
    def __call__(self, x):
        x = x.astype(self.dtype)
        x = nn.Conv(self.features, (1, 1), dtype=self.dtype, name="stem")(x)
        y = nn.Conv(self.features, (3, 3), use_bias=False, dtype=self.dtype)(x)
        y = nn.BatchNorm(use_running_average=False, dtype=self.dtype)(y)
        y = BEFORE[self.before](y, x)
        z = BLOCKS[self.block](
            dtype=self.dtype, implementation=self.implementation, name="attention"
        )(y)
        z = nn.relu(z + y).mean((1, 2))
        return nn.Dense(5, dtype=jnp.float32)(z)


def errors(module, plain, x):
    """The compiled gradient of ``module`` against that of ``plain``, op by op."""
    params = draw_params(module, x)

    def loss(module, params):
        y, _ = module.apply({"params": params}, x, mutable=["batch_stats"])
        return jnp.sin(y).sum()

    compiled = jit_as_users_do(jax.grad(partial(loss, module)))(params)
    eager = jax.grad(partial(loss, plain))(params)
    # Of the whole gradient, since single leaves may cancel to their rounding.
    return distances(compiled, eager)


def draw_params(module, x):
    """Parameters from NumPy, since the compilation of ``init`` takes seconds.

    No bias and no scale has a value that the compiler could simplify away.
    """
    start = {"kernel": lambda p: p, "scale": np.ones_like}
    return jax.tree_util.tree_map_with_path(
        lambda path, p: (
            start.get(path[-1].key, np.zeros_like)(p)
            + np.float32(0.1)
            * np.cos(np.arange(p.size, dtype=np.float32)).reshape(p.shape)
        ),
        variables_for(module, x)["params"],
    )


def distances(compiled, eager):
    """Of each leaf, the largest error in units of its largest value."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(eager)]
    size = max(np.abs(leaf).max() for leaf in leaves)

    def distance(a, b):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        return np.abs(a - b).max() / max(np.abs(b).max(), FLOOR * size)

    flat = jax.tree.leaves_with_path(jax.tree.map(distance, compiled, eager))
    return {jax.tree_util.keystr(path): float(error) for path, error in flat}


# Of the largest gradient: a leaf below it has only rounding to compare.
FLOOR = 0.2
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
# One shape for all blocks behind one layer, so that the operations compile once.
CASES = [(b, "float32", s) for b, s in zip(BEFORE, SHAPES, strict=True)]
CASES += [("silu", "bfloat16", SHAPES[3])]


# What decides no maximum has no decision to lose: without the long tests, one program
# of every other block.
WITHOUT_MAXIMUM = ("residual", "float32")


@cache
def has_maximum(block):
    """Whether the gradient goes to the element or the map that is the largest."""
    run = BLOCKS[block](implementation="plain").init_with_output

    def loss(x):
        y, _ = run(jax.random.key(0), x)
        return y.sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((1, 4, 4, 32))))
    return "argmax" in program or "_larger" in program


def is_quick(case, block):
    """Whether it is no long test: every fourth program of those with a maximum."""
    if block in OTHER_FORMS:
        return False
    alike = [
        name
        for name in BLOCKS
        if name not in OTHER_FORMS and has_maximum(name) == has_maximum(block)
    ]
    place = alike.index(block)
    if not has_maximum(block):
        return case[:2] == WITHOUT_MAXIMUM and place % 2 == 0
    return (CASES.index(case) + place) % 4 == 0


@pytest.mark.parametrize(
    "before, dtype, shape, block",
    [
        pytest.param(
            *case,
            block,
            id="-".join((case[0], case[1], block)),
            marks=long_unless(is_quick(case, block)),
        )
        for case in CASES
        for block in BLOCKS
    ],
)
def test_gradients_behind_other_layers(before, dtype, shape, block):
    check(block, before, dtype, shape)


@pytest.mark.long
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("before", BEFORE)
def test_gradients_at_every_shape(before, dtype, implementation, block):
    for shape in SHAPES:
        check(block, before, dtype, shape, implementation)


def check(block, before, dtype, shape, implementation="fast"):
    *_, features = shape
    x = normal((*shape[:3], 8), features)
    make = partial(Program, block, before, features, jnp.dtype(dtype))
    plain = make("plain")
    found = errors(make(implementation), plain, x)
    # A NaN is below no bound.
    wrong = {leaf: e for leaf, e in found.items() if not e <= TOLERANCE[dtype]}
    if wrong and dtype == "bfloat16":
        # A maximum is a tie to within bfloat16's rounding, and either element is
        # right: the compiled definition is as far from its own operations.
        bounds = errors(plain, plain, x)
        wrong = {leaf: e for leaf, e in wrong.items() if not e <= 1.25 * bounds[leaf]}
    assert not wrong
