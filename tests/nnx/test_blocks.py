"""Every block in NNX: equal to Linen's, and at home in what NNX does to modules."""

import inspect
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

import flax_attn.nnx
from flax_attn import blocks
from tests.cases import has_parameters, normal, variables_for

# What these show does not depend on the optimizer of the compiler.
pytestmark = pytest.mark.usefixtures("quick_compilations")

every_block = pytest.mark.parametrize("name", blocks.BLOCKS)
learned = pytest.mark.parametrize("name", list(filter(has_parameters, blocks.BLOCKS)))
# What NNX does to a module depends on its layers and blocks inside, not on more.
REPRESENTATIVE = {"se", "cbam", "bam"}


def representative(names):
    return [
        pytest.param(name, marks=() if name in REPRESENTATIVE else pytest.mark.long)
        for name in names
    ]


every_class = pytest.mark.parametrize("name", representative(blocks.BLOCKS))

SHAPE = (4, 6, 5, 16)
X, COTANGENT = normal(SHAPE, 1), normal(SHAPE, 2)
MASK = np.arange(5) < np.array([5, 3, 0, 4])[:, None, None] * np.ones((6, 1))
NORM_FIELDS = ("spatial_norm", "norm", "hidden_norm")


def norm_field(name):
    block = blocks.BLOCKS[name]()
    return next((field for field in NORM_FIELDS if hasattr(block, field)), None)


# One of each class, under its first name. Without `extra_params` there is nothing that
# `ge` would normalize.
WITH_NORM = {
    type(make()): name
    for name, make in reversed(blocks.BLOCKS.items())
    if norm_field(name) and name != "ge"
}.values()
with_norm = pytest.mark.parametrize("name", representative(WITH_NORM))
# Only a norm that makes the logits starts at zero.
with_last_norm = pytest.mark.parametrize(
    "name", [name for name in WITH_NORM if norm_field(name) != "hidden_norm"]
)


def pair(name, x=X, **fields):
    """The block in NNX and in Linen, with the same random variables."""
    linen = blocks.BLOCKS[name](**fields)
    variables = variables_for(linen, x)
    block = flax_attn.nnx.create(name, x.shape[-1], rngs=nnx.Rngs(0), **fields)
    flax_attn.nnx.from_linen(block, variables)
    return block, linen, variables


def stacked(name, layers=3):
    """Layers in one module, by a vectorized constructor."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return flax_attn.nnx.create(name, 16, rngs=rngs)

    return make(nnx.Rngs(0))


def params(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def layer(module, i):
    """The variables of one of stacked layers, as Linen has them."""
    return jax.tree.map(lambda a: a[i], flax_attn.nnx.to_linen(module))


@every_block
@pytest.mark.parametrize(
    ("fields", "mask"),
    [
        ({}, None),
        ({"use_bias": True, "implementation": "plain"}, MASK),
        ({"dtype": jnp.bfloat16}, MASK),
    ],
    ids=["whole", "plain, masked", "bfloat16, masked"],
)
def test_outputs_and_gradients_are_those_of_linen(name, fields, mask):
    block, linen, variables = pair(name, **fields)

    @nnx.jit
    def native(block, x):
        def loss(block, x):
            y = block(x, mask)
            return (y * COTANGENT.astype(y.dtype)).sum(), y

        (d_block, d_x), y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(block, x)
        return y, nnx.to_pure_dict(d_block), d_x

    @jax.jit
    def expected(variables, x):
        def loss(variables, x):
            y = linen.apply(variables, x, mask)
            return (y * COTANGENT.astype(y.dtype)).sum(), y

        (d, d_x), y = jax.grad(loss, (0, 1), has_aux=True)(variables, x)
        return y, d["params"], d_x

    got = native(block, X)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected(variables, X))
    chex.assert_trees_all_close(got, expected(variables, X), rtol=1e-6, atol=1e-6)
    assert all(np.abs(d).max() > 0 for d in jax.tree.leaves(got[1]))


@every_class
@pytest.mark.parametrize("shape", [(3, 7, 16), (2, 3, 4, 5, 16)], ids=["1d", "3d"])
def test_other_numbers_of_spatial_axes(name, shape):
    x = normal(shape, 3)
    block, linen, variables = pair(name, x, spatial_dims=len(shape) - 2)
    assert (block(x) == linen.apply(variables, x)).all()


@learned
def test_starts_as_the_identity(name):
    block = flax_attn.nnx.create(name, 16, rngs=nnx.Rngs(0), identity_init=True)
    np.testing.assert_allclose(block(X), X, rtol=1e-6)
    assert not (flax_attn.nnx.create(name, 16, rngs=nnx.Rngs(0))(X) == X).all()


@every_class
def test_new_parameters(name):
    """Drawn with Linen's initializers, from a stream that calls leave alone."""
    rngs = nnx.Rngs(0)
    first, second = (flax_attn.nnx.create(name, 16, rngs=rngs) for _ in range(2))
    again = flax_attn.nnx.create(name, 16, rngs=nnx.Rngs(0))
    chex.assert_trees_all_equal(params(first), params(again))
    different = jax.tree.map(lambda a, b: (a != b).any(), params(first), params(second))
    assert all(jax.tree.leaves(different)) or "bias" in str(different)
    linen = blocks.BLOCKS[name]().init(jax.random.key(0), X)
    chex.assert_trees_all_equal_shapes_and_dtypes(flax_attn.nnx.to_linen(first), linen)
    count = int(rngs.params.count[...])
    first(X)
    assert int(rngs.params.count[...]) == count > 0
    assert not nnx.to_flat_state(nnx.state(first, nnx.RngState))


