"""Every block under what JAX users do to programs: meshes, export, dtypes, boxes."""

from functools import cache, partial
from itertools import product

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export
from jax.sharding import AxisType

import flax_attn
from flax_attn.blocks import BLOCKS
from tests.cases import (
    OTHER_FORMS,
    blocks,
    forms,
    forward_and_gradients,
    has_parameters,
    long_unless,
    normal,
    variables_for,
)

learned = pytest.mark.parametrize("block", list(filter(has_parameters, BLOCKS)))
# More columns than a tile of the convolution's windows has.
SHAPE = (4, 6, 20, 16)


def arrays(block, **fields):
    module = BLOCKS[block](**fields)
    x, cotangent = normal(SHAPE, 1), normal(SHAPE, 2)
    return module, variables_for(module, x), x, cotangent


@cache
def expected(block):
    """Output and gradients on one device, by the plain implementation."""
    return jax.device_get(forward_and_gradients(*arrays(block, implementation="plain")))


# Axes of one device too. The plain form is XLA's to partition; one mesh shows that it
# is allowed to.
MESHES = {
    "space": ((2, 4), ("data", "space"), jax.P("data", None, "space")),
    "channels": ((1, 4), ("data", "model"), jax.P("data", None, None, "model")),
    "batch": ((4, 1), ("data", "model"), jax.P("data")),
}
# Flax's own convolution, which BAM has inside, refuses the other meshes.
POSSIBLE = {"bam": ["batch"]}
CASES = [
    pytest.param(
        block,
        mesh,
        implementation,
        id=f"{block}-{mesh}-{implementation}",
        marks=long_unless(block not in OTHER_FORMS),
    )
    for block in BLOCKS
    for possible in [POSSIBLE.get(block, ["space", "channels"])]
    for mesh, implementation in [*product(possible, ["fast"]), (possible[0], "plain")]
]


@pytest.mark.parametrize("block, mesh, implementation", CASES)
def test_explicit_meshes(block, mesh, implementation):
    module, variables, x, cotangent = arrays(block, implementation=implementation)
    got = on_explicit_mesh(mesh, module, variables, x, cotangent)
    chex.assert_trees_all_close(got, expected(block), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(
    "module",
    [
        flax_attn.GatherExcite(extent=3),
        flax_attn.presets.timm_coordinate(train=False)(),
    ],
    ids=["local", "joint norm"],
)
def test_options_on_explicit_meshes(module, masked, mesh):
    x, cotangent = normal(SHAPE, 1), normal(SHAPE, 2)
    masks = (np.indices(SHAPE[:-1]).sum(0) % 7 > 2,) if masked else ()
    variables = variables_for(module, x)
    got = on_explicit_mesh(mesh, module, variables, x, cotangent, *masks)
    whole = forward_and_gradients(module, variables, x, cotangent, *masks)
    chex.assert_trees_all_close(got, jax.device_get(whole), rtol=1e-4, atol=1e-5)


def on_explicit_mesh(mesh, module, variables, *arrays):
    shape, names, spec = MESHES[mesh]
    mesh = jax.make_mesh(
        shape,
        names,
        axis_types=(AxisType.Explicit,) * len(names),
        devices=jax.devices()[: int(np.prod(shape))],
    )
    with jax.set_mesh(mesh):
        on_mesh = [
            jax.device_put(a, jax.NamedSharding(mesh, jax.P(*spec[: a.ndim])))
            for a in arrays
        ]
        replicated = jax.device_put(variables, jax.NamedSharding(mesh, jax.P()))
        result = forward_and_gradients(module, replicated, *on_mesh)
    *_, d_x = result
    assert d_x.sharding.is_equivalent_to(on_mesh[0].sharding, d_x.ndim)
    return jax.device_get(result)


@forms
def test_shard_map_with_replicated_parameters(block):
    module, variables, x, cotangent = arrays(block)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def local(variables, x, cotangent):
        def loss(variables, x):
            return (module.apply(variables, x) * cotangent).sum()

        return jax.grad(loss, (0, 1))(variables, x)

    shared, data = jax.P(), jax.P("data")
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(shared, data, data), out_specs=(shared, data)
    )
    got = jax.jit(run)(variables, x, cotangent)
    chex.assert_trees_all_close(got, expected(block)[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", ["se", "cbam"])
def test_the_identity_in_a_shard_map_without_jit(block):
    module = BLOCKS[block](identity_init=True)
    x = normal((4, 5, 4, 16), 0)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (jax.P(), jax.P("data")), "out_specs": jax.P("data")}
    y = jax.shard_map(module.apply, mesh=mesh, **specs)(variables, x)
    np.testing.assert_array_equal(y, x)


@forms
def test_exported_gradients_of_any_size(block):
    pytest.importorskip("flatbuffers")
    module, variables, x, cotangent = arrays(block)
    any_size = jax.ShapeDtypeStruct(export.symbolic_shape("b, h, w, 16"), jnp.float32)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), variables)
    program = export.export(jax.jit(lambda v, x: module.apply(v, x)))(shapes, any_size)
    program = export.deserialize(program.serialize(vjp_order=1))
    got = jax.jit(lambda v, x, ct: jax.vjp(program.call, v, x)[1](ct))(
        variables, x, cotangent
    )
    chex.assert_trees_all_close(got, expected(block)[1:], rtol=1e-4, atol=1e-5)


