import math
from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from flax_attn import inspect as attention_inspect
from flax_attn.inspect import attention_maps, color_map, overlay, statistics
from flax_attn.resnet import BasicBlock, BottleneckBlock, ResNet
from tests.cases import ARTICLE, IMPLEMENTATIONS, normal, variables_for

blocks = pytest.mark.parametrize("block", ARTICLE)
ATTEND = ("channel/channel_gate", "spatial/spatial_gate")


def paths_of(block, name="attention"):
    if block.startswith("cbam"):
        return [f"{name}/{path}" for path in ATTEND]
    return [f"{name}/spatial_gate" if block == "spatial" else f"{name}/channel_gate"]


# --- attention_maps


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@blocks
def test_the_input_times_the_gates_is_the_output(block, implementation):
    module = ARTICLE[block](implementation=implementation)
    x = normal((2, 5, 4, 16), 0)
    variables = variables_for(module, x)
    gates = attention_maps(module, variables, x)
    assert [f"/{path}" for path in gates] == [p for p in paths_of(block, "")]
    product = x
    for path, gate in gates.items():  # In the order of the calls: channel, spatial.
        shape = (2, 1, 1, 16) if "channel_gate" in path else (2, 5, 4, 1)
        assert gate.shape == shape and gate.dtype == jnp.float32
        product = product * gate
    np.testing.assert_array_equal(product, module.apply(variables, x))


@pytest.fixture(scope="module")
def families():
    """A network of each family, with its random variables and images."""
    small = partial(ResNet, num_classes=3, width=4)
    made = {}
    for name, model in {
        "cifar": small((11, 1), BasicBlock, imagenet_stem=False),
        "imagenet": small((1, 1), BottleneckBlock),
    }.items():
        for block in ("se", "cbam"):
            x = normal((2, 16, 16, 3), 1)
            network = model.clone(attention=ARTICLE[block])
            variables = variables_for(network, x)
            # Random variances could be negative.
            variables["batch_stats"] = jax.tree.map(
                np.ones_like, variables["batch_stats"]
            )
            made[name, block] = network, variables, x
    return made


@pytest.mark.parametrize("family", ["cifar", "imagenet"])
@pytest.mark.parametrize("block", ["se", "cbam"])
def test_every_gate_of_both_families_by_path(families, family, block):
    model, variables, x = families[family, block]
    gates = jax.eval_shape(partial(attention_maps, model, train=False), variables, x)
    # eval_shape sorts, as jit does; see below for the order of the calls.
    expected = [
        path
        for i, count in enumerate(model.stages, 1)
        for j in range(1, count + 1)
        for path in paths_of(block, f"stage{i}_block{j}/attention")
    ]
    assert list(gates) == sorted(expected)
    sides = {"cifar": (16, 8), "imagenet": (4, 2)}[family]
    for path, gate in gates.items():
        stage = int(path[5]) - 1
        channels = 4 * 2**stage * model.block.expansion
        side = sides[stage]
        spatial = path.endswith("spatial_gate")
        assert gate.shape == ((2, side, side, 1) if spatial else (2, 1, 1, channels))


def test_the_order_is_that_of_the_calls_and_the_gates_those_of_the_outputs(families):
    model, variables, x = families["cifar", "cbam"]
    gates = attention_maps(model, variables, x, train=False)
    stages = [path.split("/")[0] for path in gates]
    names = [f"stage1_block{j}" for j in range(1, 12)] + ["stage2_block1"]
    assert stages == [name for name in names for _ in range(2)]
    _, state = model.apply(
        variables, x, mutable=["intermediates"], capture_intermediates=True
    )
    for name in ("stage1_block11", "stage2_block1"):
        block = state["intermediates"][name]
        (before,) = block["norm2"]["__call__"]
        (after,) = block["attention"]["__call__"]
        product = before
        for path in paths_of("cbam", f"{name}/attention"):
            product = product * gates[path]
        np.testing.assert_array_equal(product, after)


class Several(nn.Module):
    """Sows things of its own, calls one block twice, and drops out."""

    attend: bool = True

    @nn.compact
    def __call__(self, x, times=2, *, train=True):
        self.sow("intermediates", "mean_gate", x.mean())
        self.sow("losses", "spatial_gate", x.mean())
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        block = flax_attn.SpatialAttention(name="shared")
        for _ in range(times if self.attend else 0):
            x = block(x)
        return x

    def once(self, x):
        return self(x, 1, train=False)


