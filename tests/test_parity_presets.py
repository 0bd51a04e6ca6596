"""The presets against the modules that they stand for."""

import importlib.util

import pytest

from tests import parity_table

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "timm"))),
    reason="the comparison needs torch and timm, of the extra `parity`",
)


@pytest.mark.parametrize("case", parity_table.CASES, ids=lambda case: case.name)
def test_live(case):
    for implementation, errors in parity_table.preset_errors(case).items():
        assert max(errors.values()) <= parity_table.LIMIT, (implementation, errors)
