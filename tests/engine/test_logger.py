"""``--logger``: each epoch once, however often the run starts."""

import json
import struct
import sys
import types

import pytest

from tests import tiny_run
from train.engine import logger, loop
from train.engine.config import Config, resolve


def test_tensorboard_gets_the_metrics_of_a_killed_run_once(
    shared_compilations, tiny_network, tmp_path, monkeypatch
):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.util import tensor_util

    images = tiny_run.images()
    config = Config(depth=8, batch_size=8, devices=1, epochs=3, logger="tensorboard")
    save = loop.Training._save

    def read():
        folder = str(tmp_path / "tensorboard")
        return event_accumulator.EventAccumulator(folder).Reload()

    def killed_before_the_second_save(training):
        if len(training.progress.history) == 2:
            assert [event.step for event in read().Tensors("test_loss")] == [5, 10]
            raise KeyboardInterrupt
        save(training)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_save", killed_before_the_second_save)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, images, tmp_path)
    run = loop.train(config, images, tmp_path)
    loop.train(config, images, tmp_path)  # Nothing is left to train.
    events = read()
    found = {
        tag: [
            (event.step, tensor_util.make_ndarray(event.tensor_proto).item())
            for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
    }
    assert [step for step, _ in found.pop("images_per_second")] == [5, 10, 15]
    names = set(run.history[0]) - {"step"}
    assert found == {
        name: [(line["step"], pytest.approx(line[name])) for line in run.history]
        for name in names
    }


LINES = [{"epoch": i, "step": 5 * i, "test_loss": 1 / i} for i in (1, 2, 3)]


def log_in_two_starts(folder):
    """The first fails after two epochs; the second trains the last of them again."""
    config = resolve(Config(logger="wandb"))
    no_images = {"images_per_second": None}
    with pytest.raises(FloatingPointError):
        with logger.opened(config, folder) as log_epoch:
            for line in LINES[:2]:
                log_epoch(line, no_images)
            raise FloatingPointError
    with logger.opened(config, folder) as log_epoch:
        for line in LINES:
            log_epoch(line, no_images)


class FakeRun:
    id = "abc"

    def __init__(self, calls):
        self.calls = calls

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))


def test_wandb_resumes_one_run(tmp_path, monkeypatch):
    calls = []

    def init(**options):
        assert options["project"] == "flax_attn" and options["dir"] == tmp_path
        assert options["config"]["depth"] == 20
        calls.append(("init", options["id"], options["resume"]))
        return FakeRun(calls)

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(init=init, Error=RuntimeError)
    )
    log_in_two_starts(tmp_path)
    one, two, three = (
        ("log", line["step"], {n: line[n] for n in ("epoch", "test_loss")})
        for line in LINES
    )
    assert calls == [
        *(("init", None, "allow"), one, two, ("finish", 1)),
        *(("init", "abc", "allow"), three, ("finish", 0)),
    ]

    def no_key(**options):
        raise RuntimeError("No API key\nconfigured")

    monkeypatch.setattr(sys.modules["wandb"], "init", no_key)
    message = r"wandb cannot start \(No API key configured\); call `wandb login`, or"
    with pytest.raises(ValueError, match=message):
        log_in_two_starts(tmp_path)


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    log_in_two_starts(tmp_path)
    wandb.teardown()  # Its service writes the files.
    first, second = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert first.name == second.name == f"run-{state(tmp_path)['id']}.wandb"
    logged, names = [], ("_step", "epoch", "test_loss")
    for path in (first, second):
        # A file header of 7 bytes; before each record checksum, size and kind.
        data = path.read_bytes()[7:]
        while data:
            _, size, _ = struct.unpack("<IHB", data[:7])
            record = wandb_internal_pb2.Record.FromString(data[7 : 7 + size])
            data = data[7 + size :]
            if record.WhichOneof("record_type") == "history":
                values = {i.nested_key[0]: i.value_json for i in record.history.item}
                logged.append([float(values[name]) for name in names])
    expected = [[line["step"], line["epoch"], line["test_loss"]] for line in LINES]
    assert logged == expected


def state(folder):
    return json.loads((folder / "wandb" / logger.STATE).read_text())


def test_a_full_disk_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    config = resolve(Config(logger="wandb"))
    fake = types.SimpleNamespace(init=lambda **_: FakeRun([]), Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with logger.opened(config, tmp_path) as log_epoch:

        def full(path, text):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(logger.workdir, "write", full)
        log_epoch(LINES[0], {"images_per_second": 7.0})
    assert "Epoch 1 could not be logged to" in capsys.readouterr().err


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(logger, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        message = rf"`logger` {name} needs .*pip install -e '\.\[{name}\]'\) or leave"
        with pytest.raises(ValueError, match=message):
            loop.validate(Config(logger=name))
    with pytest.raises(ValueError, match="`logger` must be one of tensorboard, wandb"):
        loop.validate(Config(logger="csv"))
    loop.validate(Config())
