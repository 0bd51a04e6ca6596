"""The training loop: one jitted step over data that lies whole on the device."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state
from jax import lax
from tqdm.auto import tqdm

from train import config as config_lib
from train.config import Config
from train.data import ImageSet
from train.resnet import ATTENTIONS, check_cifar_depth, cifar_resnet

PAD = 4
# Long enough to hide the dispatch of a call, short enough for a bar that moves.
MAX_STEPS_PER_CALL = 100
NAN_ADVICE = "A lower --learning-rate or a longer --warmup-epochs may help."


class TrainState(train_state.TrainState):
    """Step, parameters and optimiser state, and the running batch statistics."""

    batch_stats: Any


@flax.struct.dataclass
class DeviceData:
    """One part of an image set on the device, with what normalises its pixels."""

    images: jax.Array
    labels: jax.Array
    mean: jax.Array
    std: jax.Array


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of a run."""

    config: Config
    model: nn.Module
    state: TrainState
    history: list[dict[str, float]]
    """One entry for each line of metrics.jsonl."""

    @property
    def variables(self) -> dict[str, Any]:
        """The trained variables of ``model``."""
        return _variables(self.state)

    def summary(self) -> str:
        """What was trained and how well it did, in one line."""
        config, last = self.config, self.history[-1]
        total, attention = count_parameters(self.state.params)
        minutes, seconds = divmod(round(sum(h["seconds"] for h in self.history)), 60)
        return (
            f"ResNet-{config.depth}, attention {config.attention}, on "
            f"{config.dataset}: {total:,} parameters ({attention:,} of them "
            f"attention), test accuracy {last['test_accuracy']:.2%} after "
            f"{len(self.history)} epoch{'s' if len(self.history) > 1 else ''} in "
            f"{minutes} min {seconds} s."
        )


def check(config: Config) -> None:
    """Raises ``ValueError`` for a configuration that nothing can be trained by."""
    config_lib.check(config)
    config_lib.check_choice("attention", config.attention, ATTENTIONS)
    check_cifar_depth(config.depth)


def check_batch(config: Config, images: ImageSet) -> None:
    """Raises ``ValueError`` for a batch that ``images`` cannot fill."""
    _, batch_size = config_lib.length(config)
    if batch_size > len(images.train_images):
        raise ValueError(
            f"`batch_size` must be at most the {len(images.train_images):,} training "
            f"images of {config.dataset}, got {batch_size:,}."
        )


def train(config: Config, images: ImageSet, metrics: Path | None = None) -> Run:
    """Trains as ``config`` says and returns the result.

    Args:
      config: what to train.
      images: what to train and evaluate on.
      metrics: a file that gets one line of JSON after each epoch, or None.

    Raises:
      ValueError: the configuration cannot be trained.
      FloatingPointError: the loss is not finite any more.
    """
    check(config)
    check_batch(config, images)
    epochs, batch_size = config_lib.length(config)
    train_data, test_data = to_device(images)
    per_epoch = len(images.train_images) // batch_size
    schedule = make_schedule(config, per_epoch, epochs * per_epoch)
    init_key, order_key, augment_key = jax.random.split(jax.random.key(config.seed), 3)
    model = make_model(config, images.num_classes)
    state = make_state(model, make_optimizer(config, schedule), init_key)
    train_steps = make_train_steps(config, augment_key, flip=images.flip)
    history: list[dict[str, float]] = []
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        order = epoch_order(order_key, epoch, len(images.train_images))
        order = order[: per_epoch * batch_size].reshape(per_epoch, -1)
        with tqdm(
            total=per_epoch, desc=f"epoch {epoch}/{epochs}", unit="step", mininterval=1
        ) as bar:
            state, loss, accuracy = _train_epoch(
                train_steps, state, train_data, order, config, epoch, bar
            )
            trained = time.perf_counter()
            test_loss, test_accuracy = evaluate(state, test_data, batch_size)
            if not math.isfinite(test_loss):
                raise FloatingPointError(
                    f"The test loss is {test_loss} at epoch {epoch}, step "
                    f"{epoch * per_epoch}; training stopped. {NAN_ADVICE}"
                )
            bar.set_postfix(loss=f"{loss:.4f}", test_accuracy=f"{test_accuracy:.2%}")
        line = {
            "epoch": epoch,
            "step": epoch * per_epoch,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "learning_rate": float(schedule(epoch * per_epoch - 1)),
            "images_per_second": order.size / (trained - start),
            "seconds": time.perf_counter() - start,
        }
        history.append(line)
        if metrics is not None:
            with metrics.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
    return Run(config, model, state, history)


