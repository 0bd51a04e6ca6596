"""The blocks against PyTorch: by golden files, and live where torch is installed."""

import importlib.util

import jax
import numpy as np
import pytest

from tests import cases, make_golden

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="the live comparison needs the extra `parity`; golden files stand in",
)


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(part.key for part in path): leaf for path, leaf in leaves}


def check(case, implementation, expected):
    variables, x, cotangent = case.arrays()
    module = case.module(implementation=implementation)
    y, d_variables, d_x = cases.forward_and_gradients(module, variables, x, cotangent)
    actual = {"y": y, "x": d_x, **named(d_variables["params"])}
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        scale = max(np.abs(array).max(), 1.0)
        np.testing.assert_allclose(
            actual[name] / scale, array / scale, rtol=0, atol=1e-5, err_msg=name
        )


@pytest.fixture(scope="module")
def golden():
    with np.load(make_golden.PATH) as file:
        return dict(file)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("case", cases.GOLDEN, ids=lambda case: case.name)
def test_golden(golden, case, implementation):
    prefix = f"{case.name}:"
    expected = {
        key.removeprefix(prefix): array
        for key, array in golden.items()
        if key.startswith(prefix)
    }
    check(case, implementation, expected)


@needs_torch
@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("case", cases.LIVE, ids=lambda case: case.name)
def test_live(case, implementation):
    check(case, implementation, make_golden.run(case))


@needs_torch
def test_golden_files_are_what_torch_gives(golden):
    for case in cases.GOLDEN:
        for name, array in make_golden.run(case).items():
            np.testing.assert_allclose(
                golden[f"{case.name}:{name}"], array, rtol=1e-4, atol=1e-5
            )
