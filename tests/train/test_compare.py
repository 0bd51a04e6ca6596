import dataclasses
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flax_attn.resnet import ATTENTIONS, BasicBlock, ResNet
from tests import processes, tiny_run
from tests.cases import BLOCKS, variables_for
from train import compare
from train.data import cifar as data
from train.data.cifar import ImageSet
from train.data.inputs import DeviceInputs
from train.engine import config as config_lib
from train.engine import devices, interrupt, loop
from train.engine.config import Config
from train.study import comparison as comparison_lib

ROOT = Path(__file__).parents[2]
ADDED = {"none": 0, "eca": 27, "se": 2604, "cbam": 2898}
VERSIONS = {"jax": "1.2.3", "flax": "4.5.6"}


def write_run(work, attention, seed, accuracies, *, steps=None, epochs=None, **fields):
    """A run as train.loop leaves it; its first epoch has compilation in it."""
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


def summarise(work):
    summary = comparison_lib.summarise(comparison_lib.read_runs(work))
    return summary, {block["attention"]: block for block in summary["blocks"]}


def report(work, capsys):
    compare.main(["--report-only", "--workdir", str(work)])
    shown = capsys.readouterr().out
    return (work / "report.md").read_text(), shown


def stopped(arguments, code, capsys):
    """Runs a command line that has to fail in one line."""
    with pytest.raises(SystemExit) as stop:
        compare.main([str(a) for a in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == code, error
    assert error.startswith("train.compare: ") and len(error.splitlines()) == 1
    return error


# --- statistics


def test_interval_by_hand():
    # s = 1 and t(0.975; 2) = 4.302653 (any table), so half of it is 4.302653 / 3**0.5.
    low, high = comparison_lib.interval([1.0, 2.0, 3.0])
    assert math.isclose(low, 2 - 2.484138, abs_tol=1e-6)
    assert math.isclose(high, 2 + 2.484138, abs_tol=1e-6)


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_interval_is_that_of_the_paired_t_test(seeds):
    a, b = np.random.RandomState(seeds).normal(0.9, 0.01, (2, seeds))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose(
        comparison_lib.interval(list(a - b)), expected, rtol=1e-10
    )


@pytest.mark.parametrize("values", [[0.5], [0.25, 0.25], [0.1 + 0.2 - 0.3, 0.0]])
def test_no_spread_no_interval(values):
    assert comparison_lib.interval(values) is None


def test_numbers(tmp_path):
    write_block(tmp_path, "none", [0.90, 0.91, 0.95], steps=[9, 0.1, 0.1])
    write_block(tmp_path, "cbam", [0.91, 0.93, 0.98], steps=[9, 0.1, 0.14])
    summary, blocks = summarise(tmp_path)
    assert [b["attention"] for b in summary["blocks"]] == ["none", "cbam"]
    none, cbam = blocks["none"], blocks["cbam"]
    # The last epoch's and not the best one's, which is 0.99 everywhere.
    assert none["accuracies"] == {0: 0.90, 1: 0.91, 2: 0.95}
    assert math.isclose(none["mean"], 0.92)
    # Deviations -2, -1, 3: squares 14, over n - 1.
    assert math.isclose(none["std"], 0.01 * 7**0.5)
    difference = cbam["difference"]
    assert difference["by_seed"] == pytest.approx({0: 0.01, 1: 0.02, 2: 0.03})
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
    _, blocks = summarise(tmp_path)
    assert blocks["none"]["step_seconds"] == 0.2


def test_compilation_is_timed_only_where_there_is_nothing_else(tmp_path):
    write_run(tmp_path, "none", 0, [0.5, 0.5], steps=[9, 0.1])
    # None of its epochs was timed without compilation.
    write_run(tmp_path, "none", 1, [0.5, 0.5], steps=[9])
    write_run(tmp_path, "se", 0, [0.5, 0.5], steps=[7])
    write_run(tmp_path, "se", 1, [0.5, 0.5], steps=[8])
    _, blocks = summarise(tmp_path)
    none, se = blocks["none"], blocks["se"]
    assert none["step_seconds"] == 0.1 and not none["compilation_timed"]
    assert se["step_seconds"] == 7.5 and se["compilation_timed"]


def test_an_epoch_without_steps_of_its_own_has_no_time(tmp_path, capsys):
    """One that was gone on with after its last step."""
    write_run(tmp_path, "none", 0, [0.5, 0.5, 0.5], steps=[9, None, 0.3])
    write_run(tmp_path, "se", 0, [0.5, 0.5, 0.5], steps=[None, None, None])
    _, blocks = summarise(tmp_path)
    assert blocks["none"]["step_seconds"] == 0.3
    assert blocks["se"]["step_seconds"] is None and blocks["se"]["overhead"] is None
    report(tmp_path, capsys)


# --- words


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
            "+3.00 points with each of 2 seeds: without any spread there is no",
        ),
    ],
)
def test_verdict(block, none, words, tmp_path, capsys):
    write_block(tmp_path, "none", none)
    write_block(tmp_path, "se", block)
    text, shown = report(tmp_path, capsys)
    assert f"- se: {words}" in text
    assert f"\nse: {words}" in shown
    assert ("helps by" in text, "hurts by" in text) == (
        "helps by" in words,
        "hurts by" in words,
    )


