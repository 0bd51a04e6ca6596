"""timm's own layers, for the tests, without torchvision and without timm's models."""

import functools
import importlib
import importlib.util
import sys
import types

# What timm.layers imports from torchvision but the blocks never call.
TORCHVISION = {
    "torchvision": (),
    "torchvision.ops": (),
    "torchvision.ops.misc": ("FrozenBatchNorm2d",),
    "torchvision.models": (),
    "torchvision.models.feature_extraction": (
        "create_feature_extractor",
        "get_graph_node_names",
    ),
}


@functools.cache
def load():
    """The package ``timm.layers``; an ``import timm`` elsewhere is unaffected."""
    spec = importlib.util.find_spec("timm")
    # Without this empty parent, timm/__init__.py would import every model.
    parent = types.ModuleType("timm")
    parent.__path__ = spec.submodule_search_locations
    stubs = {name: types.ModuleType(name) for name in TORCHVISION}
    for name, stub in stubs.items():
        stub.__path__ = []
        vars(stub).update({inner: type(inner, (), {}) for inner in TORCHVISION[name]})
    before = _remove_foreign()
    sys.modules.update({"timm": parent, **stubs})
    try:
        return importlib.import_module("timm.layers")
    finally:
        _remove_foreign()
        sys.modules.update(before)


def _remove_foreign():
    """Removes timm and torchvision from sys.modules, and returns them."""
    names = [n for n in sys.modules if n.split(".")[0] in ("timm", "torchvision")]
    return {name: sys.modules.pop(name) for name in names}


def gather_excite(channels, *, extent, extra_params, hidden=None):
    """timm's ``GatherExcite``, put together here: its constructor fails in 1.0.31."""
    import torch

    timm = load()
    module = timm.gather_excite.GatherExcite(channels, extent=extent, use_mlp=False)
    if extra_params:
        conv = functools.partial(timm.create_conv2d, channels, channels, 3, stride=2)
        layers = [conv(depthwise=True), torch.nn.BatchNorm2d(channels)]
        more = [conv(depthwise=True), torch.nn.BatchNorm2d(channels)]
        module.gather = torch.nn.Sequential(*layers, torch.nn.ReLU(), *more)
    if hidden:
        module.mlp = timm.mlp.ConvMlp(channels, hidden)
    return module
