"""Which devices and processes train together, and how arrays lie on them.

Data parallelism: every device holds all of the state and a share of each batch. The
mesh is an ``Auto`` one, so that XLA finds the communication; statistics of a batch, in
BatchNorm too, are those of the whole batch.
"""

import json
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
    """Joins the other processes of the run, before any device is used.

    Raises:
      ValueError: the coordinator cannot be reached, or refuses the options.
    """
    if config.coordinator is None and not _in_cluster():
        return
    if config.coordinator is not None and config.process_id:
        _wait_for(config.coordinator, config.peer_timeout)
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


def _wait_for(coordinator: str, seconds: int) -> None:
    """Waits until something listens at the address; JAX itself would abort the process.

    Raises:
      ValueError: nothing does.
    """
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=seconds).close()
            return
        except (OSError, ValueError) as error:
            if time.monotonic() > end or isinstance(error, ValueError):
                raise ValueError(
                    f"`coordinator` must be HOST:PORT of process 0, got {coordinator}, "
                    f"where nothing listens ({error}); start that process too, or "
                    "raise --peer-timeout."
                ) from error
            time.sleep(0.1)


def _in_cluster() -> bool:
    """Whether a launcher that JAX knows has started several processes."""
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or any(int(os.environ.get(name, 1)) > 1 for name in counts)


def make_mesh(count: int | None = None) -> Mesh:
    """A mesh of one axis over the first ``count`` devices, by default all of them.

    Raises:
      ValueError: there are fewer.
    """
    devices = jax.devices()
    if count is not None and count > len(devices):
        raise ValueError(
            f"`devices` must be at most {len(devices)}, what {jax.default_backend()} "
            f"has, got {count}."
        )
    devices = devices[:count]
    return jax.make_mesh(
        (len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices
    )


def check_batch_divides(batch_size: int, mesh: Mesh) -> None:
    """Raises ``ValueError`` for a batch that the devices cannot share evenly."""
    if batch_size % mesh.size:
        below = batch_size // mesh.size * mesh.size
        nearest = min(
            (size for size in (below, below + mesh.size) if size),
            key=lambda size: abs(size - batch_size),
        )
        raise ValueError(
            f"`batch_size` must be a multiple of the {mesh.size} devices, got "
            f"{batch_size}; the nearest is {nearest}."
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """All of an array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """A share of an array's ``axis`` on each device."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a tree, the same in every process, whole on each device."""
    return jax.tree.map(lambda a: _place(a, replicated(mesh)), tree)


def share(tree: Any, mesh: Mesh, axis: int) -> Any:
    """Splits arrays, the same in every process, over the devices."""
    return jax.tree.map(lambda a: _place(a, split(mesh, axis)), tree)


def join_shares(tree: Any, mesh: Mesh, axis: int) -> Any:
    """Makes one array of what each process has of it along ``axis``."""
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(split(mesh, axis), a), tree
    )


def _place(array: Any, sharding: NamedSharding) -> jax.Array:
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def to_host(tree: Any) -> Any:
    """Copies a replicated tree into memory that no later step writes to."""
    return jax.tree.map(np.array, tree)


def is_main() -> bool:
    """Whether this process writes files and shows bars."""
    return jax.process_index() == 0


def log(line: str) -> None:
    """Prints a line where a bar may be."""
    tqdm.write(line, file=sys.stderr)


def on_main(action: Callable[[], T]) -> T | None:
    """What ``action`` returns in the main process, and None in the others.

    Raises:
      ValueError: in the others, where ``action`` raised in the main process.
    """
    result, error = None, None
    if is_main():
        try:
            result = action()
        except Exception as raised:
            error = raised
    if highest(int(error is not None)):
        raise error or ValueError("The main process has stopped; its message says why.")
    return result


def from_main(
    found: tuple[Any, dict[str, Any]] | None, template: Any
) -> tuple[Any, dict[str, Any]] | None:
    """What the main process found, in every process.

    Args:
      found: arrays in the shape of ``template`` and a record of JSON types, or None;
        looked at in the main process alone.
      template: a tree of arrays, in every process.
    """
    if jax.process_count() == 1:
        return found
    text = b"" if found is None else json.dumps(found[1]).encode()
    size = highest(len(text))
    if not size:
        return None
    letters = np.zeros(size, np.uint8)
    if found is not None:
        letters[:] = np.frombuffer(text, np.uint8)
        template = found[0]
    tree, letters = multihost_utils.broadcast_one_to_all((template, letters))
    return jax.tree.map(np.array, tree), json.loads(np.asarray(letters).tobytes())


def highest(value: int) -> int:
    """The highest of the values that the processes pass."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def describe() -> str:
    """What this runs on, in one line."""
    device = jax.devices()[0]
    what = f"{os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return f"{what}, Python {platform.python_version()}, jax {jax.__version__}"
