"""What the runs of ``train.compare`` say: statistics, words, tables and pictures.

All of it comes from what the runs left in their folders, and needs no jax.
"""

import dataclasses
import json
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.engine import config as config_lib
from train.engine import workdir as workdir_lib
from train.engine.config import Config

BASELINE = "none"
# The blocks that sow a spatial gate.
SPATIAL = ("spatial", "cbam", "cbam-conv")
COVERAGE = 0.95
# Accuracies are multiples of one over the test images; less than this is rounding.
NO_SPREAD = 1e-9
INTRODUCTION = f"""Test accuracy after the **last** epoch, never the best one: mean ±
sample standard deviation over seeds. Differences are paired: each run against that of
`{BASELINE}` with the same seed. Intervals are Student's t over those pairs, each for
its block alone: they are not corrected for comparing several blocks at once. Seeds
change the parameters, the order and the augmentation but not the images, so an interval
says nothing about other data. Step time is the median over epochs, then over seeds."""


@dataclasses.dataclass(frozen=True)
class Log:
    """What a run left in its folder."""

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
        """The block."""
        return self.config["attention"]

    @property
    def seed(self) -> int:
        """The seed."""
        return self.config["seed"]

    @property
    def epochs(self) -> int:
        """How many epochs the run is to have."""
        return self.config["epochs"]

    @property
    def finished(self) -> bool:
        """Whether it has them all."""
        return len(self.metrics) == self.epochs

    @property
    def accuracy(self) -> float:
        """The test accuracy after the last epoch, 0 to 1."""
        return self.metrics[-1]["test_accuracy"]

    def step_seconds(self, *, compiled: bool) -> float | None:
        """The median step time over the epochs that compile, or over the others.

        None where there is no such epoch; one that is gone on with after its last step
        counts as none, for it has no step of its own.
        """
        steps = [
            line["step_seconds"]
            for line in self.timing
            if line["step_seconds"] is not None
            and bool(line.get("compiled")) == compiled
        ]
        return statistics.median(steps) if steps else None


def name_of(attention: str, seed: int) -> str:
    """What a run's folder is called."""
    return f"{attention}-seed{seed}"


def read_runs(workdir: Path) -> list[Log]:
    """Reads the runs of a comparison, in the order of their parameters and seeds.

    Raises:
      ValueError: there is no run, a log is damaged, or the runs are not of one recipe.
    """
    logs = [_read_run(folder) for folder in _folders(workdir)]
    if not logs:
        raise ValueError(
            f"`workdir` {workdir} must hold runs, got none; leave out --report-only to "
            "train them."
        )
    check_same_recipe(workdir, [log.config for log in logs])
    return sorted(logs, key=lambda r: (r.attention_parameters, r.attention, r.seed))


def read_configs(workdir: Path) -> list[dict[str, Any]]:
    """The configurations of the runs that a comparison has begun."""
    return [_read_facts(folder)["config"] for folder in _folders(workdir)]


def _folders(workdir: Path) -> list[Path]:
    return sorted(path.parent for path in workdir.glob(f"*/{workdir_lib.RUN}"))


