import re
from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import flax_attn
from tests.cases import normal, variables_for
from tests.insertion.user_models import (
    Careful,
    DoubleConv,
    Encoder,
    InvertedResidual,
    MobileNet,
    ResNet,
    Staged,
    UNet,
)

X = normal((2, 8, 8, 3), 0)
# Its generator compiles faster than the default.
KEY = jax.random.key(0, impl="rbg")
# Programs this small take longer to compile than to run. Nothing is fused, either, so
# that equal arithmetic gives equal bits.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
CBAM = partial(flax_attn.CBAM, reduction=4, spatial_kernel_size=3)
SE = partial(flax_attn.SE, reduction=2)
MODELS = {
    "resnet": (
        ResNet(stage_sizes=(1,)),
        CBAM,
        "ResNetBlock_*/BatchNorm_1",
        {"train": False},
    ),
    "mobilenet": (MobileNet(), SE(), "blocks_*/project", {}),
    "unet": (UNet(widths=(4,)), flax_attn.ECA(), DoubleConv, {}),
}


def without_attention(tree):
    if not isinstance(tree, dict):
        return tree
    return {k: without_attention(v) for k, v in tree.items() if k != "attention"}


def shapes(model, *args, **kwargs):
    variables = jax.eval_shape(partial(model.init, **kwargs), KEY, *args)
    return jax.tree.map(lambda leaf: leaf.shape, variables)


class Chain(nn.Module):
    """Two layers, whose class is to be lifted."""

    layer: type = nn.Conv

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.layer(4, (3, 3), name="first")(x))
        return self.layer(3, (1, 1), name="second")(x)


def by_hand(params, x, attend=("first", "second")):
    """Chain with SE after the layers named, from the modules one by one."""
    for name, layer in (
        ("first", nn.Conv(4, (3, 3))),
        ("second", nn.Conv(3, (1, 1))),
    ):
        own = {k: v for k, v in params[name].items() if k != "attention"}
        x = layer.apply({"params": own}, x)
        if name in attend:
            x = SE().apply({"params": params[name]["attention"]}, x)
        if name == "first":
            x = nn.relu(x)
    return x


def assert_same_function(f, g, params, x):
    cotangent = normal(x.shape, 7)

    def both(function, params, x):
        y, pullback = jax.vjp(function, params, x)
        return y, *pullback(cotangent)

    a, b = (quick(partial(both, function))(params, x) for function in (f, g))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), a, b)


LIFTS = {
    "plain": lambda cls: cls,
    "remat": nn.remat,
    "jit": nn.jit,
}


@pytest.mark.parametrize("lift", LIFTS)
@pytest.mark.parametrize("inside", [True, False])
def test_after_each_layer_as_written_by_hand(lift, inside):
    lifted = LIFTS[lift]
    model = Chain(lifted(nn.Conv)) if inside else lifted(Chain)()
    model = flax_attn.insert(model, SE(), nn.Conv)
    variables = variables_for(model, X)
    assert shapes(model, X)["params"]["first"]["attention"] == {
        "reduce": {"kernel": (4, 2)},
        "expand": {"kernel": (2, 4)},
    }
    assert_same_function(
        lambda p, x: model.apply({"params": p}, x), by_hand, variables["params"], X
    )


def test_under_scan():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return Chain(name="chain")(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return scan(name="body")(x, None)[0]

    model = flax_attn.insert(Scanned(), SE(), "*/second")
    variables = variables_for(model, X)
    stacked = variables["params"]["body"]["chain"]
    assert stacked["second"]["attention"]["reduce"]["kernel"].shape == (3, 3, 1)
    (site,) = flax_attn.sites(model, X)
    assert site == ("body/chain/second", "Conv", X.shape, 3 * (3 + 3))

    def loop(params, x):
        for i in range(3):
            step = jax.tree.map(lambda p: p[i], params)  # noqa: B023
            x = by_hand(step, x, attend=["second"])
        return x

    def scanned(params, x):
        return model.apply({"params": {"body": {"chain": params}}}, x)

    assert_same_function(scanned, loop, stacked, X)
    # Each step starts with weights of its own.
    fresh = quick(model.init)(KEY, X)["params"]["body"]["chain"]
    first, *others = fresh["second"]["attention"]["reduce"]["kernel"]
    assert all(np.abs(first - other).max() > 1e-3 for other in others)
    paths = ("body/chain/second/attention",)
    assert flax_attn.assert_active(model, variables, X) == paths


def test_under_vmap():
    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x):
            members = nn.vmap(
                Chain,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=2,
            )
            return members(name="members")(x)

    model = flax_attn.insert(Ensemble(), SE(), nn.Conv)
    variables = variables_for(model, X)
    y = quick(model.apply)(variables, X)
    for i in range(2):
        member = jax.tree.map(lambda p: p[i], variables["params"]["members"])  # noqa: B023
        np.testing.assert_allclose(y[i], by_hand(member, X), atol=1e-5)

    # jax.vmap of apply, by example and by weights.
    model = flax_attn.insert(Chain(), SE(), nn.Conv)
    member = variables["params"]["members"]
    z = quick(jax.vmap(lambda p: model.apply({"params": p}, X)))(member)
    np.testing.assert_allclose(z, y, atol=1e-5)
    one = {"params": jax.tree.map(lambda p: p[0], member)}
    z = quick(jax.vmap(partial(model.apply, one)))(X)
    np.testing.assert_allclose(z, y[0], atol=1e-5)


