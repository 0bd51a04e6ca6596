"""The spatial gates of trained networks."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_attn.resnet import ATTENTIONS, BasicBlock, ResNet
from tests import tiny_run
from tests.cases import variables_for
from train.data.cifar import ImageSet
from train.data.inputs import DeviceInputs
from train.engine import devices
from train.engine.config import Config
from train.study import gates as study


def test_spatial_gates_are_those_of_each_stages_last_block():
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    labels = np.zeros(12, np.int32)
    images = ImageSet(pixels[:8], labels[:8], pixels[8:], labels[8:], 10, flip=False)
    model = ResNet(
        stages=(2, 1),
        block=BasicBlock,
        num_classes=10,
        width=4,
        imagenet_stem=False,
        attention=ATTENTIONS["cbam"],
    )
    variables = variables_for(model, jnp.zeros((1, 8, 8, 3)))
    # As means and variances, of which a random one would be negative.
    variables["batch_stats"] = jax.tree.map(np.ones_like, variables["batch_stats"])
    fed = DeviceInputs(images, Config(batch_size=4), devices.make_mesh(1))
    shown, gates = study.spatial_gates(model, variables, fed, count=3)
    np.testing.assert_array_equal(shown, pixels[8:11])
    assert {name: gate.shape for name, gate in gates.items()} == {
        "stage1_block2": (3, 8, 8),
        "stage2_block1": (3, 4, 4),
    }
    known = pixels[:8].astype(np.float64) / 255
    inputs = (pixels[8:11] / 255 - known.mean((0, 1, 2))) / known.std((0, 1, 2))
    apply = jax.jit(partial(model.apply, mutable=["intermediates"]))
    _, state = apply(variables, inputs.astype(np.float32))
    for name, gate in gates.items():
        attention = state["intermediates"][name]["attention"]
        (expected,) = attention["spatial"]["spatial_gate"]
        np.testing.assert_allclose(gate, expected[..., 0], atol=1e-5)
        assert gate.dtype == np.float32 and 0 < gate.min() < gate.max() <= 1


@pytest.mark.parametrize("attention", ["none", "se"])
def test_without_spatial_attention_there_are_no_spatial_gates(attention):
    pixels, labels = np.zeros((8, 4, 4, 3), np.uint8), np.zeros(8, np.int32)
    pixels[0] = 255
    images = ImageSet(pixels, labels, pixels, labels, 10, flip=False)
    model = ResNet(
        stages=(1,),
        block=BasicBlock,
        num_classes=10,
        width=4,
        imagenet_stem=False,
        attention=ATTENTIONS[attention],
    )
    variables = variables_for(model, jnp.zeros((1, 4, 4, 3)))
    fed = DeviceInputs(images, Config(batch_size=4), devices.make_mesh(1))
    shown, gates = study.spatial_gates(model, variables, fed, count=2)
    assert gates == {} and shown.shape == (2, 4, 4, 3)


def test_the_blocks_with_spatial_gates():
    """By the articles; BAM has one gate of both kinds."""
    expected = {"spatial", "cbam", "cbam-conv", "lcbam", "sse", "scse", "scse-max"}
    assert set(filter(study.has_spatial_gate, ATTENTIONS)) == expected
    assert not study.has_spatial_gate("a block of another version")


def test_gates_are_saved_once_and_only_where_there_are_some(tmp_path, monkeypatch):
    made = []

    def spatial_gates(*_):
        made.append(1)
        return np.zeros((2, 4, 4, 3), np.uint8), {"stage1_block1": np.ones((2, 4, 4))}

    def run(attention):
        config = Config(batch_size=8, attention=attention)
        return types.SimpleNamespace(config=config, model=None, variables=None)

    images = tiny_run.images()
    monkeypatch.setattr(study, "spatial_gates", spatial_gates)
    study.save_gates(tmp_path, run("se"), images)
    assert not list(tmp_path.iterdir())
    study.save_gates(tmp_path, run("cbam-conv"), images)
    study.save_gates(tmp_path, run("cbam-conv"), images)
    assert [path.name for path in tmp_path.iterdir()] == ["gates.npz"]
    assert len(made) == 1
    with np.load(tmp_path / "gates.npz") as arrays:
        assert set(arrays) == {"images", "stage1_block1"}


def panels_of(figure, rows, names):
    """The axes of images in their rows, and those of the color bars."""
    count = rows * (1 + 2 * names)
    return np.array(figure.axes[:count]).reshape(rows, -1), figure.axes[count:]


def texts_of(axis):
    return [text.get_text() for text in axis.texts]


def test_gates_stand_alone_and_beside_the_image_under_them():
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    maps = {"a": rng.uniform(0.2, 0.6, (2, 4, 4)), "b": rng.uniform(size=(2, 2, 3))}
    panels, bars = panels_of(study.plot(images, maps), 2, 2)
    titles = [axis.get_title() for axis in panels[0]]
    assert titles == ["image", "a\n4×4", "image under it", "b\n2×3", "image under it"]
    for i, (shown, *pairs) in enumerate(panels):
        np.testing.assert_array_equal(shown.images[0].get_array(), images[i])
        for j, gates in enumerate(maps.values()):
            alone, under = (axis.images[0] for axis in pairs[2 * j : 2 * j + 2])
            own = (gates.min(), gates.max())
            np.testing.assert_array_equal(alone.get_array(), gates[i])
            assert alone.get_clim() == own and alone.get_interpolation() == "nearest"
            expected = study.fade(images[i], gates[i], own)
            np.testing.assert_array_equal(under.get_array(), expected)
    for bar, gates in zip(bars, maps.values(), strict=True):
        assert bar.get_xlim() == (gates.min(), gates.max())
        assert bar.get_xlabel() == "spatial gate"
    assert not any(map(texts_of, panels.flat))


def test_limits_of_the_callers_choice():
    images = np.zeros((1, 8, 8, 3), np.uint8)
    maps = {"a": np.linspace(0, 1, 16).reshape(1, 4, 4)}
    panels, (bar,) = panels_of(study.plot(images, maps, limits=(0.25, 0.75)), 1, 1)
    assert panels[0, 1].images[0].get_clim() == bar.get_xlim() == (0.25, 0.75)


@pytest.mark.parametrize("value", [0.0, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("limits", [None, (0.0, 1.0)])
def test_a_constant_gate_shows_nothing_of_the_image(value, limits):
    """On the pixels that are drawn."""
    images = np.zeros((1, 8, 8, 3), np.uint8)
    images[0, 2:6, 2:6] = 255
    wiggle = 0.049 * np.indices((4, 4)).sum(0) / 6  # Less than means anything.
    maps = {"flat": np.full((1, 4, 4), value), "wiggle": value + wiggle[None] - 0.0245}
    panels, _ = panels_of(study.plot(images, maps, limits=limits), 1, 2)
    for under in panels[0, 2::2]:
        pixels = np.asarray(under.images[0].get_array())
        assert (pixels == pixels[0, 0]).all()
        assert texts_of(under) == [f"constant at {value:.2f}"]


def test_an_open_gate_shows_the_image_and_a_closed_one_nothing():
    image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3) * 5
    faded = study.fade(image, np.array([[0.0, 1.0], [0.5, -3.0]]), (0.0, 1.0))
    np.testing.assert_array_equal(faded[:2, 2:], image[:2, 2:])
    assert (faded[:2, :2] == study.GRAY).all() and (faded[2:, 2:] == study.GRAY).all()
    half = (image[2:, :2].astype(float) + study.GRAY) / 2
    np.testing.assert_allclose(faded[2:, :2], half, atol=0.5)


def test_a_spread_of_a_twentieth_is_no_constant():
    gate = np.array([[0.5, 0.55]])
    assert not study.is_constant(gate) and study.is_constant(gate * 0.99)
