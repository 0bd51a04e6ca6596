import json
import math
import re
from pathlib import Path

import pytest

from flax_attn.blocks import BLOCKS
from tests.study.runs import report_of, summary_of, write_block, write_run
from train.study import report


@pytest.mark.parametrize(
    "block, none, words",
    [
        (
            [0.91, 0.93, 0.98],
            [0.90, 0.91, 0.95],
            "+2.00 points (95 % interval -0.48 to +4.48 over 3 seeds): the interval "
            "covers zero; these runs do not show that it helps or hurts.",
        ),
        (
            [0.90, 0.91, 0.95],
            [0.91, 0.93, 0.98],
            "-2.00 points (95 % interval -4.48 to +0.48 over 3 seeds): the interval "
            "covers zero; these runs do not show that it helps or hurts.",
        ),
        (
            [0.941, 0.942, 0.943],
            [0.90, 0.90, 0.90],
            "helps by 4.20 points (95 % interval +3.95 to +4.45 over 3 seeds).",
        ),
        (
            [0.90, 0.90, 0.90],
            [0.941, 0.942, 0.943],
            "hurts by 4.20 points (95 % interval -4.45 to -3.95 over 3 seeds).",
        ),
        ([0.93], [0.90], "+3.00 points with a single seed: there is no interval"),
        (
            [0.93, 0.94],
            [0.90, 0.91],
            "+3.00 points with each of 2 seeds: equal differences give no interval",
        ),
    ],
)
def test_verdict(block, none, words, tmp_path):
    write_block(tmp_path, "none", none)
    write_block(tmp_path, "se", block)
    text = report_of(tmp_path)
    assert f"- se: {words}" in text
    assert ("helps by" in text, "hurts by" in text) == (
        "helps by" in words,
        "hurts by" in words,
    )


def test_without_a_step_time_there_is_no_picture_of_it(tmp_path):
    for attention in ("none", "se"):
        write_run(tmp_path, attention, 0, [0.9], steps=[None])
    report.write_report(tmp_path)
    assert (tmp_path / "curves.png").exists()
    assert not (tmp_path / "accuracy-vs-step-time.png").exists()
    assert "step-time.png" not in (tmp_path / "report.md").read_text()


def test_unfinished_runs_are_listed_and_not_averaged(tmp_path):
    write_block(tmp_path, "none", [0.90, 0.92])
    write_block(tmp_path, "se", [0.91, 0.94])
    write_run(tmp_path, "none", 2, [0.1], epochs=3)
    write_run(tmp_path, "se", 2, [0.1, 0.2, 0.5])
    write_run(tmp_path, "cbam", 0, [], epochs=3)
    summary, blocks = summary_of(tmp_path)
    assert math.isclose(blocks["none"]["mean"], 0.91)
    assert list(blocks["se"]["accuracies"]) == [0, 1, 2]
    assert list(blocks["se"]["difference"]["by_seed"]) == [0, 1]
    assert "cbam" not in blocks
    text = report_of(tmp_path)
    unfinished = re.findall(r"Not finished, so not in the table: (.*)\.", text)
    assert unfinished == [
        "none, seed 2, 1 of 3 epochs",
        "cbam, seed 0, 0 of 3 epochs",
        "cbam, seed 1, not started",
        "cbam, seed 2, not started",
    ]


def test_without_a_baseline_there_is_no_difference(tmp_path):
    write_run(tmp_path, "none", 0, [0.5, 0.9])
    write_run(tmp_path, "se", 1, [0.5, 0.9])
    text = report_of(tmp_path)
    assert "- se: no seed has a finished run with both it and none, so" in text


def test_nothing_finished(tmp_path):
    write_run(tmp_path, "none", 0, [0.5], epochs=2)
    shown = report.write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "No run is finished." in text and "No run is finished." in shown
    assert not list(tmp_path.glob("*.png"))


def test_a_time_with_compilation_in_it_is_flagged(tmp_path):
    write_run(tmp_path, "none", 0, [0.5], steps=[2.0])
    write_run(tmp_path, "se", 0, [0.5], steps=[3.0])
    text = report_of(tmp_path)
    assert "3,000.0†" in text and "+50.0%†" in text
    assert "†: includes compilation; train at least two" in text


def test_the_report_names_the_recipe_and_the_machines(tmp_path):
    for seed in range(2):
        for attention in ("none", "se"):
            write_run(
                *(tmp_path, attention, seed, [0.5, 0.9]),
                label_smoothing=0.1,
                depth=14,
                data_dir=Path("/somewhere"),
            )
    text = report_of(tmp_path)
    assert "# Attention on digits: ResNet-14, 2 epochs\n" in text
    assert "never the best one" in text
    assert "not corrected for comparing several" in text
    recipe = re.search(r"## Recipe\n\n(.*?)\n\n", text, re.DOTALL)[1].splitlines()
    assert sorted(recipe) == [
        "- batch_size: 64",
        "- dataset: digits",
        "- depth: 14",
        "- epochs: 2",
        "- label_smoothing: 0.1",
    ]
    assert "- an abacus" in text and "- jax 1.2.3, flax 4.5.6" in text
    assert "+2,604" in text and "0.0026 M" in text
    assert "different machines" not in text
    facts = json.loads((tmp_path / "se-seed1" / "run.json").read_text())
    facts["machine"] = "another abacus"
    (tmp_path / "se-seed1" / "run.json").write_text(json.dumps(facts))
    text = report_of(tmp_path)
    assert "step times are not comparable" in text and "- another abacus" in text


def test_gates_that_are_missing_are_named(tmp_path):
    for attention in ("none", "se", "cbam"):
        write_block(tmp_path, attention, [0.90, 0.91])
    text = report_of(tmp_path)
    assert re.findall(r"- (.*): no run has gates.npz", text) == ["cbam"]
    assert "gates-cbam.png" not in text
    (tmp_path / "cbam-seed1" / "gates.npz").touch()
    text = report_of(tmp_path)
    assert "no run has gates.npz" not in text
    assert "`cbam`, seed 1: the spatial gate" in text and "(gates-cbam.png)" in text


def test_one_epoch_is_no_epochs(tmp_path):
    write_run(tmp_path, "none", 0, [0.5])
    write_run(tmp_path, "se", 0, [], epochs=1)
    text = report_of(tmp_path)
    assert "ResNet-20, 1 epoch\n" in text and "0 of 1 epoch." in text
    assert "1 epochs" not in text


def test_the_table_fits_100_columns(tmp_path):
    """With a block of the longest name, losses of two digits and slow steps."""
    block = max(BLOCKS, key=len)
    for seed, (low, high) in enumerate([(0.90, 0.10), (0.11, 0.95), (0.90, 0.11)]):
        write_run(tmp_path, "none", seed, [0.1, high], steps=[9, 1.0])
        write_run(tmp_path, block, seed, [0.1, low], steps=[9, 2.5])
    summary, blocks = summary_of(tmp_path)
    blocks[block]["parameters_added"] = 2_531_072
    lines = report.table(summary).splitlines()
    assert "+2,531,072" in lines[2] and "2,500.0" in lines[2] and "+150.0%" in lines[2]
    assert len(lines[2].split(" to ")) == 2 and "±" in lines[2]
    assert max(map(len, lines)) <= 100