TABLES = {
    # CBAM: 2 * C * C / 4, and 3 * 3 * 2.
    "resnet": """
path                       type       output        parameters
ResNetBlock_0/BatchNorm_1  BatchNorm  (2, 8, 8, 8)          50
total                                                       50
""",
    # SE: 2 * C * C / 2.
    "mobilenet": """
path              type  output        parameters
blocks_0/project  Conv  (2, 4, 4, 4)          16
blocks_1/project  Conv  (2, 2, 2, 8)          64
total                                         80
""",
    # ECA: the kernel of the article's rule.
    "unet": """
path     type        output        parameters
down_4   DoubleConv  (2, 8, 8, 4)           1
bottom   DoubleConv  (2, 4, 4, 8)           3
merge_4  DoubleConv  (2, 8, 8, 4)           1
total                                       5
""",
}


@pytest.mark.parametrize("name", MODELS)
def test_the_table(name):
    model, attention, where, kwargs = MODELS[name]
    inserted = flax_attn.insert(model, attention, where)
    table = flax_attn.sites(inserted, jax.ShapeDtypeStruct(X.shape, "float32"))
    assert str(table) == TABLES[name].strip("\n")

    def count(module):
        params = jax.eval_shape(partial(module.init, **kwargs), KEY, X)
        return sum(leaf.size for leaf in jax.tree.leaves(params["params"]))

    assert count(inserted) - count(model) == table.parameters


@pytest.mark.parametrize("name", MODELS)
def test_as_it_was_at_the_start_bit_for_bit(name):
    model, attention, where, kwargs = MODELS[name]
    inserted = flax_attn.insert(model, attention, where, init="identity")
    init = partial(inserted.init, **kwargs)
    fresh = quick(init)(KEY, X)
    # Variables that no initialiser of the new model has made.
    pretrained = jax.tree.map(lambda v: v + np.float32(0.01), without_attention(fresh))
    variables, new = flax_attn.merge(pretrained, fresh)
    assert new and all("/attention/" in path for path in new)
    jax.tree.map(
        np.testing.assert_array_equal, without_attention(variables), pretrained
    )

    y = quick(partial(model.apply, **kwargs))(pretrained, X)
    now = quick(partial(inserted.apply, **kwargs))(variables, X)
    np.testing.assert_array_equal(now, y)
    cotangent = normal(y.shape, 3)

    # Which quick would get wrong for maxima.
    @(jax.jit if name == "resnet" else quick)
    def gradients_of(params):
        def loss(params):
            y = inserted.apply(variables | {"params": params}, X, **kwargs)
            return jnp.sum(y * cotangent)

        return jax.grad(loss)(params)

    gradients = gradients_of(variables["params"])
    last = [
        g
        for path, g in jax.tree_util.tree_leaves_with_path(gradients)
        if "attention" in str(path) and re.search("expand|conv", str(path[-2:]))
    ]
    assert last and all(np.abs(g).max() > 0 for g in last)
    # And the gates move the output as soon as they move.
    gates = flax_attn.assert_active(inserted, variables, X, **kwargs)
    assert len(gates) == len(last)


def test_as_it_was_without_jit():
    model = flax_attn.insert(Chain(), SE, nn.Conv, init="identity")
    variables = quick(model.init)(KEY, X)
    y = Chain().apply(without_attention(variables), X)
    np.testing.assert_array_equal(model.apply(variables, X), y)


def test_the_model_without_attention_initialises_alike():
    model = InvertedResidual(4)
    inserted = flax_attn.insert(model, SE(), nn.Conv)
    a, b = (quick(m.init)(KEY, X) for m in (model, inserted))
    jax.tree.map(np.testing.assert_array_equal, a, without_attention(b))