@every_class
def test_split_and_merge(name):
    block, linen, variables = pair(name)
    graph, state = nnx.split(block)
    doubled = jax.tree.map(lambda a: 2 * a, state)
    expected = linen.apply(jax.tree.map(lambda a: 2 * a, variables), X)
    assert (nnx.merge(graph, doubled)(X) == expected).all()
    assert (block(X) == linen.apply(variables, X)).all()
    assert graph == nnx.split(nnx.clone(block))[0]
    assert hash(graph) == hash(nnx.split(nnx.clone(block))[0])


@every_class
def test_jit_compiles_once_and_keeps_the_state(name):
    block, linen, variables = pair(name)
    other = flax_attn.nnx.create(name, 16, rngs=nnx.Rngs(1))
    traces = []

    @nnx.jit
    def run(block, x):
        traces.append(1)
        return block(x)

    for module in (block, other, block):
        np.testing.assert_allclose(run(module, X), module(X), rtol=1e-6, atol=1e-6)
    assert len(traces) == 1
    chex.assert_trees_all_equal(flax_attn.nnx.to_linen(block), variables)


@every_class
def test_vmap_over_stacked_layers(name):
    module = stacked(name)
    x = normal((3, *SHAPE), 4)
    y = nnx.vmap(lambda block, x: block(x), in_axes=0, out_axes=0)(module, x)
    for i in range(3):
        expected = blocks.BLOCKS[name]().apply(layer(module, i), x[i])
        np.testing.assert_allclose(y[i], expected, rtol=1e-5, atol=1e-6)


@every_class
def test_scan_over_stacked_layers_with_remat(name):
    module, linen = stacked(name), blocks.BLOCKS[name]()

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def run(block, x):
        return block(x)

    def sequence(variables, x):
        for i in range(3):
            x = linen.apply(jax.tree.map(lambda a: a[i], variables), x)  # noqa: B023
        return x

    gradients = nnx.jit(nnx.grad(lambda module, x: (run(module, x) ** 2).sum()))
    expected = jax.jit(jax.grad(lambda v, x: (sequence(v, x) ** 2).sum()))
    variables = flax_attn.nnx.to_linen(module)
    np.testing.assert_allclose(
        run(module, X), sequence(variables, X), rtol=1e-5, atol=1e-6
    )
    chex.assert_trees_all_close(
        nnx.to_pure_dict(gradients(module, X)),
        expected(variables, X)["params"],
        rtol=1e-4,
        atol=1e-5,
    )


@every_class
def test_shapes_alone(name):
    shapes = nnx.eval_shape(lambda: flax_attn.nnx.create(name, 16, rngs=nnx.Rngs(0)))
    expected = flax_attn.nnx.create(name, 16, rngs=nnx.Rngs(0))
    leaves = jax.tree.leaves(nnx.state(shapes))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert [a.shape for a in leaves] == [
        a.shape for a in jax.tree.leaves(nnx.state(expected))
    ]


@every_class
def test_tabulate(name):
    block, _, variables = pair(name)
    table = nnx.tabulate(block, X)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert type(block).__name__ in table and f"{count:,}" in table
    nnx.clone(block).eval()  # The methods are as they were.


