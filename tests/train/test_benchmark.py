import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from train import benchmark

ROOT = Path(__file__).parents[2]


def run(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "train.benchmark", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        **kwargs,
    )


def test_blocks_against_the_plain_ones(tmp_path):
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    result = run(
        *("--blocks", "se", "cbam", "--shapes", 2, 8, 8, 16, 1, 4, 4, 32),
        *("--rounds", 2, "--against", "plain", "--json", out, "--plot", plot),
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["rows"]
    cases = {(r["block"], r["contender"], tuple(r["shape"])) for r in rows}
    assert len(rows) == len(cases) == 2 * 2 * 2
    for row in rows:
        assert row["forward"] > 0 and row["forward_backward"] > 0
        assert row["temporaries"] >= 0 and row["compile_seconds"] > 0
    assert "2x8x8x16" in result.stdout and "Geometric means" in result.stdout
    assert plot.stat().st_size > 5000


def test_geometric_means():
    rows = [
        {
            "block": "se",
            "contender": "fast",
            "dtype": "float32",
            "forward": forward,
            "forward_backward": 5.0,
        }
        for forward in (1.0, 4.0)
    ]
    (mean,) = benchmark.geometric_means(rows)
    assert mean["shapes"] == 2
    assert math.isclose(mean["forward"], 2) and math.isclose(
        mean["forward_backward"], 5
    )


def test_the_fastest_turn_counts(monkeypatch):
    clock = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    turns = {"a": iter([9, 4, 1]), "b": iter([9, 2, 3])}  # The first warms up.
    order = []

    def call(name):
        nonlocal clock
        order.append(name)
        clock += next(turns[name])

    calls = {name: partial(call, name) for name in turns}
    assert benchmark.fastest(calls, rounds=2) == {"a": 1, "b": 2}
    assert order == ["a", "b"] * 3


def test_an_interrupt_keeps_what_is_done(tmp_path):
    out = tmp_path / "out.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "train.benchmark", "--blocks", "se", "eca", "cbam"]
        + ["--shapes", "1", "4", "4", "16", "--rounds", "1000000", "--json", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    seen = ""
    while "se (1, 4, 4, 16)" not in seen:
        character = process.stderr.read(1)
        assert character, seen
        seen += character
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Nothing was measured." in stdout
    assert json.loads(out.read_text())["rows"] == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--blocks", "none"], "`blocks` must be one of se, eca,"),
        (["--dtypes", "int8"], "`dtypes` must be one of float32,"),
        (["--shapes", "1", "0", "4", "16"], "`shapes` must have axes of at least 1"),
        (["--rounds", "0"], "`rounds` must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error and len(error.splitlines()) == 1


def test_turns_change_their_order():
    rounds, taken = 20, []
    calls = {name: partial(taken.append, name) for name in "abcd"}
    assert benchmark.fastest(calls, rounds).keys() == set("abcd")
    # After one turn each for warming up.
    turns = [tuple(taken[i : i + 4]) for i in range(4, 4 * rounds + 1, 4)]
    assert all(sorted(turn) == list("abcd") for turn in turns)
    assert len({turn[0] for turn in turns}) == 4
