"""Runs that are killed, stopped or refused, and their resumption."""

import dataclasses
import json
import os
import random
import re
import signal
import time
from functools import partial
from itertools import chain, repeat

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import processes, tiny_run
from tests.processes import finish, metrics_of, wait_until
from train.data.inputs import DeviceInputs
from train.engine import devices, interrupt, loop, workdir
from train.engine.checkpoint import Checkpoints
from train.engine.config import Config, resolve
from train.engine.saved import saved_template

# For more kills: FLAX_ATTN_KILLS=50 pytest -s -k killed.
KILLS = int(os.environ.get("FLAX_ATTN_KILLS", 2))
EPOCHS = 20
CONFIG = resolve(Config(depth=8, batch_size=8, devices=1, epochs=EPOCHS))


pytestmark = pytest.mark.usefixtures("shared_compilations", "tiny_network")


def start(folder, environment, *arguments, prefix=()):
    run = ("--workdir", folder, "--epochs", EPOCHS, *arguments)
    return processes.start(environment, "tests.tiny_run", *run, prefix=prefix)


def arrays(folder):
    """Every array of the last checkpoint, and its record."""
    checkpoints = Checkpoints(folder / "checkpoints", 3, pytest.fail)
    inputs = DeviceInputs(tiny_run.images(), CONFIG, devices.make_mesh(1))
    tree, record = checkpoints.restore(saved_template(CONFIG, inputs))
    checkpoints.close()
    del record["timing"]  # The clock's.
    return tree, record


def assert_same_run(folder, uninterrupted):
    mine, theirs = arrays(folder), arrays(uninterrupted)
    jax.tree.map(np.testing.assert_array_equal, mine[0], theirs[0])
    assert mine[1] == theirs[1]
    assert metrics_of(folder) == metrics_of(uninterrupted)
    assert metrics_of(folder).count("\n") == EPOCHS


