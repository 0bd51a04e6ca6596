"""The blocks against PyTorch: by golden files, and live where torch is installed."""

import importlib.util

import numpy as np
import pytest

from tests import cases
from tests.parity import make_golden, parity_table

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="the live comparison needs the group `parity`; golden files stand in",
)


def check(case, implementation, expected):
    errors = parity_table.article_errors(case, implementation, expected)
    assert not {n: e for n, e in errors.items() if not e <= parity_table.LIMIT}


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
