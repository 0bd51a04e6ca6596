"""Every block in NNX under what NNX and JAX do to modules."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export
from jax.sharding import AxisType

import flax_attn.nnx
from flax_attn import blocks
from tests.cases import normal
from tests.nnx.cases import (
    COTANGENT,
    X,
    compiled,
    drawn,
    every_class,
    gradients,
    learned_class,
    linen_gradients,
    pair,
)


def stacked(name, layers=3):
    """Layers in one module, by a vectorized constructor."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return flax_attn.nnx.create(name, 16, rngs=rngs)

    return drawn(lambda: make(nnx.Rngs(0)))


def layer(variables, i):
    """The variables of one of stacked layers."""
    return jax.tree.map(lambda a: a[i], variables)


@every_class
def test_split_and_merge(name):
    block, linen, variables = pair(name)
    graph, state = nnx.split(block)
    doubled = jax.tree.map(lambda a: 2 * a, state)
    apply = jax.jit(linen.apply)
    expected = apply(jax.tree.map(lambda a: 2 * a, variables), X)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    np.testing.assert_allclose(run(doubled, X), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        run(nnx.state(block), X), apply(variables, X), rtol=1e-6, atol=1e-6
    )
    assert graph == nnx.split(nnx.clone(block))[0]
    assert hash(graph) == hash(nnx.split(nnx.clone(block))[0])


@learned_class
def test_jit_compiles_once_and_keeps_the_state(name):
    block, linen, variables = pair(name)
    other = pair(name)[0]
    traces = []

    @nnx.jit
    def run(block, x):
        traces.append(1)
        return block(x)

    expected = jax.jit(linen.apply)(variables, X)
    for module in (block, other, block):
        np.testing.assert_allclose(run(module, X), expected, rtol=1e-6, atol=1e-6)
    assert len(traces) == 1
    chex.assert_trees_all_equal(flax_attn.nnx.to_linen(block), variables)


@functools.cache
def expected(name):
    """Output and gradients of the Linen block."""
    return linen_gradients(*pair(name)[1:])


@every_class
def test_exported_with_its_gradients_for_any_size(name):
    pytest.importorskip("flatbuffers")
    graph, state = nnx.split(pair(name)[0])
    symbolic = jax.ShapeDtypeStruct(
        export.symbolic_shape("b, h, w, 16"), dtype=jnp.float32
    )

    def run(params, x, cotangent):
        own = jax.tree.map(lambda a: a, state)
        nnx.replace_by_pure_dict(own, params)
        return gradients(nnx.merge(graph, own), x, cotangent)

    params = nnx.to_pure_dict(state)
    program = export.export(jax.jit(run), platforms=("cpu", "cuda", "tpu"))(
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params),
        symbolic,
        symbolic,
    )
    program = export.deserialize(bytearray(program.serialize()))
    got = program.call(params, X, COTANGENT)
    chex.assert_trees_all_close(got, expected(name), rtol=1e-4, atol=1e-5)


@every_class
def test_on_an_explicit_mesh(name):
    block, *_ = pair(name)
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4]
    )
    with jax.set_mesh(mesh):
        placed = jax.NamedSharding(mesh, jax.P("data"))
        x, cotangent = jax.device_put((X, COTANGENT), placed)
        state = jax.device_put(nnx.state(block), jax.NamedSharding(mesh, jax.P()))
        nnx.update(block, state)
        got = nnx.jit(gradients)(block, x, cotangent)
    assert got[2].sharding.is_equivalent_to(placed, X.ndim)
    chex.assert_trees_all_close(
        jax.device_get(got), expected(name), rtol=1e-4, atol=1e-5
    )


@every_class
def test_vmap_over_stacked_layers(name):
    module, linen = stacked(name), blocks.BLOCKS[name]()
    x = normal((3, *X.shape), 4)

    @nnx.jit
    def run(module, x):
        y = nnx.vmap(lambda block, x: block(x), in_axes=0, out_axes=0)(module, x)
        variables = flax_attn.nnx.to_linen(module)
        return y, [linen.apply(layer(variables, i), x[i]) for i in range(3)]

    y, expected = run(module, x)
    np.testing.assert_allclose(y, np.stack(expected), rtol=1e-5, atol=1e-6)


@learned_class
def test_scan_over_stacked_layers_with_remat(name):
    module, linen = stacked(name, layers=2), blocks.BLOCKS[name]()

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def scanned(block, x):
        return block(x)

    def sequence(variables, x):
        for i in range(2):
            x = linen.apply(layer(variables, i), x)
        return x

    run = nnx.value_and_grad(lambda module: (scanned(module, X) * COTANGENT).sum())
    by_hand = jax.value_and_grad(lambda v: (sequence(v, X) * COTANGENT).sum())
    value, d = nnx.jit(run)(module)
    expected, expected_d = jax.jit(by_hand)(flax_attn.nnx.to_linen(module))
    got = value, nnx.to_pure_dict(d)
    expected = expected, expected_d["params"]
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


@every_class
def test_tabulate(name):
    block, _, variables = pair(name)
    table = nnx.tabulate(block, X)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert type(block).__name__ in table and f"{count:,}" in table
    nnx.clone(block).eval()  # The methods are as they were.


@learned_class
def test_orbax(name, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    block = pair(name)[0]
    saved = nnx.to_pure_dict(nnx.state(block))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "block", saved)
        checkpointer.wait_until_finished()
        new = pair(name)[0]
        state = jax.tree.map(jnp.zeros_like, nnx.state(new))
        restored = checkpointer.restore(tmp_path / "block", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(new, state)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(new)), saved)


@learned_class
def test_partitioned_parameters_keep_their_sharding(name):
    init = nn.with_partitioning(nn.initializers.ones_init(), (None, "model"))
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("model",), axis_types=auto, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):  # Newer Flax places such a parameter when it is made.
        block = flax_attn.nnx.create(name, 16, rngs=nnx.Rngs(0), kernel_init=init)
        y = jax.device_get(compiled(block, X))
    kernels = [
        node
        for path, node in nnx.iter_graph(block)
        if isinstance(node, nnx.Param) and path[-1] == "kernel"
    ]
    metadata = [kernel.get_metadata() for kernel in kernels]
    assert kernels and all("model" in str(found) for found in metadata)
    assert np.isfinite(y).all() and y.shape == X.shape