@pytest.fixture(scope="module")
def several():
    model, x = Several(), normal((2, 4, 4, 8), 2)
    # With intermediates, as init with mutable=True leaves them.
    variables = jax.jit(partial(model.init, mutable=True, train=False))(
        jax.random.key(0), x
    )
    assert "intermediates" in variables
    return model, variables, x


def test_a_block_called_twice_has_a_path_for_each_call(several):
    model, variables, x = several
    gates = attention_maps(model, variables, x, train=False)
    assert list(gates) == ["shared/spatial_gate/0", "shared/spatial_gate/1"]
    y = x / np.sqrt(1 + 1e-5, dtype=np.float32)
    for gate in gates.values():
        y = y * gate
    expected = model.apply(
        {"params": variables["params"]} | {"batch_stats": variables["batch_stats"]},
        x,
        train=False,
    )
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_arguments_are_passed_on_and_variables_kept(several):
    model, variables, x = several
    before = jax.tree.map(np.array, variables)
    one = attention_maps(model, variables, x, 1, train=False)
    assert list(one) == ["shared/spatial_gate"]
    for method in ("once", Several.once, Several().once, lambda m, x: m.once(x)):
        by_method = attention_maps(model, variables, x, method=method)
        np.testing.assert_array_equal(by_method["shared/spatial_gate"], *one.values())
    rngs = {"dropout": jax.random.key(3)}
    dropped = attention_maps(model, variables, x, 1, train=True, rngs=rngs)
    assert np.abs(dropped["shared/spatial_gate"] - [*one.values()][0]).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, before, variables)


class Parts(nn.Module):
    def setup(self):
        self.first = flax_attn.SE(reduction=2)
        self.second = flax_attn.ECA()

    def __call__(self, x):
        return self.second(self.first(x))


def test_a_function_of_the_user_as_the_method():
    x = normal((2, 4, 4, 8), 2)
    variables = variables_for(Parts(), x)
    whole = attention_maps(Parts(), variables, x)
    part = attention_maps(Parts(), variables, x, method=lambda m, x: m.first(x))
    assert list(part) == ["first/channel_gate"]
    np.testing.assert_array_equal(*part.values(), whole["first/channel_gate"])


def test_state_is_not_changed():
    x = normal((2, 4, 4, 8), 6)
    norm = partial(nn.BatchNorm, use_running_average=False)
    model = flax_attn.SpatialAttention(norm=norm)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        attention_maps(model, variables, x)


def test_under_jit_the_gates_are_the_same(several):
    model, variables, x = several
    read = partial(attention_maps, model, train=False)
    for path, gate in jax.jit(read)(variables, x).items():
        np.testing.assert_allclose(gate, read(variables, x)[path], rtol=1e-6)


class Layers(nn.Module):
    axes: tuple

    @nn.compact
    def __call__(self, x):
        layer = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0} | dict.fromkeys(self.axes, 0),
            split_rngs={"params": True},
            length=3,
        )
        return layer(flax_attn.SE(name="se"), x, None)[0]


def test_scanned_layers_are_stacked():
    x = normal((2, 4, 4, 16), 4)
    model = Layers(axes=("intermediates",))
    variables = variables_for(model, x)
    gates = attention_maps(model, variables, x)
    assert {path: gate.shape for path, gate in gates.items()} == {
        "se/channel_gate": (3, 2, 1, 1, 16)
    }
    product = x
    for gate in gates["se/channel_gate"]:
        product = product * gate
    np.testing.assert_array_equal(product, model.apply(variables, x))
    with pytest.raises(ValueError, match="variable_axes="):
        attention_maps(Layers(axes=()), variables, x)


JitLayers = nn.jit(Layers)


class Two(nn.Module):
    """A block whose gate is stored, and layers in nn.jit whose gates may be lost."""

    axes: tuple = ()

    @nn.compact
    def __call__(self, x):
        x = flax_attn.CBAM(reduction=4, name="kept")(x)
        return JitLayers(self.axes, name="layers")(x)


def test_a_lost_gate_beside_others_is_named():
    x = normal((2, 4, 4, 16), 4)
    variables = variables_for(Two(), x)
    for _ in range(2):  # The second time nn.jit has compiled the layers already.
        with pytest.raises(ValueError, match="no gate at layers/se/channel_gate from"):
            attention_maps(Two(), variables, x)
    gates = attention_maps(Two(("intermediates",)), variables, x)
    kept = [f"kept/{path}" for path in ATTEND]
    assert list(gates) == [*kept, "layers/se/channel_gate"]