def _train_epoch(
    train_steps: Callable[..., Any],
    state: TrainState,
    data: DeviceData,
    order: jax.Array,
    config: Config,
    epoch: int,
    bar: tqdm,
) -> tuple[TrainState, float, float]:
    """Runs one epoch; returns the state, and the mean loss and accuracy of its steps.

    The metrics of a call are fetched when the next one is under way, so that the device
    never waits for the host.
    """
    losses: list[np.ndarray] = []
    accuracies: list[np.ndarray] = []

    def fetch(metrics: tuple[jax.Array, jax.Array]) -> None:
        loss, accuracy = (np.asarray(m, np.float64) for m in metrics)
        bad = np.flatnonzero(~np.isfinite(loss))
        if bad.size:
            step = (epoch - 1) * len(order) + bar.n + int(bad[0]) + 1
            raise FloatingPointError(
                f"The loss is {loss[bad[0]]} at epoch {epoch}, step {step}; training "
                f"stopped. {NAN_ADVICE}"
            )
        losses.append(loss)
        accuracies.append(accuracy)
        bar.set_postfix(loss=f"{loss[-1]:.4f}", refresh=False)
        bar.update(len(loss))

    before = None
    for indices in _chunks(order, steps_per_call(config, len(order))):
        state, metrics = train_steps(state, data, indices)
        if before is not None:
            fetch(before)
        before = metrics
    if before is not None:
        fetch(before)
    return (
        state,
        float(np.concatenate(losses).mean()),
        float(np.concatenate(accuracies).mean()),
    )


def _chunks(order: jax.Array, size: int) -> Iterator[jax.Array]:
    return (order[i : i + size] for i in range(0, len(order), size))


def steps_per_call(config: Config, per_epoch: int) -> int:
    """How many steps one call runs: what was asked for, or what suits the backend."""
    if config.steps_per_call is not None:
        return min(config.steps_per_call, per_epoch)
    # On CPU, a convolution's gradient inside a loop leaves XLA's fast path.
    if jax.default_backend() == "cpu":
        return 1
    # A divisor, so that one program serves all calls of an epoch; where there is none
    # of some length, the last call is shorter.
    divisor = max(n for n in range(1, MAX_STEPS_PER_CALL + 1) if per_epoch % n == 0)
    calls = -(-per_epoch // MAX_STEPS_PER_CALL)
    return divisor if divisor > MAX_STEPS_PER_CALL // 4 else -(-per_epoch // calls)


def make_model(config: Config, num_classes: int) -> nn.Module:
    """The network that ``config`` asks for."""
    return cifar_resnet(
        config.depth,
        num_classes=num_classes,
        attention=ATTENTIONS[config.attention],
        dtype=jnp.dtype(config.dtype),
    )


def make_schedule(config: Config, per_epoch: int, total: int) -> optax.Schedule:
    """A linear warm-up, then half a cosine down to 0 at step ``total``."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=int(min(config.warmup_epochs * per_epoch, total / 10)),
        decay_steps=total,
    )


def make_optimizer(
    config: Config, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum and an L2 penalty on kernels."""
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=kernel_mask),
        optax.sgd(schedule, momentum=config.momentum, nesterov=True),
    )


def kernel_mask(params: Any) -> Any:
    """A tree of bools like ``params``, true where a leaf is called ``kernel``."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )


def count_parameters(params: Any) -> tuple[int, int]:
    """How many parameters there are, and how many of them are attention."""
    sizes = [
        (leaf.size, any(part.key == "attention" for part in path))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    return sum(n for n, _ in sizes), sum(n for n, attention in sizes if attention)


def make_state(
    model: nn.Module, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """The state before the first step."""
    init = jax.jit(partial(model.init, train=True))
    variables = init(key, jnp.zeros((1, 32, 32, 3)))
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optimizer,
        batch_stats=variables["batch_stats"],
    )


def to_device(images: ImageSet) -> tuple[DeviceData, DeviceData]:
    """Both parts on the device, to be normalised by the training part's statistics."""
    values = np.arange(256) / 255
    mean, std = np.empty((2, 1, 1, 1, 3), np.float32)
    for c in range(3):
        counts = np.bincount(images.train_images[..., c].ravel(), minlength=256)
        mean[..., c] = np.average(values, weights=counts)
        variance = np.average((values - mean[..., c].item()) ** 2, weights=counts)
        std[..., c] = np.sqrt(variance)
    return (
        _device_data(images.train_images, images.train_labels, mean, std),
        _device_data(images.test_images, images.test_labels, mean, std),
    )


