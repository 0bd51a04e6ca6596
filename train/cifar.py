"""``python -m train.cifar``: trains a residual network with an attention block.

Exit codes: 0 trained, 1 the loss is not finite, 2 the command line or the data is bad.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import tyro

from train.config import Config


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line ``args``, by default that of the process."""
    config = tyro.cli(Config, prog="python -m train.cifar", args=args)
    # Only now, so that --help and a mistyped option answer at once.
    from train import data, loop

    try:
        loop.check(config)
        images = data.load(config.dataset, config.data_dir)
        loop.check_batch(config, images)
        workdir = make_workdir(config)
    except (ValueError, OSError, data.DataError) as error:
        _stop(error, 2)
    print(f"Writing to {workdir / 'metrics.jsonl'}.", file=sys.stderr)
    try:
        run = loop.train(config, images, workdir / "metrics.jsonl")
    except FloatingPointError as error:
        _stop(error, 1)
    print(run.summary())


def make_workdir(config: Config) -> Path:
    """Makes the run's folder and, if there is none, an empty metrics.jsonl in it.

    Raises:
      ValueError: another run's metrics are there, or it cannot be written to.
    """
    workdir = config.workdir
    if workdir is None:
        now = time.strftime("%Y%m%d-%H%M%S")
        name = f"{now}-{config.dataset}-resnet{config.depth}-{config.attention}"
        workdir = Path("runs") / name
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        metrics = workdir / "metrics.jsonl"
        metrics.touch()
        if metrics.stat().st_size:
            raise ValueError(
                f"`workdir` {workdir} holds an earlier run; pass another --workdir."
            )
    except OSError as error:
        raise ValueError(
            f"`workdir` {workdir} cannot be written to ({error.strerror}); pass "
            "another --workdir."
        ) from error
    return workdir


def _stop(error: Exception, code: int) -> None:
    print(f"train.cifar: {error}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
