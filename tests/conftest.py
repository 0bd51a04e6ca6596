import importlib.util
import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests import compilation, processes

# Read when the first program is compiled.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {compilation.QUICK}"
# Eight devices, for the tests of sharding; before the first use of a device.
jax.config.update("jax_num_cpu_devices", 8)
# A broadcast that nobody wrote down is a bug here.
jax.config.update("jax_numpy_rank_promotion", "raise")

# The search for doctests imports every file.
if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["parity/torch_*.py"]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """For the processes that tests start; what one compiles, the next one reads."""
    cache = tmp_path_factory.getbasetemp() / "compiled"
    if "PYTEST_XDIST_WORKER" in os.environ:  # Which has a folder in the session's.
        cache = tmp_path_factory.getbasetemp().parent / "compiled"
    return os.environ | {
        "PYTHONPATH": str(processes.ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": compilation.QUICK,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


@pytest.fixture(scope="module")
def shared_compilations(environment):
    """For modules that compile the same networks again and again in this process."""
    options = {
        name.lower(): environment[name]
        for name in environment
        if name.startswith(("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE"))
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        kind = type(before[name]) if before[name] is not None else str
        jax.config.update(name, kind(value))
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
