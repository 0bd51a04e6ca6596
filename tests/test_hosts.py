"""Two real processes that train together over loopback."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def start(workdir, environment, *arguments, devices=1):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.tiny_run", "--workdir", str(workdir)),
            *map(str, arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment | {"JAX_NUM_CPU_DEVICES": str(devices)},
    )


def start_two(workdir, environment, *arguments, devices=1):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2)
    return [
        start(
            workdir, environment, *together, *("--process-id", i), *arguments,
            devices=devices,
        )
        for i in range(2)
    ]  # fmt: skip


def finish(*processes):
    results = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        results.append((process.returncode, out, err))
    return results


def metrics_of(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text() if path.exists() else ""


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


def test_two_processes_and_a_stop_of_one_of_them(environment, alone, tmp_path):
    """Stopped through one process, gone on with by two of two devices each."""
    processes = start_two(tmp_path, environment, "--epochs", 4)
    deadline = time.monotonic() + 120
    while not metrics_of(tmp_path) and processes[0].poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    processes[1].send_signal(signal.SIGTERM)
    for code, _, err in finish(*processes):
        assert code == 143, err
        stopped = re.search(r"Stopped by SIGTERM at step (\d+) of 20; ", err)
        assert stopped, err
    again = start_two(tmp_path, environment, "--epochs", 4, devices=2)
    (first, out, err), (second, nothing, other) = finish(*again)
    assert (first, second) == (0, 0), err + other
    assert f"Going on from step {stopped[1]} of 20." in err
    assert "after 4 epochs" in out and "epoch" not in nothing + other
    assert_same_losses(tmp_path, alone)


def test_what_two_began_one_ends(environment, alone, tmp_path):
    for code, _, err in finish(*start_two(tmp_path, environment, "--epochs", 4)):
        assert code == 0, err
    assert_same_losses(tmp_path, alone)
    # A run that is done: the checkpoint of the two is read by one, with three devices.
    ((code, out, err),) = finish(
        start(tmp_path, environment, "--epochs", 4, "--devices", 2, devices=3)
    )
    assert code == 0 and "Going on from step 20 of 20." in err, err


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_the_other(dies, environment, tmp_path):
    """Within the time-out, and with what was saved still there."""
    processes = start_two(
        tmp_path, environment, "--epochs", 10**4, "--peer-timeout", 10
    )
    deadline = time.monotonic() + 120
    while metrics_of(tmp_path).count("\n") < 2 and processes[0].poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    processes[dies].kill()
    start_of_end = time.monotonic()
    (code, out, err), (_, _, _) = finish(processes[1 - dies], processes[dies])
    assert time.monotonic() - start_of_end < 60
    assert code == 3, (code, err[-3000:])
    assert "another process of the run is gone" in err.splitlines()[-1]


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
