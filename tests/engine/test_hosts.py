"""Two real processes that train together over loopback."""

import json
import re
import signal
import time

import numpy as np
import pytest

from tests import processes
from tests.processes import metrics_of, wait_until


def start(workdir, environment, *arguments, devices=1):
    return processes.start(
        *(environment, "tests.tiny_run", "--workdir", workdir, *arguments),
        JAX_NUM_CPU_DEVICES=str(devices),
    )


def start_two(workdir, environment, *arguments, devices=1):
    return [
        start(workdir, environment, *place, *arguments, devices=devices)
        for place in processes.places(2)
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
    """To 1e-5 while rounding has not grown; it does, from epoch to epoch."""
    lines = [json.loads(line) for line in metrics_of(workdir).splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in alone]
    for mine, theirs, rtol in zip(lines, alone, (1e-5, 1e-3, 1e-2, 1e-1), strict=True):
        np.testing.assert_allclose(mine["train_loss"], theirs["train_loss"], rtol=rtol)
    print("two:", [line["train_loss"] for line in lines])
    print("one:", [line["train_loss"] for line in alone])


@pytest.mark.long
def test_two_processes_and_a_stop_of_one_of_them(environment, alone, tmp_path):
    """Stopped through one process, resumed by two of two devices each."""
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
    # One process reads what the two have written; there is nothing left to do.
    ((code, _, err),) = finish(start(tmp_path, environment, "--epochs", 4))
    assert code == 0 and "Resuming from step 20 of 20." in err, err


@pytest.mark.parametrize("dies", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_process_that_dies_ends_the_other(dies, environment, tmp_path):
    """Within the time-out, and with what was saved still there."""
    both = start_two(tmp_path, environment, "--epochs", 10**4, "--peer-timeout", 10)
    wait_until(both[0], lambda: metrics_of(tmp_path).count("\n") >= 2)
    both[dies].kill()
    killed = time.monotonic()
    (code, _, err), _ = finish(both[1 - dies], both[dies])
    assert time.monotonic() - killed < 60
    # Who notices first, the run or JAX's own watch, which aborts, is a matter of luck.
    assert code in (3, -signal.SIGABRT), (code, err[-3000:])
    said = "another process of the run is gone" if code == 3 else "UNAVAILABLE"
    assert said in err


def test_a_refused_folder_ends_all(environment, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    results = finish(*start_two(tmp_path, environment, "--peer-timeout", 10))
    assert results[0][0] == 2 and "holds an earlier run" in results[0][2]
    assert results[1][0] != 0


def test_a_coordinator_that_is_not_there(environment, tmp_path):
    ((code, _, err),) = finish(
        start(
            tmp_path / "run",
            environment,
            "--coordinator",
            "127.0.0.1:1",
            *("--num-processes", 2, "--process-id", 1, "--peer-timeout", 5),
        )  # fmt: skip
    )
    assert code == 2 and len(err.splitlines()) == 1, err
    assert "`coordinator` must be HOST:PORT of process 0, got 127.0.0.1:1" in err
