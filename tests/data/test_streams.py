"""The streams of batches from folders of images, and their resumption."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.streams import (
    BATCH,
    OPTIONS,
    SIZE,
    STEPS_PER_EPOCH,
    identities,
    joined,
    passes,
    take,
)
from train.data import folders


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert set(batch) == set(other)
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], strict=True)


def digest(batches):
    parts = (b[key].tobytes() for b in batches for key in ("image", "label"))
    return hashlib.sha256(b"".join(parts)).hexdigest()


# The stream of training batches.


@pytest.fixture(scope="session")
def stream(images):
    """Two epochs and three batches."""
    return take(images, 2 * STEPS_PER_EPOCH + 3)[0]


def test_shapes(images, stream):
    for batch in stream:
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            "image": ((BATCH, SIZE, SIZE, 3), np.uint8),
            "label": ((BATCH,), np.int32),
        }


def test_an_epoch_shows_each_image_at_most_once(images, stream):
    epochs = [
        joined(stream[i * STEPS_PER_EPOCH : (i + 1) * STEPS_PER_EPOCH])
        for i in range(2)
    ]
    shown = [identities(epoch["image"]) for epoch in epochs]
    for epoch, ids in zip(epochs, shown, strict=True):
        assert len(set(ids)) == len(ids) == 200
        np.testing.assert_array_equal(epoch["label"], images.train.labels[ids])
        # A shuffle leaves about one image in its place, and classes mixed.
        assert (ids == np.arange(200)).sum() < 10
        assert len(set(epoch["label"][:30])) == 4
    assert (shown[0] == shown[1]).sum() < 10
    # The three dropped images are different ones in the next epoch.
    assert set(shown[0]) != set(shown[1])


def test_a_batch_that_divides_the_images_shows_each_once(images):
    batches, _ = take(images, 7, batch_size=29)
    ids = identities(joined(batches)["image"])
    np.testing.assert_array_equal(np.sort(ids), np.arange(203))


def test_the_seed_decides(images, stream):
    assert_same(take(images, 4)[0], stream[:4])
    other, _ = take(images, 2 * STEPS_PER_EPOCH, seed=4)
    shown, others = (identities(joined(s)["image"]) for s in (stream, other))
    assert (shown[: len(others)] == others).sum() < 20
    # Nor is one seed's stream another's, shifted by an epoch.
    assert (shown[200:400] == others[:200]).sum() < 10


def test_crops_differ_between_epochs(images):
    (first, second), _ = take(images, 2, batch_size=203)
    one, two = (b["image"][np.argsort(identities(b["image"]))] for b in (first, second))
    same = (one == two).all(axis=(1, 2, 3))
    assert same.sum() < 10


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_same_batches(images, stream, process_count):
    count = STEPS_PER_EPOCH + 2
    shares = [
        take(images, count, process_index=i, process_count=process_count)[0]
        for i in range(process_count)
    ]
    whole = [joined(rows) for rows in zip(*shares, strict=True)]
    assert_same(whole, stream[:count])


@pytest.mark.parametrize("num_threads", [0, 1, 5])
def test_threads_do_not_change_the_stream(images, stream, num_threads):
    assert_same(take(images, 9, num_threads=num_threads)[0], stream[:9])


POSITIONS = (0, 1, 7, *(STEPS_PER_EPOCH + i for i in (-1, 0, 1)), 2 * STEPS_PER_EPOCH)


def test_resume_from_a_state(images, stream):
    for position in POSITIONS:
        start, state = take(images, position)
        assert_same(start, stream[:position])
        state = json.loads(json.dumps(state))
        assert_same(take(images, 3, state)[0], stream[position : position + 3])
    # By another number of processes and threads.
    options = {"process_index": 1, "process_count": 2, "num_threads": 0}
    share, _ = take(images, 3, state, **options)
    rows = [{k: v[BATCH // 2 :] for k, v in b.items()} for b in stream[position:]]
    assert_same(share, rows)


def test_a_state_does_not_count_what_is_read_ahead(images, stream):
    batches = folders.train_batches(images, **OPTIONS, num_threads=4)
    with contextlib.closing(batches):
        assert_same([next(batches) for _ in range(5)], stream[:5])
        state = batches.get_state()
        assert_same([next(batches) for _ in range(4)], stream[5:9])
        # Back and forth in one iterator.
        batches.set_state(state)
        assert_same([next(batches) for _ in range(4)], stream[5:9])


OLD_JAXLIB = "worker profiling requires jaxlib extension version"
PROGRAM = """
import contextlib, hashlib, json, sys
from pathlib import Path
from train.data import folders

images = folders.scan(Path(sys.argv[1]))
options = json.loads(sys.argv[2])
for state in json.loads(sys.argv[3]):
    with contextlib.closing(folders.train_batches(images, **options)) as batches:
        batches.set_state(state)
        parts = [b[k].tobytes() for b, _ in zip(batches, "123") for k in sorted(b)]
        print(hashlib.sha256(b"".join(parts)).hexdigest())
"""


def test_resume_from_a_state_in_a_fresh_process(root, images, stream):
    states = [take(images, position)[1] for position in POSITIONS]
    arguments = json.dumps(OPTIONS), json.dumps(states)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, root, *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [digest(stream[p : p + 3]) for p in POSITIONS]
    # What Grain says of a jaxlib older than itself is not of the program.
    said = [line for line in run.stderr.splitlines() if OLD_JAXLIB not in line]
    assert not said


# The pass over the test images.


@pytest.mark.parametrize("batch_size", [8, 11, 48])
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_a_pass_shows_each_image_once(images, batch_size, process_count):
    batch_size -= batch_size % process_count
    options = {"batch_size": batch_size, "process_count": process_count}
    shares = [passes(images, **options, process_index=i) for i in range(process_count)]
    whole = [joined(rows) for rows in zip(*shares, strict=True)]
    assert len(whole) == -(-33 // batch_size)
    everything = joined(whole)
    assert everything["image"].shape == (len(whole) * batch_size, SIZE, SIZE, 3)
    assert everything["image"].dtype == np.uint8
    assert everything["label"].dtype == np.int32
    weights = everything["weight"]
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, np.arange(len(weights)) < 33)
    np.testing.assert_array_equal(identities(everything["image"][:33]), np.arange(33))
    np.testing.assert_array_equal(everything["label"][:33], images.test.labels)
    assert not everything["image"][33:].any() and not everything["label"][33:].any()


def test_a_batch_that_the_images_cannot_fill(images):
    with pytest.raises(ValueError, match="at most the 203 training images.* got 204"):
        take(images, 1, batch_size=204)
    with pytest.raises(ValueError, match="non-negative"):
        take(images, 1, seed=-1)
