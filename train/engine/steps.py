"""The jitted programs: training steps and evaluation."""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from train.data.inputs import Inputs
from train.engine import devices
from train.engine.config import Config, Resolved
from train.engine.model import TrainState, variables_of

# Large enough to hide the dispatch of a call, small enough for a responsive bar.
MAX_STEPS_PER_CALL = 100


class Metrics(NamedTuple):
    """The metrics of a call; the first axis is that of its steps."""

    loss: jax.Array
    accuracy: jax.Array
    finite: jax.Array
    """Whether each leaf of ``variables_of(state)`` is finite after the step.

    The optimizer's state is left out: a value that is not finite reaches the parameters
    in the same step.
    """


@contextlib.contextmanager
def searching() -> Iterator[None]:
    """Keeps JAX's search for NaN and infinities on, if JAX's debug flags are set.

    In jax 0.10 to 0.12 a context inside JAX, such as ``debug_nans(False)`` around a
    constant, otherwise ends it for the whole thread.
    """
    config: Any = jax.config
    with contextlib.ExitStack() as stack:
        if config.jax_debug_nans:
            stack.enter_context(jax.debug_nans(True))
        if config.jax_debug_infs:
            stack.enter_context(jax.debug_infs(True))
        yield


def make_train_steps(
    config: Config, inputs: Inputs
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns ``(state, data, key, item) -> (state, metrics)``, jitted.

    ``key`` is key data for the augmentation, an argument so that one program serves all
    seeds; ``item``, from ``inputs.train_batches``, holds one step or more. The old
    state's buffers are donated.
    """

    def step(
        state: TrainState, data: Any, key: jax.Array, item: Any
    ) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(jax.random.wrap_key_data(key), state.step)
        images, labels = inputs.batch(data, item, step_key)
        images = lax.with_sharding_constraint(images, devices.sharded(inputs.mesh))

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            logits, updates = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                images,
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
        leaves = jax.tree.leaves(variables_of(state))
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])
        return state, Metrics(loss, accuracy, finite)

    # To find an infinity, JAX runs a step again; for NaN it does this itself.
    donated = () if getattr(jax.config, "jax_debug_infs") else (0,)  # noqa: B009 (mypy)

    @partial(
        jax.jit, donate_argnums=donated, out_shardings=devices.replicated(inputs.mesh)
    )
    def train_steps(
        state: TrainState, data: Any, key: jax.Array, item: Any
    ) -> tuple[TrainState, Metrics]:
        if len(jax.tree.leaves(item)[0]) == 1:  # No loop at all: see `steps_per_call`.
            state, metrics = step(state, data, key, jax.tree.map(lambda a: a[0], item))
            return state, jax.tree.map(lambda m: m[None], metrics)
        return lax.scan(lambda s, i: step(s, data, key, i), state, item)

    return train_steps


def make_evaluate(
    inputs: Inputs,
) -> Callable[[TrainState, Callable[[], None]], tuple[float, float]]:
    """Returns ``(state, between) -> (mean loss, accuracy)`` over the test part.

    Each image counts once. ``between`` is called after each batch and may raise to end
    the evaluation.
    """

    @partial(jax.jit, out_shardings=devices.replicated(inputs.mesh))
    def add(
        sums: jax.Array, state: TrainState, data: Any, item: Any, weights: jax.Array
    ) -> jax.Array:
        images, labels = inputs.test_batch(data, item)
        images = lax.with_sharding_constraint(images, devices.sharded(inputs.mesh))
        logits = state.apply_fn(variables_of(state), images).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = (logits.argmax(-1) == labels).astype(jnp.float32)
        return sums + jnp.stack([losses, correct]) @ weights

    def evaluate(
        state: TrainState, between: Callable[[], None] = lambda: None
    ) -> tuple[float, float]:
        sums = devices.replicate(np.zeros(2, np.float32), inputs.mesh)
        for item, weights in inputs.test_batches():
            sums = add(sums, state, inputs.test_data, item, weights)
            between()
        loss, accuracy = np.asarray(sums, np.float64) / inputs.test_size
        return float(loss), float(accuracy)

    return evaluate


def steps_per_call(config: Resolved, steps_per_epoch: int) -> int:
    """The number of steps per call: that of ``config``, or one for the backend."""
    if config.steps_per_call is not None:
        return min(config.steps_per_call, steps_per_epoch)
    # On CPU, a convolution's gradient inside a loop leaves XLA's fast path. Images read
    # during training would all have to be read before the first step.
    if jax.default_backend() == "cpu" or config.loader == "grain":
        return 1
    # A divisor, so that one program serves all calls of an epoch; without one that is
    # large enough, the last call is shorter.
    sizes = range(1, MAX_STEPS_PER_CALL + 1)
    divisor = max(size for size in sizes if steps_per_epoch % size == 0)
    if divisor > MAX_STEPS_PER_CALL // 4:
        return divisor
    calls = math.ceil(steps_per_epoch / MAX_STEPS_PER_CALL)
    return math.ceil(steps_per_epoch / calls)
