"""The report of ``train.compare`` from its logs: text, tables and figures.

It needs jax only for the pictures of gates, and to decide whether a block without one
should have one.
"""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.engine import config as config_lib
from train.engine import workdir as workdir_lib
from train.engine.config import Config
from train.study.gates import has_spatial_gate
from train.study.logs import GATES, Log, name_of, read_runs
from train.study.statistics import BASELINE, summarize
from train.study.tables import format_table

MILLIONS = "in millions"
INTRODUCTION = f"""Test accuracy after the **last** epoch, never the best one: mean ±
sample standard deviation over seeds. Differences are in points and paired: each run
against that of `{BASELINE}` with the same seed. Intervals are Student's t over those
pairs, each for its block alone: they are not corrected for comparing several blocks at
once. Seeds change initialization, data order and augmentation, but not the images, so
an interval says nothing about other datasets. Parameters count only the attention. Step
time is the median over epochs, then over seeds."""


def verdict(block: Mapping[str, Any]) -> str:
    """A sentence on what the difference to the baseline shows and what it does not."""
    name, difference = block["attention"], block["difference"]
    if difference is None:
        return (
            f"{name}: no seed has a finished run with both it and {BASELINE}, so no "
            "difference can be computed."
        )
    mean, low, high = (difference[k] for k in ("mean", "low", "high"))
    seeds, points = len(difference["by_seed"]), f"{name}: {_points(mean)} points"
    if seeds == 1:
        return (
            f"{points} with a single seed: there is no interval, and a single pair of "
            "runs does not show whether it helps."
        )
    if low is None:
        return (
            f"{points} with each of {seeds} seeds: equal differences give no interval, "
            "and these runs do not show whether it helps."
        )
    spread = f"(95 % interval {_range(low, high)} over {seeds} seeds)"
    if low > 0 or high < 0:
        effect = "helps" if low > 0 else "hurts"
        return f"{name}: {effect} by {_points(mean)[1:]} points {spread}."
    return (
        f"{points} {spread}: the interval covers zero; these runs do not show that it "
        "helps or hurts."
    )


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def table(summary: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The blocks as an aligned table, for the terminal or for Markdown."""
    if not summary["blocks"]:
        return "No run is finished."
    rows = [_row(block) for block in summary["blocks"]]
    if not markdown:  # To fit in 100 columns.
        rows = [{k: v for k, v in row.items() if k != MILLIONS} for row in rows]
    return format_table(rows, markdown=markdown)


def _row(block: Mapping[str, Any]) -> dict[str, str | None]:
    difference = block["difference"] or {"mean": None, "low": None}
    mean, low = difference["mean"], difference["low"]
    seconds, overhead = block["step_seconds"], block["overhead"]
    spread = "" if block["std"] is None else f" ± {100 * block['std']:.2f}"
    added = block["parameters_added"]
    mark = "†" if block["compilation_timed"] else ""
    return {
        "block": block["attention"],
        "seeds": str(len(block["accuracies"])),
        "accuracy, %": f"{100 * block['mean']:.2f}{spread}",
        f"over {BASELINE}": None if mean is None else _points(mean),
        "95 % interval": None if low is None else _range(low, difference["high"]),
        "parameters": f"{added:+,}",
        MILLIONS: f"{added / 1e6:.4f} M",
        "step, ms": None if seconds is None else f"{1e3 * seconds:,.1f}{mark}",
        "overhead": None if overhead is None else f"{overhead:+.1%}{mark}",
    }


def _range(low: float, high: float) -> str:
    return f"{_points(low)} to {_points(high)}"


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """Remarks on what the table does not show, one line each."""
    lines = [
        verdict(block) for block in summary["blocks"] if block["attention"] != BASELINE
    ]
    for run in summary["unfinished"]:
        state = "not started"
        if run["epochs"] is not None:
            state = f"{run['epochs']} of {_epochs(summary['recipe']['epochs'])}"
        lines.append(
            f"Not finished, so not in the table: {run['attention']}, seed "
            f"{run['seed']}, {state}."
        )
    lines += [
        f"{block['attention']}: no run has {GATES}; train without --report-only to "
        "get the picture."
        for block in summary["blocks"]
        if block["gates_seed"] is None
        and block["attention"] != BASELINE
        and has_spatial_gate(block["attention"])
    ]
    if any(block["compilation_timed"] for block in summary["blocks"]):
        lines.append(
            "†: includes compilation; train at least two epochs to get a step time "
            "without it."
        )
    if len(summary["machines"]) > 1 or len(summary["versions"]) > 1:
        lines.append(
            "The runs come from different machines or versions: step times are not "
            "comparable, and accuracies may differ for that reason alone."
        )
    return lines


def markdown(summary: Mapping[str, Any], workdir: Path) -> str:
    """The report in Markdown, with links to the figures in its folder."""
    recipe = summary["recipe"]
    gates = {
        block["attention"]: block["gates_seed"]
        for block in summary["blocks"]
        if block["gates_seed"] is not None
    }
    parts = [
        f"# Attention on {recipe['dataset']}: ResNet-{recipe['depth']}, "
        f"{_epochs(recipe['epochs'])}",
        INTRODUCTION,
        table(summary, markdown=True),
        _bullets(remarks(summary)),
    ]
    if _timed(summary["blocks"]):
        parts += [
            "## Accuracy against step time",
            "![Accuracy against step time](accuracy-vs-step-time.png)",
        ]
    if summary["blocks"]:
        parts += [
            "## Test accuracy over epochs",
            "Mean over seeds; the band spans the lowest to the highest.",
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
    quoted = shlex.quote(workdir.as_posix())
    command = f"python -m train.compare --report-only --workdir {quoted}"
    parts += [
        "## Recipe",
        _bullets(f"{field}: {value}" for field, value in _notable(recipe).items()),
        "All other options have their defaults.",
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


def _timed(blocks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The blocks with a step time."""
    return [block for block in blocks if block["step_seconds"] is not None]


def _epochs(count: int) -> str:
    return f"{count} epoch{'' if count == 1 else 's'}"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table_of_runs(blocks: Sequence[Mapping[str, Any]]) -> str:
    seeds = sorted({seed for block in blocks for seed in block["accuracies"]})
    rows = []
    for block in blocks:
        percent = {seed: 100 * share for seed, share in block["accuracies"].items()}
        by_seed = {f"seed {seed}": percent.get(seed) for seed in seeds}
        rows.append({"accuracy, %": block["attention"], **by_seed})
    return format_table(rows, markdown=True)


def _notable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The main fields of a recipe, and those that differ from the default."""
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
    summary = summarize(logs)
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

    from train.study import plots

    histories: dict[str, list[Any]] = {block["attention"]: [] for block in blocks}
    for log in logs:
        if log.finished:
            histories[log.attention].append(log.metrics)
    figures = {"curves": plots.plot_bands(histories)}
    if timed := _timed(blocks):
        figures["accuracy-vs-step-time"] = plots.plot_cost(timed)
    for block in blocks:
        attention, seed = block["attention"], block["gates_seed"]
        if seed is not None:
            # Only now, since it imports jax.
            from flax_attn.inspect import plot

            path = workdir / name_of(attention, seed) / GATES
            with np.load(path) as arrays:
                gates = dict(arrays)
            figures[f"gates-{attention}"] = plot(gates.pop("images"), gates)
    for name, figure in figures.items():
        figure.savefig(workdir / f"{name}.png", dpi=150)
