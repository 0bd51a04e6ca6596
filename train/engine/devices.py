"""The devices and processes of a run, and the sharding of its arrays.

Data parallelism: the state is replicated on every device and each batch is sharded.
The mesh axis is ``Auto``, so XLA inserts the communication, and the batch statistics
of BatchNorm are those of the whole batch.
"""

import json
import math
import os
import platform
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm.auto import tqdm

from train.engine.config import Config

AXIS = "data"
T = TypeVar("T")


def join(config: Config) -> None:
    """Connects to the other processes of the run; call it before using a device.

    Raises:
      ValueError: the coordinator cannot be reached or rejects the options.
    """
    if config.coordinator is None and not _in_cluster():
        return
    if config.coordinator is not None and config.process_id:
        _wait_for_coordinator(config.coordinator, config.peer_timeout)
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            initialization_timeout=config.peer_timeout,
            heartbeat_timeout_seconds=config.peer_timeout,
        )
    except RuntimeError as error:
        raise ValueError(
            f"`coordinator` {config.coordinator} cannot be joined "
            f"({' '.join(str(error).split())})."
        ) from error


def _wait_for_coordinator(coordinator: str, seconds: int) -> None:
    """Waits until the coordinator listens; JAX would abort the process instead.

    Raises:
      ValueError: it does not listen within ``seconds``.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=seconds).close()
            return
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline or isinstance(error, ValueError):
                raise ValueError(
                    f"`coordinator` must be HOST:PORT of process 0, got {coordinator}, "
                    f"which does not respond ({error}); start process 0, or increase "
                    "--peer-timeout."
                ) from error
            time.sleep(0.1)


def _in_cluster() -> bool:
    """Whether a launcher known to JAX started several processes."""
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or any(int(os.environ.get(name, 1)) > 1 for name in counts)


def make_mesh(count: int | None = None) -> Mesh:
    """A one-axis mesh over the first ``count`` devices (default: all).

    Raises:
      ValueError: there are fewer devices.
    """
    devices = jax.devices()
    if count is not None and count > len(devices):
        raise ValueError(
            f"`devices` must be at most {len(devices)}, the number of "
            f"{jax.default_backend()} devices, got {count}; pass a smaller --devices."
        )
    devices = devices[:count]
    return jax.make_mesh(
        (len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices
    )


def check_batch_divides(batch_size: int, mesh: Mesh) -> None:
    """Raises ``ValueError`` for a batch that the devices cannot divide evenly."""
    if batch_size % mesh.size:
        nearest = mesh.size * max(1, math.ceil(batch_size / mesh.size - 0.5))
        raise ValueError(
            f"`batch_size` must be a multiple of the {mesh.size} devices, got "
            f"{batch_size}; the nearest is {nearest}."
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """An equal shard along ``axis`` on each device."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies a tree, equal in all processes, to each device."""
    return jax.tree.map(lambda a: _place(a, replicated(mesh)), tree)


def shard(tree: Any, mesh: Mesh, axis: int) -> Any:
    """Shards arrays, equal in all processes, along ``axis`` over the devices."""
    return jax.tree.map(lambda a: _place(a, sharded(mesh, axis)), tree)


def join_shards(tree: Any, mesh: Mesh, axis: int) -> Any:
    """Global arrays from the shards that each process holds along ``axis``."""
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(sharded(mesh, axis), a), tree
    )


def _place(array: Any, sharding: NamedSharding) -> jax.Array:
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def to_host(tree: Any) -> Any:
    """Copies a replicated tree to host memory, safe from donation by later steps."""
    return jax.tree.map(np.array, tree)


def is_main() -> bool:
    """Whether this is the main process, which writes files and shows progress."""
    return jax.process_index() == 0


def log(line: str) -> None:
    """Prints a line to standard error without breaking a progress bar."""
    tqdm.write(line, file=sys.stderr)


def on_main(action: Callable[[], T]) -> T | None:
    """Runs ``action`` in the main process; returns its result there, else None.

    Raises:
      ValueError: in the other processes, if ``action`` raised in the main one.
    """
    result, error = None, None
    if is_main():
        try:
            result = action()
        except Exception as raised:
            error = raised
    if max_over_processes(int(error is not None)):
        raise error or ValueError("The main process stopped; see its message.")
    return result


def broadcast_from_main(
    found: tuple[Any, dict[str, Any]] | None, template: Any
) -> tuple[Any, dict[str, Any]] | None:
    """Returns the main process's ``found`` in every process.

    Args:
      found: arrays shaped like ``template`` and a record of JSON types, or None; read
        in the main process only.
      template: a tree of arrays, needed in every process.
    """
    if jax.process_count() == 1:
        return found
    text = b"" if found is None else json.dumps(found[1]).encode()
    size = max_over_processes(len(text))
    if not size:
        return None
    encoded = np.zeros(size, np.uint8)
    if found is not None:
        encoded[:] = np.frombuffer(text, np.uint8)
        template = found[0]
    tree, encoded = multihost_utils.broadcast_one_to_all((template, encoded))
    return jax.tree.map(np.array, tree), json.loads(np.asarray(encoded).tobytes())


def max_over_processes(value: int) -> int:
    """The maximum of ``value`` over all processes."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def describe() -> str:
    """The device, Python and jax of this process, in one line."""
    device = jax.devices()[0]
    what = f"{os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return f"{what}, Python {platform.python_version()}, jax {jax.__version__}"
