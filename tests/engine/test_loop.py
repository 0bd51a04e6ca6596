import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_attn.resnet import cifar_resnet
from tests.cases import normal
from train.data import inputs
from train.data.cifar import ImageSet
from train.engine import attention, devices, loop, model
from train.engine import config as config_lib
from train.engine.config import Config

TINY = Config(
    depth=8, dataset="digits", epochs=2, batch_size=16, attention="cbam", devices=1
)


pytestmark = pytest.mark.usefixtures("shared_compilations", "tiny_network")


@pytest.fixture(scope="module")
def images():
    rng = np.random.RandomState(0)
    labels = rng.randint(0, 3, 77).astype(np.int32)
    # Each class has a shade of its own.
    pixels = rng.randint(0, 60, (77, 8, 8, 3)) + 80 * labels[:, None, None, None]
    pixels = pixels.astype(np.uint8)
    return ImageSet(pixels[:50], labels[:50], pixels[50:], labels[50:], 3, flip=True)


@pytest.fixture(scope="module")
def done(images, tmp_path_factory):
    """A run for several tests, and its metrics."""
    folder = tmp_path_factory.mktemp("run")
    run = loop.train(TINY, images, folder)
    return run, read(folder / "metrics.jsonl"), read(folder / "timing.jsonl")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run(done):
    run, lines, timing = done
    assert lines == run.history and timing == run.timing
    assert [line["epoch"] for line in lines] == [1, 2]
    assert [line["step"] for line in lines] == [3, 6]
    fields = "epoch step train_loss train_accuracy test_loss test_accuracy"
    assert list(lines[0]) == [*fields.split(), "learning_rate"]
    fields = "epoch steps compiled step_seconds images_per_second seconds"
    assert list(timing[0]) == fields.split()
    assert [line["compiled"] for line in timing] == [True, False]
    for line in lines + timing:
        assert np.isfinite(list(line.values())).all()
    for line in timing:
        assert line["steps"] * line["step_seconds"] < line["seconds"]
        assert np.isclose(line["images_per_second"] * line["step_seconds"], 16)
    assert int(run.state.step) == 6
    total, attention = loop.count_parameters(run.state.params)
    # At 16 channels, r = 16: the MLP's C * h twice, and the 7x7's 98.
    assert attention == 2 * 16 * 1 + 98
    assert f"{total:,} parameters ({attention:,} of them attention)" in run.summary()
    assert "ResNet-8, attention cbam, on digits" in run.summary()


def test_the_same_seed_gives_the_same_run(images, done):
    again = loop.train(TINY, images)
    chex.assert_trees_all_equal(again.state.params, done[0].state.params)


@pytest.mark.long
def test_steps_in_one_call_are_the_same_steps(images, done):
    """Three steps an epoch, as two and one."""
    config = dataclasses.replace(TINY, epochs=1)
    one = loop.train(config, images)
    many = loop.train(dataclasses.replace(config, steps_per_call=2), images)
    losses = [run.history[0]["train_loss"] for run in (one, many)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert int(many.state.step) == 3


def test_bfloat16_with_smoothed_labels(images, done):
    config = dataclasses.replace(TINY, epochs=1, dtype="bfloat16", label_smoothing=0.3)
    run = loop.train(config, images)
    assert np.isfinite(run.history[0]["test_loss"])
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(run.state.params)}
    assert dtypes == {jnp.dtype("float32")}
    # Smoothing bounds the loss away from that of the sharp labels.
    assert abs(run.history[0]["train_loss"] - done[1][0]["train_loss"]) > 0.01


