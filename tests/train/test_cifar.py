"""The command line of ``train.cifar``."""

import json
import subprocess
from functools import partial
from unittest.mock import Mock

import jax
import pytest

from tests import processes, tiny_run
from train import cifar
from train.engine import config as config_lib
from train.engine import loop, model, setup
from train.engine.config import Config
from train.engine.progress import Run


def run_here(capsys, *arguments):
    """What ``subprocess.run`` returns for this command line, without a process."""
    code = 0
    try:
        cifar.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())


def test_digits(tmp_path, capsys, monkeypatch):
    """By a network of one residual block."""
    monkeypatch.setattr(model, "cifar_resnet", tiny_run.network)
    workdir = tmp_path / "run"
    arguments = ("--dataset", "digits", "--depth", 8, "--epochs", 1, "--devices", 1)
    arguments += ("--attention", "se", "--workdir", workdir)
    run = partial(run_here, capsys)
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    (line,) = (workdir / "metrics.jsonl").read_text().splitlines()
    accuracy = json.loads(line)["test_accuracy"]
    assert "ResNet-8, attention se, on digits" in result.stdout
    assert f"test accuracy {accuracy:.2%} after 1 epoch in" in result.stdout
    assert "epoch 1/1" in result.stderr
    assert max(map(len, result.stdout.splitlines()[:2])) <= 80
    assert result.stdout.splitlines()[2:] == [
        f"The run is in {workdir}. Next:",
        f"  python -m train.report {workdir}",
    ]
    first = result.stderr.splitlines()[0]
    # The stem, two convolutions of 16 channels, three norms, SE and the head.
    parameters = 27 * 16 + 2 * 9 * 16 * 16 + 3 * 2 * 16 + 2 * 16 + 170
    assert f"· ResNet-8 + se, {parameters:,} parameters · compiling…" in first
    lines = result.stderr.replace("\r", "\n").splitlines()
    assert max(len(line) for line in lines if "/22" in line) <= 80
    # The same folder again: no step is left.
    again = run(*arguments)
    assert again.returncode == 0 and "Resuming from step 22 of 22" in again.stderr
    assert again.stdout == result.stdout
    never = run(*arguments, "--resume", "never")
    assert never.returncode == 2 and "holds an earlier run" in never.stderr
    # Another configuration: the differences are named, and nothing is overwritten.
    other = run(*arguments, "--seed", 1, "--learning-rate", 0.2)
    assert other.returncode == 2
    assert "learning_rate 0.1 (now 0.2), seed 0 (now 1); pass anoth" in other.stderr
    assert (workdir / "metrics.jsonl").read_text() == line + "\n"


def test_the_next_command_has_the_folder_of_the_data(tmp_path, capsys, monkeypatch):
    config = config_lib.resolve(Config(attention="cbam"))
    run = Mock(spec=Run, **{"summary.return_value": "trained"})
    monkeypatch.setattr(setup, "load", lambda config: tiny_run.images())
    monkeypatch.setattr(loop, "train", lambda *_: run)
    workdir, folder = tmp_path / "run", tmp_path / "the data"
    arguments = ("--attention", config.attention, "--batch-size", 8, "--devices", 1)
    for data, expected in ((folder, f" --data-dir '{folder}'"), (None, "")):
        options = ("--data-dir", data) if data else ()
        result = run_here(capsys, *arguments, "--workdir", workdir, *options)
        assert result.stdout.endswith(
            f"\n  python -m train.gates {workdir}{expected}\n"
        )


def test_as_a_command():
    result = processes.complete("train.cifar", "--depth", 19, "--dataset", "digits")
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("train.cifar: `depth` must be 6n+2")


@pytest.mark.parametrize(
    "option, known",
    [
        ("--attention", "cbam-conv"),
        ("--preset", "official_eca50"),
        ("--dataset", "cifar100"),
        ("--dtype", "bfloat16"),
        ("--init", "identity"),
    ],
)
def test_choices(option, known, capsys):
    with pytest.raises(SystemExit) as stop:
        cifar.main([option, "cbm"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "invalid choice 'cbm'" in error
    assert option in error and known in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        # Before any data are downloaded.
        (["--depth", "19", "--dataset", "cifar10"], "`depth` must be 6n+2"),
        (["--batch-size", "1438"], "`batch_size` must be at most the 1,437"),
        (["--workdir", "{file}/run"], "cannot be written to (Not a directory)"),
        (["--workdir", "{file}"], "cannot be written to (File exists)"),
        (["--dataset", "cifar10", "--data-dir", "{bad}"], "is corrupt or truncated"),
        (["--dataset", "cifar100", "--data-dir", "{file}"], "--dataset digits, which"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, refused):
    """Nothing is left behind."""
    file, bad = tmp_path / "file", tmp_path / "bad"
    file.touch()
    bad.mkdir()
    (bad / "cifar-10-binary.tar.gz").write_bytes(b"not an archive")
    before = sorted(tmp_path.rglob("*"))
    arguments = [a.format(file=file, bad=bad) for a in arguments]
    if "--dataset" not in arguments:
        arguments += ["--dataset", "digits"]
    if "--workdir" not in arguments:
        arguments += ["--workdir", tmp_path / "run"]
    assert message in refused(cifar, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def not_finite(monkeypatch):
    def train(*_):
        raise FloatingPointError("The loss is nan at epoch 1, step 2.")

    monkeypatch.setattr(loop, "train", train)


def test_a_run_that_is_not_finite(tmp_path, capsys, not_finite):
    result = run_here(capsys, "--dataset", "digits", "--workdir", tmp_path / "run")
    assert result.returncode == 1 and not result.stdout
    assert result.stderr == "train.cifar: The loss is nan at epoch 1, step 2.\n"


@pytest.mark.parametrize("flag", ["jax_debug_nans", "jax_debug_infs"])
def test_a_search_for_nan_keeps_the_traceback(flag, tmp_path, not_finite):
    jax.config.update(flag, True)
    try:
        with pytest.raises(FloatingPointError, match="The loss is nan"):
            cifar.main(["--dataset", "digits", "--workdir", str(tmp_path / "run")])
    finally:
        jax.config.update(flag, False)