class Again(nn.Module):
    """A block that is called outside of a scan, and inside, where its gate is lost."""

    @nn.compact
    def __call__(self, x):
        block = flax_attn.SpatialAttention(name="shared")
        scan = nn.scan(
            lambda block, x, _: (block(x), None), variable_broadcast="params", length=2
        )
        return scan(block, block(x), None)[0]


def test_a_gate_that_is_lost_in_one_of_two_calls_is_named():
    x = normal((2, 4, 4, 8), 4)
    with pytest.raises(ValueError, match="no gate at shared/spatial_gate from Again"):
        attention_maps(Again(), variables_for(Again(), x), x)


def test_channels_first_keeps_the_paths():
    x = normal((2, 16, 4, 4), 5)
    model = flax_attn.ChannelsFirst(flax_attn.CBAM())
    gates = attention_maps(model, variables_for(model, x), x)
    assert tuple(gates) == ATTEND
    assert gates[ATTEND[1]].shape == (2, 4, 4, 1)


def test_attention_maps_raises(several):
    _, variables, x = several
    with pytest.raises(
        ValueError, match="`model` must call an attention block .* no gate from Several"
    ):
        attention_maps(Several(attend=False), variables, x, train=False)
    with pytest.raises(ValueError, match="`mutable` must be left out, got True"):
        attention_maps(Several(), variables, x, mutable=True)


def test_the_standard_module_is_not_shadowed():
    import inspect

    assert flax_attn.inspect is attention_inspect is not inspect
    assert "inspect" not in flax_attn.__all__


# --- statistics


def entropy(g):
    """By hand, with the limits at 0 and 1."""
    return -sum(p * math.log2(p) for p in (g, 1 - g) if p > 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16, np.float16])
def test_statistics_are_those_of_the_elements(dtype):
    values = np.array([0.0, 0.03125, 0.25, 0.5, 0.75, 0.96875, 1.0, 1.0])
    (row,) = statistics(values.astype(dtype).reshape(2, 4))
    assert (row.path, row.shape) == ("", (2, 4))
    assert (row.below, row.above, row.mean) == (2 / 8, 3 / 8, values.mean())
    assert row.entropy == pytest.approx(np.mean([entropy(g) for g in values]), 1e-12)


def test_values_on_a_limit_are_not_counted():
    gate = np.array([0.25, 0.2, 0.75, 0.8])
    (row,) = statistics(gate, low=0.25, high=0.75)
    assert (row.below, row.above) == (0.25, 0.25)
    (row,) = statistics(gate)
    assert (row.below, row.above) == (0, 0)


def test_many_half_precision_elements_do_not_stall_the_mean():
    (row,) = statistics(jnp.full((300, 300), 0.75, jnp.bfloat16))
    assert row.mean == 0.75 and row.entropy == pytest.approx(entropy(0.75), 1e-12)


def test_statistics_print_as_a_table():
    gates = {"stage1/channel_gate": np.full((2, 1, 1, 16), 0.5), "b": np.ones(4)}
    table = statistics(gates)
    assert [row.path for row in table] == list(gates)
    header, first, second = str(table).splitlines()
    assert header.split() == ["path", "shape", "below", "above", "mean", "entropy"]
    assert first.split() == [
        *("stage1/channel_gate", "2×1×1×16", "0.0%", "0.0%", "0.500", "1.000")
    ]
    assert second.split() == ["b", "4", "0.0%", "100.0%", "1.000", "0.000"]
    assert len({len(line) for line in (header, first, second)}) == 1
    assert "gate" in str(statistics(np.ones(3))).splitlines()[1]


@pytest.mark.parametrize(
    "gates, options, says",
    [
        ({}, {}, "`gates` must contain at least one"),
        ({"a": np.array([0.5, 1.5])}, {}, r"`gates`\['a'\] must .* from 0.5 to 1.5"),
        (np.array([-0.5, 0.5]), {}, "`gates` must .* from -0.5 to 0.5"),
        (np.array([np.nan, 0.5]), {}, "`gates` must .* from nan to nan"),
        (np.zeros((2, 0)), {}, r"`gates` must have elements.* got shape \(2, 0\)"),
        (np.ones(2), {"low": 0.9, "high": 0.1}, "`low` and `high` .* 0.9 and 0.1"),
        (np.ones(2), {"high": 1.1}, "`low` and `high` .* 0.05 and 1.1"),
    ],
)
def test_statistics_raises(gates, options, says):
    with pytest.raises(ValueError, match=says):
        statistics(gates, **options)


