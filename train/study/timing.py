"""Timing in turns, with interrupts between turns only."""

import math
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import jax

Call = Callable[[], Any]

_interrupted = threading.Event()


def fastest(calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
    """Seconds of each call: the minimum over ``rounds`` turns, after a warm-up."""
    for call in calls.values():
        _take_turn(call)
    best = dict.fromkeys(calls, math.inf)
    turns = list(calls)
    order = random.Random(0)
    for _ in range(rounds):
        # PyTorch's threads spin for a while after a call, and a large program leaves
        # caches cold. In random order no call always follows the same one.
        order.shuffle(turns)
        for name in turns:
            start = time.perf_counter()
            _take_turn(calls[name])
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def _take_turn(call: Call) -> None:
    call()
    check_interrupt()


def interrupt_between_turns() -> None:
    """Makes SIGINT raise ``KeyboardInterrupt`` between turns, a second one at once.

    Raised inside XLA it can crash the process.
    """
    signal.signal(signal.SIGINT, _note_interrupt)


def check_interrupt() -> None:
    """Raises ``KeyboardInterrupt`` if SIGINT came."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


def _note_interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls ``function`` and waits for its result."""
    return jax.block_until_ready(function(*arguments))


def with_gradients(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``(variables, x, cotangent) -> (output of apply, all gradients)``."""

    def run(variables: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        y, pullback = jax.vjp(apply, variables, x)
        return y, pullback(cotangent)

    return run


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that a compiled program needs beside its arguments and results."""
    analysis: Any = compiled.memory_analysis()
    return analysis.temp_size_in_bytes
