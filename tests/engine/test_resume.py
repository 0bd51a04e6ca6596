"""Runs that are killed, stopped or damaged, and what the next start makes of them."""

import dataclasses
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import processes, tiny_run
from tests.processes import finish, metrics_of, wait_until
from train.data.inputs import DeviceInputs
from train.engine import loop
from train.engine.checkpoint import CheckpointError, Checkpoints
from train.engine.config import Config, resolve

# More kills than the suite has time for: FLAX_ATTN_KILLS=50 pytest -s -k killed.
KILLS = int(os.environ.get("FLAX_ATTN_KILLS", 3))
EPOCHS = 30
CONFIG = resolve(Config(depth=8, batch_size=8, devices=1, epochs=EPOCHS))


pytestmark = pytest.mark.usefixtures("shared_compilations")


def start(workdir, environment, *arguments, prefix=()):
    run = ("--workdir", workdir, "--epochs", EPOCHS, *arguments)
    return processes.start(environment, "tests.tiny_run", *run, prefix=prefix)


def arrays(workdir):
    """Every array of the last checkpoint, and its record."""
    checkpoints = Checkpoints(workdir / "checkpoints", 3, pytest.fail)
    training = loop.Training(
        CONFIG,
        DeviceInputs(tiny_run.images(), CONFIG, loop.devices.make_mesh(1)),
    )
    tree, record = checkpoints.restore(loop.devices.to_host(training._tree()))
    checkpoints.close()
    del record["timing"]  # The clock's.
    return tree, record


def assert_same_run(workdir, untouched):
    mine, theirs = (arrays(folder) for folder in (workdir, untouched))
    jax.tree.map(np.testing.assert_array_equal, mine[0], theirs[0])
    assert mine[1] == theirs[1]
    mine, theirs = ((f / "metrics.jsonl").read_bytes() for f in (workdir, untouched))
    assert mine == theirs and mine.count(b"\n") == EPOCHS


@pytest.fixture(scope="module")
def untouched(environment, tmp_path_factory):
    """The run that nobody touched."""
    workdir = tmp_path_factory.mktemp("untouched")
    code, out, err = finish(start(workdir, environment))
    assert code == 0, err
    assert f"after {EPOCHS} epochs" in out
    return workdir


def wait_for_a_save(process, saving):
    """Until a save begins, in a folder of its own, which is there for a moment."""

    def unfinished():
        return {name for name in os.listdir(saving) if name.endswith("-tmp")}

    left_behind = unfinished()
    wait_until(process, lambda: unfinished() - left_behind)


def test_a_killed_run_ends_as_if_nobody_had_touched_it(
    environment, untouched, tmp_path
):
    """Killed at random moments and, every other time, in the middle of a save."""
    draw = random.Random(0)
    workdir, kills, in_saves = tmp_path / "run", 0, 0
    saving = workdir / "checkpoints"
    while True:
        process = start(workdir, environment)
        if kills < KILLS:
            if kills:
                wait_until(process, lambda: metrics_of(workdir))
            if kills % 2:
                wait_for_a_save(process, saving)
                time.sleep(draw.uniform(0, 0.02))
                in_saves += any(n.endswith("-tmp") for n in os.listdir(saving))
            else:
                time.sleep(draw.uniform(0, 1.5))
            process.kill()
        code, _, err = finish(process)
        # Whatever the moment, each line of the metrics is whole and in its place.
        lines = [json.loads(line) for line in metrics_of(workdir).splitlines()]
        assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
        if code == 0:
            break
        assert code == -signal.SIGKILL, err
        kills += 1
    assert_same_run(workdir, untouched)
    print(
        f"{kills} kills, {in_saves} of them in a save: parameters, batch statistics, "
        "optimiser state and metrics.jsonl bit-identical to the run nobody touched"
    )
    assert kills >= min(KILLS, 3)


@pytest.mark.parametrize(
    "which",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)],
)
def test_a_stopped_run_saves_and_resumes_from_that_step(
    which, environment, untouched, tmp_path
):
    process = start(tmp_path, environment)
    wait_until(process, lambda: metrics_of(tmp_path).count("\n") >= 2)
    process.send_signal(which)
    code, out, err = finish(process)
    assert code == 128 + which, err
    last = err.splitlines()[-1]
    step = re.search(rf"Stopped by {which.name} at step (\d+) of 150; the check", last)
    assert step and f"checkpoint of step {step[1]} is in" in last
    assert last.endswith(f"Resume by the same command with --workdir {tmp_path}.")
    assert "Traceback" not in err and not out
    code, out, err = finish(start(tmp_path, environment))
    assert code == 0 and f"Resuming from step {step[1]} of 150." in err, err
    assert_same_run(tmp_path, untouched)


