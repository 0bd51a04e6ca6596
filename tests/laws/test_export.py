"""Blocks as programs: exported once for any platform, batch, height and width.

``test_transformations.py`` exports every block, with its gradient; here what is stored
runs in a process that has neither this library nor flax.
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from flax_attn.blocks import BLOCKS
from tests.cases import REFERENCES, normal, variables_for

SHAPES = ((1, 1, 1, 32), (2, 9, 13, 32), (3, 20, 40, 32))
# Of each form of the arithmetic one.
EXPORTED = ("se", "cbam-conv", "bam", "scse-max")

LOADER = """
import sys
import jax, numpy as np
from jax import export

for name in sys.argv[2:]:
    with open(f"{sys.argv[1]}/{name}.bin", "rb") as file:
        program = export.deserialize(bytearray(file.read()))
    data = np.load(f"{sys.argv[1]}/{name}.npz")
    for i in range(3):
        y = program.call(data[f"x{i}"])
        np.testing.assert_allclose(y, data[f"y{i}"], rtol=1e-5, atol=1e-5)
        print(name, y.shape)
assert "flax_attn" not in sys.modules and "flax" not in sys.modules
"""


def test_in_a_fresh_process_at_three_sizes(environment, tmp_path):
    pytest.importorskip("flatbuffers")
    symbolic = export.symbolic_shape("b, h, w, 32")
    for name in EXPORTED:
        module = BLOCKS[name]()
        variables = variables_for(module, jnp.ones(SHAPES[0]))
        params = jax.tree.map(np.float64, variables["params"])
        run = jax.jit(lambda x, m=module, v=variables: m.apply(v, x))
        # The forms for CPU and for the rest stand in one program.
        program = export.export(run, platforms=("cpu", "cuda", "tpu"))(
            jax.ShapeDtypeStruct(symbolic, jnp.float32)
        )
        (tmp_path / f"{name}.bin").write_bytes(program.serialize())
        arrays = {}
        for i, shape in enumerate(SHAPES):
            arrays[f"x{i}"] = x = normal(shape, i)
            arrays[f"y{i}"] = REFERENCES[name](params, np.float64(x))
        np.savez(tmp_path / f"{name}.npz", **arrays)
    result = subprocess.run(
        [sys.executable, "-c", LOADER, tmp_path, *EXPORTED],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 3 * len(EXPORTED)
