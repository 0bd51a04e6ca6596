"""``--help`` of every command, in one process."""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest

import train
from flax_attn.blocks import BLOCKS

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(path.stem for path in (ROOT / "train").glob("[a-z]*.py"))
PROGRAM = """
import contextlib, importlib, io, json, sys
commands = {name: importlib.import_module(f"train.{name}") for name in sys.argv[1:]}
on_import, helps = sorted(sys.modules), {}
for name, command in commands.items():
    with contextlib.redirect_stdout(io.StringIO()) as text:
        with contextlib.suppress(SystemExit):
            command.main(["--help"])
    helps[name] = text.getvalue()
print(json.dumps([on_import, sorted(sys.modules), helps]))
"""
# All that a command needs only once it runs; jax and flax know the names of the blocks.
SLOW = {"grain", "matplotlib", "optax", "orbax", "PIL", "pooch", "requests", "scipy"}
SLOW |= {"sklearn", "tensorboard", "torch", "wandb"}


@pytest.fixture(scope="module")
def printed(environment):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *COMMANDS],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"COLUMNS": "80"},
    )
    assert result.returncode == 0 and not result.stderr, result.stderr
    return json.loads(result.stdout)


def test_what_is_imported(printed):
    """So that each answers within a second."""
    on_import, on_help, _ = printed
    assert not {"jax", "flax", "tqdm", *SLOW} & set(on_import)
    assert "jax" in on_help and not SLOW & set(on_help)


def test_it_fits_in_80_columns(printed):
    assert {"cifar", "imagenet", "compare", "gates", "report", "benchmark"} <= set(
        printed[2]
    )
    for name, text in printed[2].items():
        assert f"usage: python -m train.{name} " in text
        assert max(map(len, text.splitlines())) <= 80, name
        assert "(default: )" not in text, name
        assert "None" not in text, name


def test_its_paragraphs_are_filled(printed):
    """A line ends where the next word would not fit."""
    lines = [line[1:-2].rstrip() for line in printed[2]["cifar"].splitlines()]
    texts = [line if re.match(" {7}[^ ]", line) else "" for line in lines]
    pairs = [(a, b) for a, b in pairwise(texts) if a and b]
    assert len(pairs) > 20
    for a, b in pairs:
        assert len(f"{a} {b.split()[0]}") > 76, (a, b)


def test_what_it_says(printed):
    # Without the frames and line breaks.
    said = {
        name: " ".join(text.replace("│", " ").split())
        for name, text in printed[2].items()
    }
    for part in ("none,se,se-max,", "timm_cbam", "{cifar10,cifar100,digits,folder}"):
        assert part in said["cifar"]
    assert "--workdir PATH" in said["cifar"] and "--epochs INT" in said["cifar"]
    assert "--depth INT" in said["imagenet"] and "(default: 50)" in said["imagenet"]
    assert f"Blocks: {', '.join(BLOCKS)}." in said["benchmark"]
    assert f"Blocks: none, {', '.join(BLOCKS)}." in said["compare"]
    assert "--coordinator" in said["cifar"] and "--coordinator" not in said["compare"]


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(train, "find_spec", lambda name: None if "y" in name else name)
    monkeypatch.setattr(sys, "argv", ["-m", "--help"])
    with pytest.raises(SystemExit) as stop:
        train._check_installed()
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert (
        "not installed (scipy, tyro);" in line and 'pip install -e ".[train]"' in line
    )
    monkeypatch.setattr(sys, "argv", ["notebook"])
    with pytest.raises(ImportError, match=r"\(scipy, tyro\)"):
        train._check_installed()


def test_all_of_the_extra_is_checked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {
        re.match(r"[\w-]+", requirement)[0]
        for requirement in project["optional-dependencies"]["train"]
    }
    packages = metadata.packages_distributions()
    assert len(wanted) == len(train.NEEDED)
    assert all(wanted & set(packages[name]) for name in train.NEEDED)
