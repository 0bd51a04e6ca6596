"""Network, schedule, optimizer and initial state of a configuration."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

from flax_attn import parameter_labels
from flax_attn.resnet import cifar_resnet, imagenet_resnet
from train.engine.attention import make_attention
from train.engine.config import Config, Resolved


class TrainState(train_state.TrainState):
    """Step, parameters and optimizer state, and the running batch statistics."""

    batch_stats: Any


def make_model(config: Config, num_classes: int, *, train: bool = False) -> nn.Module:
    """The network of ``config``, for evaluation or training.

    Both have the same variables; only a normalization inside a preset differs.
    """
    make = cifar_resnet if config.family == "cifar" else imagenet_resnet
    return make(
        config.depth,
        num_classes=num_classes,
        attention=make_attention(config, train=train),
        dtype=jnp.dtype(config.dtype),
    )


def check_block(config: Config) -> None:
    """Raises ``ValueError`` for an attention that this network cannot have.

    Makes the blocks, abstractly, so jax's devices must be known already.
    """
    network: Any = make_model(config, 1)
    if network.attention is None:
        return
    name = config.preset or config.attention
    has_parameters = False
    for stage in range(len(network.stages)):
        features = network.width * 2**stage * network.block.expansion
        x = jax.ShapeDtypeStruct((1, 8, 8, features), "float32")
        init = network.attention().init
        try:
            variables = jax.eval_shape(init, jax.random.key(0), x)
        except ValueError as error:
            problem = f"{name} does not go with this network"
            remedy = "choose another attention"
            if config.init != "default":
                problem = f"`init` {config.init} does not go with {name}"
                remedy = f"leave `init` out or {remedy}"
            raise ValueError(f"{problem} ({error}); {remedy}.") from error
        has_parameters |= "params" in variables
    if config.attention_lr_scale != 1 and not has_parameters:
        raise ValueError(
            "`attention_lr_scale` is for the parameters of attention blocks, got "
            f"{config.attention_lr_scale} for {name}, which has none; leave it out or "
            "choose another attention."
        )


def make_apply(config: Config, num_classes: int) -> Callable[..., Any]:
    """``apply`` of the network, which passes ``train`` to the attention too."""
    models = {
        train: make_model(config, num_classes, train=train) for train in (False, True)
    }

    def apply(
        variables: Any, images: Any, *, train: bool = False, **kwargs: Any
    ) -> Any:
        return models[train].apply(variables, images, train=train, **kwargs)

    return apply


def make_schedule(config: Config, steps_per_epoch: int, total: int) -> optax.Schedule:
    """A linear warmup, then half a cosine down to 0 at step ``total``."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=int(min(config.warmup_epochs * steps_per_epoch, total / 10)),
        decay_steps=total,
    )
    # Optax divides the integer step, which strict dtype promotion refuses.
    return lambda step: schedule(jnp.asarray(step, jnp.float32))


def make_optimizer(
    config: Resolved, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum and an L2 penalty on kernels.

    The updates of the attention are multiplied by ``attention_lr_scale``; its default
    adds nothing, so that the state is that of runs without this option.
    """
    transformations = [
        optax.add_decayed_weights(config.weight_decay, mask=kernel_mask),
        optax.sgd(schedule, momentum=config.momentum, nesterov=True),
    ]
    if config.attention_lr_scale != 1:
        scale = optax.scale(config.attention_lr_scale)
        transformations.append(optax.masked(scale, attention_mask(config)))
    return optax.chain(*transformations)


def attention_mask(config: Resolved) -> Any:
    """A tree of bools like the parameters, true where they are of attention."""
    # The number of classes does not matter.
    images = jax.ShapeDtypeStruct(
        (1, config.image_size, config.image_size, 3), "float32"
    )
    labels = parameter_labels(make_model(config, 1), images)
    return jax.tree.map(lambda label: label != "backbone", labels)


def kernel_mask(params: Any) -> Any:
    """A tree of bools like ``params``, true where a leaf is called ``kernel``."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )


def count_parameters(params: Any) -> tuple[int, int]:
    """The number of parameters, and how many of them are attention."""
    sizes = [
        (leaf.size, any(part.key == "attention" for part in path))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    return sum(n for n, _ in sizes), sum(n for n, attention in sizes if attention)


def make_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    image_size: int,
    apply: Callable[..., Any] | None = None,
) -> TrainState:
    """The state before the first step; ``apply`` defaults to that of the model."""
    init = jax.jit(partial(model.init, train=True))
    variables = init(key, jnp.zeros((1, image_size, image_size, 3)))
    return TrainState.create(
        apply_fn=apply or model.apply,
        params=variables["params"],
        tx=optimizer,
        batch_stats=variables["batch_stats"],
    )


def variables_of(state: TrainState) -> dict[str, Any]:
    """The variables to apply the network with."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def leaf_names(tree: Any) -> list[str]:
    """The paths of a tree's leaves, such as ``params/norm_stem/scale``."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
