"""Downloads, from a real server on loopback that does what each test says."""

import hashlib
import http.server
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from train.data import download

ROOT = Path(__file__).parents[2]
CONTENT = random.Random(0).randbytes(40_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HALF = 20_000


class Server(http.server.ThreadingHTTPServer):
    """Answers each request by the next of ``answers``; the last one stays."""

    daemon_threads = False  # `server_close` waits for them.

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = []
        self.requests = []
        """(path, Range) of each request."""
        self.asked = threading.Semaphore(0)
        self.go, self.end = threading.Event(), threading.Event()

    def url(self, path="file"):
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def serve(self, *answers):
        self.answers = list(answers)
        return self.url()

    @property
    def ranges(self):
        return [header for _, header in self.requests]

    def handle_error(self, request, client_address):
        pass  # Clients hang up here.


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers["Range"]))
        server.asked.release()
        answers = server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        answer(self)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSES_SECONDS", (0.01, 0.02))
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.go.set()
    server.end.set()
    server.shutdown()
    thread.join()
    server.server_close()


def sends(content, status=200, then=None, **headers):
    """Sends just this, and then calls ``then``."""

    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)
        if then is not None:
            then(handler)

    return answer


def resumes(content=CONTENT, stop=None, then=None, total=None):
    """Sends what the request's Range asks for, up to ``stop``."""

    def answer(handler):
        header = handler.headers["Range"]
        if header is None:
            return sends(content[:stop], then=then)(handler)
        start = int(re.fullmatch(r"bytes=(\d+)-", header)[1])
        total_ = len(content) if total is None else total
        where = f"bytes {start}-{len(content) - 1}/{total_}"
        sends(content[start:stop], 206, then, Content_Range=where)(handler)

    return answer


def error(status):
    return lambda handler: handler.send_error(status)


def hangs(handler):
    handler.server.end.wait(20)


def drips(handler):
    """A byte now and then, of whatever is being sent."""
    for _ in range(400):
        handler.wfile.write(b"0")
        if handler.server.end.wait(0.05):
            return


def resets(handler):
    """Breaks off without the usual farewell."""
    handler.connection.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
    )
    os.close(handler.connection.detach())


def fetch(path, *urls):
    download.fetch(urls, path, size=len(CONTENT), sha256=SHA256)


def fails(path, *urls):
    """The one line that says why."""
    with pytest.raises(download.DownloadError) as error:
        fetch(path, *urls)
    message = str(error.value)
    assert message.isprintable() and all(url in message for url in urls)
    assert not path.exists()
    return message


def partial(path):
    return path.with_name(path.name + ".part")


def is_alone(path):
    """It is whole, and nothing is beside it."""
    return path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]


def test_whole(server, tmp_path):
    path = tmp_path / "new" / "folder" / "target"
    fetch(path, server.serve(sends(CONTENT, Content_Length=40_000)))
    assert is_alone(path)
    assert server.requests == [("/file", None)]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("total", [None, "*"])
@pytest.mark.parametrize(
    "first",
    [
        resumes(stop=HALF),
        sends(CONTENT[:HALF], Content_Length=40_000),
        sends(CONTENT[:HALF], Content_Length=HALF),
        sends(CONTENT, Content_Length=HALF),  # There is more than it says.
        sends(b"4e20\r\n" + CONTENT[:HALF] + b"\r\n", Transfer_Encoding="chunked"),
    ],
)
def test_a_truncated_answer_is_continued(server, tmp_path, first, total):
    path = tmp_path / "target"
    fetch(path, server.serve(first, resumes(total=total)))
    assert server.ranges == [None, "bytes=20000-"] and is_alone(path)


def test_a_reset(server, tmp_path):
    path = tmp_path / "target"
    fetch(path, server.serve(sends(CONTENT[:HALF], then=resets), resumes()))
    # It may take bytes along that were on their way.
    assert len(server.ranges) == 2 and is_alone(path)


def test_a_later_start_continues(server, tmp_path):
    path = tmp_path / "target"
    message = fails(path, server.serve(resumes(stop=HALF), error(404)))
    assert "HTTP status 404" in message
    assert f"20,000 of 40,000 bytes are kept in {partial(path)}" in message
    assert partial(path).read_bytes() == CONTENT[:HALF]
    fetch(path, server.serve(resumes()))
    assert server.ranges == [None, "bytes=20000-", "bytes=20000-"]
    assert is_alone(path)