@every_class
def test_an_optimizer_step_lowers_the_loss(name):
    # Positive, so that no ReLU of few units is dead from the start.
    positive = nnx.initializers.uniform(0.3)
    block = flax_attn.nnx.create(name, 16, rngs=nnx.Rngs(0), kernel_init=positive)
    optimizer = nnx.Optimizer(block, optax.sgd(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(block, optimizer):
        value, gradients = nnx.value_and_grad(
            lambda block: jnp.mean((block(X) - X / 4) ** 2)
        )(block)
        optimizer.update(block, gradients)
        return value

    losses = [float(step(block, optimizer)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]


@every_class
def test_orbax(name, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    block, linen, variables = pair(name)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "block", nnx.to_pure_dict(nnx.state(block)))
        checkpointer.wait_until_finished()
        new = flax_attn.nnx.create(name, 16, rngs=nnx.Rngs(7))
        state = nnx.state(new)
        restored = checkpointer.restore(tmp_path / "block", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(new, state)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(new)), restored)
    np.testing.assert_allclose(new(X), linen.apply(variables, X), rtol=1e-6, atol=1e-6)


@with_norm
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_batch_norm_follows_the_mode(name, mask):
    field = norm_field(name)
    norm = partial(nn.BatchNorm, momentum=0.9, use_running_average=False)
    train, evaluate = (
        blocks.BLOCKS[name](**{field: partial(norm, use_running_average=mode)})
        for mode in (False, True)
    )
    block = flax_attn.nnx.create(
        name, 16, rngs=nnx.Rngs(0), **{field: partial(nnx.BatchNorm, momentum=0.9)}
    )
    variables = train.init(jax.random.key(0), X)
    stats = flax_attn.nnx.to_linen(block)["batch_stats"]
    chex.assert_trees_all_equal(stats, variables["batch_stats"])
    variables["params"] = variables_for(train, X)["params"]
    flax_attn.nnx.from_linen(block, variables)

    run = nnx.jit(lambda block, x: block(x, mask))
    block.train()
    expected, updates = train.apply(variables, X, mask, mutable=["batch_stats"])
    np.testing.assert_allclose(run(block, X), expected, rtol=1e-4, atol=1e-5)
    new = flax_attn.nnx.to_linen(block)
    chex.assert_trees_all_close(
        new["batch_stats"], updates["batch_stats"], rtol=1e-6, atol=1e-6
    )
    changes = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), new["batch_stats"], variables["batch_stats"]
    )
    assert all(change > 0 for change in jax.tree.leaves(changes))

    block.eval()
    expected = evaluate.apply(variables | updates, X, mask)
    np.testing.assert_allclose(run(block, X), expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(flax_attn.nnx.to_linen(block), new)


@with_norm
def test_a_norm_of_each_sample_is_that_of_linen(name):
    field = norm_field(name)
    linen = blocks.BLOCKS[name](**{field: nn.LayerNorm})
    block = flax_attn.nnx.create(name, 16, rngs=nnx.Rngs(0), **{field: nnx.LayerNorm})
    variables = variables_for(linen, X)
    flax_attn.nnx.from_linen(block, variables)
    np.testing.assert_allclose(
        block(X, MASK), linen.apply(variables, X, MASK), rtol=1e-5, atol=1e-6
    )


@with_last_norm
def test_a_norm_that_starts_as_the_identity(name):
    make = partial(flax_attn.nnx.create, name, 16, rngs=nnx.Rngs(0), identity_init=True)
    field = norm_field(name)
    block = make(**{field: nnx.BatchNorm})
    np.testing.assert_allclose(block(X), X, rtol=1e-6)
    for norm in (partial(nnx.BatchNorm, use_scale=False), nnx.RMSNorm):
        with pytest.raises(ValueError, match="`identity_init` .* got .*nnx"):
            make(**{field: norm})


@with_norm
@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm, partial(nn.BatchNorm, momentum=0.9), nn.LayerNorm(), "batch"],
    ids=["linen", "partial", "made", "name"],
)
def test_a_norm_of_linen_is_refused(name, norm):
    field = norm_field(name)
    with pytest.raises(ValueError, match=f"`{field}` must make an NNX module"):
        flax_attn.nnx.create(name, 16, rngs=nnx.Rngs(0), **{field: norm})


@every_class
def test_partitioned_parameters_keep_their_sharding(name):
    init = nn.with_partitioning(nn.initializers.ones_init(), (None, "model"))
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("model",), axis_types=auto, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):  # Newer Flax places such a parameter when it is made.
        block = flax_attn.nnx.create(name, 16, rngs=nnx.Rngs(0), kernel_init=init)
        y = jax.device_get(block(X))
    kernels = [
        node
        for path, node in nnx.iter_graph(block)
        if isinstance(node, nnx.Param) and path[-1] == "kernel"
    ]
    metadata = [kernel.get_metadata() for kernel in kernels]
    assert kernels and all("model" in str(found) for found in metadata)
    assert np.isfinite(y).all() and y.shape == X.shape


