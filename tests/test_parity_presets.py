"""The presets against the modules that they stand for."""

import importlib.util

import pytest

from tests import cases, parity_table

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "timm"))),
    reason="the comparison needs torch and timm, of the extra `parity`",
)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("case", parity_table.CASES, ids=lambda case: case.name)
def test_live(case, implementation):
    errors = parity_table.preset_errors(case, implementation)
    assert max(errors.values()) <= parity_table.LIMIT, errors
