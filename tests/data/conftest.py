import gc
import threading
import time

import numpy as np
import pytest

from tests.data import streams
from train.data import folders


@pytest.fixture(scope="module", autouse=True)
def no_thread_survives():
    yield
    gc.collect()
    deadline = time.monotonic() + 30
    while alive := [t for t in threading.enumerate() if t.name.startswith("grain-")]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.01)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder of images in four classes, among other files."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, counts in (("train", streams.TRAIN_COUNTS), ("val", streams.TEST_COUNTS)):
        identity = 0
        for name, count in zip(streams.CLASSES, counts, strict=True):
            if count:
                (folder / part / name).mkdir(parents=True)
            for i in range(count):
                file = f"{i:03}{streams.SUFFIXES[i % len(streams.SUFFIXES)]}"
                streams.write_image(folder / part / name / file, identity, rng)
                identity += 1
    (folder / "train" / streams.CLASSES[1] / "notes.txt").write_text("not an image")
    (folder / "val" / streams.CLASSES[0] / "Thumbs.db").write_bytes(b"")
    (folder / "train" / streams.CLASSES[2] / "._000.png").write_bytes(b"\0")
    (folder / "train" / ".checkpoints").mkdir()
    (folder / "train" / "README").write_text("")
    return folder


@pytest.fixture(scope="session")
def images(root):
    return folders.scan(root)
