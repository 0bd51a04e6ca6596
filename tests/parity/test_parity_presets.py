"""The presets against the PyTorch modules they correspond to."""

import importlib.util
import sys

import numpy as np
import pytest

from flax_attn import presets
from flax_attn.blocks.channel import hidden_width
from tests import cases
from tests.parity import parity_table, timm_layers

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "timm"))),
    reason="the comparison needs torch and timm, of the group `parity`",
)


@pytest.mark.parametrize("case", parity_table.CASES, ids=lambda case: case.name)
def test_live(case):
    for implementation, errors in parity_table.preset_errors(case).items():
        failed = {n: e for n, e in errors.items() if not e <= parity_table.LIMIT}
        assert not failed, implementation


def test_widths_for_any_number_of_channels():
    """timm's rules round in floating point, ours in integers."""
    timm = timm_layers.load()
    for channels in range(1, 4097):
        for preset, ratio, divisor in (
            (presets.timm_se, 1 / 16, 8),
            (presets.timm_cbam(train=False), 1 / 16, 1),
            (presets.timm_gc, 1 / 8, 1),
            (presets.timm_coordinate(train=False), 1 / 16 * (2 / 3), 8),
        ):
            expected = timm.make_divisible(channels * ratio, divisor, round_limit=0.0)
            assert hidden_width(preset(), channels) == expected, channels
    for channels in (*range(1, 20), *(2**i for i in range(5, 14)), 54, 320, 1000, 8191):
        for preset, module in (
            (presets.timm_eca, timm.eca.EcaModule),
            (presets.timm_ceca, timm.eca.CecaModule),
        ):
            (expected,) = module(channels).conv.kernel_size
            assert preset.keywords["kernel_size"](channels) == expected, channels


def test_loading_layers_leaves_timm_unchanged():
    before = {name: module for name, module in sys.modules.items() if is_foreign(name)}
    timm_layers.load()
    assert before == {n: module for n, module in sys.modules.items() if is_foreign(n)}


def is_foreign(name):
    return name.split(".")[0] in ("timm", "torchvision")


def test_errors_are_relative_to_the_largest_entry_or_1():
    expected = {"small": np.array([0.5, 0.25]), "large": np.array([[-50.0, 1.0]])}
    actual = {"small": np.array([0.5, 0.375]), "large": np.array([[-50.0, 2.0]])}
    assert parity_table.errors(actual, expected) == {"small": 0.125, "large": 0.02}
    with pytest.raises(AssertionError):
        parity_table.errors(actual | {"new": actual["small"]}, expected)
    with pytest.raises(AssertionError):
        parity_table.errors(actual | {"large": np.float64(-50)}, expected)


def test_a_nan_is_an_error():
    found = parity_table.errors({"y": np.array([np.nan])}, {"y": np.array([0.0])})
    assert not found["y"] <= parity_table.LIMIT


def test_the_table(monkeypatch, capsys):
    """One line per preset, with the errors that test_live checks."""
    monkeypatch.setattr(cases, "LIVE", [])
    found = {"y": 2e-7, "x": 3e-7, "params/a": 4e-7, "batch_stats/b": 5e-8}
    monkeypatch.setattr(parity_table, "preset_errors", lambda case: {"fast": found})
    parity_table.main()
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("`")[-2] for line in lines[2:]]
    assert len(set(names)) == len(names)
    assert set(presets.__all__) - {"official_eca"} == {
        name for name in names if "(" not in name
    }
    assert "| timm: `cbam` | `timm_cbam` | 2e-07 | 4e-07 | 5e-08 |" in lines
