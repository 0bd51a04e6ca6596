"""Several devices in one process: the same run as on one."""

import jax
import numpy as np
import pytest

from tests import tiny_run
from train.data import inputs
from train.engine import devices, loop
from train.engine.config import Config, resolve


def losses_of(count):
    """The mean loss of an epoch's five steps, and that of the test images."""
    config = Config(depth=8, batch_size=8, epochs=1, attention="se", devices=count)
    (line,) = loop.train(config, tiny_run.images()).history
    return line["train_loss"], line["test_loss"], line["test_accuracy"]


@pytest.fixture(scope="module")
def alone(tiny_network):
    return losses_of(1)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.long), 8])
def test_the_same_losses_on_many_devices(count, alone):
    """With the statistics of each shard, not of the batch, they differ at once."""
    losses = losses_of(count)
    print(f"{count} devices: {losses}, one: {alone}")
    np.testing.assert_allclose(losses[0], alone[0], rtol=1e-5)
    np.testing.assert_allclose(losses[1], alone[1], rtol=1e-4)
    assert losses[2] == alone[2]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_each_device_has_its_shard(count):
    mesh = devices.make_mesh(count)
    fed = inputs.DeviceInputs(tiny_run.images(), resolve(Config(batch_size=8)), mesh)
    first = next(fed.train_batches(1, 0, 2))
    assert first.shape == (2, 8)
    assert first.sharding.shard_shape(first.shape) == (2, 8 // count)
    item, weights = next(fed.test_batches())
    for array in (item, weights):
        assert array.sharding.shard_shape(array.shape) == (8 // count,)
    for array in jax.tree.leaves(fed.data):
        assert array.is_fully_replicated and len(array.devices()) == count


@pytest.mark.parametrize(
    "batch_size, nearest", [(2, 8), (12, 8), (13, 16), (20, 16), (28, 24), (30, 32)]
)
def test_a_batch_that_does_not_divide(batch_size, nearest):
    with pytest.raises(ValueError, match=f"multiple of the 8 .* nearest is {nearest}."):
        devices.check_batch_divides(batch_size, devices.make_mesh())
