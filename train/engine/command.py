"""Maps the errors of a command to one line on standard error and an exit code.

0 done, 1 the training diverged, 2 invalid command line, data or workdir, 3 another
process of the run is gone, 130 and 143 stopped by SIGINT and SIGTERM.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn


@contextlib.contextmanager
def exit_codes(prog: str) -> Iterator[None]:
    """Ends the process with one line and an exit code for an expected error.

    Other errors are bugs and keep their traceback. Imports wait for an error, so that
    ``--help`` is fast.
    """
    try:
        yield
    except KeyboardInterrupt:
        stop(prog, "stopped by SIGINT; only what was saved before is kept.", 130)
    except FloatingPointError as error:
        if debugging():
            raise
        stop(prog, error, 1)
    except (ValueError, OSError) as error:
        stop(prog, error, 2)
    except Exception as error:
        _stop_for(prog, error)
        raise


def _stop_for(prog: str, error: Exception) -> None:
    import jax

    from train.data.cifar import DataError
    from train.engine.checkpoint import CheckpointError
    from train.engine.interrupt import Interrupted

    if isinstance(error, DataError | CheckpointError):
        stop(prog, error, 2)
    if isinstance(error, Interrupted):
        stop(prog, error, error.exit_code)
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        message = " ".join(str(error).split())[:200]
        print(
            f"{prog}: another process of the run died ({message}); restart all "
            "processes with the same --workdir to resume from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        # A normal exit would wait for the dead process, and abort.
        os._exit(3)


def debugging() -> bool:
    """Whether JAX looks for NaN or infinities, so that a traceback shows them."""
    import jax

    config: Any = jax.config
    return config.jax_debug_nans or config.jax_debug_infs


def stop(prog: str, error: object, code: int) -> NoReturn:
    """Prints one line and ends the process."""
    print(f"{prog}: {error}", file=sys.stderr)
    raise SystemExit(code)