def test_unfinished_runs_are_listed_and_not_averaged(tmp_path, capsys):
    write_block(tmp_path, "none", [0.90, 0.92])
    write_block(tmp_path, "se", [0.91, 0.94])
    write_run(tmp_path, "none", 2, [0.1], epochs=3)
    write_run(tmp_path, "se", 2, [0.1, 0.2, 0.5])
    write_run(tmp_path, "cbam", 0, [], epochs=3)
    summary, blocks = summarise(tmp_path)
    assert math.isclose(blocks["none"]["mean"], 0.91)
    assert list(blocks["se"]["accuracies"]) == [0, 1, 2]
    assert list(blocks["se"]["difference"]["by_seed"]) == [0, 1]
    assert "cbam" not in blocks
    text, _ = report(tmp_path, capsys)
    unfinished = re.findall(r"Unfinished and in no number here: (.*)\.", text)
    assert unfinished == [
        "none, seed 2, 1 of 3 epochs",
        "cbam, seed 0, 0 of 3 epochs",
        "cbam, seed 1, not begun",
        "cbam, seed 2, not begun",
    ]


def test_without_a_baseline_there_is_no_difference(tmp_path, capsys):
    write_run(tmp_path, "none", 0, [0.5, 0.9])
    write_run(tmp_path, "se", 1, [0.5, 0.9])
    text, _ = report(tmp_path, capsys)
    assert "- se: no seed is finished both with it and with none" in text


def test_nothing_finished(tmp_path, capsys):
    write_run(tmp_path, "none", 0, [0.5], epochs=2)
    text, shown = report(tmp_path, capsys)
    assert "No run is finished." in text and "No run is finished." in shown
    assert not list(tmp_path.glob("*.png"))


def test_a_time_with_compilation_in_it_is_flagged(tmp_path, capsys):
    write_run(tmp_path, "none", 0, [0.5], steps=[2.0])
    write_run(tmp_path, "se", 0, [0.5], steps=[3.0])
    text, _ = report(tmp_path, capsys)
    assert "3,000.00†" in text and "+50.0%†" in text
    assert "†: no epoch was timed without compilation" in text


