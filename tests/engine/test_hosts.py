"""Two processes that train together over loopback."""

import json
import re
import signal
import time

import numpy as np
import pytest

from tests import processes
from tests.processes import metrics_of, wait_until
from train.engine import devices
from train.engine.config import Config


def start(workdir, environment, *arguments, devices=1):
    return processes.start(
        *(environment, "tests.tiny_run", "--workdir", workdir, *arguments),
        JAX_NUM_CPU_DEVICES=str(devices),
    )


def start_two(workdir, environment, *arguments, devices=1):
    return [
        start(workdir, environment, *place, *arguments, devices=devices)
        for place in processes.process_options(2)
    ]


def finish(*several):
    return [processes.finish(process) for process in several]


@pytest.fixture(scope="module")
def alone(environment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    ((code, _, err),) = finish(start(workdir, environment, "--epochs", 4))
    assert code == 0, err
    return [json.loads(line) for line in metrics_of(workdir).splitlines()]


def assert_same_losses(workdir, alone):
    """To 1e-5 in the first epoch; the effect of rounding grows with the epochs."""
    lines = [json.loads(line) for line in metrics_of(workdir).splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in alone]
    for mine, theirs, rtol in zip(lines, alone, (1e-5, 1e-3, 1e-2, 1e-1), strict=True):
        np.testing.assert_allclose(mine["train_loss"], theirs["train_loss"], rtol=rtol)
    print("two:", [line["train_loss"] for line in lines])
    print("one:", [line["train_loss"] for line in alone])


@pytest.mark.long
def test_two_processes_one_of_which_is_stopped(environment, alone, tmp_path):
    """A signal to one stops both; two processes of two devices each resume."""
    both = start_two(tmp_path, environment, "--epochs", 4)
    wait_until(both[0], lambda: metrics_of(tmp_path))
    both[1].send_signal(signal.SIGTERM)
    for code, _, err in finish(*both):
        assert code == 143, err
        stopped = re.search(r"Stopped by SIGTERM at step (\d+) of 20; ", err)
        assert stopped, err
    again = start_two(tmp_path, environment, "--epochs", 4, devices=2)
    (first, out, err), (second, nothing, other) = finish(*again)
    assert (first, second) == (0, 0), err + other
    assert f"Resuming from step {stopped[1]} of 20." in err
    assert "after 4 epochs" in out and "epoch" not in nothing + other
    assert_same_losses(tmp_path, alone)
    # One process restores the checkpoint of the two; no step is left.
    ((code, _, err),) = finish(start(tmp_path, environment, "--epochs", 4))
    assert code == 0 and "Resuming from step 20 of 20." in err, err


@pytest.mark.parametrize("dies", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_process_that_dies_ends_the_other(dies, environment, tmp_path):
    """Within the time-out."""
    both = start_two(tmp_path, environment, "--epochs", 10**4, "--peer-timeout", 10)
    wait_until(both[0], lambda: metrics_of(tmp_path).count("\n") >= 2)
    both[dies].kill()
    killed = time.monotonic()
    (code, _, err), _ = finish(both[1 - dies], both[dies])
    assert time.monotonic() - killed < 60
    # Either the run or JAX's own heartbeat notices first. That aborts, or, with jax
    # 0.7.2, exits as if by an error, but for what it says.
    said = {
        3: "another process of the run died",
        1: "Terminating process because the JAX distributed service detected fatal",
        -signal.SIGABRT: "UNAVAILABLE",
    }
    assert code in said and said[code] in err, (code, err[-3000:])


def test_a_refused_folder_ends_both_processes(environment, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    results = finish(*start_two(tmp_path, environment, "--peer-timeout", 10))
    assert results[0][0] == 2 and "holds an earlier run" in results[0][2]
    assert results[1][0] != 0


def test_a_coordinator_that_does_not_listen():
    config = Config(
        coordinator="127.0.0.1:1", num_processes=2, process_id=1, peer_timeout=1
    )
    message = "`coordinator` must be HOST:PORT of process 0, got 127.0.0.1:1, which"
    with pytest.raises(ValueError, match=message) as error:
        devices.join(config)
    assert "\n" not in str(error.value)