@pytest.mark.parametrize("block", ["none", "se", "cbam+identity"])
def test_strict_dtype_promotion_in_the_steps_of_a_whole_network(
    images, block, monkeypatch
):
    """Traced only, which is when dtypes are promoted."""
    monkeypatch.setattr(model, "cifar_resnet", cifar_resnet)
    fields = attention.attention_fields(block) | {"label_smoothing": 0.1}
    config = config_lib.resolve(dataclasses.replace(TINY, **fields))
    fed = inputs.DeviceInputs(images, config, devices.make_mesh(1))
    key = jax.random.key(0)
    with jax.numpy_dtype_promotion("strict"):
        optimizer = loop.make_optimizer(config, loop.make_schedule(config, 3, 6))
        network = loop.make_model(config, fed.num_classes)
        state = jax.eval_shape(lambda: loop.make_state(network, optimizer, key, 32))
        assert "stage3_block1" in state.params
        arguments = (state, fed.data, jax.random.key_data(key))
        arguments += (next(fed.train_batches(1, 0, 1)),)
        after, metrics = jax.eval_shape(loop.make_train_steps(config, fed), *arguments)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert metrics.loss.dtype == jnp.float32


@pytest.mark.parametrize("flag, kind", [("nans", "nan"), ("infs", "inf")])
def test_a_search_finds_the_operation(flag, kind, images):
    """In the third step, long after the contexts that JAX enters when it compiles."""
    config = dataclasses.replace(TINY, learning_rate=1e38, weight_decay=0.0)
    jax.config.update(f"jax_debug_{flag}", True)
    try:
        message = rf"value \({kind}\) encountered in"
        with pytest.raises(FloatingPointError, match=message):
            loop.train(config, images)
    finally:
        jax.config.update(f"jax_debug_{flag}", False)


def test_steps_per_call_suits_the_backend(monkeypatch):
    assert loop.steps_per_call(TINY, 390) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert loop.steps_per_call(TINY, 390) == 78
    assert loop.steps_per_call(TINY, 11) == 11
    # No useful divisor: five calls of 87, 87, 87, 87 and 83 steps.
    assert loop.steps_per_call(TINY, 431) == 87
    assert loop.steps_per_call(dataclasses.replace(TINY, steps_per_call=50), 11) == 11


