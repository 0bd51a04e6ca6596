import dataclasses
import json
import re
import shlex
import signal
import types
from functools import partial

import numpy as np
import pytest

from flax_attn.resnet import ATTENTIONS
from tests import processes
from tests.study.runs import summary_of, write_block, write_run
from train import compare
from train.data import cifar as data
from train.data.cifar import ImageSet
from train.engine import interrupt, loop, setup
from train.engine.config import Config

# --- the report from the logs


@pytest.fixture
def comparison(tmp_path):
    work = tmp_path / "a comparison"
    write_block(work, "none", [0.90, 0.91])
    write_block(work, "cbam", [0.91, 0.93])
    gates = {f"stage{i}_block3": np.full((8, 2, 2), 0.5, np.float32) for i in (1, 2, 3)}
    images = np.zeros((8, 4, 4, 3), np.uint8)
    np.savez(work / "cbam-seed1" / "gates.npz", images=images, **gates)
    return work


def test_rebuild_is_the_same_to_the_byte_and_loads_no_data(
    comparison, capsys, monkeypatch
):
    compare.main(["--report-only", "--workdir", str(comparison)])
    text = (comparison / "report.md").read_text()
    shown = capsys.readouterr().out
    # The terminal shows the table and the remarks.
    assert re.search(r"\n *cbam  .*\+2,898", shown)
    assert re.search(r"\n\|  *cbam \|.*\+2,898", text)
    assert re.search(r"\ncbam: \+1.50 points", shown)
    names = ("accuracy-vs-step-time.png", "curves.png", "gates-cbam.png")
    made = (*names, "report.json", "report.md")
    assert all(f"]({name})" in text for name in names)
    assert "`cbam`, seed 1: the spatial gate" in text
    saved = json.loads((comparison / "report.json").read_text())
    assert saved["recipe"]["epochs"] == 3 and saved["unfinished"] == []
    assert saved["blocks"][1]["difference"]["by_seed"].keys() == {"0", "1"}
    before = {name: (comparison / name).read_bytes() for name in made}
    for name in made:
        (comparison / name).unlink()
    # The command is the one in the report, and reads logs alone.
    command = re.search(r"```bash\n(.*)\n```", text)[1]
    arguments = shlex.split(command)
    assert arguments[:3] == ["python", "-m", "train.compare"]
    monkeypatch.setattr(data, "load", lambda *_: pytest.fail("data were loaded"))
    compare.main(arguments[3:])
    assert {name: (comparison / name).read_bytes() for name in made} == before


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("metrics.jsonl", '{"epoch": 1', "metrics.jsonl is damaged (JSONDecodeError"),
        ("metrics.jsonl", '{"epoch": 2}\n', "is damaged (ValueError: epochs [2])"),
        ("timing.jsonl", "", "timing.jsonl is damaged (ValueError: empty)"),
        ("run.json", "{}", "run.json is damaged (KeyError: 'config')"),
        ("run.json", "", "run.json is damaged (JSONDecodeError"),
    ],
)
def test_damaged_logs(file, content, message, comparison, refused):
    (comparison / "cbam-seed0" / file).write_text(content)
    error = refused(compare, "--report-only", "--workdir", comparison)
    assert message in error and "train without --report-only" in error


def test_runs_of_two_recipes(comparison, refused):
    write_run(comparison, "se", 0, [0.1, 0.2, 0.3], learning_rate=0.5)
    error = refused(compare, "--report-only", "--workdir", comparison)
    assert "one recipe, got `learning_rate` 0.1 and 0.5; pass another" in error


def test_a_folder_with_another_name(comparison, refused):
    (comparison / "cbam-seed0").rename(comparison / "copy")
    error = refused(compare, "--report-only", "--workdir", comparison)
    assert "copy must have the name of its run, cbam-seed0" in error


def test_no_runs(tmp_path, refused):
    error = refused(compare, "--report-only", "--workdir", tmp_path / "no")
    assert "must contain runs, got none" in error


