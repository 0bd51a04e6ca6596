"""Downloads of files whose size and SHA-256 are known; nothing else is believed.

The bytes gather in ``NAME.part`` beside the target, which appears only when they are
the published ones. What a broken connection, a kill or a full disk leaves there is
where the next attempt, or the next start, continues.
"""

import contextlib
import hashlib
import http.client
import io
import os
import queue
import re
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

try:
    import fcntl
except ImportError:  # On Windows; only a download asks for it.
    fcntl = None  # type: ignore[assignment]

TIMEOUT_SECONDS = 30.0
"""The longest silence of a socket, and the span over which its rate is judged."""
ANSWER_SECONDS = 120.0
"""The longest wait for an answer's headers, through redirections and hosts that have
several IP addresses of which the first are dead."""
SLOWEST = 10_000
"""Bytes per second; a slower connection is given up."""
PAUSES_SECONDS = (1.0, 3.0, 9.0)
"""Between the attempts at one address: there is one attempt more than pauses."""
AGAIN = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS)
"""Beside 5xx, what a server may answer now and not later."""
PROGRESS = 1 << 20
"""After an attempt that brings the file this many bytes further, the count of attempts
begins anew: a connection that breaks now and then can last the night."""


class DownloadError(Exception):
    """Nothing whole came; the message says from where, why, and what is kept."""


class _AttemptError(Exception):
    """The reason why an attempt failed, and whether the address deserves another."""

    def __init__(self, reason: str, *, again: bool):
        super().__init__(reason)
        self.again = again


def is_address(url: str) -> bool:
    """Whether ``url`` is an http or https address: the only ones that are fetched."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return False
    known = parts.scheme in ("http", "https")
    return known and bool(parts.hostname) and url.isprintable()


def mismatch(file: io.BufferedIOBase, size: int, sha256: str) -> str | None:
    """What distinguishes ``file`` from the published one, in words; None if nothing."""
    actual = file.seek(0, os.SEEK_END)
    if actual != size:
        return f"{actual:,} bytes, not the published {size:,}"
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        return f"its SHA-256 is {digest}, not the published {sha256}"
    return None


def fetch(urls: Sequence[str], path: Path, *, size: int, sha256: str) -> None:
    """Fetches the file of ``size`` bytes and this digest from the first of ``urls``.

    Where an address fails the next one continues. Processes that fetch to the same
    ``path`` wait for each other; who finds it there when its turn comes has nothing
    to do.

    Args:
      urls: http or https addresses, in the order in which they are tried.
      path: the target; missing folders are made, and removed if nothing came.
      size: the published size in bytes.
      sha256: the published digest, 64 hexadecimal digits.

    Raises:
      DownloadError: no address gave the file, or it cannot be written.
    """
    if fcntl is None:
        raise DownloadError(
            "this system has no fcntl.flock, without which two runs could mix their "
            "bytes; fetch the file by other means"
        )
    partial = path.with_name(f"{path.name}.part")
    made: list[Path] = []
    try:
        made = [folder for folder in path.parents if not folder.exists()]
        with _locked(partial) as file:
            if path.exists():
                return
            _fill(urls, _Partial(file, path.name, size, sha256))
            os.fsync(file.fileno())  # A crash must not leave the name without bytes.
            os.replace(partial, path)
    except _AttemptError as error:
        raise DownloadError(f"{error}{_kept(partial, size)}") from error
    except OSError as error:
        message = f"{partial} cannot be written ({_words(error)})"
        raise DownloadError(f"{message}{_kept(partial, size)}") from error
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # It is not empty, or was never made.
                folder.rmdir()


def _kept(partial: Path, size: int) -> str:
    try:
        count = partial.stat().st_size
    except OSError:
        return ""
    return (
        f"; {count:,} of {size:,} bytes are kept in {partial}, where the next start "
        "continues (delete it to begin anew)"
    )


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[io.BufferedRandom]:
    """Opens ``partial`` to append to it, for one process at a time.

    An empty file is removed in the end.
    """
    while True:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("a+b") as file:
            _lock(file, partial)
            if not _is_at(file, partial):
                continue  # Who had the lock has finished with this file.
            try:
                yield file
            finally:
                if _is_at(file, partial) and not os.fstat(file.fileno()).st_size:
                    partial.unlink()
            return


def _lock(file: io.BufferedRandom, partial: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Waiting for another process to fetch {partial}.", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)


def _is_at(file: io.BufferedRandom, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class _Partial:
    """The bytes that came so far, and the bar that shows how many."""

    def __init__(self, file: io.BufferedRandom, name: str, size: int, sha256: str):
        self.size = size
        self._file, self._sha256 = file, sha256
        if len(self) >= size and self.mismatch():
            file.truncate(0)
        self.bar = tqdm(
            total=size, initial=len(self), unit="B", unit_scale=True, desc=name
        )

    def __len__(self) -> int:
        return self._file.seek(0, os.SEEK_END)

    def append(self, block: bytes) -> None:
        self._file.write(block)
        self._file.flush()  # A kill loses nothing.
        self.bar.update(len(block))

    def restart(self) -> None:
        self._file.truncate(0)
        self.bar.initial = 0
        self.bar.reset()

    def mismatch(self) -> str | None:
        return mismatch(self._file, self.size, self._sha256)


def _fill(urls: Sequence[str], partial: _Partial) -> None:
    """Completes ``partial`` from the first address that has what is missing."""
    reasons = []
    with partial.bar:
        if len(partial) == partial.size:
            return  # An earlier run was stopped at the very end.
        for url in urls:
            try:
                return _fill_from(url, partial)
            except _AttemptError as error:
                reasons.append(f"{url} ({error})")
    raise _AttemptError("; ".join(reasons), again=False)


def _fill_from(url: str, partial: _Partial) -> None:
    """Makes attempts at one address; raises the last one's error."""
    failures, furthest = 0, len(partial)
    while True:
        try:
            return _attempt(url, partial)
        except _AttemptError as error:
            # The furthest so far: a server that breaks off and then starts at 0
            # would otherwise be asked for ever.
            if len(partial) >= furthest + PROGRESS:
                failures, furthest = 0, len(partial)
            if not error.again:
                raise
            if failures == len(PAUSES_SECONDS):
                attempts = f"{failures + 1} attempts"
                raise _AttemptError(f"{error}; {attempts}", again=False) from error
            partial.bar.set_postfix_str(f"continues after: {error}")
            time.sleep(PAUSES_SECONDS[failures])
            failures += 1


