import importlib.util

import jax

# Eight devices, for the tests of sharding; before the first use of a device.
jax.config.update("jax_num_cpu_devices", 8)
# A broadcast that nobody wrote down is a bug here.
jax.config.update("jax_numpy_rank_promotion", "raise")

# The search for doctests imports every file.
if importlib.util.find_spec("torch") is None:
    collect_ignore = ["torch_article.py"]
