"""Bytes, temporaries and compile times for a TPU, which need not be present.

The compiler is libtpu's, of the dependency group ``tpu-aot``.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from tqdm.auto import tqdm

from flax_attn.blocks import create
from train.data.inputs import DeviceData
from train.engine import devices
from train.engine.config import Config
from train.engine.model import make_state
from train.engine.steps import make_train_steps
from train.study import networks
from train.study.blocks import Shape
from train.study.timing import check_interrupt, temporary_bytes, with_gradients

SHAPES: tuple[Shape, ...] = ((128, 32, 32, 64), (128, 56, 56, 256), (128, 14, 14, 1024))
GIGABYTE = 1e9


def open_topology(name: str) -> jax.Device:
    """The first device of a topology such as ``v5e:2x2``; this process uses the CPU.

    Raises:
      ValueError: libtpu is not installed, or does not know the topology.
    """
    if find_spec("libtpu") is None:
        raise ValueError(
            "`compile_for` needs the TPU compiler libtpu, which is not installed; "
            "run pip install -e '.[train]' --group tpu-aot in an environment of its "
            "own."
        )
    # Only the compiler is needed: libtpu and jax would search for a TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    jax.config.update("jax_platforms", "cpu")
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except RuntimeError as error:
        raise ValueError(
            f"`compile_for` must be a TPU topology such as v5e:2x2, got {name!r} "
            f"({' '.join(str(error).split())})."
        ) from error
    return topology.devices[0]


def compile_block(
    block: str, shape: Shape, dtype: str, contenders: Sequence[str], device: jax.Device
) -> Iterator[dict[str, Any]]:
    """Compiles forward and forward + backward; bytes are relative to those of a copy.

    The gradient of the plain CBAM takes minutes at a batch of 128.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)

    def compile_(function: Any, *arguments: Any) -> tuple[jax.stages.Compiled, float]:
        jitted = jax.jit(function, in_shardings=sharding, out_shardings=sharding)
        return _timed(jitted.lower(*arguments))

    x = jax.ShapeDtypeStruct(shape, dtype)
    copy, _ = compile_(lambda x: x * jnp.asarray(1.0001, dtype), x)
    copied = bytes_accessed(copy)
    for contender in contenders:
        module = create(block, dtype=jnp.dtype(dtype), implementation=contender)
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        forward, forward_seconds = compile_(module.apply, variables, x)
        both, seconds = compile_(with_gradients(module.apply), variables, x, x)
        yield {
            "block": block,
            "contender": contender,
            "shape": shape,
            "dtype": dtype,
            "forward_seconds": forward_seconds,
            "seconds": seconds,
            "forward_bytes": bytes_accessed(forward) / copied,
            "bytes": bytes_accessed(both) / copied,
            "temporaries": temporary_bytes(both)
            / (math.prod(shape) * jnp.dtype(dtype).itemsize),
        }


def compile_network(
    blocks: Sequence[str], contenders: Sequence[str], device: jax.Device
) -> Iterator[dict[str, Any]]:
    """Compiles the training step of ResNet-50 with and without each block.

    In bfloat16 at a batch of 128, images of 224 x 224, on one device. The overheads are
    over the network without a block.
    """
    name, _, size, dtype = network = networks.RESNET50
    mesh = Mesh(np.array([device]), (devices.AXIS,), axis_types=(AxisType.Auto,))
    base = None
    variants = networks.variants(blocks, contenders)
    for block, contender in (bar := tqdm(variants, unit="network")):
        check_interrupt()
        bar.set_postfix_str(block)
        compiled, seconds = _timed(_lower_step(network, block, contender, size, mesh))
        accessed = bytes_accessed(compiled) / GIGABYTE
        base = base or accessed
        yield {
            "network": name,
            "dtype": dtype,
            "batch": networks.BATCH,
            "block": f"{block} {contender}".strip(),
            "accessed_gb": accessed,
            "overhead_percent": 100 * (accessed / base - 1),
            "temporaries_gb": temporary_bytes(compiled) / GIGABYTE,
            "compile_seconds": seconds,
        }


def _lower_step(
    network: Any, block: str, contender: str, size: int, mesh: Mesh
) -> jax.stages.Lowered:
    model, optimizer = networks.make_network(network, block, contender)
    state = jax.eval_shape(
        lambda: make_state(model, optimizer, jax.random.key(0), size)
    )
    batch = networks.BATCH
    describe: Any = partial(jax.ShapeDtypeStruct, sharding=devices.replicated(mesh))
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(1)))
    state, key = jax.tree.map(
        lambda leaf: describe(leaf.shape, leaf.dtype), (state, key)
    )
    data = DeviceData(
        describe((batch, size, size, 3), np.uint8),
        describe((batch,), np.int32),
        mean=describe((1, 1, 1, 3), np.float32),
        std=describe((1, 1, 1, 3), np.float32),
    )
    indices = describe((1, batch), np.int32)
    train_steps: Any = make_train_steps(Config(), networks.DescribedInputs(mesh))
    return train_steps.lower(state, data, key, indices)


def bytes_accessed(compiled: jax.stages.Compiled) -> float:
    """Bytes that a compiled program reads and writes, by the compiler's own count."""
    analysis: Any = compiled.cost_analysis()
    return analysis["bytes accessed"]


def _timed(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
    start = time.perf_counter()
    return lowered.compile(), time.perf_counter() - start
