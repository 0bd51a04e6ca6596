"""Reads the files of runs, without jax."""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.engine import config as config_lib
from train.engine import workdir as workdir_lib

GATES = "gates.npz"


@dataclasses.dataclass(frozen=True)
class Log:
    """The files of one run."""

    folder: Path
    config: dict[str, Any]
    parameters: int
    attention_parameters: int
    machine: str
    versions: dict[str, str]
    metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    timing: list[dict[str, Any]]
    """The lines of timing.jsonl."""

    @property
    def attention(self) -> str:
        """The name of the attention with its options, such as ``se+identity``."""
        return config_lib.block_name(self.config)

    @property
    def seed(self) -> int:
        """The seed."""
        return self.config["seed"]

    @property
    def epochs(self) -> int:
        """The length of the run when it is finished."""
        return self.config["epochs"]

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return len(self.metrics) == self.epochs

    @property
    def accuracy(self) -> float:
        """The test accuracy after the last epoch, 0 to 1."""
        return self.metrics[-1]["test_accuracy"]

    @property
    def gates(self) -> Path:
        """The file of spatial gates, which exists if the block has any."""
        return self.folder / GATES

    def step_seconds(self, *, compiled: bool) -> float | None:
        """The median step time over the epochs that compile, or over the others.

        None without such an epoch. An epoch resumed after its last step does not count,
        since it has no step to time.
        """
        steps = [
            line["step_seconds"]
            for line in self.timing
            if line["step_seconds"] is not None
            and bool(line.get("compiled")) == compiled
        ]
        return statistics.median(steps) if steps else None


def name_of(attention: str, seed: int) -> str:
    """The name of a run's folder in a comparison."""
    return f"{attention}-seed{seed}"


def labels_of(runs: Sequence[Path]) -> list[str]:
    """The names of the runs' folders; if some are equal, the paths."""
    folders = [run if run.is_dir() else run.parent for run in map(Path.resolve, runs)]
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one line of JSON for each."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if others := [line for line in lines if not isinstance(line, dict)]:
        raise ValueError(f"{others[0]!r} is not an object")
    return lines


def read_runs(workdir: Path) -> list[Log]:
    """Reads the runs of a comparison, in the order of their parameters and seeds.

    Raises:
      ValueError: there is no run, a log is damaged, or the recipes differ.
    """
    logs = [_read_run(folder) for folder in _folders(workdir)]
    if not logs:
        raise ValueError(
            f"`workdir` {workdir} must contain runs, got none; leave out --report-only "
            "to train them."
        )
    check_same_recipe(workdir, [log.config for log in logs])
    return sorted(logs, key=lambda r: (r.attention_parameters, r.attention, r.seed))


def read_configs(workdir: Path) -> list[dict[str, Any]]:
    """The configurations of the runs that a comparison has started."""
    return [_read_facts(folder)["config"] for folder in _folders(workdir)]


def recipe_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's configuration that all runs of a comparison share."""
    own = (*config_lib.OF_BLOCK, "seed")
    return {k: v for k, v in config_lib.completed(config).items() if k not in own}


def check_same_recipe(workdir: Path, configs: Sequence[Mapping[str, Any]]) -> None:
    """Raises ``ValueError`` unless the configurations share one recipe."""
    recipes = [recipe_of(config) for config in configs]
    for other in recipes[1:]:
        for field in sorted(recipes[0].keys() | other.keys()):
            one, two = recipes[0].get(field), other.get(field)
            if one != two:
                raise ValueError(
                    f"`workdir` {workdir} must contain runs of one recipe, got "
                    f"`{field}` {one} and {two}; pass another --workdir or the same "
                    "recipe."
                )


def _folders(workdir: Path) -> list[Path]:
    return sorted(path.parent for path in workdir.glob(f"*/{workdir_lib.RUN}"))


def _read_facts(folder: Path) -> dict[str, Any]:
    """Returns run.json; raises ``ValueError`` if it is not that of this folder."""
    path = folder / workdir_lib.RUN
    try:
        facts = json.loads(path.read_text())
        config = facts["config"]
        name = name_of(config_lib.block_name(config), config["seed"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if folder.name != name:
        raise ValueError(
            f"{folder} must have the name of its run, {name}; rename it or move it "
            "out of the workdir."
        )
    return facts


def _read_run(folder: Path) -> Log:
    facts = _read_facts(folder)
    fields: dict[str, Any] = {
        field.name: facts.get(field.name) for field in dataclasses.fields(Log)
    }
    for name, file in (
        ("metrics", workdir_lib.METRICS),
        ("timing", workdir_lib.TIMING),
    ):
        path = folder / file
        try:
            fields[name] = read_lines(path) if path.exists() else []
        except json.JSONDecodeError as error:
            raise _damaged(path, error) from error
    log = Log(**fields | {"folder": folder})
    if None in vars(log).values():
        raise _damaged(folder / workdir_lib.RUN, KeyError("a field is missing"))
    epochs = [line.get("epoch") for line in log.metrics]
    if epochs != list(range(1, len(epochs) + 1)) or len(epochs) > log.epochs:
        raise _damaged(folder / workdir_lib.METRICS, ValueError(f"epochs {epochs}"))
    if log.finished and not log.timing:
        raise _damaged(folder / workdir_lib.TIMING, ValueError("empty"))
    return log


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is damaged ({type(error).__name__}: {error}); train without "
        "--report-only, and if that does not help, move the run out of the workdir."
    )
