"""Commands in child processes, some of which the tests kill."""

import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start(environment, module, *arguments, prefix=(), **variables):
    """Starts ``python -m module arguments``, after ``prefix``; returns its process."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment | variables,
    )


def finish(process):
    """Returns the exit code and the output, as two strings."""
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def complete(module, *arguments, environment=None, cwd=ROOT):
    """Runs ``python -m module arguments``; returns what ``subprocess.run`` does."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


def process_options(count):
    """The options that connect ``count`` processes, for each of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    together = ("--coordinator", coordinator, "--num-processes", count)
    return [(*together, "--process-id", i) for i in range(count)]


def run(environment, module, *arguments, **options):
    return finish(start(environment, module, *arguments, **options))


def wait_until(process, condition):
    """Until ``condition`` holds or the process has ended."""
    deadline = time.monotonic() + 300
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def metrics_of(workdir):
    """The text of a run's metrics so far."""
    path = workdir / "metrics.jsonl"
    return path.read_text() if path.exists() else ""
