"""The folder of a run: its run.json, its lock and atomic writes."""

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from train.engine import config as config_lib
from train.engine.config import Resolved

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
RUN = "run.json"
CHECKPOINTS = "checkpoints"


def choose(config: Resolved) -> Path:
    """The folder of ``--workdir``, or a new one under runs/."""
    if config.workdir is not None:
        return config.workdir
    now = time.strftime("%Y%m%d-%H%M%S")
    name = f"{now}-{config.dataset}-resnet{config.depth}-{config.block}"
    return Path("runs") / name


def check_resumable(workdir: Path, config: Resolved) -> None:
    """Raises ``ValueError`` unless ``config`` may start or resume in ``workdir``.

    Nothing is written.
    """
    described = workdir / RUN
    if not described.exists():
        metrics = workdir / METRICS
        if metrics.exists() and metrics.stat().st_size:
            raise ValueError(
                f"`workdir` {workdir} holds an earlier run but no {RUN}, so it "
                "cannot be resumed; pass another --workdir."
            )
        return
    try:
        there = config_lib.completed(json.loads(described.read_text())["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`workdir` {workdir} holds a {RUN} that cannot be read ({error}); pass "
            "another --workdir."
        ) from error
    wanted = config_lib.recipe(config)
    names = sorted({n for n in wanted | there if wanted.get(n) != there.get(n)})
    if names:
        differences = ", ".join(
            f"{n} {there.get(n)} (now {wanted.get(n)})" for n in names
        )
        raise ValueError(
            f"`workdir` {workdir} contains a run with a different configuration: "
            f"{differences}; pass another --workdir."
        )
    if config.resume == "never":
        raise ValueError(
            f"`workdir` {workdir} holds an earlier run; pass another --workdir, or "
            "--resume auto to resume it."
        )


@contextlib.contextmanager
def locked(workdir: Path, config: Resolved) -> Iterator[None]:
    """Makes the folder and locks it, so that no two runs write to it at once.

    Raises:
      ValueError: another process holds it, it is read-only, or it holds another run.
    """
    check_resumable(workdir, config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # The system releases it even if the process is killed.
        acquired = FileLock(workdir / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise ValueError(
            f"`workdir` {workdir} is in use by another process; wait until it ends, or "
            "pass another --workdir."
        ) from error
    except OSError as error:
        raise ValueError(
            f"`workdir` {workdir} cannot be written to ({error.strerror}); pass "
            "another --workdir."
        ) from error
    with acquired:
        # Again, since the previous holder may have started another run.
        check_resumable(workdir, config)
        yield


def write(path: Path, text: str) -> None:
    """Replaces a file atomically: a reader sees the old or the new content."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Replaces a file by one line of JSON for each of ``lines``."""
    write(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def describe(config: Resolved, parameters: int, attention: int, machine: str) -> str:
    """The text of run.json: configuration, sizes, machine and versions."""
    packages = ("flax-attn", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"  # A checkout that is not installed.
    fields = {
        "config": config_lib.recipe(config),
        "parameters": parameters,
        "attention_parameters": attention,
        "machine": machine,
        "versions": versions,
    }
    return json.dumps(fields, indent=1) + "\n"
