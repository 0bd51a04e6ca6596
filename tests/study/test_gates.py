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
from train.engine import devices, loop, model, setup
from train.engine.config import Config
from train.engine.model import variables_of
from train.study import gates as study


def network(stages, attention):
    fields = {"block": BasicBlock, "num_classes": 10, "width": 4}
    attention = ATTENTIONS[attention]
    return ResNet(stages, **fields, imagenet_stem=False, attention=attention)


def inputs_of(*arrays):
    images = ImageSet(*arrays, 10, flip=False)
    return DeviceInputs(images, Config(batch_size=4), devices.make_mesh(1))


def test_spatial_gates_and_grad_cam_are_those_of_each_stages_last_block():
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    labels = np.arange(12, dtype=np.int32) % 10
    model = network((2, 1), "cbam")
    variables = variables_for(model, jnp.zeros((1, 8, 8, 3)))
    # As means and variances, of which a random one would be negative.
    variables["batch_stats"] = jax.tree.map(np.ones_like, variables["batch_stats"])
    fed = inputs_of(pixels[:8], labels[:8], pixels[8:], labels[8:])
    shown, gates = study.spatial_gates(model, variables, fed, count=3)
    np.testing.assert_array_equal(shown, pixels[8:11])
    assert {name: gate.shape for name, gate in gates.items()} == {
        "stage1_block2": (3, 8, 8),
        "stage2_block1": (3, 4, 4),
    }
    known = pixels[:8].astype(np.float64) / 255
    inputs = (pixels[8:11] / 255 - known.mean((0, 1, 2))) / known.std((0, 1, 2))
    last = {"capture_intermediates": lambda module, _: module.name == "stage2_block1"}
    apply = jax.jit(partial(model.apply, mutable=["intermediates"], **last))
    _, state = apply(variables, inputs.astype(np.float32))
    for name, gate in gates.items():
        attention = state["intermediates"][name]["attention"]
        (expected,) = attention["spatial"]["spatial_gate"]
        np.testing.assert_allclose(gate, expected[..., 0], atol=1e-5)
        assert gate.dtype == np.float32 and 0 < gate.min() < gate.max() <= 1
    cam = study.grad_cam(model, variables, fed, count=3)
    (last,) = state["intermediates"]["stage2_block1"]["__call__"]
    head = variables["params"]["head"]["kernel"].T[labels[8:11]]
    expected = np.maximum(np.einsum("nijc,nc->nij", last, head) / 16, 0)
    assert cam.dtype == np.float32 and (expected > 0).any()
    np.testing.assert_allclose(cam, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ["none", "se"])
def test_without_spatial_attention_there_are_no_spatial_gates(attention):
    pixels, labels = np.zeros((8, 4, 4, 3), np.uint8), np.zeros(8, np.int32)
    pixels[0] = 255
    model = network((1,), attention)
    variables = variables_for(model, jnp.zeros((1, 4, 4, 3)))
    fed = inputs_of(pixels, labels, pixels, labels)
    shown, gates = study.spatial_gates(model, variables, fed, count=2)
    assert gates == {} and shown.shape == (2, 4, 4, 3)


def test_the_blocks_with_spatial_gates():
    """By the articles; BAM has one gate of both kinds."""
    expected = {"spatial", "cbam", "cbam-conv", "lcbam", "sse", "scse", "scse-max"}
    assert set(filter(study.has_spatial_gate, ATTENTIONS)) == expected
    assert not study.has_spatial_gate("a block of another version")
    # The global context is added to the map.
    assert {n for n in ATTENTIONS if not study.gates_of(n)} == {"none", "gc"}
    assert study.gates_of("official_eca50") == {"channel_gate"}
    assert study.gates_of("timm_cbam") == {"channel_gate", "spatial_gate"}


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


def test_gates_over_steps_are_those_of_the_run(monkeypatch):
    """Before the first step those of its initial variables, at the end the trained."""
    monkeypatch.setattr(model, "cifar_resnet", tiny_run.network)
    # Three steps, of batches that the test part does not fill.
    config = Config(attention="cbam", depth=8, batch_size=24, epochs=3, devices=1)
    config, images = setup.validate(config), tiny_run.images()
    with pytest.raises(ValueError, match="`steps` must be at most 3, .* cbam, got 4"):
        study.gates_over_steps(config, images, steps=4)
    found = study.gates_over_steps(config, images, steps=3)
    assert {path: values.shape for path, values in found.items()} == {
        f"stage1_block1/attention/{kind}/{kind}_gate": (4, 3)
        for kind in ("channel", "spatial")
    }
    trained = loop.train(config, images)
    inputs = setup.make_inputs(config, images, devices.make_mesh(1))
    item, _ = next(inputs.test_batches())
    shown = inputs.test_batch(inputs.test_data, item)[0][: inputs.test_size]
    initial = loop.Training(config, inputs).progress.state
    for step, variables in ((0, variables_of(initial)), (3, trained.variables)):
        _, sown = trained.model.apply(
            variables, shown, train=True, mutable=["intermediates", "batch_stats"]
        )
        attention = sown["intermediates"]["stage1_block1"]["attention"]
        for kind in ("channel", "spatial"):
            (gate,) = attention[kind][f"{kind}_gate"]
            expected = np.quantile(gate, [0.05, 0.5, 0.95])
            actual = found[f"stage1_block1/attention/{kind}/{kind}_gate"][step]
            np.testing.assert_allclose(actual, expected, atol=1e-5)
