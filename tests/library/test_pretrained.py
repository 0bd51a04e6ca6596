"""Pretrained networks from folders and from the Hub, without a network connection."""

import hashlib
import json
import sys
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_attn import convert, presets, resnet
from flax_attn.blocks.channel import hidden_width
from flax_attn.resnet import BasicBlock, BottleneckBlock, from_pretrained
from flax_attn.resnet._timm import fields_of
from tests import tiny_hub

NAME = "timm/seresnet18.tiny"


def error_of(*arguments, kind=ValueError, **options):
    """The error, which is one line."""
    with pytest.raises(kind) as error:
        from_pretrained(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_and_a_file(tmp_path):
    expected = tiny_hub.write(tmp_path)
    model, variables, preprocessing = from_pretrained(tmp_path)
    assert model == tiny_hub.MODEL
    chex.assert_trees_all_equal(variables, expected)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))
    assert preprocessing == resnet.Preprocessing(
        mean=(0.5, 0.25, 0.125),
        std=(0.5, 0.5, 0.25),
        input_size=(32, 48),
        interpolation="bilinear",
        crop_pct=0.9,
        test_input_size=(64, 64),
        test_crop_pct=0.9,
    )

    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    path = tmp_path / "other.safetensors"
    found = from_pretrained(str(path), dtype=jnp.bfloat16)
    assert found.model == tiny_hub.MODEL.clone(dtype=jnp.bfloat16)
    chex.assert_trees_all_equal(found.variables, expected)
    assert "there is no" in error_of(tmp_path)


def test_the_configuration_may_be_one_dict(tmp_path):
    expected = tiny_hub.write(tmp_path)
    flat = {k: v for k, v in tiny_hub.CONFIG.items() if k != "pretrained_cfg"}
    (tmp_path / "config.json").write_text(json.dumps(flat | {"crop_pct": 0.95}))
    model, variables, preprocessing = from_pretrained(tmp_path)
    assert model == tiny_hub.MODEL
    chex.assert_trees_all_equal(variables, expected)
    assert preprocessing == resnet.Preprocessing(crop_pct=0.95, test_crop_pct=0.95)


@pytest.mark.parametrize(
    "changed, message",
    [
        ("mean", "`pretrained_cfg` of timm must be an object"),
        ({"mean": 0.5}, "`mean` of timm must be a list of numbers, got 0.5"),
        ({"std": [0.5, "0.5", 0.5]}, "`std` of timm must be a list of positive"),
        ({"mean": []}, "`mean` of timm must be a list of numbers, got []"),
        ({"input_size": [224, 224]}, "must be a list of channels, height and width"),
        ({"input_size": [3, 224.0, 224]}, "`input_size` of timm must be a list of"),
        (
            {"mean": [0.5, float("inf"), 0.5]},
            "`mean` of timm must be a list of numbers",
        ),
        ({"std": [0.5, 0, 0.5]}, "`std` of timm must be a list of positive numbers"),
        (
            {"crop_pct": "0.9"},
            "`crop_pct` of timm must be a positive number, got '0.9'",
        ),
        ({"crop_pct": 0}, "`crop_pct` of timm must be a positive number, got 0"),
        ({"crop_pct": float("nan")}, "`crop_pct` of timm must be a positive number"),
        ({"interpolation": 3}, "`interpolation` of timm must be a string, got 3"),
    ],
)
def test_a_configuration_of_wrong_types(tmp_path, changed, message):
    tiny_hub.write(tmp_path)
    config = tiny_hub.CONFIG | {"pretrained_cfg": changed}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert message in error_of(tmp_path)


@pytest.mark.parametrize("dtype", [np.int8, np.complex64, bool])
def test_weights_that_are_no_floats(tmp_path, dtype):
    state = convert.to_torch(tiny_hub.write(tmp_path), naming="timm")
    state["fc.bias"] = state["fc.bias"].astype(dtype)
    convert.save(tmp_path / "model.safetensors", state, overwrite=True)
    assert f"floating-point weights, got {np.dtype(dtype)}" in error_of(tmp_path)


