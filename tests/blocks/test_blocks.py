"""What holds for every block: values, gradients, shapes, dtypes, transformations."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from tests.cases import (
    ARTICLE,
    BLOCKS,
    IMPLEMENTATIONS,
    REFERENCES,
    Case,
    forward_and_gradients,
    normal,
    variables_for,
)

blocks = pytest.mark.parametrize("block", BLOCKS)
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def as_float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


@both
@blocks
@pytest.mark.parametrize("shape, ratio", [((2, 7, 4, 18), 9), ((1, 1, 1), 16)])
def test_against_numpy_in_float64(block, shape, ratio, implementation):
    case = Case(block, (1, *shape) if len(shape) == 3 else shape, ratio, k=5)
    variables, x, cotangent = case.arrays()
    params, x64 = as_float64(variables["params"]), np.float64(x)
    module = case.module(implementation=implementation)
    y, d_variables, d_x = forward_and_gradients(module, variables, x, cotangent)
    reference = REFERENCES[block]
    np.testing.assert_allclose(y, reference(params, x64), rtol=1e-5, atol=1e-5)

    # The gradient along a random direction, by central differences in float64.
    def objective(step):
        moved = jax.tree.map(lambda a, d: a + step * d, params, directions)
        return (reference(moved, x64 + step * d) * cotangent).sum()

    directions = jax.tree.map(lambda a: np.float64(normal(a.shape, 7)), params)
    d = np.float64(normal(x.shape, 8))
    numeric = (objective(1e-5) - objective(-1e-5)) / 2e-5
    analytic = (d_x * d).sum() + sum(
        jax.tree.leaves(
            jax.tree.map(lambda g, d: (g * d).sum(), d_variables["params"], directions)
        )
    )
    np.testing.assert_allclose(analytic, numeric, rtol=1e-4, atol=1e-4)


INPUTS = {
    "odd": lambda: normal((2, 9, 7, 20), 1),
    "1x1": lambda: normal((3, 1, 1, 20), 2),
    "one channel": lambda: normal((2, 5, 4, 1), 3),
    "after a ReLU": lambda: np.maximum(normal((2, 6, 6, 16), 4), 0),
    "constant": lambda: np.full((2, 6, 6, 16), 0.7, np.float32),
    "zeros": lambda: np.zeros((2, 6, 6, 16), np.float32),
}


@blocks
@pytest.mark.parametrize("kind", INPUTS)
def test_fast_is_plain(block, kind):
    x = INPUTS[kind]()
    variables = variables_for(BLOCKS[block](), x)
    cotangent = normal(x.shape, 9)
    fast, plain = (
        forward_and_gradients(BLOCKS[block](implementation=i), variables, x, cotangent)
        for i in IMPLEMENTATIONS
    )
    chex.assert_tree_all_finite(fast)
    np.testing.assert_allclose(fast[0], plain[0], rtol=1e-6, atol=1e-6)
    for a, b in zip(jax.tree.leaves(fast[1:]), jax.tree.leaves(plain[1:]), strict=True):
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "block, field",
    [
        ("eca", "kernel_size"),
        ("channel-conv", "kernel_size"),
        ("spatial", "kernel_size"),
        ("cbam", "spatial_kernel_size"),
    ],
)
@pytest.mark.parametrize("k", [1, 3, 5, 7, 9])
def test_fast_is_plain_for_every_kernel_size(block, field, k):
    x = normal((2, 8, 11, 12), k)
    make = partial(BLOCKS[block], **{field: k})
    variables = variables_for(make(), x)
    fast, plain = (
        forward_and_gradients(make(implementation=i), variables, x, x)
        for i in IMPLEMENTATIONS
    )
    chex.assert_trees_all_close(fast, plain, rtol=1e-5, atol=1e-5)


@both
@blocks
def test_leading_axes(block, implementation):
    module = BLOCKS[block](implementation=implementation)
    x = normal((2, 3, 5, 4, 16), 0)
    variables = variables_for(module, x[0])
    y = module.apply(variables, x)
    assert y.shape == x.shape
    for i in range(2):
        np.testing.assert_allclose(module.apply(variables, x[i]), y[i], atol=1e-6)
        np.testing.assert_allclose(module.apply(variables, x[i, 0]), y[i, 0], atol=1e-6)
    mapped = jax.vmap(partial(module.apply, variables))(x)
    np.testing.assert_allclose(mapped, y, atol=1e-6)


@both
@blocks
def test_gradients_under_vmap_and_jit_and_remat(block, implementation):
    module = BLOCKS[block](implementation=implementation)
    x, cotangent = normal((3, 5, 4, 16), 0), normal((3, 5, 4, 16), 1)
    variables = variables_for(module, x)

    def grad(apply):
        return jax.grad(lambda x, cotangent: (apply(variables, x) * cotangent).sum())

    expected = grad(module.apply)(x, cotangent)  # Eager: nothing is fused.
    for other in (
        grad(module.apply),
        jax.vmap(grad(module.apply)),
        grad(jax.checkpoint(module.apply)),
    ):
        np.testing.assert_allclose(jax.jit(other)(x, cotangent), expected, atol=1e-6)


@blocks
def test_forward_mode_by_the_plain_implementation(block):
    x, direction = normal((1, 3, 3, 4), 0), normal((1, 3, 3, 4), 1)
    variables = variables_for(BLOCKS[block](), x)

    def f(x, implementation="plain"):
        return BLOCKS[block](implementation=implementation).apply(variables, x)

    @jax.jit
    def derivatives(x):
        _, tangent = jax.jvp(f, (x,), (direction,))
        hessian = jax.hessian(lambda x: (f(x) ** 2).sum())(x)
        fast = jax.jacrev(partial(f, implementation="fast"))(x)
        return tangent, jax.jacfwd(f)(x), jax.jacrev(f)(x), fast, hessian

    tangent, forward, reverse, fast, hessian = derivatives(x)
    step = 1e-2
    numeric = (f(x + step * direction) - f(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(tangent, numeric, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(forward, reverse, atol=1e-5)
    np.testing.assert_allclose(fast, reverse, atol=1e-5)
    hessian = hessian.reshape(36, 36)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-4)
    assert np.abs(hessian).max() > 0.1


@blocks
def test_the_fast_implementation_refuses_forward_mode(block):
    module = BLOCKS[block]()
    x = normal((1, 3, 3, 4), 0)
    variables = variables_for(module, x)
    with pytest.raises(TypeError, match='implementation="plain"'):
        jax.jvp(partial(module.apply, variables), (x,), (x,))


@both
@blocks
def test_result_dtype_is_linens(block, implementation):
    def dtype_of(x, params, field):
        module = BLOCKS[block](dtype=field, implementation=implementation)
        arrays = jnp.ones((1, 4, 4, 16), x)
        variables = variables_for(module, arrays)
        variables = jax.tree.map(lambda a: jnp.asarray(a, params), variables)
        apply = partial(module.apply, mutable=["intermediates"])
        y, sown = jax.eval_shape(apply, variables, arrays)
        gates = jax.tree.leaves(sown)
        assert gates and all(gate.dtype == y.dtype for gate in gates)
        return str(y.dtype)

    assert dtype_of("float32", "float32", None) == "float32"
    assert dtype_of("bfloat16", "float32", None) == "float32"
    assert dtype_of("bfloat16", "bfloat16", None) == "bfloat16"
    assert dtype_of("float32", "float32", jnp.bfloat16) == "bfloat16"
    assert dtype_of("float16", "float32", jnp.float16) == "float16"
    assert dtype_of("float16", "float16", jnp.float32) == "float32"


@both
@blocks
@pytest.mark.parametrize("dtype, atol", [("bfloat16", 0.1), ("float16", 0.0125)])
def test_half_precision_is_near_float32(block, dtype, atol, implementation):
    case = Case(block, (2, 12, 11, 32), k=7)
    variables, x, cotangent = case.arrays()
    # Of one sign, or the sums over a map would cancel down to the rounding.
    cotangent = np.abs(cotangent)
    exact = forward_and_gradients(case.module(), variables, x, cotangent)
    module = case.module(dtype=jnp.dtype(dtype), implementation=implementation)
    half = forward_and_gradients(
        module, variables, jnp.asarray(x, dtype), jnp.asarray(cotangent, dtype)
    )
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(exact), strict=True):
        scale = max(np.abs(b).max(), 1)
        error = np.abs(np.asarray(a, np.float32) - b).mean() / scale
        assert error < (2 * atol if block == "bam" else atol)  # Seven layers, not one.


@both
@blocks
def test_large_half_precision_maps_do_not_overflow(block, implementation):
    module = BLOCKS[block](dtype=jnp.float16, implementation=implementation)
    x = jnp.full((1, 32, 32, 64), 300, jnp.float16)
    y = module.apply(variables_for(module, x), x)
    assert jnp.isfinite(y).all()


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@both
def test_float64(implementation, x64):
    module = flax_attn.CBAM(param_dtype=jnp.float64, implementation=implementation)
    x = np.float64(normal((1, 6, 5, 16), 0))
    variables = as_float64(variables_for(module, x))
    y = module.apply(variables, x)
    assert y.dtype == jnp.float64
    expected = REFERENCES["cbam"](variables["params"], x)
    np.testing.assert_allclose(y, expected, rtol=1e-12)


@pytest.mark.parametrize("block", ARTICLE)
def test_sown_gates_multiply_back_to_the_output(block):
    module = BLOCKS[block]()
    x = normal((2, 5, 4, 16), 0)
    variables = variables_for(module, x)
    y, state = module.apply(variables, x, mutable=["intermediates"])
    gates = jax.tree.leaves(state["intermediates"])
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(state["intermediates"])
    }
    expected = {
        "spatial": {"spatial_gate/0"},
        "cbam": {"channel/channel_gate/0", "spatial/spatial_gate/0"},
        "cbam-conv": {"channel/channel_gate/0", "spatial/spatial_gate/0"},
    }
    assert paths == expected.get(block, {"channel_gate/0"})
    product = x
    for gate in gates:
        product = product * gate
    np.testing.assert_array_equal(product, y)
    # Nothing is collected unless it is asked for, by init neither.
    assert set(module.init(jax.random.key(0), x)) == {"params"}


@blocks
def test_a_gate_that_nobody_reads_costs_nothing(block, monkeypatch):
    module = BLOCKS[block]()
    x = normal((2, 5, 4, 16), 0)
    variables = variables_for(module, x)

    def optimised():
        # A new function, so that nothing comes from a cache.
        compiled = (
            jax.jit(lambda v, x: module.apply(v, x)).lower(variables, x).compile()
        )
        text = compiled.as_text()
        return [
            line.split(", metadata=")[0]
            for line in text[text.index("ENTRY") :].splitlines()
        ]

    with_sow = optimised()
    monkeypatch.setattr(nn.Module, "sow", lambda *args, **kwargs: False)
    assert optimised() == with_sow


@blocks
def test_sharded_over_eight_devices(block):
    module = BLOCKS[block]()
    x, cotangent = normal((16, 6, 5, 16), 0), normal((16, 6, 5, 16), 1)
    variables = variables_for(module, x)
    expected = forward_and_gradients(module, variables, x, cotangent)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    replicated = jax.NamedSharding(mesh, jax.P())
    y, d_variables, d_x = forward_and_gradients(
        module,
        jax.device_put(variables, replicated),
        *jax.device_put((x, cotangent), sharding),
    )
    assert y.sharding.is_equivalent_to(sharding, y.ndim)
    chex.assert_trees_all_close((y, d_variables, d_x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", ["se-max", "spatial", "cbam"])
def test_masks_hold_inside_a_larger_program(block):
    """Whatever XLA fuses before the block, no maximum may lose its gradient."""
    u = normal((8, 14, 15, 33), 0)
    factor, shift = normal((1, 1, 1, 33), 1), normal((1, 1, 1, 33), 2)
    variables = variables_for(BLOCKS[block](), u)
    before = {
        "affine": lambda u: u * factor + shift,
        "normalised": lambda u: (u - u.mean()) * jax.lax.rsqrt(u.var() + 1e-5) * factor,
        "gelu": lambda u: nn.gelu(u * factor + shift),
    }

    def gradient(implementation, kind, dtype):
        module = BLOCKS[block](dtype=dtype, implementation=implementation)

        def loss(u):
            y = module.apply(variables, before[kind](u).astype(dtype))
            return (nn.tanh(y.astype(jnp.float32)) * u).sum()

        return jax.jit(jax.grad(loss))(u)

    for kind in before:
        for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.1)):
            fast = gradient("fast", kind, dtype)
            plain = gradient("plain", kind, dtype)
            chex.assert_tree_all_finite(fast)
            size = np.abs(plain).max()
            np.testing.assert_allclose(
                fast / size, plain / size, rtol=0, atol=tolerance, err_msg=kind
            )


ATTENTION = ("se", "eca", "channel", "spatial", "cbam")


@pytest.mark.parametrize(
    "x, message",
    [
        (np.ones((4, 16), np.float32), r"at least 3 axes .* got shape \(4, 16\)"),
        (np.ones((0, 4, 4, 16), np.float32), r"no empty axis, got shape \(0, 4, 4, 16"),
        (np.ones((4, 0, 16), np.float32), "no empty axis"),
        (np.ones((4, 4, 16), np.int32), "floating-point array, got dtype int32"),
        (np.ones((4, 4, 16), bool), "floating-point array, got dtype bool"),
        (np.ones((4, 4, 16), np.complex64), "floating-point array, got dtype complex"),
    ],
)
@pytest.mark.parametrize("block", ATTENTION)
def test_bad_inputs(block, x, message):
    with pytest.raises(ValueError, match="`x` must .*" + message):
        BLOCKS[block]().init(jax.random.key(0), x)


@pytest.mark.parametrize(
    "module, message",
    [
        (
            flax_attn.SE(reduction=0),
            "`reduction` must be an integer of at least 1, got 0",
        ),
        (flax_attn.SE(reduction=-4), "`reduction` .* got -4"),
        (flax_attn.CBAM(reduction=2.5), "`reduction` .* got 2.5"),
        (flax_attn.SE(hidden_features=0), "`hidden_features` .* got 0"),
        (flax_attn.SE(pool="mean"), '`pool` must be "avg" or "max", got \'mean\''),
        (flax_attn.ECA(pool=None), "`pool` must be .* got None"),
        (flax_attn.ECA(kernel_size=4), "`kernel_size` must be an odd .* got 4.* as 5"),
        (flax_attn.ECA(kernel_size=-3), "`kernel_size` must be an odd .* got -3"),
        (flax_attn.ECA(padding="same"), "`padding` must be .* got 'same'"),
        (flax_attn.ECA(gamma=0), "`gamma` must not be 0"),
        (flax_attn.ChannelAttention(excite="fc"), "`excite` must be .* got 'fc'"),
        (flax_attn.CBAM(excite="FC"), "`excite` must be .* got 'FC'"),
        (flax_attn.SpatialAttention(kernel_size=2), "`kernel_size` must be an odd"),
        (flax_attn.CBAM(spatial_kernel_size=0), "`spatial_kernel_size` must be an odd"),
        (flax_attn.CBAM(implementation="slow"), "`implementation` must be .* 'slow'"),
    ],
)
def test_bad_fields(module, message):
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), jnp.ones((1, 4, 4, 16)))


@pytest.mark.parametrize("block", BLOCKS)
def test_fewer_channels_than_the_reduction(block):
    variables = BLOCKS[block]().init(jax.random.key(0), jnp.ones((1, 2, 2, 3)))
    chex.assert_tree_all_finite(variables)
    hidden = {
        leaf.shape[-1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
        if "reduce" in jax.tree_util.keystr(path)
    }
    assert hidden <= {1}


def test_hidden_width_is_not_rounded():
    x = jnp.ones((1, 2, 2, 54))
    for fields, width in (({"reduction": 9}, 6), ({"reduction": 16}, 3)):
        params = flax_attn.SE(**fields).init(jax.random.key(0), x)["params"]
        assert params["reduce"]["kernel"].shape == (54, width)
    params = flax_attn.CBAM(hidden_features=5).init(jax.random.key(0), x)["params"]
    assert params["channel"]["reduce"]["kernel"].shape == (54, 5)


@pytest.mark.parametrize("use_bias", [False, True])
def test_parameter_trees(use_bias):
    def tree(module, features=64):
        x = jnp.ones((1, 4, 4, features))
        return jax.tree.map(jnp.shape, module.init(jax.random.key(0), x)["params"])

    def with_bias(**kernels):
        return {
            name: {"kernel": k} | ({"bias": k[-1:]} if use_bias else {})
            for name, k in kernels.items()
        }

    mlp = with_bias(reduce=(64, 4), expand=(4, 64))
    b = {"use_bias": use_bias}
    assert tree(flax_attn.SE(**b)) == mlp
    assert tree(flax_attn.ChannelAttention(**b)) == mlp
    assert tree(flax_attn.ECA(**b), 128) == with_bias(conv=(5, 1, 1))
    spatial = with_bias(conv=(7, 7, 2, 1))
    assert tree(flax_attn.SpatialAttention(**b)) == spatial
    assert tree(flax_attn.CBAM(**b)) == {"channel": mlp, "spatial": spatial}
    conv = {"channel": with_bias(conv=(3, 1, 1)), "spatial": spatial}
    assert tree(flax_attn.CBAM(excite="conv", **b)) == conv


def test_official_cbam_has_a_norm_and_no_bias_before_it():
    module = flax_attn.CBAM(
        use_bias=True,
        spatial_norm=partial(nn.BatchNorm, use_running_average=False, momentum=0.99),
    )
    x = normal((4, 6, 6, 16), 0)
    variables = module.init(jax.random.key(0), x)
    spatial = jax.tree.map(jnp.shape, variables["params"]["spatial"])
    assert spatial == {
        "conv": {"kernel": (7, 7, 2, 1)},
        "norm": {"bias": (1,), "scale": (1,)},
    }
    y, updates = module.apply(variables, x, mutable=["batch_stats"])
    assert y.shape == x.shape
    assert updates["batch_stats"]["spatial"]["norm"]["mean"].shape == (1,)


def test_fields_reach_the_computation():
    """No option is ignored: each changes the output, the tree or the error above."""
    x = normal((2, 6, 5, 16), 0)

    def output(make, **fields):
        module = make(**fields)
        return module.apply(variables_for(module, x), x)

    base = {
        make: output(make) for make in (flax_attn.SE, flax_attn.ECA, flax_attn.CBAM)
    }
    for make, fields in [
        (flax_attn.SE, {"pool": "max"}),
        (flax_attn.SE, {"act": nn.gelu}),
        (flax_attn.SE, {"gate": nn.hard_sigmoid}),
        (flax_attn.ECA, {"pool": "max"}),
        (flax_attn.ECA, {"padding": "circular"}),
        (flax_attn.ECA, {"gate": nn.tanh}),
        (flax_attn.CBAM, {"act": nn.gelu}),
        (flax_attn.CBAM, {"gate": nn.hard_sigmoid}),
    ]:
        assert np.abs(output(make, **fields) - base[make]).max() > 1e-3, fields
    circular = output(flax_attn.ChannelAttention, excite="conv", padding="circular")
    assert (
        np.abs(circular - output(flax_attn.ChannelAttention, excite="conv")).max() > 0
    )
    widths = jax.tree.map(
        jnp.shape, flax_attn.ECA(gamma=1, b=3).init(jax.random.key(0), x)["params"]
    )
    assert widths == {"conv": {"kernel": (7, 1, 1)}}
    ones = flax_attn.SE(
        use_bias=True,
        kernel_init=nn.initializers.ones,
        bias_init=nn.initializers.constant(2.0),
        param_dtype=jnp.bfloat16,
    ).init(jax.random.key(0), x)["params"]["reduce"]
    assert ones["kernel"].dtype == jnp.bfloat16
    assert (ones["kernel"] == 1).all() and (ones["bias"] == 2).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block", BLOCKS)
def test_identity_at_the_start(block, implementation):
    x = normal((2, 5, 4, 32), 1)
    module = BLOCKS[block](
        identity_init=True,
        implementation=implementation,
        bias_init=nn.initializers.ones_init(),
        use_bias=True,
    )
    variables = module.init(jax.random.key(0), x)

    @jax.jit
    def run(variables):
        return module.apply(variables, x)

    np.testing.assert_array_equal(run(variables), x)
    gradients = jax.grad(lambda v: jnp.sum(run(v) ** 2))(variables)
    last = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(gradients)
        if path[-2].key in ("expand", "conv") and path[-1].key == "kernel"
    ]
    assert last and all(jnp.abs(leaf).max() > 0 for leaf in last)


@pytest.mark.parametrize("block", [flax_attn.CBAM, flax_attn.BAM])
def test_identity_with_a_norm_can_learn(block):
    """Zeros before a norm would learn nothing, or all at once."""
    norm = partial(nn.BatchNorm, use_running_average=False)
    field = "spatial_norm" if block is flax_attn.CBAM else "norm"
    module = block(identity_init=True, **{field: norm})
    x = normal((2, 5, 4, 32), 1)
    variables = module.init(jax.random.key(0), x)

    @jax.jit
    def run(params):
        state = variables | {"params": params}
        y, _ = module.apply(state, x, mutable=["batch_stats"])
        return y

    np.testing.assert_array_equal(run(variables["params"]), x)
    gradients = jax.grad(lambda p: jnp.sum(run(p) ** 2))(variables["params"])
    scales = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(gradients)
        if path[-1].key == "scale"
    ]
    assert scales and all(jnp.abs(leaf).max() > 1e-3 for leaf in scales)
    stepped = jax.tree.map(lambda p, g: p - 1e-6 * g, variables["params"], gradients)
    assert 0 < jnp.abs(run(stepped) - x).max() < 0.01


@pytest.mark.parametrize("norm", [nn.RMSNorm, partial(nn.LayerNorm, use_scale=False)])
def test_identity_needs_a_norm_with_a_scale(norm):
    module = flax_attn.SpatialAttention(identity_init=True, norm=norm)
    with pytest.raises(ValueError, match="`norm` must have .* pass a norm such as"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.ones((2, 2, 4)))


def test_identity_needs_a_gate_of_a_half():
    module = flax_attn.ECA(identity_init=True, gate=nn.relu)
    with pytest.raises(ValueError, match="`gate` must be 0.5 at 0, got 0.0"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.ones((2, 2, 4)))


@pytest.mark.parametrize(
    "module, shapes",
    [
        (
            flax_attn.SE(hidden_features=lambda c: c // 5),
            {"reduce": {"kernel": (20, 4)}, "expand": {"kernel": (4, 20)}},
        ),
        (flax_attn.ECA(kernel_size=lambda c: c - 9), {"conv": {"kernel": (11, 1, 1)}}),
    ],
    ids=["hidden", "kernel"],
)
def test_widths_may_be_functions_of_the_channels(module, shapes):
    x = jnp.ones((3, 3, 20))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables["params"]) == shapes


@pytest.mark.parametrize("width", [2.0, None, 0])
def test_bad_widths_from_functions(width):
    module = flax_attn.CBAM(hidden_features=lambda c: width)
    with pytest.raises(ValueError, match="`hidden_features`"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.ones((2, 2, 4)))