def test_the_next_address_continues(server, tmp_path):
    path = tmp_path / "target"
    server.serve(resumes(stop=HALF), error(404), resumes())
    fetch(path, server.url("a"), server.url("b"))
    assert server.requests == [
        ("/a", None),
        ("/a", "bytes=20000-"),
        ("/b", "bytes=20000-"),
    ]
    assert is_alone(path)


def test_no_more_is_trusted_than_came(server, tmp_path):
    """A Content-Length that is too long does not matter once all bytes are there."""
    path = tmp_path / "target"
    fetch(path, server.serve(sends(CONTENT, Content_Length=50_000)))
    assert is_alone(path) and len(server.requests) == 1


def test_a_server_that_ignores_range(server, tmp_path):
    path = tmp_path / "target"
    fetch(path, server.serve(resumes(stop=HALF), sends(CONTENT)))
    assert server.ranges == [None, "bytes=20000-"] and is_alone(path)


def test_a_server_that_always_breaks_off(server, tmp_path):
    path = tmp_path / "target"
    message = fails(path, server.serve(sends(CONTENT[:HALF])))
    assert "it ended after 20,000 of 40,000 bytes; 3 attempts" in message
    assert len(server.requests) == 3
    assert partial(path).stat().st_size == HALF


def test_attempts_that_bring_much_are_not_counted(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PROGRESS", 4_000)
    path = tmp_path / "target"
    stops = [resumes(stop=stop) for stop in range(4_000, 40_000, 4_000)]
    fetch(path, server.serve(*stops, resumes()))
    assert len(server.requests) == 10 and is_alone(path)
    # To bring the same bytes over and over is no progress.
    path = tmp_path / "other" / "target"
    fails(path, server.serve(sends(CONTENT[:HALF])))
    assert len(server.requests) == 13


@pytest.mark.parametrize(
    "where",
    [
        "bytes 0-39999/40000",
        "bytes 19999-39999/40000",
        "bytes 20000-39999/40001",
        "bytes */40000",
        "20000-39999/40000",
        "\x1b[2Jnonsense",
        None,
    ],
)
def test_another_content_range(server, tmp_path, where):
    path = tmp_path / "target"
    partial(path).write_bytes(CONTENT[:HALF])
    headers = {} if where is None else {"Content_Range": where}
    wrong = sends(CONTENT[HALF:], 206, **headers)
    message = fails(path, server.serve(wrong))
    assert "its Content-Range is " in message and len(server.requests) == 1
    assert "where byte 20,000 of 40,000 should follow" in message
    # What was there is not at fault: the next address continues it.
    server.serve(wrong, resumes())
    fetch(path, server.url("a"), server.url("b"))
    assert server.ranges[-1] == "bytes=20000-" and is_alone(path)


def test_a_range_that_nobody_asked_for(server, tmp_path):
    path = tmp_path / "target"
    wrong = sends(CONTENT[9:], 206, Content_Range="bytes 9-39999/40000")
    assert "its Content-Range is" in fails(path, server.serve(wrong))
    assert not list(tmp_path.iterdir())


def test_a_range_that_cannot_be_had(server, tmp_path):
    path = tmp_path / "target"
    partial(path).write_bytes(CONTENT[:HALF])
    fetch(path, server.serve(error(416), sends(CONTENT)))
    assert server.ranges == ["bytes=20000-", None] and is_alone(path)
    path.unlink()
    assert "(HTTP status 416)" in fails(path, server.serve(error(416)))
    assert len(server.requests) == 3 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content, reason",
    [
        (CONTENT[:-1] + b"?", f"its SHA-256 is .*, not the published {SHA256}"),
        (CONTENT + b"?", "more than the published 40,000 bytes came"),
        (CONTENT * 9, "more than the published 40,000 bytes came"),
    ],
)
def test_other_bytes(server, tmp_path, content, reason):
    """They are deleted, and not asked for again."""
    path = tmp_path / "new" / "target"
    assert re.search(reason, fails(path, server.serve(sends(content))))
    assert len(server.requests) == 1 and not list(tmp_path.iterdir())
    server.serve(sends(content), sends(CONTENT))
    fetch(path, server.url("a"), server.url("b"))
    assert is_alone(path)


def test_a_byte_too_many_that_comes_late(server, tmp_path):
    def one_more(handler):
        time.sleep(0.1)
        handler.wfile.write(b"?")

    message = fails(tmp_path / "target", server.serve(sends(CONTENT, then=one_more)))
    assert "more than the published 40,000 bytes came" in message
    assert not list(tmp_path.iterdir())


