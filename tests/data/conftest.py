import gc
import threading
import time

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_thread_survives():
    yield
    gc.collect()
    deadline = time.monotonic() + 30
    while alive := [t for t in threading.enumerate() if t.name.startswith("grain-")]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.01)