def test_in_half_precision_the_sites_keep_their_dtype():
    model = ResNet(stage_sizes=(1,), dtype=jnp.bfloat16)
    inserted = flax_attn.insert(model, SE, nn.BatchNorm, init="identity")
    fresh = quick(partial(inserted.init, train=False))(KEY, X)
    y = quick(partial(inserted.apply, train=False))(fresh, X)
    plain = without_attention(fresh)
    expected = quick(partial(model.apply, train=False))(plain, X)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(y), np.float32(expected))


def test_batch_statistics_and_methods_and_rngs_pass_through():
    inserted = flax_attn.insert(ResNet(stage_sizes=(1,)), SE, nn.BatchNorm)
    state = shapes(inserted, X)["batch_stats"]
    assert state["bn_init"] == {"mean": (8,), "var": (8,)}
    run = partial(inserted.apply, train=True, mutable=["batch_stats"])
    variables = jax.eval_shape(inserted.init, KEY, X)
    _, new = jax.eval_shape(run, variables, X)
    assert jax.tree.map(np.shape, new["batch_stats"]) == state

    inserted = flax_attn.insert(MobileNet(), SE(), InvertedResidual)
    variables = variables_for(inserted, X)

    @quick
    def run(variables, x):
        y = inserted.apply(variables, x)
        encoded = inserted.apply(variables, x, method="encode")
        # A part without sites of a model that has some.
        parts = inserted.apply(variables, encoded, method="classify")
        bound = inserted.bind(variables)
        also = inserted.apply(
            variables, x, method=lambda m, x: m.classify(bound.encode(x))
        )
        drop = partial(inserted.apply, variables, x, deterministic=False)
        dropped = [drop(rngs={"dropout": jax.random.key(i)}) for i in (0, 0, 1)]
        return y, parts, also, dropped

    y, parts, also, (a, b, c) = run(variables, X)
    np.testing.assert_allclose(parts, y, atol=1e-6)
    np.testing.assert_allclose(also, y, atol=1e-6)
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0 and np.abs(a - y).max() > 0
    with pytest.raises(AttributeError, match="no attribute"):
        inserted.decode  # noqa: B018
    with pytest.raises(ValueError, match="`model` must be bound"):
        inserted(X)


DOWN = ["down_4/Conv_0", "down_4/Conv_1", "down_8/Conv_0", "down_8/Conv_1"]
UP = ["up_8", "up_4"]


@pytest.mark.parametrize(
    "where, expected",
    [
        (nn.ConvTranspose, UP),
        ((nn.ConvTranspose, nn.LayerNorm), None),
        ("down_*/Conv_?", DOWN),
        ("down_4/Conv_0", DOWN[:1]),
        (re.compile("(up|down)_[0-9]"), ["down_4", "down_8", "up_8", "up_4"]),
        (lambda module, path: getattr(module, "features", 0) == 16, None),
        (lambda module, path: path in UP, UP),
    ],
)
def test_where(where, expected):
    model = flax_attn.insert(UNet(), flax_attn.ECA, where)
    paths = [site.path for site in flax_attn.sites(model, X)]
    if where == (nn.ConvTranspose, nn.LayerNorm):
        blocks = ("down_4", "down_8", "bottom", "merge_8", "merge_4")
        norms = {f"{block}/LayerNorm_{i}" for block in blocks for i in (0, 1)}
        assert set(paths) == {*UP, *norms} and len(paths) == len(norms) + 2
    elif expected is None:
        assert paths == ["bottom/Conv_0", "bottom/Conv_1", "bottom"]
    else:
        assert paths == expected


@pytest.mark.parametrize(
    "where", [nn.Embed, "conv", re.compile("down"), lambda m, p: 0]
)
def test_no_match_is_an_error(where):
    plain = UNet()
    model = flax_attn.insert(plain, SE(), where)
    variables = jax.eval_shape(plain.init, KEY, X)
    message = r"`where` must select .* UNet.__call__ calls, .*down_4/Conv_0 \(Conv\)"
    for run in (
        lambda: jax.eval_shape(model.init, KEY, X),
        lambda: jax.eval_shape(model.apply, variables, X),
        lambda: flax_attn.sites(model, X),
    ):
        with pytest.raises(ValueError, match=message):
            run()


def test_no_match_in_a_method_is_an_error_when_no_attention_is_known():
    plain = MobileNet()
    variables = jax.eval_shape(plain.init, KEY, X)
    model = flax_attn.insert(plain, SE(), InvertedResidual)
    with pytest.raises(ValueError, match="MobileNet.classify calls"):
        jax.eval_shape(
            partial(model.apply, method="classify"), variables, normal((2, 2, 2, 8), 0)
        )
    # Pretrained variables alone do not make a model with attention.
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match="attention/reduce"):
        jax.eval_shape(model.apply, variables, X)


