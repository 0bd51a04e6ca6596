"""Statistics of a comparison: means over seeds and paired differences."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from train.study.logs import Log, recipe_of

BASELINE = "none"
COVERAGE = 0.95
# Accuracies are multiples of one over the test images; less than this is rounding.
NO_SPREAD = 1e-9


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean by Student's t, or None without any spread.

    That is, for a single value, and for equal ones, which accuracies over few test
    images may be: an interval of width 0 would claim certainty.
    """
    if len(values) < 2 or max(values) - min(values) < NO_SPREAD:
        return None
    from scipy import stats  # Slow to import.

    low, high = stats.t.interval(
        COVERAGE, len(values) - 1, loc=statistics.fmean(values), scale=stats.sem(values)
    )
    return float(low), float(high)


def paired_difference(
    values: Mapping[int, float], base: Mapping[int, float]
) -> dict[str, Any] | None:
    """The mean of ``values - base`` over their common seeds, and its interval.

    None without a common seed.
    """
    differences = {
        seed: values[seed] - value for seed, value in base.items() if seed in values
    }
    if not differences:
        return None
    low, high = interval(list(differences.values())) or (None, None)
    mean = statistics.fmean(differences.values())
    return {"by_seed": differences, "mean": mean, "low": low, "high": high}


def summarize(logs: Sequence[Log]) -> dict[str, Any]:
    """The content of ``report.json``; unfinished runs are only listed."""
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
        "blocks": [_summarize_block(runs, base) for runs in finished.values()],
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
    """The values without repetitions, in order; they need not be hashable."""
    values = list(values)
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _summarize_block(runs: Sequence[Log], base: Sequence[Log]) -> dict[str, Any]:
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
        "gates_seed": next((log.seed for log in runs if log.gates.exists()), None),
        "difference": None,
        "overhead": None,
    }
    if attention == BASELINE:
        return block
    block["difference"] = paired_difference(
        accuracies, {log.seed: log.accuracy for log in base}
    )
    base_seconds, base_compilation_timed = _step_time(base)
    if step_seconds is not None and base_seconds is not None:
        block["overhead"] = step_seconds / base_seconds - 1
        block["compilation_timed"] |= base_compilation_timed
    return block


def _step_time(runs: Sequence[Log]) -> tuple[float | None, bool]:
    """The median of the runs' step times, and whether compilation is in it.

    Runs that compiled in every epoch, since each was interrupted, are left out unless
    all runs did.
    """
    for compiled in (False, True):
        times = [log.step_seconds(compiled=compiled) for log in runs]
        known = [seconds for seconds in times if seconds is not None]
        if known:
            return statistics.median(known), compiled
    return None, False
