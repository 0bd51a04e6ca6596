import dataclasses
import hashlib
import http.server
import io
import tarfile
import threading

import numpy as np
import pytest

from train import data

TINY = data.Archive(
    url="http://127.0.0.1:9/tiny.tar.gz",
    size=0,
    sha256="",
    folder="tiny-bin",
    train_files=("a.bin", "b.bin"),
    test_files=("t.bin",),
    records=5,
    test_records=3,
    num_classes=10,
    label_bytes=2,
)


def records(n, seed):
    rng = np.random.RandomState(seed)
    pixels = rng.randint(0, 256, (n, 3072), dtype=np.uint8)
    labels = rng.randint(0, 10, (n, 2), dtype=np.uint8)
    return np.concatenate([labels, pixels], axis=1)


FILES = {"a.bin": records(5, 0), "b.bin": records(5, 1), "t.bin": records(3, 2)}


def write_folder(folder, files=FILES):
    folder.mkdir(parents=True)
    for name, array in files.items():
        (folder / name).write_bytes(array.tobytes())


def tar_bytes(files=FILES, folder="tiny-bin"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, array in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = array.nbytes
            tar.addfile(info, io.BytesIO(array.tobytes()))
    return buffer.getvalue()


def known(content, **fields):
    """TINY, published with this content."""
    digest = hashlib.sha256(content).hexdigest()
    return dataclasses.replace(TINY, size=len(content), sha256=digest, **fields)


@pytest.fixture
def tiny(monkeypatch):
    def register(archive=TINY):
        monkeypatch.setitem(data.ARCHIVES, "tiny", archive)

    register()
    return register


@pytest.fixture
def server():
    """Serves `answer(handler)` on loopback; yields a function that sets it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.answer(self)

        def log_message(self, *args):
            pass

    httpd = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()

    def serve(answer):
        httpd.answer = answer
        return f"http://127.0.0.1:{httpd.server_port}/tiny.tar.gz"

    yield serve
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def sends(content, length=None):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(length or len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def check(images):
    train = np.concatenate([FILES["a.bin"], FILES["b.bin"]])
    assert images.train_images.shape == (10, 32, 32, 3)
    assert images.test_images.shape == (3, 32, 32, 3)
    # Record 7's green pixel in row 3, column 9; the label is the last label byte.
    assert images.train_images[7, 3, 9, 1] == train[7, 2 + 1024 + 3 * 32 + 9]
    np.testing.assert_array_equal(images.train_labels, train[:, 1])
    np.testing.assert_array_equal(images.test_labels, FILES["t.bin"][:, 1])
    assert images.train_images.dtype == np.uint8
    assert images.train_labels.dtype == np.int32


def test_a_folder_inside_or_itself(tiny, tmp_path):
    write_folder(tmp_path / "tiny-bin")
    check(data.load("tiny", tmp_path))
    check(data.load("tiny", tmp_path / "tiny-bin"))


def test_an_archive(tiny, tmp_path):
    content = tar_bytes()
    tiny(known(content))
    (tmp_path / "tiny.tar.gz").write_bytes(content)
    check(data.load("tiny", tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.tar.gz"]


def test_a_download(tiny, tmp_path, server):
    content = tar_bytes()
    tiny(known(content, url=server(sends(content))))
    check(data.load("tiny", tmp_path / "new"))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tiny.tar.gz"]


@pytest.mark.parametrize(
    "answer, reason",
    [
        (lambda c: sends(c[: len(c) // 2]), "corrupt or truncated: .* bytes, not"),
        (lambda c: sends(c[:-9], length=len(c)), "IncompleteRead|truncated"),
        (lambda c: sends(c[::-1]), "its SHA-256 is .*, not the published"),
        (lambda c: sends(c * 3), "more than the published"),
        (lambda c: lambda h: h.send_error(404), "HTTP Error 404"),
        (lambda c: lambda h: h.wfile.write(b"nonsense\r\n\r\n"), "nonsense"),
    ],
)
def test_a_download_that_fails(tiny, tmp_path, server, answer, reason):
    content = tar_bytes()
    tiny(known(content, url=server(answer(content))))
    with pytest.raises(data.DataError, match=reason) as error:
        data.load("tiny", tmp_path / "new")
    message = str(error.value)
    assert "--dataset digits" in message and str(tmp_path) in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_nobody_answers(tiny, tmp_path):
    with pytest.raises(data.DataError, match="failed .*refused.* --dataset digits"):
        data.load("tiny", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_server_that_hangs(tiny, tmp_path, server, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(data, "TIMEOUT_SECONDS", 0.2)
    tiny(dataclasses.replace(TINY, url=server(lambda handler: release.wait(10))))
    with pytest.raises(data.DataError, match="timed out"):
        data.load("tiny", tmp_path)
    release.set()


def test_a_damaged_archive_is_not_used(tiny, tmp_path):
    content = tar_bytes()
    tiny(known(content))
    path = tmp_path / "tiny.tar.gz"
    path.write_bytes(content[:-100])
    with pytest.raises(data.DataError, match="truncated: .* delete it to download"):
        data.load("tiny", tmp_path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(data.DataError, match="its SHA-256 is .* delete it"):
        data.load("tiny", tmp_path)
    assert path.exists()


@pytest.mark.parametrize(
    "files, folder, reason",
    [
        ({"a.bin": FILES["a.bin"]}, "tiny-bin", "tiny-bin/b.bin"),
        (FILES, "../tiny-bin", "tiny-bin/a.bin"),
        (FILES | {"a.bin": records(4, 0)}, "tiny-bin", "a.bin has 12,296 bytes, not"),
        (FILES | {"t.bin": records(9, 0)}, "tiny-bin", "t.bin has .* bytes, not 9,222"),
    ],
)
def test_an_archive_with_other_contents(tiny, tmp_path, files, folder, reason):
    content = tar_bytes(files, folder)
    tiny(known(content))
    (tmp_path / "tiny.tar.gz").write_bytes(content)
    with pytest.raises(data.DataError, match=f"is corrupt.*{reason}"):
        data.load("tiny", tmp_path)


def test_a_folder_with_other_contents(tiny, tmp_path):
    write_folder(tmp_path / "tiny-bin", FILES | {"a.bin": records(4, 0)})
    with pytest.raises(data.DataError, match="a.bin has 12,296 bytes, not 15,370"):
        data.load("tiny", tmp_path)
    (tmp_path / "tiny-bin" / "a.bin").unlink()
    with pytest.raises(data.DataError, match="is incomplete: .*a.bin"):
        data.load("tiny", tmp_path)
    bad = FILES["a.bin"].copy()
    bad[2, 1] = 77
    (tmp_path / "tiny-bin" / "a.bin").write_bytes(bad.tobytes())
    with pytest.raises(data.DataError, match="has the label 77, but only 10"):
        data.load("tiny", tmp_path)


def test_the_published_layouts():
    ten, hundred = data.ARCHIVES["cifar10"], data.ARCHIVES["cifar100"]
    # 30,730,000 bytes for each of six files; 153,700,000 and 30,740,000.
    assert {ten.file_size(f) for f in ten.train_files + ten.test_files} == {30_730_000}
    assert hundred.file_size("train.bin") == 153_700_000
    assert hundred.file_size("test.bin") == 30_740_000
    assert (ten.name, len(ten.sha256)) == ("cifar-10-binary.tar.gz", 64)


def test_digits():
    images = data.load("digits", None)
    assert images.train_images.shape == (1437, 32, 32, 3)
    assert images.test_images.shape == (360, 32, 32, 3)
    assert images.train_images.dtype == np.uint8 and images.train_images.max() == 255
    assert set(images.test_labels) == set(range(10)) and not images.flip
    # Every scan is in one part: the split loses and doubles none.
    total = np.concatenate([images.train_labels, images.test_labels])
    assert np.bincount(total).tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]
    again = data.load("digits", None)
    np.testing.assert_array_equal(again.test_images, images.test_images)