@every_class
def test_errors_are_those_of_linen(name):
    make = partial(flax_attn.nnx.create, name, rngs=nnx.Rngs(0))
    for features in (0, 1.5, True):
        with pytest.raises(ValueError, match="`features` must be"):
            make(features)
    with pytest.raises(ValueError, match="`implementation` must be"):
        make(16, implementation="slow")
    with pytest.raises(TypeError, match="wrong"):
        make(16, wrong=1)
    block = make(16)
    with pytest.raises(ValueError, match="`x` must have 16 channels"):
        block(X[..., :8])
    with pytest.raises(ValueError, match="`x` must have at least 3 axes"):
        block(X[0, 0])
    with pytest.raises(ValueError, match="`mask` must be boolean"):
        block(X, MASK.astype(np.float32))


@every_block
def test_the_class_declares_what_linen_declares(name):
    make = flax_attn.nnx.BLOCKS[name]
    native = getattr(make, "func", make)
    linen = getattr(blocks.BLOCKS[name], "func", blocks.BLOCKS[name])
    assert getattr(flax_attn.nnx, linen.__name__) is native
    assert native is flax_attn.nnx.native(linen) and native.block is linen
    features, rngs, *fields = inspect.signature(native).parameters.values()
    assert features.name == "features" and rngs.name == "rngs"
    expected = inspect.signature(linen).parameters
    assert {f.name: f.default for f in fields} == {
        field: parameter.default
        for field, parameter in expected.items()
        if field not in ("parent", "name")
    }
    assert "Attributes:" in native.__doc__ and ">>>" not in native.__doc__


def test_what_is_no_block():
    with pytest.raises(ValueError, match="`name` must be one of se, "):
        flax_attn.nnx.create("sa", 16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`make` must be a subclass"):
        flax_attn.nnx.native(nn.Dense)


@learned
def test_variables_move_without_renaming(name):
    block, _, variables = pair(name)
    chex.assert_trees_all_equal(flax_attn.nnx.to_linen(block), variables)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables)
    flax_attn.nnx.from_linen(block, half)
    chex.assert_trees_all_equal_shapes_and_dtypes(flax_attn.nnx.to_linen(block), half)
    chex.assert_trees_all_equal(flax_attn.nnx.to_linen(block), half)
    leaves, tree = jax.tree.flatten(variables)
    wider = jax.tree.unflatten(tree, [*leaves[:-1], np.zeros((1, *leaves[-1].shape))])
    with pytest.raises(ValueError, match="`variables` must have the shapes"):
        flax_attn.nnx.from_linen(block, wider)
    with pytest.raises(ValueError, match="got one that .* at params/other"):
        other = {"params": variables["params"] | {"other": leaves[0]}}
        flax_attn.nnx.from_linen(block, other)
    with pytest.raises(ValueError, match="got none at params/"):
        flax_attn.nnx.from_linen(block, {"params": {}})
    chex.assert_trees_all_equal(flax_attn.nnx.to_linen(block), half)


class Scaled(blocks.Attention, kw_only=True):
    """A block that the library does not know, with another one inside."""

    gates = {"gate_of": "scale_gate"}
    start: float = 0.5

    @nn.compact
    def __call__(self, x, mask=None):
        return blocks.SE(name="inner")(x, mask) * self.gate_of(x)

    @nn.compact
    def gate_of(self, x):
        init = nn.initializers.constant(self.start)
        gate = self.param("scale", init, x.shape[-1:])
        self.sow("intermediates", "scale_gate", gate)
        return gate.reshape((1,) * (x.ndim - 1) + gate.shape)


def test_a_block_of_your_own():
    block = flax_attn.nnx.native(Scaled)(16, start=2.0, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(block.scale[...], np.full(16, 2.0))
    variables = flax_attn.nnx.to_linen(block)
    assert (block(X) == Scaled().apply(variables, X)).all()
    gates = flax_attn.nnx.attention_maps(block, X)
    assert sorted(gates) == ["inner/channel_gate", "scale_gate"]


def test_inside_a_linen_module():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            make = flax_attn.nnx.SE
            return nnx.bridge.to_linen(make, 16, name="attention")(x)

    variables = Model().init(jax.random.key(0), X)
    linen = {"params": variables["params"]["attention"]}
    expected = flax_attn.SE().apply(nn.meta.unbox(linen), X)
    assert (Model().apply(variables, X) == expected).all()
