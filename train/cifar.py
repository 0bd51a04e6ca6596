"""``python -m train.cifar``: trains a residual network with an attention block.

Exit codes: 0 trained, 1 the loss is not finite, 2 the command line, the data or the
workdir is bad, 3 another process of the run is gone, 130 and 143 stopped by SIGINT and
SIGTERM.
"""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import tyro

from train.engine.config import Config


def main(
    args: Sequence[str] | None = None,
    *,
    prog: str = "train.cifar",
    default: Config | None = None,
) -> None:
    """Runs the command line ``args``, by default that of the process."""
    config = tyro.cli(
        Config, prog=f"python -m {prog}", args=args, default=default or Config()
    )
    try:
        _run(config, prog)
    except KeyboardInterrupt:
        _stop(prog, "stopped by SIGINT before the first step.", 130)


def _run(config: Config, prog: str) -> None:
    # Only now, so that --help and a mistyped option answer at once.
    import jax

    from train.data import cifar as data
    from train.engine import devices, interrupt, loop, workdir
    from train.engine.checkpoint import CheckpointError

    try:
        loop.check(config)
        devices.join(config)
        folder = workdir.choose(config)
        devices.on_main(lambda: workdir.check(folder, config))
        images = loop.load(config)
        loop.check_batch(config, images)
        with interrupt.listening():
            run = loop.train(config, images, folder)
    except (ValueError, OSError, data.DataError, CheckpointError) as error:
        _stop(prog, error, 2)
    except FloatingPointError as error:
        _stop(prog, error, 1)
    except interrupt.Interrupted as error:
        _stop(prog, error, error.exit_code)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        message = " ".join(str(error).split())[:200]
        print(
            f"{prog}: another process of the run is gone ({message}); start all of "
            "them again to go on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        # An orderly end would wait for the one that is gone, and abort.
        os._exit(3)
    if devices.is_main():
        print(run.summary())


def _stop(prog: str, error: object, code: int) -> NoReturn:
    print(f"{prog}: {error}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
