"""Downloads of published files from a list of mirrors; their SHA-256 alone decides."""

import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

TIMEOUT_SECONDS = (10.0, 30.0)
"""To connect, and without any data during the download."""
MIN_BYTES_PER_SECOND = 200_000
"""An address that sends less is dropped while there is another one to try."""
WINDOW_SECONDS = 10.0
"""Length of each of the consecutive windows in which the speed is measured."""
# So small that even a slow address completes several of them in a window.
CHUNK_BYTES = 1 << 13


class DownloadError(Exception):
    """The file cannot be downloaded; the message is one line that says why."""


class _TooSlow(Exception):
    """The message is the measured speed."""


def is_address(url: str) -> bool:
    """Whether ``url`` is an http or https address."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return (
        url.isprintable() and parts.scheme in ("http", "https") and bool(parts.netloc)
    )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(urls: Sequence[str], path: Path, sha256: str) -> None:
    """Downloads a file to ``path``, which is written only once all of it is right.

    Args:
      urls: its addresses; one that fails, or sends other bytes, is left for the next,
        and so is a slow one, which is tried again if the others fail.
      path: where the file goes.
      sha256: of the file.

    Raises:
      DownloadError: no address sent the file, or it cannot be written.
    """
    import pooch
    import requests

    failures = []
    untried, slow = list(urls), list[str]()
    while untried or slow:
        url = untried.pop(0) if untried else slow.pop(0)
        progress = _Progress(least=MIN_BYTES_PER_SECOND if untried else 0)
        downloader = pooch.HTTPDownloader(
            progressbar=progress, chunk_size=CHUNK_BYTES, timeout=TIMEOUT_SECONDS
        )
        try:
            pooch.retrieve(
                url,
                f"sha256:{sha256}",
                fname=path.name,
                path=path.parent,
                downloader=downloader,
            )
        except _TooSlow as error:
            tqdm.write(f"{url} sends {error}; trying the next.", file=sys.stderr)
            slow.append(url)
            continue
        except requests.HTTPError as error:
            status = getattr(error.response, "status_code", "unknown")
            reason = f"HTTP status {status}"
        except requests.Timeout:
            reason = "timed out"
        except requests.RequestException as error:
            reason = _reason(error)
        except ValueError:  # Pooch's, which has deleted the file.
            reason = f"its SHA-256 is not the published {sha256}"
        except OSError as error:  # No other address would help.
            raise DownloadError(
                f"{path} cannot be written ({error.strerror})"
            ) from error
        else:
            _share(path)
            return
        finally:
            progress.close()
        failures.append(f"{url} ({reason})")
    raise DownloadError("; ".join(failures))


class _Progress(tqdm):
    """Pooch's progress bar, which also measures the speed."""

    def __init__(self, least: int) -> None:
        """Makes ``update`` raise ``_TooSlow`` below ``least`` bytes per second."""
        # The delay hides the bar of an address that sends nothing.
        super().__init__(ncols=79, unit="B", unit_scale=True, delay=1e-6)
        self.least = least
        self.start, self.received = time.monotonic(), 0.0

    def __bool__(self) -> bool:
        """Pooch asks whether there is a bar; without a total, tqdm has no answer."""
        return True

    def reset(self, total: float | None = None) -> None:
        """Pooch calls it when the file is complete, to fill the bar at once."""
        self.delay = 0
        super().reset(total)

    def update(self, n: float | None = 1) -> bool | None:
        """Counts ``n`` more bytes."""
        now = time.monotonic()
        if self.n == 0:  # The first bytes, or all of them after `reset`.
            self.start, self.received = now, 0.0
        elif now - self.start > WINDOW_SECONDS:
            speed = self.received / (now - self.start)
            if speed < self.least:
                raise _TooSlow(f"{speed / 1e3:,.0f} kB/s")
            self.start, self.received = now, 0.0
        self.received += n or 0
        return super().update(n)


def _share(path: Path) -> None:
    """Gives a file the mode of any new file; a temporary file is its owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _reason(error: BaseException) -> str:
    """What the system said, or else the error, in a short line.

    A server may have written any part of it.
    """
    said = (e.strerror for e in _causes(error) if isinstance(e, OSError) and e.strerror)
    text = next(said, str(error))
    text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text.split())[:200]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
