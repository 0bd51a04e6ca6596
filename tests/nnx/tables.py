"""What is proven of each block in each API, and how far NNX is from Linen.

From the root of a checkout::

  python -m tests.nnx.tables laws         # which test runs for which block
  python -m tests.nnx.tables differences  # the largest ones, with the installed Flax
"""

import contextlib
import io
import sys
from collections import defaultdict
from functools import partial

import flax
import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import flax_attn.nnx
from flax_attn.blocks import BLOCKS
from tests.cases import variables_for
from tests.nnx.cases import COTANGENT, MASK, X, create, gradients, linen_gradients, pair
from tests.nnx.test_norms import WITH_NORM, norm_field

APIS = {"Linen": "tests/laws", "NNX": "tests/nnx"}


class Collected:
    """The tests, by law, of each block: "x", or "long" where all are so marked."""

    def __init__(self):
        self.cells = defaultdict(dict)

    def pytest_collection_modifyitems(self, items):
        for item in items:
            given = getattr(item, "callspec", None)
            for value in given.params.values() if given else ():
                block = getattr(value, "block", value)
                if isinstance(block, str) and block in BLOCKS:
                    law = item.originalname.removeprefix("test_").replace("_", " ")
                    mark = "long" if item.get_closest_marker("long") else "x"
                    if self.cells[law].get(block) != "x":
                        self.cells[law][block] = mark


def laws():
    """Rows of the table of laws."""
    yield ["API", "law", *BLOCKS]
    for api, folder in APIS.items():
        collected = Collected()
        options = ["--collect-only", "-q", "-m", "", "-n", "0", "-W", "ignore"]
        with contextlib.redirect_stdout(io.StringIO()):
            code = pytest.main([folder, *options], plugins=[collected])
        assert code == 0, f"{folder} cannot be collected"
        for law, blocks in collected.cells.items():
            yield [api, law, *(blocks.get(name, "") for name in BLOCKS)]


def largest(got, expected):
    """The largest difference of two trees, relative to the largest value expected."""
    a, b = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (got, expected)
    )
    return np.abs(a - b).max() / np.abs(b).max()


def state_difference(name):
    """Of the statistics that one step of training leaves in the block's BatchNorm."""
    field = norm_field(name)
    norm = partial(nn.BatchNorm, momentum=0.9, use_running_average=False)
    linen = BLOCKS[name](**{field: norm})
    block = create(name, **{field: partial(nnx.BatchNorm, momentum=0.9)})
    params = variables_for(linen, X)["params"]
    variables = flax_attn.nnx.to_linen(block) | {"params": params}
    flax_attn.nnx.from_linen(block, variables)
    nnx.jit(lambda block: block(X, MASK))(block)
    run = jax.jit(lambda v: linen.apply(v, X, MASK, mutable=["batch_stats"])[1])
    got = flax_attn.nnx.to_linen(block)["batch_stats"]
    return largest(got, run(variables)["batch_stats"])


def differences():
    """Rows of the table of differences."""
    yield ["block", "output", "gradients", "variables", "statistics"]
    for name in BLOCKS:
        block, linen, variables = pair(name)
        got = nnx.jit(gradients)(block, X, COTANGENT)
        expected = linen_gradients(linen, variables)
        row = [largest(got[0], expected[0]), largest(got[1:], expected[1:])]
        row.append(largest(flax_attn.nnx.to_linen(block), variables))
        cells = [f"{value:.1e}" for value in row]
        cells.append(f"{state_difference(name):.1e}" if name in WITH_NORM else "")
        yield [name, *cells]


def main(which):
    """Prints a table in Markdown."""
    print(f"jax {jax.__version__}, flax {flax.__version__}\n")
    for i, row in enumerate({"laws": laws, "differences": differences}[which]()):
        print(f"| {' | '.join(row)} |")
        if i == 0:
            print("|" + "---|" * len(row))


if __name__ == "__main__":
    if sys.argv[1:] not in (["laws"], ["differences"]):
        sys.exit(__doc__)
    main(sys.argv[1])