def _read_facts(folder: Path) -> dict[str, Any]:
    """Returns run.json; raises ``ValueError`` if it is not that of this folder."""
    try:
        facts = json.loads((folder / workdir_lib.RUN).read_text())
        name = name_of(facts["config"]["attention"], facts["config"]["seed"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise _damaged(folder / workdir_lib.RUN, error) from error
    if folder.name != name:
        raise ValueError(
            f"{folder} must be called as its run, {name}; rename it or move it away."
        )
    return facts


def _read_run(folder: Path) -> Log:
    from train import report

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
            fields[name] = report.read(path) if path.exists() else []
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
        "--report-only, and if that does not help move the folder away first."
    )


def recipe_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's configuration it shares with the other runs."""
    return {k: v for k, v in config.items() if k not in ("attention", "seed")}


def check_same_recipe(workdir: Path, configs: Sequence[Mapping[str, Any]]) -> None:
    """Raises ``ValueError`` unless the configurations share one recipe."""
    recipes = [recipe_of(config) for config in configs]
    for other in recipes[1:]:
        for field in sorted(recipes[0].keys() | other.keys()):
            one, two = recipes[0].get(field), other.get(field)
            if one != two:
                raise ValueError(
                    f"`workdir` {workdir} must hold runs of one recipe, got `{field}` "
                    f"{one} and {two}; pass another --workdir or the same recipe."
                )


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean by Student's t, or None where there can be none.

    One value has no spread. Several that are equal, as accuracies over few test images
    may be, have none either: an interval without width would claim certainty.
    """
    if len(values) < 2 or max(values) - min(values) < NO_SPREAD:
        return None
    from scipy import stats

    mean = statistics.fmean(values)
    quantile = float(stats.t.ppf((1 + COVERAGE) / 2, len(values) - 1))
    half = quantile * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean + half


def summarise(logs: Sequence[Log]) -> dict[str, Any]:
    """What the runs say, from those alone that are finished: see ``report.json``."""
    finished: dict[str, list[Log]] = {}
    for log in logs:
        if log.finished:
            finished.setdefault(log.attention, []).append(log)
    base = finished.get(BASELINE, [])
    done = {(log.attention, log.seed): len(log.metrics) for log in logs}
    epochs = logs[0].epochs
    return {
        "recipe": recipe_of(logs[0].config),
        "machines": _distinct(log.machine for log in logs),
        "versions": _distinct(log.versions for log in logs),
        "blocks": [_summarise_block(runs, base) for runs in finished.values()],
        "unfinished": [
            {
                "attention": attention,
                "seed": seed,
                "epochs": done.get((attention, seed)),
            }
            for attention in _distinct((BASELINE, *(log.attention for log in logs)))
            for seed in sorted({log.seed for log in logs})
            if done.get((attention, seed)) != epochs
        ],
    }


def _distinct(values: Iterable[Any]) -> list[Any]:
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    return distinct


def _summarise_block(runs: Sequence[Log], base: Sequence[Log]) -> dict[str, Any]:
    """One block's numbers: accuracies and differences 0 to 1, times in seconds."""
    attention = runs[0].attention
    accuracies = {log.seed: log.accuracy for log in runs}
    step_seconds, compilation_timed = _step_time(runs)
    block: dict[str, Any] = {
        "attention": attention,
        "parameters": runs[0].parameters,
        "parameters_added": runs[0].attention_parameters,
        "accuracies": accuracies,
        "mean": statistics.fmean(accuracies.values()),
        "std": statistics.stdev(accuracies.values()) if len(runs) > 1 else None,
        "step_seconds": step_seconds,
        "compilation_timed": compilation_timed,
        "gates_seed": next(
            (log.seed for log in runs if (log.folder / "gates.npz").exists()), None
        ),
        "difference": None,
        "overhead": None,
    }
    if attention == BASELINE:
        return block
    differences = {
        log.seed: accuracies[log.seed] - log.accuracy
        for log in base
        if log.seed in accuracies
    }
    if differences:
        low, high = interval(list(differences.values())) or (None, None)
        mean = statistics.fmean(differences.values())
        block["difference"] = {
            "by_seed": differences,
            "mean": mean,
            "low": low,
            "high": high,
        }
    base_seconds, base_compilation_timed = _step_time(base)
    if step_seconds is not None and base_seconds is not None:
        block["overhead"] = step_seconds / base_seconds - 1
        block["compilation_timed"] |= base_compilation_timed
    return block


def _step_time(runs: Sequence[Log]) -> tuple[float | None, bool]:
    """The median of the runs' step times, and whether compilation is in it.

    It is where no run has an epoch without; a run that was interrupted so often that
    each of its epochs compiled does not spoil the time of the others.
    """
    for compiled in (False, True):
        times = [log.step_seconds(compiled=compiled) for log in runs]
        known = [seconds for seconds in times if seconds is not None]
        if known:
            return statistics.median(known), compiled
    return None, False


def verdict(block: Mapping[str, Any]) -> str:
    """What the difference to the baseline shows, and what it does not, in words."""
    name, difference = block["attention"], block["difference"]
    if difference is None:
        return (
            f"{name}: no seed is finished both with it and with {BASELINE}, so there "
            "is no difference to tell."
        )
    mean, low, high = (difference[k] for k in ("mean", "low", "high"))
    seeds = len(difference["by_seed"])
    if seeds == 1:
        return (
            f"{name}: {_points(mean)} points with a single seed: there is no interval, "
            "and one run of each does not show whether it helps."
        )
    if low is None:
        return (
            f"{name}: {_points(mean)} points with each of {seeds} seeds: without any "
            "spread there is no interval, and these runs do not show whether it helps."
        )
    spread = f"(95 % interval {_points(low)} to {_points(high)} over {seeds} seeds)"
    if low > 0:
        return f"{name}: helps by {_points(mean)[1:]} points {spread}."
    if high < 0:
        return f"{name}: hurts by {_points(mean)[1:]} points {spread}."
    return (
        f"{name}: {_points(mean)} points {spread}: the interval covers zero; these "
        "runs do not show that it helps or hurts."
    )


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def table(summary: Mapping[str, Any]) -> str:
    """The blocks as an aligned Markdown table."""
    if not summary["blocks"]:
        return "No run is finished."
    rows = [
        (
            "block",
            "seeds",
            "test accuracy, %",
            f"to {BASELINE}, points",
            "95 % interval",
            "parameters added",
            "in millions",
            "step, ms",
            "overhead",
        )
    ]
    for block in summary["blocks"]:
        difference = block["difference"] or {"mean": None, "low": None}
        low = difference["low"]
        mark = "†" if block["compilation_timed"] else ""
        rows.append(
            (
                block["attention"],
                str(len(block["accuracies"])),
                f"{100 * block['mean']:.2f}"
                + ("" if block["std"] is None else f" ± {100 * block['std']:.2f}"),
                "-" if difference["mean"] is None else _points(difference["mean"]),
                "-"
                if low is None
                else f"{_points(low)} to {_points(difference['high'])}",
                f"{block['parameters_added']:+,}",
                f"{block['parameters_added'] / 1e6:.4f} M",
                "-"
                if block["step_seconds"] is None
                else f"{1e3 * block['step_seconds']:,.2f}{mark}",
                "-" if block["overhead"] is None else f"{block['overhead']:+.1%}{mark}",
            )
        )
    return _markdown_table(rows)


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        for row in rows
    ]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """What the reader of the table has to know, in one line each."""
    lines = [
        verdict(block) for block in summary["blocks"] if block["attention"] != BASELINE
    ]
    for run in summary["unfinished"]:
        state = (
            "not begun"
            if run["epochs"] is None
            else f"{run['epochs']} of {summary['recipe']['epochs']} epochs"
        )
        lines.append(
            f"Unfinished and in no number here: {run['attention']}, seed "
            f"{run['seed']}, {state}."
        )
    lines += [
        f"{block['attention']}: no run has its gates.npz; train without --report-only "
        "to have the picture."
        for block in summary["blocks"]
        if block["attention"] in SPATIAL and block["gates_seed"] is None
    ]
    if any(block["compilation_timed"] for block in summary["blocks"]):
        lines.append(
            "†: no epoch was timed without compilation; train at least two epochs "
            "for a step time that can be trusted."
        )
    if len(summary["machines"]) > 1 or len(summary["versions"]) > 1:
        lines.append(
            "The runs come from different machines or versions: step times are not "
            "comparable, and accuracies may differ for that alone."
        )
    return lines