def test_the_bar(server, tmp_path, capsys):
    path = tmp_path / "target"
    fetch(path, server.serve(sends(CONTENT)))
    assert re.search(r"target: 100%.* 40\.0k/40\.0k ", capsys.readouterr().err)
    path.unlink()
    partial(path).write_bytes(CONTENT[:HALF])
    fetch(path, server.serve(resumes()))
    shown = capsys.readouterr().err
    assert " 20.0k/40.0k " in shown and " 40.0k/40.0k " in shown
    assert " 0.00/40.0k" not in shown
    # A server that starts at 0 sends the bar there too.
    path.unlink()
    partial(path).write_bytes(CONTENT[:HALF])
    fetch(path, server.serve(sends(CONTENT)))
    shown = capsys.readouterr().err
    assert " 0.00/40.0k" in shown and " 40.0k/40.0k " in shown
    assert "60.0k" not in shown


def test_a_partial_file_of_other_bytes(server, tmp_path):
    """Whichever of its two sources was wrong, the address is asked for all of it."""
    path = tmp_path / "target"
    partial(path).write_bytes(b"?" * HALF)
    fetch(path, server.serve(resumes()))
    assert server.ranges == ["bytes=20000-", None] and is_alone(path)


@pytest.mark.parametrize("size", [40_000, 40_001, 90_000])
def test_a_partial_file_that_is_too_long(server, tmp_path, size):
    path = tmp_path / "target"
    partial(path).write_bytes(b"?" * size)
    fetch(path, server.serve(resumes()))
    assert server.ranges == [None] and is_alone(path)


def test_a_partial_file_that_is_whole(server, tmp_path):
    path = tmp_path / "target"
    partial(path).write_bytes(CONTENT)
    fetch(path, server.serve(error(404)))
    assert not server.requests and is_alone(path)


@pytest.mark.parametrize(
    "answer, reason",
    [
        (resets, "(Connection reset by peer; 3 attempts)"),
        (error(503), "(HTTP status 503; 3 attempts)"),
        (error(429), "(HTTP status 429; 3 attempts)"),
        (error(404), "(HTTP status 404)"),
        (error(403), "(HTTP status 403)"),
        (error(304), "(HTTP status 304)"),
        (sends(b"", 204), "(HTTP status 204)"),
        (lambda h: h.wfile.write(b"a\x1b[2Jb.\r\n\r\n"), "(a [2Jb; 3 attempts)"),
        (lambda h: h.wfile.write(b"n" * 900), f"({'n' * 200}; 3 attempts)"),
    ],
)
def test_a_server_that_refuses(server, tmp_path, answer, reason):
    path = tmp_path / "new" / "folder" / "target"
    assert fails(path, server.serve(answer)) == f"{server.url()} {reason}"
    assert not list(tmp_path.iterdir())
    # The next address may be better.
    server.serve(*[answer] * (3 if "3 attempts" in reason else 1), sends(CONTENT))
    fetch(path, server.url("a"), server.url("b"))
    assert server.requests[-1] == ("/b", None) and is_alone(path)


@pytest.mark.parametrize(
    "answer",
    [
        hangs,
        drips,  # Into the status line; then into the length of a chunk.
        sends(b"", then=drips, Transfer_Encoding="chunked"),
        sends(b"", then=hangs),
    ],
)
def test_a_server_that_hangs(server, tmp_path, monkeypatch, answer):
    monkeypatch.setattr(download, "PAUSES_SECONDS", (0.01,))
    path = tmp_path / "new" / "folder" / "target"
    with monkeypatch.context() as short:
        short.setattr(download, "TIMEOUT_SECONDS", 0.2)
        short.setattr(download, "ANSWER_SECONDS", 0.3)
        message = fails(path, server.serve(answer))
    assert message == f"{server.url()} (timed out; 2 attempts)"
    assert not list(tmp_path.iterdir())


def test_a_server_that_falls_silent(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.3)
    path = tmp_path / "target"
    fetch(path, server.serve(resumes(stop=HALF, then=hangs), resumes()))
    assert server.ranges == [None, "bytes=20000-"] and is_alone(path)
    # The connection to the silent server is closed before long.
    deadline = time.monotonic() + 10
    while any(thread.name == "download" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Silence after the last byte changes nothing.
    path.unlink()
    fetch(path, server.serve(sends(CONTENT, then=hangs)))
    assert len(server.requests) == 3 and is_alone(path)


def test_a_server_that_drips(server, tmp_path, monkeypatch):
    """Never silent for long, and yet it would take half an hour."""
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.4)
    path = tmp_path / "target"
    message = fails(path, server.serve(sends(b"", then=drips)))
    assert re.search(r"\(only \d bytes came in 0 s; 3 attempts\); \d+ of", message)


