"""Programs compiled for a TPU; the compiler itself is an extra."""

import math
from functools import partial
from importlib.util import find_spec

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from flax_attn.resnet import BasicBlock, ResNet
from train.engine import devices
from train.engine.model import TrainState
from train.study import networks, tpu


def test_a_topology_that_is_unknown(monkeypatch):
    monkeypatch.setattr(tpu, "find_spec", lambda name: name)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    message = "topology such as v5e:2x2, got 'nonsense'"
    with pytest.raises(ValueError, match=message):
        tpu.open_topology("nonsense")


def test_the_step_of_a_network_is_lowered_from_shapes_alone():
    """On the CPU, since nothing is compiled."""
    make = partial(ResNet, (1,), BasicBlock, width=16, imagenet_stem=False)
    network = ("a network", make, 32, "bfloat16")
    device = jax.devices()[3]
    mesh = Mesh(np.array([device]), (devices.AXIS,), axis_types=(AxisType.Auto,))
    sizes = {}
    for block in ("none", "se"):
        lowered = tpu._lower_step(network, block, "fast", 32, mesh)
        state, data, _, indices = lowered.args_info[0]
        assert isinstance(state, TrainState) and indices.shape == (1, networks.BATCH)
        assert data.images.shape == (networks.BATCH, 32, 32, 3)
        sizes[block] = sum(
            math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)
        )
        assert "bf16" in lowered.as_text()
    # SE at 16 channels, r = 16: 2 * C * h.
    assert sizes["se"] - sizes["none"] == 2 * 16 * 1


@pytest.mark.long
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the group tpu-aot")
def test_a_block_is_compiled():
    (row,) = tpu.compile_block(
        "se", (8, 8, 8, 128), "bfloat16", ["fast"], tpu.open_topology("v5e:2x2")
    )
    assert row["bytes"] > row["forward_bytes"] > 1 and row["seconds"] > 0
