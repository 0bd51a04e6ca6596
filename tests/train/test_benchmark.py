import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flax_attn.blocks import BLOCKS
from train import benchmark
from train.study import blocks, timing, torch_blocks, tpu

ROOT = Path(__file__).parents[2]


def test_blocks_against_the_plain_ones(tmp_path, capsys, monkeypatch):
    # The handler would stay.
    monkeypatch.setattr(timing, "interrupt_between_turns", lambda: None)
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    shapes = (2, 8, 8, 16, 1, 4, 4, 32)
    arguments = ("--blocks", "se", "eca", "--shapes", *shapes, "--rounds", 2)
    arguments += ("--against", "plain", "--json", out, "--plot", plot)
    benchmark.main([str(a) for a in arguments])
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    cases = {(r["block"], r["contender"], tuple(r["shape"])) for r in rows}
    assert len(rows) == len(cases) == 2 * 2 * 2
    for row in rows:
        assert row["forward"] > 0 and row["forward_backward"] > 0
        assert row["temporaries"] >= 0 and row["compile_seconds"] > 0
    assert "2x8x8x16" in printed and "Geometric means" in printed
    assert plot.stat().st_size > 5000


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
        (["--blocks", "none"], "`blocks` must be one of se, se-max,"),
        (["--dtypes", "int8"], "`dtypes` must be one of float32,"),
        (["--shapes", "1", "0", "4", "16"], "`shapes` must have axes of at least 1"),
        (["--plot", "a.png", "--network"], "`plot` draws single blocks; leave out"),
        (["--plot", "bars.txt"], "`plot` must be a picture, got bars.txt; end its"),
        (["--json", "no/a.json"], "`json` must be in a folder that exists, got no/a"),
        (["--rounds", "0"], "`rounds` must be at least 1, got 0"),
        (
            ["--inside", "--network"],
            "`inside` times single blocks; leave out `network`",
        ),
        (["--inside", "--compile-for", "v5e:2x2"], "leave out `compile_for`"),
        (["--network", "--against", "torch"], "leave out torch or `network`"),
        (["--network", "--dtypes", "float16"], "leave out `shapes` and `dtypes`"),
    ],
)
def test_bad_arguments(arguments, message, refused):
    assert message in refused(benchmark, *arguments)


def test_extras_that_are_missing(refused, monkeypatch):
    for module in (torch_blocks, tpu):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "pip install --group parity" in refused(benchmark, "--against", "torch")
    line = refused(benchmark, "--compile-for", "v5e:2x2", "--network")
    assert "--group tpu-aot in an environment" in line


def test_all_blocks_are_measured_by_default(capsys, monkeypatch):
    """And it names those without a counterpart in PyTorch."""
    asked = []

    def measure_block(block, shape, dtype, against, rounds, *, inside):
        asked.append((block, against, inside))
        return
        yield

    monkeypatch.setattr(blocks, "measure_block", measure_block)
    monkeypatch.setattr(timing, "interrupt_between_turns", lambda: None)
    monkeypatch.setattr(torch_blocks, "check_installed", lambda: None)
    benchmark.main(["--shapes", "1", "2", "2", "16", "--against", "torch", "--inside"])
    output = capsys.readouterr()
    assert asked == [(block, ("torch",), True) for block in BLOCKS]
    missing = [block for block in BLOCKS if not torch_blocks.has_counterpart(block)]
    assert f"not in PyTorch: {', '.join(missing)}." in output.err
    assert "Nothing was measured." in output.out