@pytest.mark.long
def test_stopped_in_the_middle_of_an_epoch(tmp_path):
    """After a step, before its epoch ends: here and not in the next process."""
    images = tiny_run.images()
    config = Config(depth=8, batch_size=8, devices=1, epochs=3)
    whole = loop.train(config, images)

    def stop_after(calls, monkeypatch):
        asked = iter(range(10**6))
        monkeypatch.setattr(
            loop.interrupt,
            "requested",
            lambda: signal.SIGTERM if next(asked) >= calls else None,
        )

    steps = []
    with pytest.MonkeyPatch.context() as patch:
        # The question comes after each of an epoch's 5 steps and 3 test batches: stop
        # at its third step, at the next, and in its evaluation.
        for calls in (2, 0, 2):
            stop_after(calls, patch)
            with pytest.raises(loop.interrupt.Interrupted) as error:
                loop.train(config, images, tmp_path)
            steps.append(int(re.search(r"at step (\d+)", str(error.value))[1]))
            assert error.value.exit_code == 143
    assert steps == [3, 4, 5]
    run = loop.train(config, images, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, run.variables, whole.variables)
    assert run.history == whole.history
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole.history


@pytest.mark.parametrize("steps_per_call", [1, 5])
def test_a_state_that_is_not_finite_stops_the_run(
    steps_per_call, tmp_path, monkeypatch
):
    """One parameter turns NaN in step 7, whose loss is that of the state before."""
    make_optimizer = loop.make_optimizer

    def make_poisoned(config, schedule):
        poison = optax.scale_by_schedule(lambda i: jnp.where(i == 6, jnp.nan, 1.0))
        stem = partial(
            jax.tree_util.tree_map_with_path,
            lambda path, _: [part.key for part in path] == ["norm_stem", "scale"],
        )
        return optax.chain(make_optimizer(config, schedule), optax.masked(poison, stem))

    monkeypatch.setattr(loop, "make_optimizer", make_poisoned)
    config = Config(
        depth=8, batch_size=8, devices=1, epochs=3, steps_per_call=steps_per_call
    )
    with pytest.raises(FloatingPointError) as error:
        loop.train(config, tiny_run.images(), tmp_path / "Run")
    message = str(error.value)
    assert message.startswith(
        "params/norm_stem/scale is not finite after epoch 2, step 7, whose loss is "
        "finite ("
    )
    assert "JAX_DEBUG_NANS=True" in message and "--learning-rate" not in message
    where = f"The checkpoint of step 5 is in {tmp_path / 'Run' / 'checkpoints'}"
    assert where in message
    assert os.listdir(tmp_path / "Run" / "checkpoints") == ["5"]
    assert len((tmp_path / "Run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_finished_run_is_only_read(environment, untouched):
    before = (untouched / "metrics.jsonl").read_bytes()
    config = CONFIG
    run = loop.train(config, tiny_run.images(), untouched)
    assert len(run.history) == EPOCHS
    assert (untouched / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"seed": 1}, r"another configuration: seed 0 \(now 1\); pass another"),
        (
            {"depth": 14, "learning_rate": 0.2},
            r"depth 8 \(now 14\), learning_rate 0.1 \(now 0.2\)",
        ),
        ({"resume": "never"}, "holds an earlier run; pass another --workdir, or"),
    ],
)
def test_another_configuration_is_refused(untouched, fields, message):
    config = CONFIG
    before = {p: p.stat().st_mtime_ns for p in untouched.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=message):
        loop.train(dataclasses.replace(config, **fields), tiny_run.images(), untouched)
    after = {p: p.stat().st_mtime_ns for p in untouched.rglob("*") if p.is_file()}
    before.pop(untouched / ".lock", None)
    after.pop(untouched / ".lock", None)
    assert before == after


def test_a_field_that_an_older_run_lacks_had_its_default(untouched, tmp_path):
    facts = json.loads((untouched / "run.json").read_text())
    assert facts["config"].pop("init") == "default"
    assert facts["config"].pop("preset") is None
    (tmp_path / "run.json").write_text(json.dumps(facts))
    config = CONFIG
    loop.workdir.check_resumable(tmp_path, config)
    config = dataclasses.replace(config, attention="se", init="identity")
    message = r"attention none \(now se\), init default \(now identity\)"
    with pytest.raises(ValueError, match=message):
        loop.workdir.check_resumable(tmp_path, config)


def test_two_runs_do_not_share_a_folder(untouched):
    config = CONFIG
    with loop.workdir.locked(untouched, config):
        with pytest.raises(ValueError, match="is in use by another process"):
            loop.train(config, tiny_run.images(), untouched)


# Checkpoints alone.

TREE = {
    "params": {"kernel": np.arange(30000, dtype=np.float32), "bias": np.ones(3)},
    "opt_state": (np.asarray(3, np.int32), {"trace": np.zeros((2, 2), np.float16)}),
    "key": np.arange(2, dtype=np.uint32),
}
TREE["params"]["bias"] = TREE["params"]["bias"].astype(np.float32)


def save_two(directory):
    logged = []
    checkpoints = Checkpoints(directory, 3, logged.append)
    for step in (5, 7):
        checkpoints.save(step, TREE, {"step": step})
    checkpoints.close()
    assert logged == []


def restore(directory):
    logged = []
    checkpoints = Checkpoints(directory, 3, logged.append)
    try:
        return checkpoints.restore(TREE), logged
    finally:
        checkpoints.close()


