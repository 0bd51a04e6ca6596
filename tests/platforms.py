"""The code for another platform, run on the CPU of the tests."""

import contextlib
import types

from jax import lax


@contextlib.contextmanager
def code_for(platform, *modules):
    """Within it, ``modules`` trace what they would run on ``platform``.

    Only what is traced for the first time: JAX and ``_maxima`` keep earlier traces.
    """

    def chosen(*arrays, default=None, **per_platform):
        return per_platform.get(platform, default)(*arrays)

    proxy = types.SimpleNamespace(**vars(lax) | {"platform_dependent": chosen})
    originals = {module: module.lax for module in modules}
    try:
        for module in modules:
            module.lax = proxy
        yield
    finally:
        for module, original in originals.items():
            module.lax = original