# --- the command line


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit):
        compare.main(["--help"])
    text = capsys.readouterr().out
    options = re.findall(r"^. (--[a-z][a-z-]+)", text, re.MULTILINE)
    fields = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(Config)}
    own = ["--attentions", "--seeds", "--workdir", "--report-only"]
    # Every option of a recipe; those that are the comparison's own only once.
    assert options[:4] == own
    own += ["--init", "--preset", "--attention-lr-scale"]
    own += ["--attention", "--seed", "--resume", "--coordinator", "--num-processes"]
    own += ["--process-id", "--peer-timeout"]
    assert sorted(options[4:]) == sorted(fields - {*own})
    assert all(name in text for name in ATTENTIONS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--attentions", "none", "cbm"], "`attentions` must be one of none, se,"),
        (["--attentions", "cbm+identity"], "timm_cbam, timm_ceca"),
        (["--attentions", "none+identity"], "with `attention` none; choose a block"),
        (["--attentions", "se", "se"], "`attentions` must be distinct, got"),
        (
            ["--attentions", "se", "se+1.0lr"],
            "got se more than once; pass each only once.",
        ),
        (["--attentions"], "`attentions` must have at least one value, got none."),
        (["--seeds"], "`seeds` must have at least one value, got none."),
        (["--seeds", "1", "0", "1"], "got 1 more than once; pass each only once."),
        (["--seeds", "-1"], "`seed` must be in [0, 2**32), got -1."),
        (["--depth", "19"], "`depth` must be 6n+2"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_: pytest.fail("data were loaded"))
    workdir = tmp_path / "work"
    assert message in refused(compare, *arguments, "--workdir", workdir)
    assert not workdir.exists()


def test_a_block_without_that_start_is_refused_before_any_run(tmp_path, refused):
    names = ("--attentions", "none", "ge+identity", "--workdir", tmp_path / "work")
    error = refused(compare, "--dataset", "digits", "--depth", 8, *names)
    assert "`init` identity does not go with ge" in error
    assert not (tmp_path / "work").exists()


def test_another_recipe_in_the_folder(comparison, refused, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_: pytest.fail("data were loaded"))
    recipe = ("--dataset", "digits", "--epochs", 4)
    error = refused(compare, "--workdir", comparison, *recipe)
    assert "must contain runs of one recipe, got `epochs` 4 and 3" in error


# --- training


@pytest.fixture
def trained(monkeypatch):
    """Stands in for the loop: the configurations that were trained, in their order."""
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (64, 8, 8, 3)).astype(np.uint8)
    labels = np.zeros(64, np.int32)
    images = ImageSet(pixels, labels, pixels, labels, 10, flip=False)
    calls = []

    def train(config, given, workdir):
        assert given is images
        calls.append((config, workdir))
        if config.attention == "eca":
            raise FloatingPointError("The loss is nan.")
        if not (workdir / "run.json").exists():
            accuracies = [0.1, 0.5 + 0.1 * config.seed]
            write_run(workdir.parent, config.attention, config.seed, accuracies)
        return types.SimpleNamespace(config=config, model=None, variables=None)

    monkeypatch.setattr(setup, "load", lambda *_: images)
    monkeypatch.setattr(loop, "train", train)
    return calls


def test_trains_seed_by_seed_and_resumes(trained, tmp_path, capsys):
    recipe = ["--dataset", "digits", "--epochs", "2", "--workdir", str(tmp_path)]
    compare.main(["--attentions", "se", "--seeds", "1", "0", *recipe])
    error = capsys.readouterr().err
    assert "The baseline none is trained too." in error
    names = ["none-seed1", "se-seed1", "none-seed0", "se-seed0"]
    assert [workdir for _, workdir in trained] == [tmp_path / n for n in names]
    for config, workdir in trained:
        assert type(config) is Config and config.workdir is None
        assert workdir.name == f"{config.attention}-seed{config.seed}"
        assert (config.dataset, config.epochs) == ("digits", 2)
    # More seeds join; the report has all that are there.
    compare.main(["--attentions", "none", "se", "--seeds", "2", *recipe])
    assert "trained too" not in capsys.readouterr().err
    summary, blocks = summary_of(tmp_path)
    assert list(blocks["se"]["accuracies"]) == [0, 1, 2]
    assert json.loads((tmp_path / "report.json").read_text())["unfinished"] == []


