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
    return dataclasses.replace(TINY, sha256=digest, **fields)


@pytest.fixture
def tiny(monkeypatch):
    def register(archive=TINY):
        monkeypatch.setitem(data.ARCHIVES, "tiny", archive)

    register()
    return register


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


def test_an_archive(tiny, tmp_path):
    content = tar_bytes()
    tiny(known(content))
    (tmp_path / "tiny.tar.gz").write_bytes(content)
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
        f"{tmp_path} holds neither tiny-bin/ nor tiny.tar.gz, and the download failed: "
        f"{address}/half (its SHA-256 is not the published {archive.sha256}); "
        f"{address}/absent (HTTP status 404). Pass --data-url, --data-dir, or "
        "--dataset digits, which needs no network."
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


def member(name, content, **fields):
    """A member of an archive, with whatever header it claims to have."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


A = FILES["a.bin"].tobytes()
GOOD = {n: member(f"tiny-bin/{n}", FILES[n].tobytes()) for n in FILES}


def hostile(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "first, reason",
    [
        ([], "tiny-bin/a.bin is not in it"),
        ([member("tiny-bin/../tiny-bin/a.bin", A)], "tiny-bin/a.bin is not in it"),
        ([member("/tiny-bin/a.bin", A)], "tiny-bin/a.bin is not in it"),
        ([member("./tiny-bin/a.bin", A)], "tiny-bin/a.bin is not in it"),
        (
            [
                member("tiny-bin/real", A),
                member("tiny-bin/a.bin", b"", type=tarfile.SYMTYPE, linkname="real"),
            ],
            "a.bin in it is not a file",
        ),
        (
            [
                member("real", A),
                member("tiny-bin/a.bin", b"", type=tarfile.LNKTYPE, linkname="real"),
            ],
            "a.bin in it is not a file",
        ),
        (
            [
                member(
                    "tiny-bin/a.bin", b"", type=tarfile.SYMTYPE, linkname="/etc/hosts"
                )
            ],
            "a.bin in it is not a file",
        ),
        ([member("tiny-bin/a.bin", b"", type=tarfile.DIRTYPE)], "is not a file"),
        ([member("tiny-bin/a.bin", b"", type=tarfile.CHRTYPE)], "is not a file"),
        ([member("tiny-bin/a.bin", b"", type=tarfile.FIFOTYPE)], "is not a file"),
        ([member("tiny-bin/a.bin", A + b"?")], "a.bin has 15,371 bytes, not 15,370"),
        ([member("tiny-bin/a.bin", A[:-1])], "a.bin has 15,369 bytes, not 15,370"),
        ([GOOD["a.bin"], member("tiny-bin/a.bin", A)], "a.bin is in it twice"),
        ([GOOD["a.bin"], member("tiny-bin/b.bin", A)], "b.bin is in it twice"),
    ],
)
def test_a_hostile_archive(tiny, tmp_path, first, reason):
    """Whose hash is that of the published one."""
    content = hostile(*first, GOOD["b.bin"], GOOD["t.bin"])
    tiny(known(content))
    (tmp_path / "tiny.tar.gz").write_bytes(content)
    with pytest.raises(data.DataError, match=f"is corrupt.*{reason}"):
        data.load("tiny", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.tar.gz"]


def test_a_member_that_claims_to_be_huge(tiny, tmp_path):
    """A terabyte that does not exist is neither read nor allocated."""
    info, _ = member("tiny-bin/a.bin", b"", size=10**12)
    content = gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + A)
    tiny(known(content))
    (tmp_path / "tiny.tar.gz").write_bytes(content)
    with pytest.raises(data.DataError, match="a.bin has 1,000,000,000,000 bytes, not"):
        data.load("tiny", tmp_path)


def test_other_members_are_ignored(tiny, tmp_path):
    """And nothing is unpacked to the disk."""
    content = hostile(
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


def damaged_late():
    """Nonsense in the compressed stream, after more than any buffer holds."""
    tar = gzip.decompress(hostile(member("tiny-bin/first", bytes(10**6))))
    gz = zlib.compressobj(wbits=31)
    return gz.compress(tar[:500_000]) + gz.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 99


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c[: len(c) // 2],  # EOFError
        lambda c: damaged_late(),
        lambda c: b"PK" + c[2:],  # ReadError
        lambda c: gzip.compress(b""),
    ],
)
def test_an_archive_that_cannot_be_read(tiny, tmp_path, damage):
    content = damage(tar_bytes())
    tiny(known(content))
    (tmp_path / "tiny.tar.gz").write_bytes(content)
    with pytest.raises(data.DataError, match="tiny.tar.gz is corrupt: .+"):
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
    # Every scan is in exactly one part.
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
