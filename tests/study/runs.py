"""Runs of ``train.compare`` as the loop leaves them, written by hand."""

import json

from train.engine import config as config_lib
from train.engine.config import Config
from train.study import report
from train.study.logs import read_runs
from train.study.statistics import summarize

ADDED = {"none": 0, "eca": 27, "se": 2604, "cbam": 2898, "channel-conv": 27}
VERSIONS = {"jax": "1.2.3", "flax": "4.5.6"}


def write_run(work, attention, seed, accuracies, *, steps=None, epochs=None, **fields):
    """A run whose first epoch has compilation in it."""
    folder = work / f"{attention}-seed{seed}"
    folder.mkdir(parents=True)
    epochs = epochs or len(accuracies)
    config = Config(
        attention=attention, seed=seed, dataset="digits", epochs=epochs, **fields
    )
    steps = steps or [9.0, *[0.1] * (len(accuracies) - 1)]
    facts = {
        "config": config_lib.recipe(config),
        "parameters": 272_474 + ADDED[attention],
        "attention_parameters": ADDED[attention],
        "machine": "an abacus",
        "versions": VERSIONS,
    }
    (folder / "run.json").write_text(json.dumps(facts))
    lines = [
        {"epoch": i, "step": 7 * i, "test_loss": 1.0, "test_accuracy": accuracy}
        for i, accuracy in enumerate(accuracies, 1)
    ]
    write_lines(folder / "metrics.jsonl", lines)
    lines = [
        {"epoch": i, "steps": 7, "step_seconds": s, "seconds": 1.0}
        | ({"compiled": True} if i == 1 else {})
        for i, s in enumerate(steps, 1)
    ]
    write_lines(folder / "timing.jsonl", lines)
    return folder


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_block(work, attention, final, **kwargs):
    """One run per seed, whose best epoch is not the last one."""
    for seed, accuracy in enumerate(final):
        write_run(work, attention, seed, [0.1, 0.99, accuracy], **kwargs)


def summary_of(work):
    """The summary, and its blocks by name."""
    summary = summarize(read_runs(work))
    return summary, {block["attention"]: block for block in summary["blocks"]}


def report_of(work):
    """The text of the report; nothing is drawn."""
    return report.markdown(summary_of(work)[0], work)