class Odd(nn.Module):
    """Submodules that return what is no feature map, or have the name already."""

    @nn.compact
    def __call__(self, x):
        a, b = Pair(name="pair")(x)
        a = Named(name="named")(a + b)
        return nn.Dense(2, name="head")(a.mean((1, 2)))


class Pair(nn.Module):
    def __call__(self, x):
        return x, 2 * x


class Named(nn.Module):
    def setup(self):
        self.attention = nn.Conv(3, (1, 1))

    def __call__(self, x):
        return self.attention(x)


class Halves(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x[..., ::2, :] * self.param("scale", nn.initializers.ones, ())


@pytest.mark.parametrize(
    "where, attention, message",
    [
        (
            "pair",
            SE(),
            r"pair \(Pair\) returns a tuple of arrays of shapes \[\(2, 8, 8",
        ),
        ("head", SE(), r"head \(Dense\) returns an array of shape \(2, 2\)"),
        ("named", SE(), "`name` must be free below named .*'attention' already"),
        ("named/*", Halves, r"`attention` must keep the shape \(2, 8, 8, 3\)"),
    ],
)
def test_sites_that_cannot_be(where, attention, message):
    model = flax_attn.insert(Odd(), attention, where)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, KEY, X)


def test_another_name():
    model = flax_attn.insert(Odd(), SE(), "named", name="gate")
    assert set(shapes(model, X)["params"]["named"]) == {"attention", "gate"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((UNet, SE(), nn.Conv), "`model` must be an instance"),
        ((UNet(), 3, nn.Conv), "`attention` must be a Linen module"),
        ((UNet(), lambda: 3, nn.Conv), "`attention` must be a Linen module"),
        ((UNet(), SE(), int), "`where` must be"),
        ((UNet(), SE(), ()), "`where` must be"),
        ((UNet(), SE(), (nn.Conv, "x")), "`where` must be"),
        ((UNet(), SE(), [nn.Conv]), "`where` must be .*classes go into a tuple"),
        (
            (UNet(), flax_attn.presets.official_cbam, nn.Conv),
            "`attention` must need no arguments, .*'train'; give it them",
        ),
        ((UNet(), SE(), nn.Conv(3, (1, 1))), "`where` must be"),
    ],
)
def test_arguments_out_of_their_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        flax_attn.insert(*arguments)


@pytest.mark.parametrize("name", [None, "", "a/b", 3])
def test_names_that_cannot_be(name):
    message = f"`name` must be a string .* got {name!r}; leave it out"
    with pytest.raises(ValueError, match=message):
        flax_attn.insert(UNet(), SE(), nn.Conv, name=name)


def test_starts_that_cannot_be():
    with pytest.raises(ValueError, match="`init` must be 'identity' or None, got 'id'"):
        flax_attn.insert(UNet(), SE(), nn.Conv, init="id")
    with pytest.raises(ValueError, match="got True; leave it out"):
        flax_attn.insert(UNet(), SE(), nn.Conv, init=True)
    with pytest.raises(ValueError, match="needs an attention with a field"):
        flax_attn.insert(UNet(), Halves(), nn.Conv, init="identity")


class Shared(nn.Module):
    """Setup style; one layer called twice."""

    layer: nn.Module = nn.Conv(3, (1, 1))

    def setup(self):
        self.shared = self.layer.clone()

    def __call__(self, x):
        return self.shared(self.shared(x))