def test_normalize():
    constants = resnet.Preprocessing(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    images = np.ones((2, 4, 4, 3), np.float32)
    actual = constants.normalize(images)
    assert actual.shape == images.shape and actual.dtype == jnp.float32
    np.testing.assert_allclose(actual[0, 0, 0], [1, 3, 0.5])
    with pytest.raises(ValueError, match="got uint8; pass images / 255"):
        constants.normalize(images.astype(np.uint8))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache of an earlier download, with the Hub out of reach."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    tiny_hub.write(source)
    root = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(snapshot.name)
    for file in source.iterdir():
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(blob)
    return cache


def test_the_hub(hub):
    assert from_pretrained(NAME, cache_dir=hub).model == tiny_hub.MODEL
    message = error_of("timm/seresnet50.a1_in1k", cache_dir=hub, kind=ConnectionError)
    assert "cannot be reached" in message and "pass a folder" in message

    blob = next(hub.rglob("model.safetensors")).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    message = error_of(NAME, cache_dir=hub)
    assert "was changed after the download" in message and str(blob) in message


@pytest.mark.parametrize(
    "error, kind, message",
    [
        ("RepositoryNotFoundError", ValueError, "`source` must be a folder or file"),
        ("GatedRepoError", ValueError, "asks you to agree to its terms"),
        ("RevisionNotFoundError", ValueError, "`revision` must be .* got 'v9'"),
        ("EntryNotFoundError", ValueError, "which has none"),
        ("LocalEntryNotFoundError", ConnectionError, "cannot be reached"),
        ("HfHubHTTPError", ConnectionError, r"does not give .* \(503 busy\)"),
    ],
)
def test_errors_of_the_hub(tmp_path, monkeypatch, error, kind, message):
    library = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    error = getattr(pytest.importorskip("huggingface_hub.errors"), error)

    def fail(*arguments, **options):
        assert options["revision"] == "v9"
        # Their constructors want a response.
        raised = error.__new__(error)
        raised.args = ("503 busy\nand more",)
        raise raised

    monkeypatch.setattr(library, "hf_hub_download", fail)
    with pytest.raises(kind, match=message) as found:
        from_pretrained(NAME, revision="v9")
    assert "\n" not in str(found.value) and isinstance(found.value.__cause__, error)


def test_names_that_no_repository_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "pass e.g. 'timm/seresnet50" in error_of("seresnet50")
    pytest.importorskip("huggingface_hub")
    assert "which is neither" in error_of("timm/seresnet50..a1")


@pytest.mark.parametrize("module", ["huggingface_hub", "safetensors"])
def test_missing_extras(tmp_path, monkeypatch, module):
    tiny_hub.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    source = NAME if module == "huggingface_hub" else tmp_path
    assert "pip install" in error_of(source, kind=ImportError)


def test_files_that_were_changed(tmp_path):
    shape = {"layers": [1, 1], "channels": [8, 16]}
    tiny_hub.write(tmp_path, model_args=shape, num_classes=4)
    message = error_of(tmp_path)
    assert "2 of the wrong shape: fc.bias as params/head/bias (3,): exp" in message
    tiny_hub.write(tmp_path, model_args=shape | {"layers": [1, 2]})
    assert "14 missing: batch_stats/stage2_block2" in error_of(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "is truncated" in error_of(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text()[:-8])
    assert "config.json is not JSON" in error_of(tmp_path)
    config.write_text("[]")
    assert "with an `architecture`" in error_of(tmp_path)
    config.unlink()
    assert "there is no" in error_of(weights)


# As in timm's documentation of its variants; tests/parity compares all names.
@pytest.mark.parametrize(
    "name, expected",
    [
        ("resnet34", {"stages": (3, 4, 6, 3), "block": BasicBlock, "attention": None}),
        (
            "ecaresnet50t",
            {
                "block": BottleneckBlock,
                "attention": presets.timm_eca,
                "deep_stem": True,
                "stem_features": (24, 32, 64),
                "pooled_shortcut": True,
                "stem_pool": "max",
            },
        ),
        (
            "resnet101s",
            {
                "stages": (3, 4, 23, 3),
                "stem_features": (64, 64, 128),
                "pooled_shortcut": False,
            },
        ),
        ("resnetrs420", {"stages": (4, 44, 87, 4), "stem_pool": "conv"}),
    ],
)
def test_architectures(name, expected):
    fields, channels = fields_of({"architecture": name})
    assert {key: fields[key] for key in expected} == expected
    assert channels == 3 and fields["num_classes"] == 1000


def test_blocks_of_architectures():
    def block(name):
        block = fields_of({"architecture": name})[0]["block"]
        return block.func, block.keywords

    resnext = {"groups": 32, "width_per_group": 4}
    assert block("seresnext50_32x4d") == (BottleneckBlock, resnext)
    assert block("wide_resnet50_2") == (BottleneckBlock, {"width_per_group": 128})
    assert block("resnetblur18") == (BasicBlock, {"anti_alias": "blur"})
    attention = fields_of({"architecture": "resnetrs50"})[0]["attention"]
    assert hidden_width(attention(), 256) == 64


@pytest.mark.parametrize(
    "name, changed, message",
    [
        ("resnet50_gn", {}, "got 'resnet50_gn', which has GroupNorm"),
        ("vit_base_patch16_224", {}, "which is none of them"),
        ("resnet33", {}, "which is none of them"),
        ("resnet18", {"global_pool": "max"}, "`global_pool` of timm must be 'avg'"),
        ("resnet18", {"img_size": 5}, "`img_size` of timm must be left out"),
        ("resnet18", {"num_classes": -1}, "`num_classes` of timm .* of at least 0"),
        ("resnet18", {"num_classes": "10"}, "`num_classes` .* of at least 0.* '10'"),
        ("resnet18", {"cardinality": 2}, "`cardinality` of timm must be 1 with basic"),
        ("resnet18", {"base_width": 4}, "`base_width` of timm must be 64 with basic"),
        ("resnet18", {"in_chans": 0}, "`in_chans` of timm .* of at least 1"),
        ("resnet18", {"layers": 2}, "`layers` of timm must be a list of integers"),
        ("resnet18", {"avg_down": "no"}, "`avg_down` of timm must be true or false"),
        ("resnet18", {"block_args": ["se"]}, "`block_args` of timm must be an object"),
        ("resnet18", ["se"], "`model_args` of timm must be an object"),
        ("resnet18", {"stem_type": "thin"}, "`stem_type` of timm"),
        ("resnet18", {"channels": (8, 8, 8, 8)}, "each twice the last"),
        ("resnet18", {"block_args": {"attn_layer": "ge"}}, "'eca' or 'ceca' or 'cbam'"),
        ("resnet18", {"block_args": {"attn_kwargs": 1}}, "an `attn_layer` alone"),
        ("resnet18", {"block_args": {"rd_ratio": 0.25}}, "`rd_ratio` .* used with se"),
        ("resnetrs50", {"aa_layer": "avg"}, "`replace_stem_pool` of timm"),
    ],
)
def test_networks_that_are_not_covered(name, changed, message):
    with pytest.raises(ValueError, match=message):
        fields_of({"architecture": name, "model_args": changed})


def test_arguments_without_effect_and_attention_by_argument():
    changed = {
        "drop_rate": 0.1,
        "pretrained_strict": True,
        "global_pool": "avg",
        "in_chans": 1,
    }
    changed |= {"block_args": {"attn_layer": "ese"}}
    fields, channels = fields_of({"architecture": "resnet18", "model_args": changed})
    assert channels == 1
    block = fields["attention"]()
    assert block.use_bias and block.gate is nn.hard_sigmoid
    assert isinstance(fields["attention"], partial)
