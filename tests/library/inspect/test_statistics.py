"""The statistics of gates: their values, their table, and what they refuse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from flax_attn.inspect import attention_maps, statistics


def entropy(g):
    """By hand, with the limits at 0 and 1."""
    return -sum(p * math.log2(p) for p in (g, 1 - g) if p > 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16, np.float16])
def test_statistics_are_those_of_the_elements(dtype):
    values = np.array([0.0, 0.03125, 0.25, 0.5, 0.75, 0.96875, 1.0, 1.0])
    (row,) = statistics(values.astype(dtype).reshape(2, 4))
    assert (row.path, row.shape) == ("", (2, 4))
    assert (row.below, row.above, row.mean) == (2 / 8, 3 / 8, values.mean())
    assert row.entropy == pytest.approx(np.mean([entropy(g) for g in values]), 1e-12)


def test_values_on_a_limit_are_not_counted():
    gate = np.array([0.25, 0.2, 0.75, 0.8])
    (row,) = statistics(gate, low=0.25, high=0.75)
    assert (row.below, row.above) == (0.25, 0.25)
    (row,) = statistics(gate)
    assert (row.below, row.above) == (0, 0)


def test_many_half_precision_elements_do_not_stall_the_mean():
    (row,) = statistics(jnp.full((300, 300), 0.75, jnp.bfloat16))
    assert row.mean == 0.75 and row.entropy == pytest.approx(entropy(0.75), 1e-12)


def test_what_a_block_adds_is_left_out():
    x = jnp.linspace(-4, 4, 32).reshape(1, 2, 2, 8)
    model = nn.Sequential([flax_attn.SE(), flax_attn.GlobalContext()])
    gates = attention_maps(model, model.init(jax.random.key(0), x), x)
    assert list(gates) == ["layers_0/channel_gate", "layers_1/channel_shift"]
    assert [row.path for row in statistics(gates)] == ["layers_0/channel_gate"]
    assert not statistics({"channel_shift/0": np.array([-3.0])})


def test_statistics_print_as_a_table():
    gates = {"stage1/channel_gate": np.full((2, 1, 1, 16), 0.5), "b": np.ones(4)}
    table = statistics(gates)
    assert [row.path for row in table] == list(gates)
    header, first, second = str(table).splitlines()
    assert header.split() == ["path", "shape", "below", "above", "mean", "entropy"]
    assert first.split() == [
        *("stage1/channel_gate", "2×1×1×16", "0.0%", "0.0%", "0.500", "1.000")
    ]
    assert second.split() == ["b", "4", "0.0%", "100.0%", "1.000", "0.000"]
    assert len({len(line) for line in (header, first, second)}) == 1
    assert "gate" in str(statistics(np.ones(3))).splitlines()[1]


@pytest.mark.parametrize(
    "gates, options, says",
    [
        ({}, {}, "`gates` must contain at least one"),
        ({"a": np.array([0.5, 1.5])}, {}, r"`gates`\['a'\] must .* from 0.5 to 1.5"),
        (np.array([-0.5, 0.5]), {}, "`gates` must .* from -0.5 to 0.5"),
        (np.array([np.nan, 0.5]), {}, "`gates` must .* from nan to nan"),
        (np.zeros((2, 0)), {}, r"`gates` must have elements.* got shape \(2, 0\)"),
        (np.ones(2), {"low": 0.9, "high": 0.1}, "`low` and `high` .* 0.9 and 0.1"),
        (np.ones(2), {"high": 1.1}, "`low` and `high` .* 0.05 and 1.1"),
    ],
)
def test_statistics_raises(gates, options, says):
    with pytest.raises(ValueError, match=says):
        statistics(gates, **options)