# --- overlay


def bilinear(gate, height, width):
    """Bilinear sampling at pixel centers, borders extended, in float64."""

    def weights(n, size):
        matrix = np.zeros((size, n))
        for i in range(size):
            at = min(max((i + 0.5) * n / size - 0.5, 0), n - 1)
            low = min(int(at), max(n - 2, 0))
            matrix[i, low] += 1 - (at - low)
            if low + 1 < n:
                matrix[i, low + 1] += at - low
        return matrix

    return weights(gate.shape[0], height) @ gate @ weights(gate.shape[1], width).T


def test_an_overlay_shows_the_image_where_the_gate_is_open():
    image = np.random.RandomState(0).randint(0, 256, (12, 16, 3)).astype(np.uint8)
    gate = np.random.RandomState(1).uniform(size=(3, 4)).astype(np.float32)
    values = bilinear(gate.astype(np.float64), 12, 16)
    colors = color_map(values)
    expected = colors + 0.7 * values[..., None] * (image - colors)
    picture = overlay(image, gate, alpha=0.3)
    assert picture.dtype == np.uint8 and picture.shape == image.shape
    assert np.abs(picture - expected).max() <= 0.501
    assert np.abs(overlay(image, gate, alpha=1) - colors).max() <= 0.501
    # All valid shapes and dtypes.
    for same in (gate[..., None], gate[None, ..., None], jnp.asarray(gate)):
        np.testing.assert_array_equal(overlay(image, same, alpha=0.3), picture)
    for same in (image / 255, (image / 255).astype(np.float32)):
        np.testing.assert_array_equal(overlay(same, gate, alpha=0.3), picture)


def test_bright_pixels_are_no_open_gates():
    """At one gate, the image moves a pixel by less than its gate's range of colors."""
    image = np.zeros((2, 8, 3), np.uint8)
    image[1] = 255
    dark, bright = overlay(image, np.linspace(0, 1, 8)[None]).astype(float)
    np.testing.assert_array_equal(dark[0], bright[0])  # Closed: nothing of the image.
    np.testing.assert_allclose(bright[-1] - dark[-1], 0.4 * 255, atol=1)
    light = np.stack([dark, bright]) @ [0.299, 0.587, 0.114]
    assert light[1, :3].max() < light[0, -1]  # Closed and bright, open and dark.


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("value", [0.0, 0.5, 0.97, 1.0])
def test_under_a_constant_gate_all_pixels_are_equal(value, alpha):
    image = np.zeros((8, 8, 3), np.uint8)
    image[2:6, 2:6] = 255
    wiggle = 0.049 * (np.indices((4, 4)).sum(0) / 6 - 0.5)  # Less than means anything.
    gates = np.stack([np.full((4, 4), value), value + wiggle])
    pictures = overlay(np.stack([image, image]), gates, alpha=alpha)
    expected = np.broadcast_to(np.rint(color_map(value)), pictures.shape)
    np.testing.assert_array_equal(pictures, expected)
    assert len(np.unique(overlay(image, value + 2 * wiggle, alpha=alpha))) > 3


