"""SIGINT and SIGTERM as a request to stop after the current step."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

_requested: signal.Signals | None = None


class Interrupted(Exception):
    """A run stopped because of ``signal``.

    Attributes:
      signal: SIGINT or SIGTERM.
      saved: whether there is a checkpoint to resume from.
    """

    def __init__(self, which: signal.Signals, message: str, *, saved: bool) -> None:
        """Keeps the signal beside the message."""
        super().__init__(message)
        self.signal, self.saved = which, saved

    @property
    def exit_code(self) -> int:
        """What a shell reports for that signal: 130 or 143."""
        return 128 + self.signal


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Turns the two signals into a request; a second signal acts as usual."""
    global _requested
    before = {s: signal.signal(s, _note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _requested = None
        for which, handler in before.items():
            signal.signal(which, handler)


def requested() -> signal.Signals | None:
    """The signal that was received, or None."""
    return _requested


def _note(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = signal.Signals(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    print(
        f"\n{_requested.name}: stopping after the current step and saving. "
        "Interrupt again to stop immediately.",
        file=sys.stderr,
    )