@pytest.mark.parametrize("layer", [nn.Conv(3, (1, 1)), Shared()])
def test_a_submodule_that_is_called_twice_has_one_attention(layer):
    model = flax_attn.insert(Shared(layer), SE(), "shared")
    assert len(flax_attn.sites(model, X)) == 1
    variables = variables_for(model, X)
    params = dict(variables["params"]["shared"])
    attention = {"params": params.pop("attention")}
    expected = X
    for _ in range(2):
        expected = layer.apply({"params": params}, expected)
        expected = SE().apply(attention, expected)
    y = quick(model.apply)(variables, X)
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_a_submodule_that_calls_its_super_class_has_one_attention():
    class Base(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(3, (1, 1), name="conv")(x)

    class Derived(nn.remat(Base)):
        @nn.compact
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Model(nn.Module):
        def __call__(self, x):
            return self.block(x)

        def setup(self):
            self.block = Derived()

    model = flax_attn.insert(Model(), SE(), Base)
    variables = variables_for(model, X)
    params = variables["params"]["block"]
    y = 2 * nn.Conv(3, (1, 1)).apply({"params": params["conv"]}, X)
    y = SE().apply({"params": params["attention"]}, y)
    np.testing.assert_allclose(quick(model.apply)(variables, X), y, atol=1e-6)


def test_parameters_lie_where_they_did():
    class Own(nn.Module):
        """Names that the wrapper might have taken."""

        def setup(self):
            self.model = nn.Conv(3, (1, 1))
            self.hook = nn.Sequential([nn.Sequential([nn.Conv(3, (1, 1))])])

        def __call__(self, x):
            return self.hook(self.model(x))

    class Outer(nn.Module):
        body: nn.Module

        @nn.compact
        def __call__(self, x):
            return flax_attn.insert(UNet(), SE(), DoubleConv)(self.body(x))

    own = flax_attn.insert(Own(), SE(), nn.Conv)
    table = [site.path for site in flax_attn.sites(own, X)]
    assert table == ["model", "hook/layers_0/layers_0"]
    for cls in (Outer, nn.remat(Outer), nn.jit(Outer)):
        model = cls(own)
        params = shapes(model, X)["params"]
        assert without_attention(params) == {
            "body": shapes(Own(), X)["params"],
            "UNet_0": shapes(UNet(), X)["params"],
        }
        paths = [site.path for site in flax_attn.sites(model, X)]
        assert paths[:2] == [f"body/{path}" for path in table]
        assert paths[2:4] == ["UNet_0/down_4", "UNet_0/down_8"]


def test_insertions_into_insertions():
    first = flax_attn.insert(UNet(), flax_attn.ECA(), nn.Conv)
    # Dense layers are in SE alone, which is left alone.
    both = flax_attn.insert(first, SE(), DoubleConv)
    with pytest.raises(ValueError, match="selects none of"):
        flax_attn.sites(flax_attn.insert(both, SE(), nn.Dense), X)
    params = shapes(both, X)["params"]["down_4"]
    assert set(params["attention"]) == {"reduce", "expand"}
    assert set(params["Conv_0"]["attention"]) == {"conv"}
    with pytest.raises(ValueError, match="`name` must be free below down_4/Conv_0"):
        flax_attn.sites(flax_attn.insert(first, SE(), nn.Conv), X)
    twice = flax_attn.insert(first, SE(), nn.Conv, name="se")
    assert set(shapes(twice, X)["params"]["up_4"]) == {"kernel", "bias"}
    assert set(shapes(twice, X)["params"]["logits"]) >= {"attention", "se"}


METHODS = {
    "function": Encoder.encode,
    "other": Encoder().encode,
    "partial": partial(Encoder.encode),
    "lambda": lambda model, x: model.encode(x),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("twice", [False, True])
def test_a_method_of_the_class_has_attention_too(method, twice):
    model = flax_attn.insert(Encoder(), SE(), nn.Conv)
    if twice:
        model = flax_attn.insert(model, flax_attn.ECA(), nn.Conv, name="eca")
    expected = shapes(model, X, method="encode")
    assert set(expected["params"]["conv"]) >= {"attention"}
    method = METHODS[method]
    assert shapes(model, X, method=method) == expected
    lazy = model.lazy_init(KEY, jax.ShapeDtypeStruct(X.shape, "float32"), method=method)
    assert jax.tree.map(jnp.shape, lazy) == expected
    (site,) = {site.path for site in flax_attn.sites(model, X, method=method)}
    assert site == "conv"
    if not twice:
        y = model.apply(lazy, X, method=method)
        conv = without_attention(lazy["params"]["conv"])
        z = nn.Conv(3, (1, 1)).apply({"params": conv}, X)
        z = SE().apply({"params": lazy["params"]["conv"]["attention"]}, z)
        np.testing.assert_allclose(y, z, atol=1e-6)
        gates = flax_attn.assert_active(model, lazy, X, method=method)
        assert gates == ("conv/attention",)


def test_a_method_of_a_base_class_is_that_of_the_base_class():
    class Derived(Encoder):
        def encode(self, x):
            raise NotImplementedError

    model = flax_attn.insert(Derived(), SE(), nn.Conv)
    expected = shapes(flax_attn.insert(Encoder(), SE(), nn.Conv), X, method="encode")
    assert shapes(model, X, method=Encoder.encode) == expected


@pytest.mark.parametrize("twice", [False, True])
def test_fields_are_those_of_the_model(twice):
    model = flax_attn.insert(Encoder(width=5), SE(), nn.Conv)
    if twice:
        model = flax_attn.insert(model, SE(), nn.Conv, name="se")
    assert model.width == 5
    assert set(shapes(model, X, method="encode")["params"]) == {"conv"}
    assert "attention" in shapes(model, X, method="layer")["params"]["layer"]
    with pytest.raises(AttributeError, match="Encoder has no attribute 'depth', only"):
        model.depth  # noqa: B018


def test_a_bound_model_takes_the_variables_of_the_call():
    plain = Encoder()
    # Its field is bound as well.
    bound = plain.bind(variables_for(plain, X))
    model = flax_attn.insert(plain, SE(), "layer")
    again = flax_attn.insert(bound, SE(), "layer")
    assert shapes(again, X) == shapes(model, X)
    other = variables_for(model, X, seed=9)
    np.testing.assert_array_equal(again.apply(other, X), model.apply(other, X))
    assert len(flax_attn.sites(again.bind(other), X)) == 1


AXES = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
TRANSFORMS = {
    "vmap": lambda f: partial(nn.vmap(f, **AXES, in_axes=0)),
    "scan": lambda f: (
        lambda m, x: nn.scan(lambda m, x, _: (f(m, x), None), **AXES, length=2)(
            m, x, None
        )[0]
    ),
    "remat": nn.remat,
    "jit": nn.jit,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_is_inserted_in_a_method_can_be_transformed(transform):
    class Outer(nn.Module):
        transform: str

        @nn.compact
        def __call__(self, x):
            model = flax_attn.insert(Chain(name="chain"), SE(), nn.Conv)
            lift = TRANSFORMS[self.transform]
            return lift(lambda model, x: model(x))(model, x)

    model = Outer(transform)
    kernel = shapes(model, X)["params"]["chain"]["second"]["attention"]["reduce"]
    stacked = transform in ("vmap", "scan")
    assert kernel["kernel"] == (*([2] if stacked else []), 3, 1)
    variables = variables_for(model, X)
    y = model.apply(variables, X)
    members = variables["params"]["chain"]
    if transform in ("remat", "jit"):
        expected = by_hand(members, X)
    else:
        a, b = (jax.tree.map(lambda p: p[i], members) for i in range(2))  # noqa: B023
        if transform == "scan":
            expected = by_hand(b, by_hand(a, X))
        else:
            expected = np.stack([by_hand(a, X[0]), by_hand(b, X[1])])
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("layer", [Chain(), MobileNet()])
def test_a_submodule_runs_with_attention_and_without(layer):
    class Outer(nn.Module):
        layer: nn.Module

        @nn.compact
        def __call__(self, x):
            inserted = flax_attn.insert(self.layer, SE(), nn.Conv)
            return self.layer(x), inserted(x), self.layer(x)

    model = Outer(layer)
    inserted = flax_attn.insert(layer, SE(), nn.Conv)
    variables = variables_for(model, X)
    assert shapes(model, X)["params"] == {"layer": shapes(inserted, X)["params"]}
    own = {"params": variables["params"]["layer"]}
    y, attended, z = quick(model.apply)(variables, X)
    np.testing.assert_allclose(attended, quick(inserted.apply)(own, X), atol=1e-6)
    np.testing.assert_array_equal(y, z)
    assert np.abs(y - attended).max() > 0


@pytest.mark.parametrize("fresh", [False, True])
def test_a_call_without_sites_does_not_depend_on_earlier_ones(fresh):
    model = flax_attn.insert(Staged(), SE(), "body")
    variables = variables_for(model, X)
    if fresh:
        model = flax_attn.insert(Staged(), SE(), "body")
    head = partial(jax.eval_shape, partial(model.apply, stage="head"))
    features = jax.ShapeDtypeStruct((2, 8, 8, 4), "float32")
    assert head(variables, features).shape == (2, 8, 8, 2)
    for run in (
        lambda: head(without_attention(variables), features),
        lambda: jax.eval_shape(partial(model.init, stage="head"), KEY, features),
    ):
        with pytest.raises(ValueError, match="Staged.__call__ calls, got 'body'"):
            run()


def test_a_name_of_the_model_does_not_hide_that_nothing_is_selected():
    model = flax_attn.insert(Odd(), SE(), "name")
    with pytest.raises(ValueError, match="Odd.__call__ calls, got 'name'"):
        jax.eval_shape(model.init, KEY, X)


def test_modules_without_a_scope_are_left_alone():
    model = flax_attn.insert(Careful(), SE(), nn.Conv)
    (site,) = flax_attn.sites(model, X)
    assert site.path == "conv"
    variables = variables_for(model, X)
    gates = flax_attn.assert_active(model, variables, X)
    assert gates == ("conv/attention",)
    labels = flax_attn.parameter_labels(model, X)
    assert labels["conv"]["kernel"] == "backbone"


def test_what_nn_jit_has_compiled_is_not_mixed_up():
    lifted = nn.jit(Chain)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lifted(name="chain")(x)

    plain = Model()
    models = {
        (): plain,
        ("first",): flax_attn.insert(plain, SE(), "*/first"),
        ("second",): flax_attn.insert(plain, SE(), "*/second"),
        ("first", "second"): flax_attn.insert(plain, SE(), nn.Conv),
    }
    # For all models the same, so that nothing else tells them apart.
    variables = variables_for(models["first", "second"], X)
    for _ in range(2):
        for attend, model in models.items():
            # The second time it is there already, and runs without a trace.
            expected = by_hand(variables["params"]["chain"], X, attend=attend)
            y = model.apply(variables, X)
            np.testing.assert_allclose(y, expected, atol=1e-5)
    for attend in (("first",), ("first", "second")):
        gates = flax_attn.assert_active(models[attend], variables, X)
        assert gates == tuple(f"chain/{name}/attention" for name in attend)


def test_nn_jit_compiles_once():
    traces = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(x.shape)
            return nn.Conv(3, (1, 1))(x)

    lifted = nn.jit(Counted)

    class Fixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lifted(name="counted")(x)

    model = flax_attn.insert(Fixed(), SE(), nn.Conv)
    variables = variables_for(model, X)
    traces.clear()
    for _ in range(3):
        model.apply(variables, X)
    assert len(traces) == 1


class Gated(nn.Module):
    """Blocks written in by hand; ``broken`` makes the second one idle."""

    broken: str = ""

    @nn.compact
    def __call__(self, x):
        y = CBAM(name="used")(x)
        z = flax_attn.SE(reduction=1, name="second")(y)
        if self.broken == "result":
            z = y
        if self.broken == "zero":
            z = z * 0
        # A common factor, or one for each channel, is lost on it.
        return nn.GroupNorm(num_groups=1)(z)


@pytest.mark.parametrize("broken", ["", "result", "zero"])
def test_idle_gates_are_found(broken):
    model = Gated(broken)
    variables = quick(model.init)(KEY, X)
    run = partial(flax_attn.assert_active, model, variables, X)
    if not broken:
        assert run() == ("used/channel", "used/spatial", "second")
    else:
        dead = "second" if broken == "result" else "used/channel, used/spatial, second"
        with pytest.raises(AssertionError, match=f"on the gates of {dead}\\. "):
            # What is sown moves with the gate, and is no output.
            run(mutable=["intermediates"])


def test_a_gate_that_is_closed_is_active_all_the_same():
    model = flax_attn.SE(reduction=1, gate=lambda logits: 0 * logits)
    variables = variables_for(model, X)
    assert flax_attn.assert_active(model, variables, X) == ("",)


def test_scales_that_start_at_zero_are_told():
    model = flax_attn.insert(
        nn.Sequential([nn.LayerNorm(scale_init=nn.initializers.zeros)]),
        SE,
        nn.LayerNorm,
    )
    variables = quick(model.init)(KEY, X)
    with pytest.raises(AssertionError, match="gates of layers_0/attention.*at zero"):
        flax_attn.assert_active(model, variables, X)


class Foreign(nn.Module):
    """An attention of somebody else."""

    @nn.compact
    def __call__(self, x):
        return x * nn.sigmoid(self.param("scale", nn.initializers.zeros, (1,) * x.ndim))


def test_an_attention_of_another_kind():
    model = flax_attn.insert(Chain(), Foreign, nn.Conv)
    variables = variables_for(model, X)
    paths = ("first/attention", "second/attention")
    assert flax_attn.assert_active(model, variables, X) == paths
    labels = flax_attn.parameter_labels(model, X)
    assert labels["first"]["attention"] == {"scale": "attention_no_decay"}


def test_nothing_to_find():
    chain = Chain()
    variables = variables_for(chain, X)
    for run in (
        lambda: flax_attn.sites(chain, X),
        lambda: flax_attn.assert_active(chain, variables, X),
        lambda: flax_attn.parameter_labels(chain, X),
    ):
        with pytest.raises(ValueError, match="`model` must .*Chain"):
            run()
    model = flax_attn.insert(chain, SE(), nn.Conv)
    with pytest.raises(ValueError, match="must give a finite output"):
        flax_attn.assert_active(model, variables_for(model, X), X * np.nan)


def test_merge_tells_what_does_not_fit():
    new = {"params": {"a": {"kernel": np.ones((2, 3))}, "b": {"bias": np.ones(4)}}}
    old = {"params": {"a": {"kernel": np.zeros((3, 2))}, "c": np.zeros(5)}}
    message = r"params/a/kernel \(3, 2\) against \(2, 3\), params/c \(5,\) has no place"
    with pytest.raises(ValueError, match=message):
        flax_attn.merge(old, new)
    half = {"params": {"b": {"bias": np.zeros(4, np.float16)}}}
    merged, added = flax_attn.merge(half, new)
    assert added == ("params/a/kernel",)
    assert merged["params"]["a"]["kernel"] is new["params"]["a"]["kernel"]
    assert merged["params"]["b"]["bias"] is half["params"]["b"]["bias"]
    assert flax_attn.merge({}, new)[1] == ("params/a/kernel", "params/b/bias")


def test_merge_keeps_the_metadata_of_the_new_variables():
    old = {"params": {"kernel": np.zeros((2, 3))}}
    box = nn.Partitioned(np.ones((2, 3)), names=(None, "model"))
    merged, _ = flax_attn.merge(old, {"params": {"kernel": box}})
    kernel = merged["params"]["kernel"]
    assert kernel.names == (None, "model") and kernel.value.sum() == 0


def test_labels_train_the_attention_apart():
    inserted = flax_attn.insert(Gated(), SE(use_bias=True), "used", name="extra")
    variables = variables_for(inserted, X, seed=2)
    params = variables["params"]
    labels = flax_attn.parameter_labels(inserted, X)
    decayed, spared = "attention", "attention_no_decay"
    dense = {"kernel": decayed, "bias": spared}
    mlp = {"reduce": {"kernel": decayed}, "expand": {"kernel": decayed}}
    assert labels == {
        "used": {
            "channel": mlp,
            "spatial": {"conv": {"kernel": decayed}},
            "extra": {"reduce": dense, "expand": dense},
        },
        "second": mlp,
        "GroupNorm_0": {"scale": "backbone", "bias": "backbone"},
    }
    optimiser = optax.multi_transform(
        {
            "attention": optax.chain(optax.add_decayed_weights(0.5), optax.scale(-0.1)),
            "attention_no_decay": optax.scale(-0.1),
            "backbone": optax.set_to_zero(),
        },
        labels,
    )

    def loss(params):
        y = inserted.apply({"params": params}, X)
        return jnp.sum(y * normal(y.shape, 3))

    @jax.jit  # Not quick, for the gradients of the maxima.
    def step(params):
        gradients = jax.grad(loss)(params)
        updates, _ = optimiser.update(gradients, optimiser.init(params), params)
        return gradients, optax.apply_updates(params, updates)

    gradients, new = step(params)

    def check(label, p, g, q):
        decay = 0.5 * p if label == "attention" else 0
        rate = 0 if label == "backbone" else 0.1
        np.testing.assert_allclose(q, p - rate * (g + decay), atol=1e-6)

    jax.tree.map(check, labels, params, gradients, new)
    moved = jax.tree.map(lambda g: bool(np.abs(g).max() > 0), gradients)
    assert all(jax.tree.leaves(moved)), moved
    mask = jax.tree.map(lambda label: label == "attention", labels)
    optax.adamw(1e-3, mask=mask).init(params)


def test_the_gates_of_the_relatives():
    model = nn.Sequential([flax_attn.BAM(), flax_attn.scSE()])
    variables = variables_for(model, X)
    gates = flax_attn.assert_active(model, variables, X)
    assert set(gates) == {"layers_0", "layers_1", "layers_1/channel"}
    labels = flax_attn.parameter_labels(model, X)
    assert labels["layers_1"]["spatial"] == {"kernel": "attention"}
    assert labels["layers_0"]["spatial_conv1"]["bias"] == "attention_no_decay"


def test_captured_intermediates_hold_each_output_once():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="dense")(x)

    x = normal((2, 4, 4, 3), 0)
    model = flax_attn.insert(Model(), flax_attn.SE(), "dense")
    model = flax_attn.insert(model, flax_attn.ECA(), "dense", name="second")
    variables = model.init(jax.random.key(0), x)
    y, state = model.apply(variables, x, capture_intermediates=True)
    (recorded,) = state["intermediates"]["__call__"]
    np.testing.assert_array_equal(recorded, y)
    assert len(state["intermediates"]["dense"]["__call__"]) == 1