# One of each kind that a checkpoint has.
FOLDERS = ["state", "state/d", "state/ocdbt.process_0", "state/ocdbt.process_0/d"]
FOLDERS += ["record"]
FILES = ["state/_METADATA", "state/manifest.ocdbt", "state/d/*", "record/metadata"]
FILES += ["state/ocdbt.process_0/manifest.ocdbt", "state/ocdbt.process_0/d/*"]
# What no checkpoint can be read without; the digest finds a bit that flipped.
NEEDED = ("state", "state/ocdbt.process_0/d/*", "record", "record/metadata")


# Of reads and writes that failed, the array store's threads tell a loop that is closed.
late_complaints = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@late_complaints
@pytest.mark.parametrize(
    "damage, name",
    [
        *(("missing", name) for name in FOLDERS + FILES),
        *(("truncated", name) for name in FILES),
        *(("emptied", name) for name in FILES),
        *(("flipped", name) for name in FILES),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(name, damage, tmp_path):
    save_two(tmp_path / "checkpoints")
    # The largest of several, which holds the arrays.
    path = max(
        (tmp_path / "checkpoints" / "7").glob(name), key=lambda p: p.stat().st_size
    )
    if path.is_dir():
        shutil.rmtree(path)
    elif damage == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        if damage == "flipped":
            data[len(data) // 2] ^= 1
        path.write_bytes(
            {"truncated": data[: len(data) // 2], "emptied": b"", "flipped": data}[
                damage
            ]
        )
    (tree, record), logged = restore(tmp_path / "checkpoints")
    # Whichever it is, it is whole.
    jax.tree.map(np.testing.assert_array_equal, tree, TREE)
    if record == {"step": 7} and name not in NEEDED:
        # What was damaged is not read: the checkpoint is whole without it.
        assert logged == []
        return
    assert record == {"step": 5}
    (line,) = logged
    assert f"{tmp_path / 'checkpoints' / '7'} is damaged" in line
    assert (tmp_path / "damaged-7").is_dir()
    # The run can save step 7 again.
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3, pytest.fail)
    checkpoints.save(7, TREE, {"step": 7})
    checkpoints.close()
    assert restore(tmp_path / "checkpoints") == ((TREE_LIKE, {"step": 7}), [])


class _Like:
    """Equal to a tree of the same arrays."""

    def __eq__(self, other):
        jax.tree.map(np.testing.assert_array_equal, other, TREE)
        return True


TREE_LIKE = _Like()


def test_all_checkpoints_damaged(tmp_path):
    save_two(tmp_path)
    for step in ("5", "7"):
        (tmp_path / step / "record" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match="None of the 2 checkpoints in"):
        restore(tmp_path)
    assert (tmp_path / "5").is_dir() and (tmp_path / "7").is_dir()


def test_orbax_is_silent_only_while_open(tmp_path):
    absl = logging.getLogger("absl")
    before = absl.level
    checkpoints = Checkpoints(tmp_path, 1, pytest.fail)
    assert absl.level == logging.CRITICAL
    checkpoints.close()
    assert absl.level == before < logging.CRITICAL


def test_no_checkpoint(tmp_path):
    assert restore(tmp_path / "none") == (None, [])


def test_the_newest_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, pytest.fail)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, TREE, {"step": step})
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]


@pytest.mark.long
def test_a_full_disk_does_not_stop_the_run(environment, untouched, tmp_path):
    """A limit on the size of files stands for the disk: writing fails in its midst."""
    process = start(
        tmp_path,
        environment,
        "--keep",
        1,
        prefix=("bash", "-c", 'ulimit -f 40; exec "$@"', "limited"),
    )
    code, out, err = finish(process)
    assert code == 0 and f"after {EPOCHS} epochs" in out, err
    lines = [line for line in err.splitlines() if "could not be written" in line]
    assert "The checkpoint of step 5 could not be written to" in lines[0]
    assert "there is no earlier one and training continues." in lines[0]
    assert len(lines) == EPOCHS
    mine, theirs = ((f / "metrics.jsonl").read_bytes() for f in (tmp_path, untouched))
    assert mine == theirs


def test_a_disk_without_room_is_not_tried(tmp_path, monkeypatch):
    logged = []
    checkpoints = Checkpoints(tmp_path, 3, logged.append)
    checkpoints.save(1, TREE, {"step": 1})
    checkpoints.wait()
    usage = shutil.disk_usage(tmp_path)._replace(free=900_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    checkpoints.save(2, TREE, {"step": 2})
    checkpoints.close()
    assert logged == [
        f"The checkpoint of step 2 could not be written to {tmp_path} (it needs 1.1 MB "
        "and the disk has 0.9 MB left); that of step 1 is kept and training continues."
    ]


@late_complaints
def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(tmp_path):
    logged = []
    checkpoints = Checkpoints(tmp_path, 1, logged.append)
    checkpoints.save(1, TREE, {"step": 1})
    checkpoints.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        for step in (2, 3):
            checkpoints.save(step, TREE, {"step": step})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(logged) == 2 and "that of step 1 is kept" in logged[1]
    checkpoints.save(4, TREE, {"step": 4})
    checkpoints.close()
    assert len(logged) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["4"]