def test_an_epoch_shows_every_image_once():
    key = jax.random.key(0)
    orders = [np.asarray(inputs.epoch_order(key, epoch, 50)) for epoch in (1, 2, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    np.testing.assert_array_equal(orders[0], orders[2])
    assert (orders[0] != orders[1]).any()


@pytest.mark.parametrize("batch_size", [4, 27, 50])
def test_evaluation_counts_each_image_once(images, done, batch_size):
    config = config_lib.resolve(dataclasses.replace(TINY, batch_size=batch_size))
    fed = inputs.DeviceInputs(images, config, devices.make_mesh(1))
    loss, accuracy = loop.make_evaluate(fed)(done[0].state)
    pixels = images.train_images / 255
    x = images.test_images / 255 - pixels.mean((0, 1, 2))
    x = np.float32(x / pixels.std((0, 1, 2)))
    logits = np.float64(jax.jit(done[0].model.apply)(done[0].variables, x))
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -logp[np.arange(27), images.test_labels].mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    expected = (logits.argmax(-1) == images.test_labels).mean()
    np.testing.assert_allclose(accuracy, expected, rtol=1e-6)


def test_augmentation_draws_for_each_image():
    image = normal((1, 32, 32, 3), 0)
    images = jnp.asarray(np.repeat(image, 200, axis=0))
    moved = np.asarray(inputs.augment(images, jax.random.key(0), flip=True))
    padded = np.pad(image[0], ((4, 4), (4, 4), (0, 0)))
    seen = set()
    for one in moved:
        for i in range(9):
            for j in range(9):
                crop = padded[i : i + 32, j : j + 32]
                for flip, candidate in enumerate((crop, crop[:, ::-1])):
                    if np.array_equal(one, candidate):
                        seen.add((i, j, flip))
    rows, columns, flips = map(set, zip(*seen, strict=True))
    assert rows == columns == set(range(9)) and flips == {0, 1}
    assert len(seen) > 100
    still = inputs.augment(images, jax.random.key(0), flip=False)
    mirrored = np.asarray(still)[:, :, ::-1]
    assert (moved == np.asarray(still)).all((1, 2, 3)).sum() in range(60, 140)
    assert (moved == mirrored).all((1, 2, 3)).sum() in range(60, 140)


def test_only_kernels_decay(done):
    config = dataclasses.replace(TINY, weight_decay=0.5)
    optimizer = loop.make_optimizer(config, optax.constant_schedule(1.0))
    params = jax.tree.map(jnp.ones_like, done[0].state.params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        assert bool(update.any()) == (path[-1].key == "kernel"), path


def test_the_learning_rate_of_the_attention(done):
    """A step's updates are scaled exactly, and the default is the optimizer without."""
    params = done[0].state.params
    updates, states = {}, {}
    for factor in (1.0, 0.25):
        config = dataclasses.replace(TINY, attention_lr_scale=factor)
        optimizer = loop.make_optimizer(
            config_lib.resolve(config), optax.constant_schedule(1.0)
        )
        states[factor] = optimizer.init(params)
        update = jax.jit(optimizer.update)
        updates[factor], _ = update(params, states[factor], params)
    decay = optax.add_decayed_weights(0.1, model.kernel_mask)
    before = optax.chain(decay, optax.sgd(lambda step: 1.0, 0.9))
    chex.assert_trees_all_equal_structs(states[1.0], before.init(params))
    scaled = set()
    for (path, full), slow in zip(
        jax.tree_util.tree_leaves_with_path(updates[1.0]),
        jax.tree.leaves(updates[0.25]),
        strict=True,
    ):
        factor = 0.25 if "attention" in {part.key for part in path} else 1.0
        assert full.any()
        np.testing.assert_array_equal(slow, factor * full, str(path))
        scaled.add(factor)
    assert scaled == {0.25, 1.0}


def test_the_schedule():
    config = dataclasses.replace(TINY, learning_rate=0.4, warmup_epochs=2)
    schedule = loop.make_schedule(config, steps_per_epoch=10, total=400)
    assert schedule(0) == 0 and schedule(400) == 0
    np.testing.assert_allclose([schedule(10), schedule(20)], [0.2, 0.4], rtol=1e-6)
    np.testing.assert_allclose(schedule(210), 0.2, rtol=1e-6)
    # A short run warms up for a tenth of it.
    short = loop.make_schedule(config, steps_per_epoch=10, total=100)
    assert short(10) == np.float32(0.4)


def test_a_loss_that_is_not_finite_stops_the_run(images, tmp_path, monkeypatch):
    """In the middle of a call, by finite logits whose difference overflows."""

    def make_far(config, schedule):
        def far(updates, params):
            bias = updates["head"]["bias"]
            return updates | {"head": updates["head"] | {"bias": 3e38 * jnp.sign(bias)}}

        return optax.stateless(far)

    monkeypatch.setattr(loop, "make_optimizer", make_far)
    config = dataclasses.replace(TINY, steps_per_call=3)
    match = (
        r"The loss is (nan|inf) at epoch 1, step 2; .* There is no checkpoint\. A lo"
    )
    with pytest.raises(FloatingPointError, match=match):
        loop.train(config, images, tmp_path)


def test_a_norm_inside_a_preset_trains(images):
    """Its averages move in training and are only used in evaluation.

    With strict dtype promotion, for all of a run.
    """
    fields = {"attention": "none", "preset": "timm_cbam", "label_smoothing": 0.1}
    config = dataclasses.replace(TINY, epochs=1, **fields)
    with jax.numpy_dtype_promotion("strict"):
        run = loop.train(config, images)
    averages = run.variables["batch_stats"]["stage1_block1"]["attention"]["spatial"]
    assert averages["norm"]["mean"] != 0 and averages["norm"]["var"] != 1
    x = np.float32(images.test_images[:3] / 255)
    apply = jax.jit(run.state.apply_fn)
    # With the statistics of the batch, an image's logits would depend on the other.
    first, second = (apply(run.variables, x[[0, i]])[0] for i in (1, 2))
    np.testing.assert_array_equal(first, second)
