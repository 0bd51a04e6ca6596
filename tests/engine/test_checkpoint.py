"""Checkpoints without a run: damaged ones, full disks, and which are kept."""

import contextlib
import logging
import resource
import shutil

import jax
import numpy as np
import pytest

from train.engine.checkpoint import CheckpointError, Checkpoints

TREE = {
    "params": {
        "kernel": np.arange(30000, dtype=np.float32),
        "bias": np.ones(3, np.float32),
    },
    "opt_state": (np.asarray(3, np.int32), {"trace": np.zeros((2, 2), np.float16)}),
    "key": np.arange(2, dtype=np.uint32),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints, of the steps 5 and 7, to be copied."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(directory, 3, pytest.fail)
    for step in (5, 7):
        checkpoints.save(step, TREE, {"step": step})
    checkpoints.close()
    return directory


def restore(directory):
    logged = []
    with contextlib.closing(Checkpoints(directory, 3, logged.append)) as checkpoints:
        return checkpoints.restore(TREE), logged


# The folders and files of a checkpoint; of several alike, one.
FOLDERS = ["state", "state/d", "state/ocdbt.process_0", "state/ocdbt.process_0/d"]
FOLDERS += ["record"]
FILES = ["state/_METADATA", "state/manifest.ocdbt", "state/d/*", "record/metadata"]
FILES += ["state/ocdbt.process_0/manifest.ocdbt", "state/ocdbt.process_0/d/*"]
# What restoring reads; the digest detects flipped bits.
NEEDED = ("state", "state/ocdbt.process_0/d/*", "record", "record/metadata")


# The array store's threads report failed reads and writes to a closed event loop.
late_reports = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@late_reports
@pytest.mark.parametrize(
    "damage, name",
    [
        *(("missing", name) for name in FOLDERS + FILES),
        *(("truncated", name) for name in FILES),
        *(("emptied", name) for name in FILES),
        *(("flipped", name) for name in FILES),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    name, damage, saved, tmp_path
):
    directory = shutil.copytree(saved, tmp_path / "checkpoints")
    # The largest of several, which holds the arrays.
    path = max((directory / "7").glob(name), key=lambda p: p.stat().st_size)
    if path.is_dir():
        shutil.rmtree(path)
    elif damage == "missing":
        path.unlink()
    else:
        data = path.read_bytes()
        half, middle = data[: len(data) // 2], data[len(data) // 2]
        flipped = half + bytes([middle ^ 1]) + data[len(half) + 1 :]
        contents = {"truncated": half, "emptied": b"", "flipped": flipped}
        path.write_bytes(contents[damage])
    (tree, record), logged = restore(directory)
    jax.tree.map(np.testing.assert_array_equal, tree, TREE)
    if record == {"step": 7} and name not in NEEDED:
        # Restoring does not read this file.
        assert logged == []
        return
    assert record == {"step": 5}
    (line,) = logged
    assert f"{directory / '7'} is damaged" in line
    assert (tmp_path / "damaged-7").is_dir()


def test_the_step_of_a_damaged_checkpoint_is_saved_again(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "checkpoints")
    shutil.rmtree(directory / "7" / "record")
    assert len(restore(directory)[1]) == 1
    checkpoints = Checkpoints(directory, 3, pytest.fail)
    checkpoints.save(7, TREE, {"step": 7})
    checkpoints.close()
    (tree, record), logged = restore(directory)
    assert record == {"step": 7} and logged == []
    jax.tree.map(np.testing.assert_array_equal, tree, TREE)


def test_a_replacement_that_could_not_be_written_is_tried_again(tmp_path, monkeypatch):
    logged = []
    with contextlib.closing(Checkpoints(tmp_path, 1, logged.append)) as checkpoints:
        checkpoints.save(7, TREE, {"evaluated": False})
        with monkeypatch.context() as patch:
            usage = shutil.disk_usage(tmp_path)._replace(free=900_000)
            patch.setattr(shutil, "disk_usage", lambda path: usage)
            checkpoints.save(7, TREE, {"evaluated": True})
        assert len(logged) == 1
        checkpoints.save(7, TREE, {"evaluated": True})
    assert restore(tmp_path)[0][1] == {"evaluated": True}


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    """As after an evaluation that was interrupted; a kill leaves one of the two."""
    with contextlib.closing(Checkpoints(tmp_path, 1, pytest.fail)) as checkpoints:
        checkpoints.save(7, TREE, {"evaluated": False})
    with contextlib.closing(Checkpoints(tmp_path, 1, pytest.fail)) as checkpoints:
        checkpoints.restore(TREE)
        checkpoints.save(7, TREE, {"evaluated": True})
    assert [p.name for p in tmp_path.iterdir()] == ["7"]
    assert restore(tmp_path)[0][1] == {"evaluated": True}
    shutil.copytree(tmp_path / "7", tmp_path / "7.replaced")
    assert restore(tmp_path)[0][1] == {"evaluated": True}
    assert [p.name for p in tmp_path.iterdir()] == ["7"]
    (tmp_path / "7").rename(tmp_path / "7.replaced")
    assert restore(tmp_path)[0][1] == {"evaluated": True}


def test_all_checkpoints_damaged(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for step in ("5", "7"):
        (tmp_path / step / "record" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match="None of the 2 checkpoints in"):
        restore(tmp_path)
    assert (tmp_path / "5").is_dir() and (tmp_path / "7").is_dir()


def test_orbax_is_silent_only_while_open(tmp_path):
    absl = logging.getLogger("absl")
    before = absl.level
    checkpoints = Checkpoints(tmp_path, 1, pytest.fail)
    assert absl.level == logging.CRITICAL
    checkpoints.close()
    assert absl.level == before < logging.CRITICAL


def test_no_checkpoint(tmp_path):
    assert restore(tmp_path / "none") == (None, [])


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, pytest.fail)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, TREE, {"step": step})
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]


def test_a_save_that_cannot_fit_on_the_disk_is_not_tried(tmp_path, monkeypatch):
    logged = []
    checkpoints = Checkpoints(tmp_path, 3, logged.append)
    checkpoints.save(1, TREE, {"step": 1})
    checkpoints.wait()
    usage = shutil.disk_usage(tmp_path)._replace(free=900_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    checkpoints.save(2, TREE, {"step": 2})
    checkpoints.close()
    assert logged == [
        f"The checkpoint of step 2 could not be written to {tmp_path} (it needs 1.1 "
        "MB, but the disk has only 0.9 MB left); that of step 1 is kept and training "
        "continues."
    ]


@late_reports
def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(tmp_path):
    logged = []
    checkpoints = Checkpoints(tmp_path, 1, logged.append)
    checkpoints.save(1, TREE, {"step": 1})
    checkpoints.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        for step in (2, 3):
            checkpoints.save(step, TREE, {"step": step})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(logged) == 2 and "that of step 1 is kept" in logged[1]
    checkpoints.save(4, TREE, {"step": 4})
    checkpoints.close()
    assert len(logged) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["4"]
