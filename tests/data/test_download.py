"""Downloads from a server on loopback; the path selects its answer."""

import contextlib
import hashlib
import http.server
import os
import random
import re
import socket
import threading
import time

import pytest

from train.data import download

CONTENT = random.Random(0).randbytes(400_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ANSWERS = {  # Content, and the Content-Length that it claims.
    "/good": (CONTENT, 400_000),
    "/wrong": (CONTENT[:-1] + b"?", 400_000),
    "/short": (CONTENT[:-1], 399_999),
    "/long": (CONTENT + b"?", 400_001),
    "/breaks-off": (CONTENT[:200_000], 400_000),
    "/hangs-late": (CONTENT[:200_000], 400_000),
    "/empty": (b"", 0),
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.paths.append(self.path)
        if self.path == "/hangs":
            self.server.end.wait(20)
        elif self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/good")
            self.end_headers()
        elif self.path == "/nonsense":
            self.wfile.write(b"a\x1b[2Jb\r\n\r\n")
        elif self.path == "/slow":
            self.send_response(200)
            self.send_header("Content-Length", "400000")
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # It was left.
                for start in range(0, 400_000, 10_000):
                    self.wfile.write(CONTENT[start : start + 10_000])
                    time.sleep(0.005)
        elif self.path not in ANSWERS:
            self.send_error(int(self.path[1:]))
        else:
            content, length = ANSWERS[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)
            if self.path == "/hangs-late":
                self.server.end.wait(20)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def httpd():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.end = threading.Event()
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield httpd
        httpd.end.set()
        httpd.shutdown()
        thread.join()


@pytest.fixture
def server(httpd, monkeypatch):
    """The server, which records the requested paths."""
    monkeypatch.setenv("no_proxy", "*")
    httpd.paths = []
    httpd.url = lambda path: f"http://127.0.0.1:{httpd.server_port}/{path}"
    return httpd


def fails(path, *urls):
    """Returns the one line of the error; no file is left."""
    with pytest.raises(download.DownloadError) as error:
        download.fetch(urls, path, SHA256)
    message = str(error.value)
    assert message.isprintable() and all(url in message for url in urls)
    assert not [p for p in path.parent.rglob("*") if p.is_file()]
    return message


def is_alone(path):
    """It is complete, and the only file of its folder."""
    return path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("first", ["good", "moved"])
def test_a_complete_download(server, tmp_path, capsys, first):
    path = tmp_path / "new" / "folder" / "target"
    download.fetch([server.url(first), server.url("404")], path, SHA256)
    assert is_alone(path) and "/404" not in server.paths
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert re.search(r"100%.* 400k/400k ", capsys.readouterr().err)


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("wrong", f"its SHA-256 is not the published {SHA256}"),
        ("short", "its SHA-256 is not the published"),
        ("long", "its SHA-256 is not the published"),
        ("empty", "its SHA-256 is not the published"),
        ("breaks-off", "200000 bytes read, 200000 more expected"),
        ("404", "HTTP status 404"),
        ("503", "HTTP status 503"),
        ("304", "its SHA-256 is not the published"),
        ("nonsense", "BadStatusLine"),
        ("hangs", "timed out"),
        ("hangs-late", "timed out"),
    ],
)
def test_after_a_mirror_that_fails_the_next_is_tried(
    server, tmp_path, monkeypatch, answer, reason
):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", (1, 0.2))
    path = tmp_path / "target"
    message = fails(path, url := server.url(answer))
    assert re.match(rf"{re.escape(url)} \(.*{reason}", message)
    download.fetch([url, server.url("good"), server.url("404")], path, SHA256)
    assert server.paths == [f"/{answer}", f"/{answer}", "/good"] and is_alone(path)


@pytest.mark.parametrize(
    "urls, asked",
    [
        (["slow", "good"], ["/slow", "/good"]),
        # The last one has no other to be left for.
        (["slow", "slow"], ["/slow", "/slow"]),
        (["slow", "404"], ["/slow", "/404", "/slow"]),
    ],
)
def test_a_slow_address_is_left_while_there_is_another(
    server, tmp_path, monkeypatch, capsys, urls, asked
):
    """It sends at most 2 MB/s."""
    monkeypatch.setattr(download, "MIN_BYTES_PER_SECOND", 10**7)
    monkeypatch.setattr(download, "WINDOW_SECONDS", 0.02)
    path = tmp_path / "target"
    download.fetch([server.url(url) for url in urls], path, SHA256)
    assert server.paths == asked and is_alone(path)
    left = re.search(r"(http\S+) sends [\d,]+ kB/s; trying", capsys.readouterr().err)
    assert left[1] == server.url("slow")


def test_a_server_that_does_not_listen(server, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
    path = tmp_path / "target"
    assert fails(path, url) == f"{url} (Connection refused)"
    both = fails(path, url, server.url("404"))
    assert both == f"{url} (Connection refused); {server.url('404')} (HTTP status 404)"
    download.fetch([url, server.url("good")], path, SHA256)
    assert is_alone(path)


def test_a_folder_that_cannot_be_written(server, tmp_path):
    """No other address is tried."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "target", tmp_path / "file" / "new" / "target"):
        reason = "cannot be written .(File exists|Not a directory)"
        with pytest.raises(download.DownloadError, match=reason):
            download.fetch([server.url("good")] * 2, path, SHA256)
    assert len(server.paths) <= 2


def test_an_interrupt_leaves_nothing(server, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pooch.core.hash_matches", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download.fetch([server.url("good")], tmp_path / "target", SHA256)
    assert server.paths == ["/good"] and not list(tmp_path.iterdir())


def test_addresses():
    assert download.is_address("http://127.0.0.1:9/a")
    assert download.is_address("HTTPS://example.org/a?b=c")
    for url in ("file:///etc/passwd", "ftp://a/b", "/a/b", "", "http:///a", "http://["):
        assert not download.is_address(url)
    assert not download.is_address("http://a/b\nc")
