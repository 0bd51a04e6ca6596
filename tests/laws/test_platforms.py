"""What the blocks run on a GPU, as far as a CPU can tell."""

import jax
import numpy as np
import pytest

from flax_attn.blocks import BLOCKS
from flax_attn.functional import _convolution
from tests.cases import long_unless, variables_for
from tests.laws.test_programs import check
from tests.platforms import code_for


@pytest.mark.parametrize(
    "block, platform", [*((b, "cuda") for b in BLOCKS), ("cbam-conv", "rocm")]
)
def test_a_gpu_never_waits_for_the_host(block, platform):
    """No branch and no loop, whose condition the host would read before it goes on."""
    module = BLOCKS[block]()
    x = np.ones((2, 6, 5, 32), np.float32)

    def loss(variables, x):
        return module.apply(variables, x).sum()

    traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(
        variables_for(module, x), x
    )
    program = traced.lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")
    # The larger of two maps is decided in a branch: see `_maxima.decide`.
    expected = ["stablehlo.case"] if block == "scse-max" else []
    assert [op.name for op in within(program.operation) if waits(op)] == expected


def within(op):
    yield op
    for region in op.regions:
        for block in region:
            for inner in block:
                yield from within(inner.operation)


def waits(op):
    """Whether the program goes on only once the host knows a value."""
    if op.name == "stablehlo.case":
        # A platform's code is a case of one branch, and its number one of constants.
        is_number = op.operands[0].owner.name == "stablehlo.constant"
        return len(op.regions) > 1 and not is_number
    return op.name in ("stablehlo.if", "stablehlo.while")


@pytest.mark.parametrize(
    "block, before, shape",
    [
        pytest.param(*case, marks=long_unless(case[0] == "spatial"))
        for case in [
            ("eca", "silu", (3, 4, 4, 33)),
            ("spatial", "residual", (2, 11, 9, 24)),
            ("cbam", "padding", (3, 13, 7, 40)),
            ("cbam-conv", "affine", (2, 14, 14, 32)),
        ]
    ],
)
def test_gradients_of_programs_with_the_convolutions_of_a_gpu(block, before, shape):
    with code_for("cuda", _convolution):
        check(block, before, "float32", shape)