def test_a_batch_that_cannot_be_filled(trained, tmp_path, refused):
    arguments = ["--dataset", "digits", "--workdir", tmp_path / "work"]
    error = refused(compare, *arguments, "--batch-size", 65)
    assert "`batch_size` must be at most the 64" in error
    assert not trained and not (tmp_path / "work").exists()


def test_a_loss_that_is_not_finite_stops_its_run_alone(trained, tmp_path, capsys):
    arguments = ["--attentions", "none", "eca", "se", "--seeds", "0"]
    recipe = ["--dataset", "digits", "--epochs", "2", "--workdir", str(tmp_path)]
    with pytest.raises(SystemExit, match="^1$"):
        compare.main([*arguments, *recipe])
    output = capsys.readouterr()
    assert "train.compare: eca-seed0: The loss is nan." in output.err
    assert [config.attention for config, _ in trained] == ["none", "eca", "se"]
    assert "se: +0.00 points with a single seed" in output.out


run = partial(processes.complete, "train.compare")


@pytest.mark.long
def test_a_comparison_that_really_trains(environment, tmp_path):
    work = tmp_path / "work"
    arguments = ("--attentions", "none", "cbam", "--seeds", 0, "--workdir", work)
    arguments += ("--dataset", "digits", "--depth", 8, "--epochs", 1)
    result = run(*arguments, environment=environment)
    assert result.returncode == 0, result.stderr
    blocks = json.loads((work / "report.json").read_text())["blocks"]
    assert [block["attention"] for block in blocks] == ["none", "cbam"]
    # At 16, 32 and 64 channels, r = 16: the MLP's C * h twice, and the 7x7's 98.
    added = 2 * (16 * 1 + 32 * 2 + 64 * 4) + 3 * 98
    assert blocks[1]["parameters_added"] == added
    assert blocks[1]["parameters"] - blocks[0]["parameters"] == added
    for block in blocks:
        log = work / f"{block['attention']}-seed0" / "metrics.jsonl"
        (line,) = log.read_text().splitlines()
        assert block["accuracies"]["0"] == json.loads(line)["test_accuracy"]
        assert block["step_seconds"] > 0 and block["compilation_timed"]
    assert (work / "gates-cbam.png").read_bytes().startswith(b"\x89PNG")
    assert "cbam:" in result.stdout and "single seed" in result.stdout
    # The same command again trains nothing and says the same.
    report = (work / "report.md").read_bytes()
    before = {p: p.read_bytes() for p in work.glob("*-seed0/*.jsonl")}
    (work / "cbam-seed0" / "gates.npz").unlink()  # And adds what is missing.
    again = run(*arguments, environment=environment)
    assert again.returncode == 0, again.stderr
    assert {p: p.read_bytes() for p in work.glob("*-seed0/*.jsonl")} == before
    assert (work / "report.md").read_bytes() == report
    assert (work / "cbam-seed0" / "gates.npz").exists()


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="^2$"):
        compare.main(["--dataset", "digits", "--workdir", str(tmp_path / "file")])
    assert "cannot be written to (Not a directory)" in capsys.readouterr().err


def test_an_interrupt_is_passed_on(trained, tmp_path, capsys, monkeypatch):
    def train(*_):
        raise interrupt.Interrupted(signal.SIGTERM, "stopped.", saved=True)

    monkeypatch.setattr(loop, "train", train)
    with pytest.raises(SystemExit, match="^143$"):
        compare.main(["--dataset", "digits", "--workdir", str(tmp_path)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "train.compare: none-seed0: stopped."
    assert not (tmp_path / "report.md").exists()