def markdown(summary: Mapping[str, Any], workdir: Path) -> str:
    """The report: ``summary`` in words, tables and the figures beside it."""
    recipe = summary["recipe"]
    gates = {
        block["attention"]: block["gates_seed"]
        for block in summary["blocks"]
        if block["gates_seed"] is not None
    }
    parts = [
        f"# Attention on {recipe['dataset']}: ResNet-{recipe['depth']}, "
        f"{recipe['epochs']} epochs",
        INTRODUCTION,
        table(summary),
        _bullets(remarks(summary)),
    ]
    if summary["blocks"]:
        parts += [
            "## Accuracy against step time",
            "![Accuracy against step time](accuracy-vs-step-time.png)",
            "## Test accuracy over epochs",
            "Mean over seeds; the band reaches from the lowest to the highest.",
            "![Test accuracy over epochs](curves.png)",
            "## Every run",
            _table_of_runs(summary["blocks"]),
        ]
    if gates:
        parts.append("## Where it attends")
    for attention, seed in gates.items():
        parts += [
            f"`{attention}`, seed {seed}: the spatial gate of each stage's last block.",
            f"![Spatial gates of {attention}](gates-{attention}.png)",
        ]
    command = (
        f"python -m train.compare --report-only --workdir {shlex.quote(str(workdir))}"
    )
    parts += [
        "## Recipe",
        _bullets(f"{field}: {value}" for field, value in _notable(recipe).items()),
        "Every other option has its default.",
        "## Machine and versions",
        _bullets(summary["machines"]),
        _bullets(
            ", ".join(f"{name} {version}" for name, version in versions.items())
            for versions in summary["versions"]
        ),
        "## Rebuild",
        "This report, `report.json` and the figures come from the logs alone:",
        f"```bash\n{command}\n```",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table_of_runs(blocks: Sequence[Mapping[str, Any]]) -> str:
    seeds = sorted({seed for block in blocks for seed in block["accuracies"]})
    rows = [("test accuracy, %", *(f"seed {seed}" for seed in seeds))]
    for block in blocks:
        accuracies = block["accuracies"]
        cells = (
            f"{100 * accuracies[s]:.2f}" if s in accuracies else "-" for s in seeds
        )
        rows.append((block["attention"], *cells))
    return _markdown_table(rows)


def _notable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say how long and on what, and those that are not the default."""
    same = ("dataset", "loader", "family")
    default = config_lib.recipe(Config(**{k: recipe[k] for k in same}))
    always = ("dataset", "depth", "epochs", "batch_size")
    return {
        field: value
        for field, value in recipe.items()
        if field in always or field not in default or value != default[field]
    }


def write_report(workdir: Path) -> str:
    """Writes report.md, report.json and the figures; returns what the terminal shows.

    Raises:
      ValueError: the logs give no report; see ``read_runs``.
    """
    logs = read_runs(workdir)
    summary = summarise(logs)
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    workdir_lib.write(workdir / "report.json", text)
    workdir_lib.write(workdir / "report.md", markdown(summary, workdir))
    if summary["blocks"]:
        _draw(workdir, logs, summary["blocks"])
    lines = [table(summary), "", *remarks(summary), "", f"Wrote {workdir}/report.md."]
    return "\n".join(lines)


def _draw(
    workdir: Path, logs: Sequence[Log], blocks: Sequence[Mapping[str, Any]]
) -> None:
    import numpy as np

    from train import report

    timed = [block for block in blocks if block["step_seconds"] is not None]
    figures = {"accuracy-vs-step-time": report.plot_cost(timed)}
    figures["curves"] = report.plot_bands(
        {
            block["attention"]: [
                log.metrics
                for log in logs
                if log.attention == block["attention"] and log.finished
            ]
            for block in blocks
        }
    )
    for block in blocks:
        attention, seed = block["attention"], block["gates_seed"]
        if seed is not None:
            path = workdir / name_of(attention, seed) / "gates.npz"
            with np.load(path) as arrays:
                gates = dict(arrays)
            figures[f"gates-{attention}"] = report.plot_gates(
                gates.pop("images"), gates
            )
    for name, figure in figures.items():
        figure.savefig(workdir / f"{name}.png", dpi=150)
