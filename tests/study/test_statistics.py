import math

import numpy as np
import pytest
from scipy import stats

from tests.study.runs import summary_of, write_block, write_run
from train.study import report
from train.study.statistics import interval


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_interval_is_that_of_the_paired_t_test(seeds):
    a, b = np.random.RandomState(seeds).normal(0.9, 0.01, (2, seeds))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose(interval(list(a - b)), expected, rtol=1e-10)


@pytest.mark.parametrize("values", [[0.5], [0.25, 0.25], [0.1 + 0.2 - 0.3, 0.0]])
def test_no_spread_no_interval(values):
    assert interval(values) is None


def test_numbers(tmp_path):
    write_block(tmp_path, "none", [0.90, 0.91, 0.95], steps=[9, 0.1, 0.1])
    write_block(tmp_path, "cbam", [0.91, 0.93, 0.98], steps=[9, 0.1, 0.14])
    summary, blocks = summary_of(tmp_path)
    assert [b["attention"] for b in summary["blocks"]] == ["none", "cbam"]
    none, cbam = blocks["none"], blocks["cbam"]
    # The last epoch's and not the best one's, which is 0.99 everywhere.
    assert none["accuracies"] == {0: 0.90, 1: 0.91, 2: 0.95}
    assert math.isclose(none["mean"], 0.92)
    # Deviations -2, -1, 3: squares 14, over n - 1.
    assert math.isclose(none["std"], 0.01 * 7**0.5)
    difference = cbam["difference"]
    assert difference["by_seed"] == pytest.approx({0: 0.01, 1: 0.02, 2: 0.03})
    # s = 1 and t(0.975; 2) = 4.302653 (any table): 2 - 2.484138 and 2 + 2.484138.
    assert math.isclose(difference["low"], -0.00484138, abs_tol=1e-7)
    assert math.isclose(difference["high"], 0.04484138, abs_tol=1e-7)
    # Medians without the epoch that compiles.
    assert none["step_seconds"] == 0.1 and not none["compilation_timed"]
    assert math.isclose(cbam["step_seconds"], 0.12)
    assert math.isclose(cbam["overhead"], 0.2)
    assert cbam["parameters_added"] == 2898 and cbam["parameters"] == 275_372
    assert none["difference"] is None and none["overhead"] is None


def test_step_time_is_the_median_of_seeds(tmp_path):
    for seed, seconds in enumerate((0.1, 0.2, 0.9)):
        write_run(tmp_path, "none", seed, [0.5, 0.5], steps=[9, seconds])
    _, blocks = summary_of(tmp_path)
    assert blocks["none"]["step_seconds"] == 0.2


def test_compilation_is_timed_only_where_there_is_nothing_else(tmp_path):
    write_run(tmp_path, "none", 0, [0.5, 0.5], steps=[9, 0.1])
    # None of its epochs was timed without compilation.
    write_run(tmp_path, "none", 1, [0.5, 0.5], steps=[9])
    write_run(tmp_path, "se", 0, [0.5, 0.5], steps=[7])
    write_run(tmp_path, "se", 1, [0.5, 0.5], steps=[8])
    _, blocks = summary_of(tmp_path)
    none, se = blocks["none"], blocks["se"]
    assert none["step_seconds"] == 0.1 and not none["compilation_timed"]
    assert se["step_seconds"] == 7.5 and se["compilation_timed"]


def test_an_epoch_without_steps_of_its_own_has_no_time(tmp_path):
    """One that was resumed after its last step."""
    write_run(tmp_path, "none", 0, [0.5, 0.5, 0.5], steps=[9, None, 0.3])
    write_run(tmp_path, "se", 0, [0.5, 0.5, 0.5], steps=[None, None, None])
    _, blocks = summary_of(tmp_path)
    assert blocks["none"]["step_seconds"] == 0.3
    assert blocks["se"]["step_seconds"] is None and blocks["se"]["overhead"] is None
    report.write_report(tmp_path)
