"""The programs that the benchmark times."""

import math

import jax.numpy as jnp
import numpy as np

import flax_attn
from flax_attn.blocks import Attention, create
from tests.cases import normal, variables_for
from train.study import blocks

SHAPE = (2, 4, 4, 16)


def test_geometric_means():
    rows = [
        {"block": "se", "contender": "fast", "dtype": "float32"}
        | {"forward": forward, "forward_backward": 5.0, "added": added}
        for forward, added in ((1.0, -1.0), (4.0, 2.0))
    ]
    (mean,) = blocks.geometric_means(rows)
    assert mean["shapes"] == 2 and "added_backward" not in mean
    assert math.isclose(mean["forward"], 2)
    assert math.isclose(mean["forward_backward"], 5)
    # Noise makes differences negative, which have no geometric mean.
    assert math.isclose(mean["added"], 0.5)


def test_inside_is_the_difference_of_two_programs(monkeypatch):
    """By a clock that gives each program a time of its own."""
    seconds = {
        "copy": 2.0,
        **{"fast forward": 4.0, "fast both": 6.0},
        **{"none inside forward": 10.0, "none inside both": 30.0},
        **{"fast inside forward": 11.0, "fast inside both": 36.0},
    }

    def fastest(calls, rounds):
        assert calls.keys() == seconds.keys() and rounds == 7
        for call in calls.values():
            call()
        return seconds

    monkeypatch.setattr(blocks, "fastest", fastest)
    (row,) = blocks.measure_block("se", SHAPE, "float32", [], 7, inside=True)
    times = (row["forward"], row["forward_backward"])
    assert times == (2.0, 3.0) and row["copy_ms"] == 2000
    assert (row["added"], row["added_backward"]) == (0.5, 3.0)


def test_the_stem_is_convolution_norm_relu_and_the_block():
    x = normal((2, 4, 4, 8), 0)
    block = create("cbam")
    stem = blocks.Stem(16, jnp.float32, block)
    variables = variables_for(stem, x)
    y, _ = stem.apply(variables, x, mutable=["batch_stats"])
    params = variables["params"]
    kernel = params["Conv_0"]["kernel"][0, 0]
    maps = np.einsum("nhwc,cd->nhwd", x, kernel)
    maps = (maps - maps.mean((0, 1, 2))) / np.sqrt(maps.var((0, 1, 2)) + 1e-5)
    norm = params["BatchNorm_0"]
    maps = np.maximum(maps * norm["scale"] + norm["bias"], 0)
    expected = block.apply({"params": params["attention"]}, maps)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    bare = blocks.Stem(16, jnp.float32, None)
    without = {name: params[name] for name in ("Conv_0", "BatchNorm_0")}
    bare_variables = {**variables, "params": without}
    y, _ = bare.apply(bare_variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(y, maps, rtol=1e-4, atol=1e-5)


class Halve(Attention):
    """A block of somebody else."""

    def __call__(self, x, mask=None):
        return x * 0.5


def test_a_new_block_in_the_registry_is_measured(monkeypatch):
    monkeypatch.setitem(flax_attn.blocks._blocks, "halve", Halve)
    rows = list(blocks.measure_block("halve", SHAPE, "float32", ["plain", "torch"], 1))
    # PyTorch has none.
    assert [row["contender"] for row in rows] == ["fast", "plain"]
    assert all(row["forward"] > 0 and row["compile_seconds"] > 0 for row in rows)