@blocks
def test_masks_of_any_size(block):
    module, variables, *_ = arrays(block)
    b, h, w = export.symbolic_shape("b, h, w")
    x = jax.ShapeDtypeStruct((b, h, w, 16), jnp.float32)
    mask = jax.ShapeDtypeStruct((b, h, w), jnp.bool_)

    def run(variables, x, mask):
        y, pullback = jax.vjp(lambda v, x: module.apply(v, x, mask), variables, x)
        return y, pullback(y)[1]

    y, d_x = jax.eval_shape(run, variables, x, mask)
    assert y.shape == d_x.shape == x.shape


@blocks
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("implementation", ["fast", "plain"])
def test_strict_dtype_promotion(block, dtype, implementation):
    module, variables, x, cotangent = arrays(
        block, dtype=jnp.dtype(dtype), implementation=implementation
    )
    half = jax.ShapeDtypeStruct(SHAPE, jnp.dtype(dtype))
    half_variables = jax.tree.map(lambda v: v.astype(dtype), variables)
    mask = jax.ShapeDtypeStruct(SHAPE[:-1], jnp.bool_)

    def run(module, variables, x, mask=None):
        y, pullback = jax.vjp(lambda v, x: module.apply(v, x, mask), variables, x)
        return pullback(y)

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(partial(run, module), variables, half, mask)
        jax.eval_shape(partial(run, module), variables, half)
        for dtype in (None, module.dtype):
            in_half = partial(run, module.clone(dtype=dtype))
            jax.eval_shape(in_half, half_variables, half, mask)


@learned
def test_the_first_start_keeps_the_boxes_of_partitioned_parameters(block):
    init = nn.with_partitioning(nn.initializers.ones_init(), (None, "model"))
    module = BLOCKS[block](identity_init=True, kernel_init=init)
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.ones(SHAPE))
    kernels = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            variables["params"], is_leaf=lambda v: isinstance(v, nn.Partitioned)
        )
        if "kernel" in jax.tree_util.keystr(path)
    ]
    assert kernels and all(isinstance(k, nn.Partitioned) for k in kernels)


@forms
def test_second_derivatives(block):
    """Of a gradient by the gradient: each rule is differentiable in reverse mode."""
    module, variables, x, _ = arrays(block)
    plain = BLOCKS[block](implementation="plain")

    def curvature(module, x):
        def slope(x):
            return jax.grad(lambda x: (module.apply(variables, x) ** 3).sum())(x)

        return jax.grad(lambda x: (slope(x) * jnp.cos(x)).sum())(x)

    fast, exact = (jax.jit(partial(curvature, m))(x) for m in (module, plain))
    np.testing.assert_allclose(fast, exact, rtol=1e-3, atol=1e-3)