def _attempt(url: str, partial: _Partial) -> None:
    """One request for the bytes that are missing."""
    error = None
    with contextlib.closing(_Answer(url, len(partial))) as answer:
        response = answer.take(ANSWER_SECONDS)
        start = _start(response, partial)
        if start < len(partial):
            partial.restart()
        try:
            for block in _blocks(answer):
                partial.append(block)
                if len(partial) > partial.size:
                    break
        except _AttemptError as broken:
            error = broken
    # However it ended: if the bytes are the published ones, they are whole.
    count = len(partial)
    if count < partial.size:
        short = f"it ended after {count:,} of {partial.size:,} bytes"
        raise error or _AttemptError(short, again=True)
    wrong = partial.mismatch()
    if count > partial.size:
        wrong = f"more than the published {partial.size:,} bytes came"
    if wrong:
        partial.restart()
        # The fault may lie in the bytes that were there before.
        raise _AttemptError(wrong, again=start > 0)


class _Answer:
    """What a server answers to one request, read by a thread of its own.

    A socket's time-out bounds each read of it, so a server that drips could make a
    status line, a header or the length of a chunk last for days. The thread is left to
    that then; it ends with the process, if not before.
    """

    def __init__(self, url: str, start: int):
        request = urllib.request.Request(url)
        if start:
            request.add_header("Range", f"bytes={start}-")
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._over = threading.Event()
        threading.Thread(
            target=self._read, args=(request,), name="download", daemon=True
        ).start()

    def take(self, seconds: float) -> Any:
        """The response, which is for its headers, and then block after block."""
        try:
            item = self._items.get(timeout=seconds)
        except queue.Empty:
            raise _AttemptError("timed out", again=True) from None
        if isinstance(item, _AttemptError):
            raise item
        return item

    def close(self) -> None:
        self._over.set()

    def _read(self, request: urllib.request.Request) -> None:
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                self._items.put(response)
                while not self._over.is_set():
                    # Not `read`, which waits for all and loses it if no more comes.
                    block = response.read1(1 << 18)
                    self._items.put(block)
                    if not block:
                        return
        except urllib.error.HTTPError as error:
            error.close()  # It is a response too, and holds the connection.
            self._items.put(error)
        except http.client.IncompleteRead:
            self._items.put(b"")
        except Exception as error:
            self._items.put(_AttemptError(_words(error), again=True))


def _start(response: Any, partial: _Partial) -> int:
    """The offset in the file of the first byte that ``response`` brings."""
    start, status = len(partial), response.status
    if status == http.HTTPStatus.OK:
        return 0
    if status == http.HTTPStatus.PARTIAL_CONTENT:
        header = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", header.strip())
        if match and int(match[1]) == start and match[2] in ("*", str(partial.size)):
            return start
        raise _AttemptError(
            f"its Content-Range is {_plain(header)!r} where byte {start:,} of "
            f"{partial.size:,} should follow",
            again=False,
        )
    again = status in AGAIN or status >= 500
    if status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
        partial.restart()
        again = True
    raise _AttemptError(f"HTTP status {status}", again=again)


def _blocks(answer: _Answer) -> Iterator[bytes]:
    """What ``answer`` brings, as it comes, as long as it comes fast enough."""
    since, count = time.monotonic(), 0
    while block := answer.take(TIMEOUT_SECONDS):
        yield block
        count += len(block)
        seconds = time.monotonic() - since
        if seconds >= TIMEOUT_SECONDS:
            if count < SLOWEST * seconds:
                slow = f"only {count:,} bytes came in {seconds:.0f} s"
                raise _AttemptError(slow, again=True)
            since, count = time.monotonic(), 0


def _words(error: Exception) -> str:
    """An error in a short line; a server may have written any part of it."""
    reason = getattr(error, "reason", error)  # The cause in a URLError.
    text = getattr(reason, "strerror", None) or str(reason)
    return _plain(text) or type(error).__name__


def _plain(text: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text.split())[:200].rstrip(".")
