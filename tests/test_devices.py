"""Several devices in one process: the same run as on one."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import tiny_run
from train import devices, inputs, loop
from train.config import Config

CONFIG = Config(depth=8, batch_size=8, epochs=1, devices=1, attention="cbam")


@pytest.fixture(scope="module")
def alone():
    return losses_of(1)


def losses_of(count):
    """The losses of each step of an epoch, and the statistics after it."""
    config = loop.config_lib.resolve(dataclasses.replace(CONFIG, devices=count))
    fed = inputs.DeviceInputs(tiny_run.images(), config, devices.make_mesh(count))
    training = loop.Training(config, fed)
    losses = []
    for item in fed.calls(1, 0, 1):
        training.progress.state, (loss, _) = training.train_steps(
            training.progress.state, fed.data, item
        )
        losses.append(np.asarray(loss)[0])
    state = training.progress.state
    loss, accuracy = training.evaluate(state)
    # Computed by all, and not by one of them over and over.
    assert item.sharding.shard_shape(item.shape) == (1, 8 // count)
    assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == count
    return losses, loss, accuracy, state


@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_same_losses_on_many_devices(count, alone):
    """Global-batch statistics too: with a share's own, losses part at the first step.

    The losses of five steps from 0.1 on; rounding grows from step to step.
    """
    losses, loss, accuracy, state = losses_of(count)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    np.testing.assert_allclose(loss, alone[1], rtol=1e-4)
    assert accuracy == alone[2]
    for mine, theirs in zip(
        *map(jax.tree.leaves, (state.batch_stats, alone[3].batch_stats)), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    print(f"{count} devices: {np.array(losses)}; one: {np.array(alone[0])}")


@pytest.mark.parametrize(
    "batch_size, nearest", [(2, 8), (12, 8), (13, 16), (20, 16), (28, 24), (30, 32)]
)
def test_a_batch_that_does_not_divide(batch_size, nearest):
    with pytest.raises(ValueError, match=f"multiple of the 8 .* nearest is {nearest}."):
        devices.check_batch(batch_size, devices.make_mesh())


def test_a_run_goes_on_with_other_devices(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=2)
    whole = loop.train(config, tiny_run.images())
    with pytest.MonkeyPatch.context() as patch:
        asked = iter(range(100))
        patch.setattr(
            loop.interrupt, "requested", lambda: 15 if next(asked) >= 6 else None
        )
        with pytest.raises(loop.interrupt.Interrupted):
            loop.train(config, tiny_run.images(), tmp_path)
    other = dataclasses.replace(config, devices=4)
    run = loop.train(other, tiny_run.images(), tmp_path)
    assert run.history[0]["train_loss"] == whole.history[0]["train_loss"]
    np.testing.assert_allclose(
        run.history[1]["train_loss"], whole.history[1]["train_loss"], rtol=1e-4
    )
