"""Epochs for TensorBoard or Weights & Biases, beside metrics.jsonl.

Both are extras and imported only when requested. A resumed run stays one run there, and
each of its epochs is logged once: the number of logged epochs is kept in the workdir.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from train.engine import config as config_lib
from train.engine import devices, workdir
from train.engine.config import Resolved

STATE = "logged.json"

LogEpoch = Callable[[Mapping[str, Any], Mapping[str, Any]], None]
LogValues = Callable[[Mapping[str, float], int], None]


def check_installed(name: str | None) -> None:
    """Raises ``ValueError`` for a logger whose package is missing."""
    if name is not None and find_spec(name) is None:
        raise ValueError(
            f"`logger` {name} needs the package {name}, which is not installed; "
            f"install the extra (pip install -e '.[{name}]') or leave --logger out."
        )


@contextlib.contextmanager
def opened(config: Resolved, folder: Path) -> Iterator[LogEpoch]:
    """Yields a function that logs an epoch, unless an earlier start logged it.

    It gets the epoch's lines of metrics.jsonl and timing.jsonl.

    Args:
      config: of the run.
      folder: its workdir.

    Raises:
      ValueError: the logger cannot start.
    """
    if config.logger is None:
        yield lambda line, timing: None
        return
    path = folder / config.logger / STATE
    state: dict[str, Any] = {"epochs": 0}
    if path.exists():
        state |= json.loads(path.read_text())
    path.parent.mkdir(exist_ok=True)
    with _SINKS[config.logger](config, folder, state) as log_values:

        def log_epoch(line: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
            if line["epoch"] <= state["epochs"]:
                return
            values = {name: line[name] for name in line if name != "step"}
            if timing["images_per_second"] is not None:
                values["images_per_second"] = timing["images_per_second"]
            try:
                log_values(values, line["step"])
                state["epochs"] = line["epoch"]
                workdir.write(path, json.dumps(state))
            except OSError as error:
                devices.log(
                    f"Epoch {line['epoch']} could not be logged to {path.parent} "
                    f"({error.strerror}); the next start will log it again."
                )

        yield log_epoch


@contextlib.contextmanager
def _tensorboard(
    config: Resolved, folder: Path, state: dict[str, Any]
) -> Iterator[LogValues]:
    from tensorboard.summary import Writer

    writer = Writer(str(folder / "tensorboard"))

    def log_values(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    try:
        yield log_values
    finally:
        writer.close()


@contextlib.contextmanager
def _wandb(
    config: Resolved, folder: Path, state: dict[str, Any]
) -> Iterator[LogValues]:
    import wandb

    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "flax_attn"),
            name=folder.absolute().name,
            config=config_lib.recipe(config),
            dir=folder,
            id=state.get("id"),
            resume="allow",
        )
    except wandb.Error as error:
        raise ValueError(
            f"`logger` wandb cannot start ({' '.join(str(error).split())}); call "
            "`wandb login`, or set WANDB_MODE=offline."
        ) from error
    state["id"] = run.id
    workdir.write(folder / "wandb" / STATE, json.dumps(state))
    exit_code = 1
    try:
        yield lambda values, step: run.log(dict(values), step=step)
        exit_code = 0
    finally:
        run.finish(exit_code=exit_code)


_SINKS: Mapping[
    str, Callable[[Resolved, Path, dict[str, Any]], AbstractContextManager[LogValues]]
] = {"tensorboard": _tensorboard, "wandb": _wandb}