@pytest.fixture(scope="module")
def uninterrupted(environment, tmp_path_factory):
    """The workdir of a run from start to end."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, out, err = finish(start(folder, environment))
    assert code == 0, err
    assert f"after {EPOCHS} epochs" in out
    return folder


def wait_for_a_save(process, saving):
    """Until a save begins, whose temporary folder exists only briefly."""

    def unfinished():
        return {name for name in os.listdir(saving) if name.endswith("-tmp")}

    left_behind = unfinished()
    wait_until(process, lambda: unfinished() - left_behind)


def test_a_killed_run_ends_like_an_uninterrupted_one(
    environment, uninterrupted, tmp_path
):
    """Killed at a random moment, then in the middle of a save, and so on."""
    draw = random.Random(0)
    folder, kills, in_saves = tmp_path / "run", 0, 0
    saving = folder / "checkpoints"
    while True:
        process = start(folder, environment)
        if kills < KILLS:
            wait_until(process, lambda: metrics_of(folder))
            if kills % 2:
                wait_for_a_save(process, saving)
                time.sleep(draw.uniform(0, 0.02))
                in_saves += any(n.endswith("-tmp") for n in os.listdir(saving))
            else:
                # A later start has metrics before it trains.
                time.sleep(draw.uniform(0, 1.5 if kills else 0.3))
            process.kill()
        code, _, err = finish(process)
        # Each line of the metrics is complete and in order.
        lines = [json.loads(line) for line in metrics_of(folder).splitlines()]
        assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
        if code == 0:
            break
        assert code == -signal.SIGKILL, err
        kills += 1
    assert_same_run(folder, uninterrupted)
    print(
        f"{kills} kills, {in_saves} of them in a save: parameters, batch statistics, "
        "optimizer state and metrics.jsonl bit-identical to the uninterrupted run"
    )
    assert kills >= min(KILLS, 2)


@pytest.mark.parametrize(
    "which",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)],
)
def test_a_stopped_run_saves_and_resumes_from_that_step(
    which, environment, uninterrupted, tmp_path
):
    process = start(tmp_path, environment)
    wait_until(process, lambda: metrics_of(tmp_path).count("\n") >= 2)
    process.send_signal(which)
    code, out, err = finish(process)
    assert code == 128 + which, err
    last = err.splitlines()[-1]
    step = re.search(rf"Stopped by {which.name} at step (\d+) of 100; the check", last)
    assert step and f"checkpoint of step {step[1]} is in" in last
    assert last.endswith(f"run the same command with --workdir {tmp_path}.")
    assert "Traceback" not in err and not out
    code, out, err = finish(start(tmp_path, environment))
    assert code == 0 and f"Resuming from step {step[1]} of 100." in err, err
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.long
def test_stopped_in_the_middle_of_an_epoch(tmp_path):
    """Between two steps, and in the evaluation."""
    images, config = tiny_run.images(), dataclasses.replace(CONFIG, epochs=3)
    whole = loop.train(config, images)

    steps = []
    with pytest.MonkeyPatch.context() as patch:
        # The question comes after each of an epoch's 5 steps and 3 test batches: stop
        # at its third step, at the next, and in its evaluation.
        for calls in (2, 0, 2):
            asked = chain(repeat(None, calls), repeat(signal.SIGTERM))
            patch.setattr(interrupt, "requested", partial(next, asked))
            with pytest.raises(interrupt.Interrupted) as error:
                loop.train(config, images, tmp_path)
            steps.append(int(re.search(r"at step (\d+)", str(error.value))[1]))
            assert error.value.exit_code == 143
    assert steps == [3, 4, 5]
    run = loop.train(config, images, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, run.variables, whole.variables)
    assert run.history == whole.history
    lines = metrics_of(tmp_path).splitlines()
    assert [json.loads(line) for line in lines] == whole.history


def test_a_run_that_was_stopped_in_its_last_evaluation_stays_finished(
    tmp_path, monkeypatch
):
    images, config = tiny_run.images(), dataclasses.replace(CONFIG, epochs=1)
    # The question comes after each of 5 steps and 3 test batches.
    asked = chain(repeat(None, 6), repeat(signal.SIGTERM))
    with monkeypatch.context() as patch:
        patch.setattr(interrupt, "requested", partial(next, asked))
        with pytest.raises(interrupt.Interrupted, match="step 5 of 5"):
            loop.train(config, images, tmp_path)
    run = loop.train(config, images, tmp_path)
    before = metrics_of(tmp_path)
    assert before.count("\n") == 1
    # A finished run asks nothing, so no signal can stop it.
    monkeypatch.setattr(interrupt, "requested", lambda: signal.SIGTERM)
    assert loop.train(config, images, tmp_path).history == run.history
    assert metrics_of(tmp_path) == before


@pytest.mark.parametrize("steps_per_call", [1, 5])
def test_a_state_that_is_not_finite_stops_the_run(
    steps_per_call, tmp_path, monkeypatch
):
    """One parameter turns NaN in step 7, whose loss is still that of the old state."""
    make_optimizer = loop.make_optimizer

    def make_poisoned(config, schedule):
        poison = optax.scale_by_schedule(lambda i: jnp.where(i == 6, jnp.nan, 1.0))
        stem = partial(
            jax.tree_util.tree_map_with_path,
            lambda path, _: [part.key for part in path] == ["norm_stem", "scale"],
        )
        return optax.chain(make_optimizer(config, schedule), optax.masked(poison, stem))

    monkeypatch.setattr(loop, "make_optimizer", make_poisoned)
    config = dataclasses.replace(CONFIG, epochs=3, steps_per_call=steps_per_call)
    with pytest.raises(FloatingPointError) as error:
        loop.train(config, tiny_run.images(), tmp_path)
    message, where = str(error.value), "after epoch 2, step 7, whose loss is finite ("
    assert message.startswith(f"params/norm_stem/scale is not finite {where}")
    assert "JAX_DEBUG_NANS=True" in message and "--learning-rate" not in message
    assert f"The checkpoint of step 5 is in {tmp_path / 'checkpoints'}" in message
    assert os.listdir(tmp_path / "checkpoints") == ["5"]
    assert metrics_of(tmp_path).count("\n") == 1


def test_a_finished_run_is_only_read(uninterrupted):
    before = metrics_of(uninterrupted)
    run = loop.train(CONFIG, tiny_run.images(), uninterrupted)
    assert len(run.history) == EPOCHS
    assert metrics_of(uninterrupted) == before


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"seed": 1}, r"a different configuration: seed 0 \(now 1\); pass an"),
        (
            {"depth": 14, "learning_rate": 0.2},
            r"depth 8 \(now 14\), learning_rate 0.1 \(now 0.2\)",
        ),
        ({"resume": "never"}, "holds an earlier run; pass another --workdir, or"),
    ],
)
def test_another_configuration_is_refused(uninterrupted, fields, message):
    def files():
        paths = uninterrupted.rglob("*")
        return {p: p.stat().st_mtime_ns for p in paths if p.name != ".lock"}

    before, config = files(), dataclasses.replace(CONFIG, **fields)
    with pytest.raises(ValueError, match=message):
        loop.train(config, tiny_run.images(), uninterrupted)
    assert files() == before


def test_a_field_missing_from_an_older_run_has_its_default(uninterrupted, tmp_path):
    facts = json.loads((uninterrupted / "run.json").read_text())
    later = {"init": "default", "preset": None, "attention_lr_scale": 1.0}
    assert {name: facts["config"].pop(name) for name in later} == later
    (tmp_path / "run.json").write_text(json.dumps(facts))
    workdir.check_resumable(tmp_path, CONFIG)
    config = dataclasses.replace(CONFIG, attention="se", init="identity")
    message = r"attention none \(now se\), init default \(now identity\)"
    with pytest.raises(ValueError, match=message):
        workdir.check_resumable(tmp_path, config)


def test_two_runs_do_not_share_a_folder(uninterrupted):
    with workdir.locked(uninterrupted, CONFIG):
        with pytest.raises(ValueError, match="is in use by another process"):
            loop.train(CONFIG, tiny_run.images(), uninterrupted)


@pytest.mark.long
def test_a_full_disk_does_not_stop_the_run(environment, uninterrupted, tmp_path):
    """By a limit on the size of files, at which writing fails."""
    limited = ("bash", "-c", 'ulimit -f 16; exec "$@"', "limited")
    code, out, err = finish(start(tmp_path, environment, "--keep", 1, prefix=limited))
    assert code == 0 and f"after {EPOCHS} epochs" in out, err
    lines = [line for line in err.splitlines() if "could not be written" in line]
    assert "The checkpoint of step 5 could not be written to" in lines[0]
    assert "there is no earlier one and training continues." in lines[0]
    assert len(lines) == EPOCHS
    assert metrics_of(tmp_path) == metrics_of(uninterrupted)
