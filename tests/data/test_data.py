import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import tarfile
import threading
import zlib

import numpy as np
import pytest

from train.data import cifar as data

TINY = data.Archive(
    name="tiny.tar.gz",
    urls=("http://127.0.0.1:9/tiny.tar.gz",),
    sha256="",
    folder="tiny-bin",
    train_files=("a.bin", "b.bin"),
    test_files=("t.bin",),
    records=5,
    test_records=3,
    num_classes=10,
    label_bytes=2,
)
PYTHON = dataclasses.replace(
    TINY,
    name="tiny-python.tar.gz",
    folder="tiny-py",
    train_files=("a", "b"),
    test_files=("t",),
    pickled_labels=(b"coarse_labels", b"fine_labels"),
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


def member(name, content, **fields):
    """A member of an archive, with whatever header it claims to have."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def archive_of(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tar_bytes(files=FILES, folder="tiny-bin"):
    members = (member(f"{folder}/{n}", array.tobytes()) for n, array in files.items())
    return archive_of(*members)


def known(content, **fields):
    """TINY, published with this content."""
    digest = hashlib.sha256(content).hexdigest()
    return dataclasses.replace(TINY, sha256=digest, **fields)


@pytest.fixture
def tiny(monkeypatch):
    def register(archive=TINY):
        monkeypatch.setitem(data.ARCHIVES, "tiny", archive)

    monkeypatch.setitem(data.PYTHON_ARCHIVES, "tiny", PYTHON)
    register()
    return register


@pytest.fixture
def published(tiny, tmp_path):
    """Writes an archive whose hash is that of the published one."""

    def write(content):
        tiny(known(content))
        (tmp_path / "tiny.tar.gz").write_bytes(content)

    return write


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    """A folder that is served on loopback, and its address."""
    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path_factory.mktemp("served")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


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


def test_an_archive(published, tmp_path):
    published(tar_bytes())
    check(data.load("tiny", tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.tar.gz"]


def test_a_download(tiny, tmp_path, server):
    folder, address = server
    (folder / "tiny.tar.gz").write_bytes(content := tar_bytes())
    tiny(known(content, urls=(f"{address}/absent", f"{address}/tiny.tar.gz")))
    check(data.load("tiny", tmp_path / "new"))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tiny.tar.gz"]
    (folder / "tiny.tar.gz").unlink()
    check(data.load("tiny", tmp_path / "new"))


def test_other_addresses(tiny, tmp_path, server):
    """They replace the known ones; the file name and the hash stay."""
    folder, address = server
    (folder / "b.zip").write_bytes(content := tar_bytes())
    (folder / "c").write_bytes(content[::-1])
    tiny(known(content))
    urls = [f"{address}/a", f"{address}/b.zip?x=../y"]
    check(data.load("tiny", tmp_path / "new", urls))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tiny.tar.gz"]
    with pytest.raises(data.DataError, match="its SHA-256 is not the published"):
        data.load("tiny", tmp_path / "other", [f"{address}/c"])
    assert not list((tmp_path / "other").iterdir())


def test_a_download_that_fails(tiny, tmp_path, server):
    """One line with the failure of each address, and what to pass instead."""
    folder, address = server
    (folder / "half").write_bytes((content := tar_bytes())[:5_000])
    archive = known(content, urls=(f"{address}/half", f"{address}/absent"))
    tiny(archive)
    with pytest.raises(data.DataError) as error:
        data.load("tiny", tmp_path)
    assert str(error.value) == (
        f"{tmp_path} contains neither tiny-bin/ nor tiny.tar.gz, and the download "
        f"failed: {address}/half (its SHA-256 is not the published {archive.sha256}); "
        f"{address}/absent (HTTP status 404). Pass --data-dir; to train, --data-url, "
        "or --dataset digits, which needs no download."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://a/b", "tiny.tar.gz", ""])
def test_addresses_of_other_schemes(tiny, tmp_path, url):
    message = f"`data_url` must be .*, got {url!r}; pass another --data-url"
    with pytest.raises(data.DataError, match=message):
        data.load("tiny", tmp_path, ["http://127.0.0.1:9/", url])
    assert not list(tmp_path.iterdir())


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


NAME, A = "tiny-bin/a.bin", FILES["a.bin"].tobytes()
GOOD = {n: member(f"tiny-bin/{n}", FILES[n].tobytes()) for n in FILES}


def archive_with(*members):
    """An archive with other members in place of a.bin."""
    return archive_of(*members, GOOD["b.bin"], GOOD["t.bin"])


def special(kind, linkname=""):
    """A member a.bin that is no regular file."""
    return member(NAME, b"", type=kind, linkname=linkname)


def huge():
    """A terabyte that does not exist is neither read nor allocated."""
    info, _ = member(NAME, b"", size=10**12)
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + A)


def damaged_late():
    """Nonsense in the compressed stream, after more than any buffer holds."""
    tar = gzip.decompress(archive_with(member("tiny-bin/first", bytes(10**6))))
    gz = zlib.compressobj(wbits=31)
    return gz.compress(tar[:500_000]) + gz.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 99


BAD_ARCHIVES = {
    "missing": (tar_bytes({"a.bin": FILES["a.bin"]}), "tiny-bin/b.bin is not in it"),
    "folder": (tar_bytes(FILES, "../tiny-bin"), "tiny-bin/a.bin is not in it"),
    "fewer": (tar_bytes(FILES | {"a.bin": records(4, 0)}), "a.bin has 12,296 bytes"),
    "more": (tar_bytes(FILES | {"t.bin": records(9, 0)}), "bytes, not 9,222"),
    "absent": (archive_with(), "tiny-bin/a.bin is not in it"),
    **{
        f"path {name}": (archive_with(member(name, A)), "tiny-bin/a.bin is not in it")
        for name in (f"tiny-bin/../{NAME}", f"/{NAME}", f"./{NAME}")
    },
    "symbolic link": (
        archive_with(member("tiny-bin/real", A), special(tarfile.SYMTYPE, "real")),
        "a.bin in it is not a file",
    ),
    "hard link": (
        archive_with(member("real", A), special(tarfile.LNKTYPE, "real")),
        "a.bin in it is not a file",
    ),
    **{
        kind: (archive_with(special(code, "/etc/hosts")), "a.bin in it is not a file")
        for kind, code in (
            ("link outside", tarfile.SYMTYPE),
            ("directory", tarfile.DIRTYPE),
            ("device", tarfile.CHRTYPE),
            ("pipe", tarfile.FIFOTYPE),
        )
    },
    "byte more": (archive_with(member(NAME, A + b"?")), "has 15,371 bytes, not"),
    "byte less": (archive_with(member(NAME, A[:-1])), "has 15,369 bytes, not"),
    "a twice": (archive_with(GOOD["a.bin"], GOOD["a.bin"]), "a.bin is in it twice"),
    "b twice": (archive_with(*GOOD.values()), "b.bin is in it twice"),
    "huge": (huge(), "a.bin has 1,000,000,000,000 bytes, not"),
    "EOFError": (tar_bytes()[: len(tar_bytes()) // 2], ": .+"),
    "damaged late": (damaged_late(), ": .+"),
    "ReadError": (b"PK" + tar_bytes()[2:], ": .+"),
    "empty": (gzip.compress(b""), ": .+"),
}


@pytest.mark.parametrize("content, reason", BAD_ARCHIVES.values(), ids=BAD_ARCHIVES)
def test_a_hostile_or_damaged_archive(published, tmp_path, content, reason):
    published(content)
    with pytest.raises(data.DataError, match=f"tiny.tar.gz is corrupt.*{reason}"):
        data.load("tiny", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.tar.gz"]


def test_other_members_are_ignored(tiny, tmp_path):
    """And nothing is unpacked to the disk."""
    content = archive_of(
        member("../escaped", b"!"),
        member(f"{tmp_path}/escaped", b"!"),
        member("tiny-bin", b"", type=tarfile.SYMTYPE, linkname="/etc"),
        *GOOD.values(),
        member("tiny-bin/more.bin", A),
    )
    tiny(known(content))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "tiny.tar.gz").write_bytes(content)
    check(data.load("tiny", tmp_path / "in"))
    names = sorted(p.name for p in tmp_path.rglob("*"))
    assert names == ["in", "tiny.tar.gz"]


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
    # Every scan is in exactly one part.
    total = np.concatenate([images.train_labels, images.test_labels])
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(total).tolist() == counts
    again = data.load("digits", None)
    np.testing.assert_array_equal(again.test_images, images.test_images)
