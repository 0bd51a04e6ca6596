"""Training steps of whole networks with and without each block."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from tqdm.auto import tqdm

from flax_attn.blocks import BLOCKS
from flax_attn.resnet import cifar_resnet, imagenet_resnet
from train.data.cifar import ImageSet
from train.data.inputs import DeviceInputs
from train.engine import devices
from train.engine.config import Resolved
from train.engine.model import TrainState, make_optimizer, make_schedule, make_state
from train.engine.steps import make_train_steps, steps_per_call
from train.study.timing import Call, fastest, wait

BATCH = 128
CLASSES = 10
# Of a call on accelerators, where training compiles several into one program.
STEPS = 13
# Name, maker, height and width of the images, dtype.
RESNET20 = ("ResNet-20", partial(cifar_resnet, 20), 32, "float32")
RESNET50 = ("ResNet-50", partial(imagenet_resnet, 50), 224, "bfloat16")


def variants(blocks: Sequence[str], contenders: Sequence[str]) -> list[tuple[str, str]]:
    """No block first, then each block with each implementation."""
    return [("none", ""), *((block, name) for block in blocks for name in contenders)]


def make_network(network: Any, block: str, contender: str) -> tuple[nn.Module, Any]:
    """The model with ``block`` in every residual branch, and its optimizer."""
    _, make, _, dtype = network
    attention = None
    if block != "none":
        attention = partial(BLOCKS[block], implementation=contender)
    model = make(num_classes=CLASSES, attention=attention, dtype=jnp.dtype(dtype))
    config = Resolved()
    return model, make_optimizer(config, make_schedule(config, 1, 100))


def measure_network(
    network: Any, blocks: Sequence[str], contenders: Sequence[str], rounds: int
) -> Iterator[dict[str, Any]]:
    """Times training steps with each block, all of them in turns.

    A call runs as many steps as one of training does: one on CPU, else several.
    """
    network_name, _, size, dtype = network
    mesh = devices.make_mesh(1)
    inputs = DeviceInputs(_noise(size), Resolved(batch_size=BATCH), mesh)
    steps = steps_per_call(Resolved(), STEPS)
    calls: dict[str, Call] = {}
    for block, contender in tqdm(
        variants(blocks, contenders), desc=f"compiling {network_name}", unit="network"
    ):
        model, optimizer = make_network(network, block, contender)
        state = make_state(model, optimizer, jax.random.key(0), size)
        call = _Steps(steps, devices.replicate(state, mesh), inputs)
        call()
        calls[f"{block} {contender}".strip()] = call
    best = fastest(calls, rounds)
    for name, seconds in best.items():
        yield {
            "network": network_name,
            "dtype": dtype,
            "batch": BATCH,
            "block": name,
            "step_ms": seconds / steps * 1e3,
            "overhead_percent": 100 * (seconds / best["none"] - 1),
        }


class _Steps:
    """Training steps that start from the state of the previous call."""

    def __init__(self, steps: int, state: TrainState, inputs: DeviceInputs) -> None:
        self.state, self.data = state, inputs.data
        self.key = jax.random.key_data(jax.random.key(1))
        images = np.tile(np.arange(BATCH, dtype=np.int32), (steps, 1))
        self.indices = devices.shard(images, inputs.mesh, axis=1)
        self.train_steps = make_train_steps(Resolved(), inputs)

    def __call__(self) -> None:
        arguments = (self.state, self.data, self.key, self.indices)
        self.state, _ = wait(self.train_steps, *arguments)


def _noise(size: int) -> ImageSet:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, BATCH).astype(np.int32)
    return ImageSet(pixels, labels, pixels, labels, CLASSES, flip=True)


class DescribedInputs(DeviceInputs):
    """Inputs without arrays, to compile a step for their shapes and dtypes."""

    def __init__(self, mesh: Mesh) -> None:
        """Takes the devices, which need not exist on this machine."""
        self.mesh, self.flip = mesh, True
