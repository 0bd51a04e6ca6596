"""Pretrained networks from folders that timm writes, and the list of those covered."""

import importlib.util
import json
import re
from unittest import mock

import jax
import numpy as np
import pytest

from flax_attn import convert
from flax_attn.resnet import from_pretrained
from flax_attn.resnet._timm import arguments_of, fields_of
from tests import cases
from tests.convert.states import assert_same
from tests.docs import markdown
from tests.parity.test_parity_convert import arrays_of, randomize

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "timm"))),
    reason="the live comparison needs the group `parity`",
)

CBAM = {"block_args": {"attn_layer": "cbam"}}
SMALL = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128), "num_classes": 10}
# At 224 those whose weights are asked for most; a small network for each further part.
NETWORKS = {
    "seresnet50": (224, {}),
    "ecaresnet50d": (224, {}),
    "resnet50": (224, CBAM),
    "seresnext26t_32x4d": (64, SMALL),
    "resnetrs50": (64, SMALL),
    "resnet50s": (64, SMALL | {"block_args": {"attn_layer": "ceca"}}),
    "wide_resnet50_2": (64, SMALL | {"in_chans": 1}),
    "resnetblur18": (49, SMALL | {"block_args": {"attn_layer": "ese"}}),
    "resnetblur50d": (64, SMALL | {"num_classes": 0}),
    "resnetaa34d": (64, SMALL),
    "seresnextaa101d_32x8d": (64, SMALL),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_maps(timm, tmp_path, name):
    import torch

    size, arguments = NETWORKS[name]
    theirs = randomize(timm.create_model(name, **arguments))
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    model, variables, preprocessing = from_pretrained(tmp_path)
    assert_same(convert.to_torch(variables, naming="timm"), arrays_of(theirs))

    written = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    config = timm.data.resolve_data_config(pretrained_cfg=written)
    assert preprocessing.mean == tuple(config["mean"])
    assert preprocessing.std == tuple(config["std"])
    assert preprocessing.input_size == tuple(config["input_size"][1:])
    for key in ("interpolation", "crop_pct", "crop_mode"):
        assert getattr(preprocessing, key) == config[key]
    config = timm.data.resolve_data_config(pretrained_cfg=written, use_test_size=True)
    assert preprocessing.test_input_size == tuple(config["input_size"][1:])
    assert preprocessing.test_crop_pct == config["crop_pct"]

    images = cases.normal((1, size, size, len(preprocessing.mean)), 0)

    def run(variables, images):
        maps = model.apply(variables, images, method="features")
        return model.apply(variables, images), maps

    logits, maps = jax.jit(run)(variables, images)
    with torch.no_grad():
        inputs = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        expected = theirs(inputs).numpy()
        their_maps = theirs.forward_intermediates(inputs, intermediates_only=True)
    difference = np.abs(logits - expected).max() / max(np.abs(expected).max(), 1)
    print(f"{name}: {difference:.1e}, largest logit {np.abs(expected).max():.2f}")
    assert difference < 1e-4
    for ours, other in zip(maps, their_maps, strict=True):
        other = np.moveaxis(other.numpy(), 1, -1)
        scale = max(np.abs(other).max(), 1)
        np.testing.assert_allclose(ours / scale, other / scale, rtol=0, atol=1e-4)


def arguments_in_timm(timm, name):
    """What the function ``name`` gives to timm's ResNet, as ``arguments_of`` has it."""
    from timm.models import resnet

    def arguments(variant, pretrained, **arguments):
        return arguments

    with mock.patch.object(resnet, "_create_resnet", arguments):
        found = getattr(resnet, name)()
    if "aa_layer" in found:
        short = {"AvgPool2d": "avg", "BlurPool2d": "blur"}
        found["aa_layer"] = short[found["aa_layer"].__name__]
    if not isinstance(found.get("block_args", {}).get("attn_layer", ""), str):
        layer = found["block_args"]["attn_layer"]
        assert layer.func is timm.layers.SEModule
        found["block_args"] = {"attn_layer": "se", **layer.keywords}
    if not found.get("stem_type"):
        found.pop("stem_width", None)  # It is that of a deep stem.
    return found | {"block": found["block"].expansion}


def test_every_resnet_of_timm_is_covered_or_in_the_guide_with_a_reason(timm):
    covered, refused = [], []
    for name in timm.list_models(module="resnet"):
        try:
            ours = arguments_of(name)
        except ValueError as error:
            reason = re.search("which has (.*); the guide", str(error))[1]
            refused.append(f"| `{name}` | {reason} |")
        else:
            assert ours == arguments_in_timm(timm, name), name
            fields_of({"architecture": name})
            covered.append(f"`{name}`")
    guide = (markdown.ROOT / ".github" / "docs" / "weights.md").read_text()
    section = guide.split("## timm networks")[1].split("\n## ")[0]
    head = f"{len(covered)} of the {len(covered) + len(refused)} networks"
    assert head in section
    listed = section.split(head)[1].split("| not supported")[0]
    assert re.findall("`[a-z0-9_]+`", listed) == covered, " ".join(covered)
    assert re.findall("^[|] `.*", section, re.MULTILINE) == refused