def test_a_busy_server(server, tmp_path):
    path = tmp_path / "target"
    fetch(path, server.serve(error(503), resets, sends(CONTENT)))
    assert len(server.requests) == 3 and is_alone(path)


def test_pauses_grow(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(download, "PAUSES_SECONDS", (3, 5, 8))
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    fails(tmp_path / "target", server.serve(error(500)))
    assert pauses == [3, 5, 8]


def test_a_redirection(server, tmp_path):
    path = tmp_path / "target"
    partial(path).write_bytes(CONTENT[:HALF])
    moved = sends(b"", 302, Location="/elsewhere")
    fetch(path, server.serve(moved, resumes()))
    assert server.requests[-1] == ("/elsewhere", "bytes=20000-") and is_alone(path)
    path.unlink()
    assert "HTTP status 302" in fails(path, server.serve(moved))


def test_nobody_listens(server, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
    message = fails(tmp_path / "target", url)
    assert message == f"{url} (Connection refused; 3 attempts)"
    fetch(tmp_path / "target", url, server.serve(sends(CONTENT)))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "target", tmp_path / "file" / "new" / "target"):
        reason = "cannot be written .(File exists|Not a directory)"
        with pytest.raises(download.DownloadError, match=reason):
            fetch(path, "http://127.0.0.1:9/")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_addresses():
    assert download.is_address("http://127.0.0.1:9/a")
    assert download.is_address("HTTPS://example.org/a?b=c")
    for url in ("file:///etc/passwd", "ftp://a/b", "/a/b", "", "http:///a", "http://["):
        assert not download.is_address(url)
    assert not download.is_address("http://a/b\nc")


SCRIPT = """
import resource, sys
from pathlib import Path
from train.data import download

limit, url, path, size, sha256 = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    download.fetch([url], Path(path), size=int(size), sha256=sha256)
except download.DownloadError as error:
    sys.exit(f"DownloadError: {error}")
"""


def start(url, path, limit=0):
    """``fetch`` in a process of its own, whose files have at most ``limit`` bytes."""
    arguments = [str(limit), url, str(path), str(len(CONTENT)), SHA256]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk(server, tmp_path):
    """No fault of the address: it is not asked again, and what fits is kept."""
    path = tmp_path / "target"
    _, message = start(server.serve(sends(CONTENT)), path, HALF).communicate()
    last = message.splitlines()[-1]
    assert last.startswith(
        f"DownloadError: {partial(path)} cannot be written (File too large); 20,000 of "
    )
    assert len(server.requests) == 1
    assert partial(path).read_bytes() == CONTENT[:HALF]


def test_a_kill(server, tmp_path):
    path = tmp_path / "target"
    url = server.serve(resumes(stop=HALF, then=hangs), resumes())
    with start(url, path) as process:
        deadline = time.monotonic() + 20
        while not (partial(path).exists() and partial(path).stat().st_size == HALF):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert [p.name for p in tmp_path.iterdir()] == ["target.part"]
    fetch(path, url)
    assert server.ranges == [None, "bytes=20000-"] and is_alone(path)


def stalls(then):
    """What follows when a second process is waiting."""

    def answer(handler):
        handler.server.go.wait(20)
        then(handler)

    return answer


@pytest.mark.parametrize(
    "first, answers, ranges",
    [
        # The first brings the file, half of it, nothing, or other bytes.
        (resumes(stop=HALF, then=stalls(lambda h: None)), [resumes()], [HALF]),
        (resumes(stop=HALF, then=stalls(lambda h: None)), [error(404)], [HALF, HALF]),
        (stalls(error(404)), [], [0]),
        (stalls(sends(CONTENT[::-1])), [], [0]),
    ],
)
def test_two_processes(server, tmp_path, first, answers, ranges):
    path = tmp_path / "target"
    with start(server.serve(first, *answers, resumes()), path) as one:
        assert server.asked.acquire(timeout=20)
        with start(server.url(), path) as two:
            line = two.stderr.readline()
            assert line == f"Waiting for another process to fetch {partial(path)}.\n"
            assert len(server.requests) == 1
            server.go.set()
            _, message = one.communicate()
            assert one.returncode == (0 if len(ranges) == len(answers) else 1), message
            _, message = two.communicate()
            assert two.returncode == 0, message
    expected = [f"bytes={start}-" if start else None for start in ranges]
    assert server.ranges == [None, *expected] and is_alone(path)


def test_a_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "fcntl", None)
    assert "has no fcntl.flock" in fails(tmp_path / "new" / "target")
    assert not list(tmp_path.iterdir())