def _device_data(*arrays: np.ndarray) -> DeviceData:
    return DeviceData(*map(jnp.asarray, arrays))


def epoch_order(key: jax.Array, epoch: int, size: int) -> jax.Array:
    """The order of the training images, a function of the key and the epoch alone."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), size)


def augment(images: jax.Array, key: jax.Array, *, flip: bool) -> jax.Array:
    """Moves each image by up to 4 pixels and mirrors it by the toss of its own coin.

    Args:
      images: ``(N, H, W, C)``; what moves in from outside is 0.
      key: for the draws, one of each kind per image.
      flip: whether to mirror at all.
    """
    shift_key, flip_key = jax.random.split(key)
    shape = images.shape[1:]
    padded = jnp.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
    corners = jax.random.randint(shift_key, (len(images), 2), 0, 2 * PAD + 1)
    images = jax.vmap(lambda x, c: lax.dynamic_slice(x, (c[0], c[1], 0), shape))(
        padded, corners
    )
    if flip:
        coins = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(coins, images[:, :, ::-1], images)
    return images


def make_train_steps(
    config: Config, key: jax.Array, *, flip: bool
) -> Callable[..., tuple[TrainState, tuple[jax.Array, jax.Array]]]:
    """Returns ``(state, data, indices) -> (state, (losses, accuracies))``, jitted.

    ``indices`` is ``(steps, batch)``; the old state's buffers are given up.
    """

    def step(
        state: TrainState, data: DeviceData, indices: jax.Array
    ) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
        step_key = jax.random.fold_in(key, state.step)
        images = augment(data.images[indices], step_key, flip=flip)
        labels = data.labels[indices]

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            logits, updates = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                normalise(images, data),
                train=True,
                mutable=["batch_stats"],
            )
            logits = logits.astype(jnp.float32)
            targets = jax.nn.one_hot(labels, logits.shape[-1])
            targets = optax.smooth_labels(targets, config.label_smoothing)
            loss = optax.softmax_cross_entropy(logits, targets).mean()
            accuracy = (logits.argmax(-1) == labels).mean()
            return loss, (updates["batch_stats"], accuracy)

        (loss, (batch_stats, accuracy)), grads = jax.value_and_grad(
            loss_fn, has_aux=True
        )(state.params)
        state = state.apply_gradients(grads=grads, batch_stats=batch_stats)
        return state, (loss, accuracy)

    @partial(jax.jit, donate_argnums=0)
    def train_steps(
        state: TrainState, data: DeviceData, indices: jax.Array
    ) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
        if len(indices) == 1:  # No loop at all: see `steps_per_call`.
            state, metrics = step(state, data, indices[0])
            return state, jax.tree.map(lambda m: m[None], metrics)
        return lax.scan(lambda s, i: step(s, data, i), state, indices)

    return train_steps


def evaluate(
    state: TrainState, data: DeviceData, batch_size: int
) -> tuple[float, float]:
    """The mean loss and the accuracy over all of ``data``, each image counted once."""
    size = len(data.labels)
    sums = jnp.zeros(2)
    for start in range(0, size, batch_size):
        indices = np.arange(start, start + batch_size)
        # The last batch is filled up, so that one program serves all, and the filling
        # weighs nothing.
        weights = (indices < size).astype(np.float32)
        sums += _evaluate_batch(state, data, np.minimum(indices, size - 1), weights)
    loss, accuracy = np.asarray(sums, np.float64) / size
    return float(loss), float(accuracy)


@jax.jit
def _evaluate_batch(
    state: TrainState, data: DeviceData, indices: jax.Array, weights: jax.Array
) -> jax.Array:
    logits = state.apply_fn(_variables(state), normalise(data.images[indices], data))
    logits, labels = logits.astype(jnp.float32), data.labels[indices]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.stack([losses, logits.argmax(-1) == labels]) @ weights


def normalise(images: jax.Array, data: DeviceData) -> jax.Array:
    """Pixels 0..255 to mean 0 and variance 1 per channel, by the training images."""
    return (images.astype(jnp.float32) / 255 - data.mean) / data.std


def _variables(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "batch_stats": state.batch_stats}
