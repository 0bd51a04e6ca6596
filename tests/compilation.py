"""How the tests compile: quickly, but for those about what the compiler does."""

import jax

# For short runs, whose time is that of compilation.
QUICK = "--xla_backend_optimization_level=0"
_DEFAULTS = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):
    # The older of two emitters takes a third of the time; later versions have one.
    QUICK += " --xla_cpu_use_fusion_emitters=false"
    _DEFAULTS |= {"xla_cpu_use_fusion_emitters": True}


def jit_as_users_do(function):
    """``jax.jit`` with the compiler's defaults."""
    return jax.jit(function, compiler_options=_DEFAULTS)
