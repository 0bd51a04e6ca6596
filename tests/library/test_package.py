"""The package as a whole: what it exports and how its API is written."""

import dataclasses
import inspect
import re
import tomllib

import pytest
from flax import linen as nn

import flax_attn
from flax_attn import functional
from tests.docs import markdown

MODULES = [
    value
    for name in flax_attn.__all__
    if inspect.isclass(value := getattr(flax_attn, name))
    and issubclass(value, nn.Module)
]
TAIL = ["dtype", "param_dtype", "precision", "kernel_init", "bias_init"]
CBAM = (
    "reduction divisor pool spatial_kernel_size excite hidden_features kernel_size "
    "gamma b spatial_norm act gate use_bias"
)
FIELDS = {
    "SE": "reduction divisor hidden_features pool hidden_norm act gate use_bias",
    "ECA": "kernel_size gamma b pool padding gate use_bias",
    "ESE": "pool gate use_bias",
    "ChannelAttention": "reduction divisor pool excite hidden_features kernel_size "
    "gamma b padding hidden_norm act gate use_bias",
    "SpatialAttention": "kernel_size pool norm gate use_bias",
    "CBAM": CBAM,
    "LightCBAM": CBAM,
    "BAM": "reduction dilation hidden_features norm act gate use_bias",
    "scSE": "reduction combine hidden_features act gate use_bias",
}
DEFAULTS = {
    "reduction": 16,
    "divisor": None,
    "hidden_features": None,
    "pool": "avg",
    "act": nn.relu,
    "gate": nn.sigmoid,
    "use_bias": False,
    "kernel_size": None,
    "gamma": 2,
    "b": 1,
    "padding": "zeros",
    "excite": "mlp",
    "norm": None,
    "hidden_norm": None,
    "spatial_norm": None,
    "spatial_kernel_size": 7,
    "dtype": None,
    "precision": None,
}
OTHER_DEFAULTS = {
    ("SpatialAttention", "kernel_size"): 7,
    ("ChannelAttention", "pool"): "both",
    ("SpatialAttention", "pool"): "both",
    ("CBAM", "pool"): "both",
    ("LightCBAM", "pool"): "avg+max",
    ("BAM", "use_bias"): True,
    ("scSE", "reduction"): 2,
}


def test_the_public_names():
    assert len(set(flax_attn.__all__)) == len(flax_attn.__all__)
    assert {*FIELDS, "Attention", "ChannelsFirst"} <= {m.__name__ for m in MODULES}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_have_their_defaults(name):
    fields = {
        field.name: field.default
        for field in dataclasses.fields(getattr(flax_attn, name))
        if field.name not in ("parent", "name")
    }
    expected = [*FIELDS[name].split(), *TAIL]
    assert set(expected) <= set(fields)
    for field in expected:
        default = DEFAULTS.get(field, fields[field])
        default = OTHER_DEFAULTS.get((name, field), default)
        assert fields[field] == default, field


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_every_field_is_documented(module):
    bases = [c for c in module.__mro__ if issubclass(c, flax_attn.blocks.Attention)]
    docs = "".join(c.__doc__ for c in bases or [module])
    for field in dataclasses.fields(module):
        if field.name not in ("parent", "name"):
            assert f"  {field.name}: " in docs, field.name
    assert ">>>" in docs and "Raises:" in docs and "Attributes:" in module.__doc__


@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_keyword_only(name):
    """PyTorch's blocks are called with the channels: CBAM(256) would mean r = 256."""
    with pytest.raises(TypeError, match="positional"):
        getattr(flax_attn, name)(256)


def public_functions():
    for owner in (flax_attn, functional, flax_attn.inspect):
        for name, value in vars(owner).items():
            if inspect.isfunction(value) and not name.startswith("_"):
                yield pytest.param(value, id=name)


@pytest.mark.parametrize("function", list(public_functions()))
def test_options_are_keyword_only(function):
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not parameter.empty:
            assert parameter.kind == parameter.KEYWORD_ONLY, parameter


def test_submodules_that_are_imported_on_first_use():
    assert {"convert", "nnx", "presets", "CBAM"} <= set(dir(flax_attn))
    assert flax_attn.convert.to_flax
    with pytest.raises(AttributeError, match="no attribute 'conver'"):
        _ = flax_attn.conver


def test_the_address_of_the_repository_is_the_same_everywhere():
    root = markdown.ROOT
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    name = project["urls"]["Repository"].removeprefix("https://github.com/")
    files = ["pyproject.toml", "colab/flax_attn.py", ".github/CITATION.cff"]
    for page in [*markdown.PAGES, *(root / file for file in files)]:
        for found in re.findall(r"github[\w/.]*/([\w-]+/flax_attn)", page.read_text()):
            assert found == name, page