def test_what_the_reader_is_told(tmp_path, capsys):
    for seed in range(2):
        for attention in ("none", "se"):
            write_run(
                *(tmp_path, attention, seed, [0.5, 0.9]),
                label_smoothing=0.1,
                depth=14,
                data_dir=Path("/somewhere"),
            )
    text, shown = report(tmp_path, capsys)
    assert "# Attention on digits: ResNet-14, 2 epochs" in text
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
    assert "+2,604" in shown and "different machines" not in text
    facts = json.loads((tmp_path / "se-seed1" / "run.json").read_text())
    facts["machine"] = "another abacus"
    (tmp_path / "se-seed1" / "run.json").write_text(json.dumps(facts))
    text, _ = report(tmp_path, capsys)
    assert "step times are not comparable" in text and "- another abacus" in text


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


def test_rebuild_is_the_same_to_the_byte_and_needs_no_jax(comparison, capsys):
    text, _ = report(comparison, capsys)
    names = ("accuracy-vs-step-time.png", "curves.png", "gates-cbam.png")
    made = (*names, "report.json", "report.md")
    assert all(f"]({name})" in text for name in names)
    assert "`cbam`, seed 1: the spatial gate" in text
    before = {name: (comparison / name).read_bytes() for name in made}
    for name in made:
        (comparison / name).unlink()
    # The command is the one in the report.
    command = re.search(r"```bash\n(.*)\n```", text)[1]
    arguments = shlex.split(command)
    assert arguments[:3] == ["python", "-m", "train.compare"]
    code = (
        "import sys; from train import compare; compare.main(sys.argv[1:]); "
        "print({'jax', 'flax', 'sklearn', 'train.data'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments[3:]],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.stdout.splitlines()[-1:] == ["set()"], result.stderr
    assert {name: (comparison / name).read_bytes() for name in made} == before


def test_gates_that_are_missing_are_told(comparison, capsys):
    (comparison / "cbam-seed1" / "gates.npz").unlink()
    text, _ = report(comparison, capsys)
    assert "- cbam: no run has its gates.npz" in text
    assert "- none: no run" not in text and "gates-cbam.png" not in text


def test_json(comparison, capsys):
    report(comparison, capsys)
    saved = json.loads((comparison / "report.json").read_text())
    assert saved["recipe"]["epochs"] == 3
    assert saved["blocks"][1]["difference"]["by_seed"].keys() == {"0", "1"}
    assert saved["unfinished"] == []


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
def test_damaged_logs(file, content, message, comparison, capsys):
    (comparison / "cbam-seed0" / file).write_text(content)
    error = stopped(["--report-only", "--workdir", comparison], 2, capsys)
    assert message in error and "train without --report-only" in error


def test_runs_of_two_recipes(comparison, capsys):
    write_run(comparison, "se", 0, [0.1, 0.2, 0.3], learning_rate=0.5)
    error = stopped(["--report-only", "--workdir", comparison], 2, capsys)
    assert "one recipe, got `learning_rate` 0.1 and 0.5; pass another" in error


def test_a_folder_with_another_name(comparison, capsys):
    (comparison / "cbam-seed0").rename(comparison / "copy")
    error = stopped(["--report-only", "--workdir", comparison], 2, capsys)
    assert "copy must be called as its run, cbam-seed0" in error


def test_no_runs(tmp_path, capsys):
    error = stopped(["--report-only", "--workdir", tmp_path / "no"], 2, capsys)
    assert "must hold runs, got none" in error


# --- the command line


def test_help_is_instant_and_whole():
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "train.compare", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    # Below a second on an idle machine; importing jax would take longer than this.
    assert time.perf_counter() - start < 2
    assert result.returncode == 0
    options = re.findall(r"^│ (--[a-z-]+)", result.stdout, re.MULTILINE)
    fields = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(Config)}
    own = ["--attentions", "--seeds", "--workdir", "--report-only"]
    # Every option of a recipe; those that are the comparison's own only once.
    assert options[:4] == own
    own += ["--attention", "--seed", "--resume", "--coordinator", "--num-processes"]
    own += ["--process-id", "--peer-timeout"]
    assert sorted(options[4:]) == sorted(fields - {*own})
    assert all(name in result.stdout for name in ATTENTIONS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--attentions", "none", "cbm"], "`attention` must be one of none, se,"),
        (["--attentions", "se", "se"], "`attentions` must differ from each other, got"),
        (["--attentions"], "`attentions` must be at least one, got none."),
        (["--seeds"], "`seeds` must be at least one, got none."),
        (["--seeds", "1", "0", "1"], "got 1 more than once; name each once."),
        (["--seeds", "-1"], "`seed` must be in [0, 2**32), got -1."),
        (["--depth", "19"], "`depth` must be 6n+2"),
        (["--dataset", "mnist"], "`dataset` must be one of"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_: pytest.fail("data were loaded"))
    workdir = tmp_path / "work"
    assert message in stopped([*arguments, "--workdir", workdir], 2, capsys)
    assert not workdir.exists()


def test_another_recipe_in_the_folder(comparison, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_: pytest.fail("data were loaded"))
    arguments = ["--workdir", comparison, "--dataset", "digits", "--epochs", 4]
    error = stopped(arguments, 2, capsys)
    assert "must hold runs of one recipe, got `epochs` 4 and 3" in error


# --- training


@pytest.fixture
def trained(monkeypatch):
    """Stands in for the loop: the configurations that were trained, in their order."""
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    labels = np.zeros(20, np.int32)
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

    monkeypatch.setattr(loop, "load", lambda *_: images)
    monkeypatch.setattr(loop, "train", train)
    return calls


def test_trains_seed_by_seed_and_goes_on(trained, tmp_path, capsys, monkeypatch):
    recipe = ["--dataset", "digits", "--epochs", "2", "--workdir", str(tmp_path)]
    # 20 images do not fill the default batch.
    monkeypatch.setattr(loop, "check_batch", lambda *_: None)
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
    summary, blocks = summarise(tmp_path)
    assert list(blocks["se"]["accuracies"]) == [0, 1, 2]
    assert json.loads((tmp_path / "report.json").read_text())["unfinished"] == []


def test_a_batch_that_cannot_be_filled(trained, tmp_path, capsys):
    arguments = ["--dataset", "digits", "--workdir", tmp_path / "work"]
    assert "`batch_size` must be at most the 20" in stopped(arguments, 2, capsys)
    assert not trained and not (tmp_path / "work").exists()


def test_a_loss_that_is_not_finite_stops_its_run_alone(
    trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loop, "check_batch", lambda *_: None)
    arguments = ["--attentions", "none", "eca", "se", "--seeds", "0"]
    recipe = ["--dataset", "digits", "--epochs", "2", "--workdir", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        compare.main([*arguments, *recipe])
    assert stop.value.code == 1
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
    result = run(*arguments, environment=environment | {"XLA_FLAGS": ""})
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
    again = run(*arguments, environment=environment | {"XLA_FLAGS": ""})
    assert again.returncode == 0, again.stderr
    assert {p: p.read_bytes() for p in work.glob("*-seed0/*.jsonl")} == before
    assert (work / "report.md").read_bytes() == report
    assert (work / "cbam-seed0" / "gates.npz").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    result = run("--dataset", "digits", "--workdir", tmp_path / "file")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "cannot be written to (Not a directory)" in result.stderr


def test_an_interrupt_is_passed_on(trained, tmp_path, capsys, monkeypatch):
    def train(*_):
        raise interrupt.Interrupted(signal.SIGTERM, "stopped; all is saved.")

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(loop, "check_batch", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        compare.main(["--dataset", "digits", "--workdir", str(tmp_path)])
    assert stop.value.code == 143
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "train.compare: none-seed0: stopped; all is saved."
    assert not (tmp_path / "report.md").exists()


# --- gates


def test_spatial_gates_are_those_of_each_stages_last_block():
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    labels = np.zeros(12, np.int32)
    images = ImageSet(pixels[:8], labels[:8], pixels[8:], labels[8:], 10, flip=False)
    model = ResNet(
        stages=(2, 1),
        block=BasicBlock,
        num_classes=10,
        width=4,
        imagenet_stem=False,
        attention=ATTENTIONS["cbam"],
    )
    variables = variables_for(model, jnp.zeros((1, 8, 8, 3)))
    # As means and variances, of which a random one would be negative.
    variables["batch_stats"] = jax.tree.map(np.ones_like, variables["batch_stats"])
    fed = DeviceInputs(images, Config(batch_size=4), devices.make_mesh(1))
    shown, gates = compare.spatial_gates(model, variables, fed, count=3)
    np.testing.assert_array_equal(shown, pixels[8:11])
    assert {name: gate.shape for name, gate in gates.items()} == {
        "stage1_block2": (3, 8, 8),
        "stage2_block1": (3, 4, 4),
    }
    known = pixels[:8].astype(np.float64) / 255
    inputs = (pixels[8:11] / 255 - known.mean((0, 1, 2))) / known.std((0, 1, 2))
    apply = jax.jit(partial(model.apply, mutable=["intermediates"]))
    _, state = apply(variables, inputs.astype(np.float32))
    for name, gate in gates.items():
        attention = state["intermediates"][name]["attention"]
        (expected,) = attention["spatial"]["spatial_gate"]
        np.testing.assert_allclose(gate, expected[..., 0], atol=1e-5)
        assert gate.dtype == np.float32 and 0 < gate.min() < gate.max() <= 1


@pytest.mark.parametrize("attention", ["none", "se"])
def test_without_spatial_attention_there_are_no_spatial_gates(attention):
    pixels, labels = np.zeros((8, 4, 4, 3), np.uint8), np.zeros(8, np.int32)
    pixels[0] = 255
    images = ImageSet(pixels, labels, pixels, labels, 10, flip=False)
    model = ResNet(
        stages=(1,),
        block=BasicBlock,
        num_classes=10,
        width=4,
        imagenet_stem=False,
        attention=ATTENTIONS[attention],
    )
    variables = variables_for(model, jnp.zeros((1, 4, 4, 3)))
    fed = DeviceInputs(images, Config(batch_size=4), devices.make_mesh(1))
    shown, gates = compare.spatial_gates(model, variables, fed, count=2)
    assert gates == {} and shown.shape == (2, 4, 4, 3)


def test_the_blocks_with_spatial_gates():
    """The names are all that a report without jax has."""
    key, x = jax.random.key(0), jnp.zeros((1, 4, 4, 16))
    sown = {
        name: str(jax.eval_shape(partial(make().init, mutable=True), key, x))
        for name, make in BLOCKS.items()
    }
    assert {n for n, tree in sown.items() if "spatial_gate" in tree} == set(
        comparison_lib.SPATIAL
    )


def test_gates_are_saved_once_and_only_where_there_are_some(tmp_path, monkeypatch):
    made = []

    def spatial_gates(*_):
        made.append(1)
        return np.zeros((2, 4, 4, 3), np.uint8), {"stage1_block1": np.ones((2, 4, 4))}

    def run(attention):
        config = Config(batch_size=8, attention=attention)
        return types.SimpleNamespace(config=config, model=None, variables=None)

    images = tiny_run.images()
    monkeypatch.setattr(compare, "spatial_gates", spatial_gates)
    compare.save_gates(tmp_path, run("se"), images)
    assert not list(tmp_path.iterdir())
    compare.save_gates(tmp_path, run("cbam-conv"), images)
    compare.save_gates(tmp_path, run("cbam-conv"), images)
    assert [path.name for path in tmp_path.iterdir()] == ["gates.npz"]
    assert len(made) == 1
    with np.load(tmp_path / "gates.npz") as arrays:
        assert set(arrays) == {"images", "stage1_block1"}