def test_a_batch_equals_its_images_one_by_one():
    images = np.random.RandomState(2).randint(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    gates = np.random.RandomState(3).uniform(size=(3, 4, 4, 1))
    expected = np.stack([overlay(*pair) for pair in zip(images, gates, strict=True)])
    np.testing.assert_array_equal(overlay(images, gates), expected)
    np.testing.assert_array_equal(overlay(images, gates[..., 0]), expected)
    assert len(np.unique(expected.reshape(3, -1), axis=0)) == 3


def test_batches_of_lines_need_their_last_axis():
    """Without it, a channel gate and the gate of one image have the same shape."""
    images, lines = np.zeros((8, 16, 16, 3), np.uint8), np.full((8, 1, 64), 0.5)
    for gate in (lines, lines.reshape(8, 64, 1), np.full((8, 8, 1), 0.5)):
        with pytest.raises(ValueError, match=r"`gate` must .*\(8, h, w, 1\) where"):
            overlay(images, gate)
        assert overlay(images, gate[..., None]).shape == images.shape
    assert overlay(images, lines[..., :1]).shape == images.shape  # One value each.
    assert overlay(images[:, :1], lines).shape == (8, 1, 16, 3)  # Images of one line.


def test_limits_stretch_the_colors_and_clip():
    image = np.zeros((1, 4, 3), np.uint8)
    gate = np.array([[0.1, 0.4, 0.6, 0.9]])
    picture = overlay(image, gate, alpha=1, limits=(0.4, 0.6))
    ends = color_map([0.0, 0.0, 1.0, 1.0])
    np.testing.assert_allclose(picture[0], ends, atol=1)


def test_the_older_name_of_the_color_map():
    assert attention_inspect.colour_map is color_map


def test_the_colors_grow_lighter():
    colors = color_map(np.linspace(0, 1, 101))
    light = colors @ [0.299, 0.587, 0.114]
    assert (np.diff(light) > 0).all() and light[0] < 20 and light[-1] > 230
    assert colors.min() >= 0 and colors.max() <= 255
    np.testing.assert_array_equal(color_map([-1.0, 2.0]), colors[[0, -1]])


GRAY = np.zeros((4, 4, 3), np.uint8)
GATE = np.full((2, 2), 0.5)


@pytest.mark.parametrize(
    "image, gate, options, says",
    [
        (GRAY[..., :1], GATE, {}, r"`image` must have shape .* got \(4, 4, 1\)"),
        (GRAY[..., 0], GATE, {}, r"got \(4, 4\); .*np.repeat\(image\[..., None\], 3"),
        (GRAY[:0], GATE, {}, r"`image` must have shape .* got \(0, 4, 3\); pass one"),
        (np.zeros((2, 4, 4, 4)), GATE, {}, r"got \(2, 4, 4, 4\); .*image\[..., :3\]"),
        (
            np.zeros((3, 8, 8)),
            GATE,
            {},
            r"got \(3, 8, 8\); .*np.moveaxis\(image, -3, -1\)",
        ),
        (GRAY.astype(int), GATE, {}, "`image` must be uint8, .* got dtype int64"),
        (GRAY - 0.5, GATE, {}, "`image` must be within .* from -0.5 to -0.5; undo"),
        (GRAY + 2.0, GATE, {}, "`image` must be within .* from 2.0 to 2.0"),
        (GRAY + np.nan, GATE, {}, "`image` must be within .* from nan to nan"),
        (GRAY, np.ones((1, 1, 16)), {}, r"`gate` must .*\(h, w\).* got \(1, 1, 16\)"),
        (GRAY, np.ones((2, 2, 2, 1)), {}, r"`gate` must .* got \(2, 2, 2, 1\)"),
        (GRAY, np.ones(4), {}, r"`gate` must .* got \(4,\)"),
        (GRAY, np.ones((0, 2)), {}, r"`gate` must .* got \(0, 2\)"),
        (GRAY[None], GATE, {}, r"`gate` must .*\(1, h, w\).* got \(2, 2\)"),
        (GRAY[None], np.ones((2, 2, 2)), {}, r"`gate` must .* got \(2, 2, 2\)"),
        (GRAY, GATE * np.nan, {}, "`gate` must be finite"),
        (GRAY, GATE, {"alpha": 1.5}, "`alpha` must be within .* got 1.5"),
        (GRAY, GATE, {"limits": (0.5, 0.5)}, r"`limits` must .* got \(0.5, 0.5\)"),
        (GRAY, GATE, {"limits": (0, np.inf)}, "`limits` must .*inf"),
    ],
)
def test_overlay_raises(image, gate, options, says):
    with pytest.raises(ValueError, match=says):
        overlay(image, gate, **options)


def test_the_gates_of_bam_and_scse():
    model = nn.Sequential([flax_attn.BAM(), flax_attn.scSE()])
    x = normal((2, 5, 4, 8), 1)
    gates = attention_maps(model, variables_for(model, x), x)
    assert {path: gate.shape for path, gate in gates.items()} == {
        "layers_0/element_gate": (2, 5, 4, 8),
        "layers_1/channel/channel_gate": (2, 1, 1, 8),
        "layers_1/spatial_gate": (2, 5, 4, 1),
    }
