"""``python -m tests.parity.parity_table`` prints the errors against PyTorch.

The guide on porting has its table; it needs the dependency group ``parity``.

A row is a block of a reference: the article, the official code, timm. Its figures are
the largest errors over the block's cases and both implementations, each relative to the
largest entry of the array that is compared, or to 1 where that is larger. The tests
demand at most ``LIMIT`` of every case.
"""

import dataclasses
import inspect
import zlib
from collections.abc import Callable
from functools import partial
from itertools import chain

import jax
import numpy as np
from flax import linen as nn

from flax_attn import GatherExcite, presets
from tests import cases
from tests.compilation import jit_as_users_do
from tests.parity import make_golden

LIMIT = 1e-5


def named(tree):
    """The leaves of a tree of dictionaries, by their path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(part.key for part in path): leaf for path, leaf in leaves}


def errors(actual, expected):
    """The largest error of each array, relative to its largest entry or 1."""
    assert actual.keys() == expected.keys()
    found = {}
    for name, array in expected.items():
        assert actual[name].shape == array.shape, name
        error = np.abs(np.asarray(actual[name], np.float64) - array).max()
        found[name] = float(error / max(np.abs(array).max(), 1.0))
    return found


@dataclasses.dataclass(frozen=True)
class Preset:
    """A preset, or a block with fields, and the PyTorch module it corresponds to."""

    reference: str
    name: str
    """A name in ``flax_attn.presets``, or where ``block`` is given, a call of it."""
    torch: Callable
    """Creates the module for C channels."""
    layers: dict[str, str]
    """The module's name for each layer of ours."""
    channels: tuple[int, ...]
    mean_first: bool = False
    """Whether the spatial kernel's inputs are [mean, max]."""
    ignored: tuple[str, ...] = ()
    """The module's tensors that change nothing."""
    small: tuple[int, int] = (1, 1)
    """The size of the smallest map that the module takes."""
    shares_ties: bool = False
    """Whether elements that tie for a maximum share its gradient, as with amax."""
    block: Callable | None = None
    """Creates what no preset has: a partial of a block, or a function of ``train``."""

    @property
    def ours(self):
        return self.block or getattr(presets, self.name)

    @property
    def has_norm(self):
        return "train" in inspect.signature(self.ours).parameters

    @property
    def has_maximum(self):
        return any(name.startswith("spatial/") for name in self.layers)

    def make(self, *, train):
        return self.ours(train=train) if self.has_norm else self.ours


def _official(name):
    def make(*arguments):
        from tests.parity import torch_official

        return getattr(torch_official, name)(*arguments)

    return make


def _timm(file, name, **options):
    def make(channels):
        from tests.parity import timm_layers

        return getattr(getattr(timm_layers.load(), file), name)(channels, **options)

    return make


def _eca(widths):
    return lambda channels: _official("ECANet")(widths[channels])


def _context(mlp):
    layers = {"reduce": "fc1", "norm": "norm", "expand": "fc2"}
    inside = {ours: f"{mlp}.{theirs}" for ours, theirs in layers.items()}
    return {"pool": "conv_attn", **inside}


def _gathering(*, extent=0, extra_params=False, use_mlp=False):
    fields = {"extent": extent, "extra_params": extra_params, "use_mlp": use_mlp}
    given = ", ".join(f"{name}={value}" for name, value in fields.items() if value)
    hidden = 4 if use_mlp else None
    block = partial(GatherExcite, **fields, hidden_features=hidden, use_bias=True)
    layers = {}
    if extra_params:
        layers |= {"gather1": "gather.0", "gather1_norm": "gather.1"}
        layers |= {"gather2": "gather.3", "gather2_norm": "gather.4"}
    if use_mlp:
        layers |= {"reduce": "mlp.fc1", "expand": "mlp.fc2"}

    def with_norm(*, train):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        return partial(block, hidden_norm=norm)

    def torch(channels):
        from tests.parity import timm_layers

        fields = {"extent": extent, "extra_params": extra_params, "hidden": hidden}
        return timm_layers.gather_excite(channels, **fields)

    return Preset(
        "timm: `ge`",
        f"GatherExcite({given})",
        torch,
        layers,
        (20,),
        small=(8, 4),  # Of one value, BatchNorm's gradient is rounding.
        block=with_norm if extra_params else block,
    )


MLP = {"reduce": "fc1", "expand": "fc2"}
CONV = {"conv": "conv"}
CBAM = {
    "channel/reduce": "channel.fc1",
    "channel/expand": "channel.fc2",
    "spatial/conv": "spatial.conv.conv",
    "spatial/norm": "spatial.conv.bn",
}
# 20, 24 and 200 are not multiples of 16; below 8, timm's ECA is wider than the formula.
PRESETS = [
    Preset(
        "official: SENet",
        "official_se",
        _official("SENet"),
        {"reduce": "down", "expand": "up"},
        (64, 20, 200),
    ),
    Preset(
        "official: ECA-Net",
        "official_eca50",
        _eca({256: 3, 512: 5, 1024: 5, 2048: 7}),
        CONV,
        (256, 512, 1024, 2048),
    ),
    Preset(
        "official: ECA-Net",
        "official_eca101",
        _eca({256: 3, 512: 3, 1024: 5, 2048: 7}),
        CONV,
        (512,),
    ),
    Preset(
        "official: CBAM",
        "official_cbam",
        _official("CBAM"),
        {
            "channel/reduce": "ChannelGate.mlp.1",
            "channel/expand": "ChannelGate.mlp.3",
            "spatial/conv": "SpatialGate.spatial.conv",
            "spatial/norm": "SpatialGate.spatial.bn",
        },
        (64, 20),
    ),
    Preset(
        "official: BAM",
        "official_bam",
        _official("BAM"),
        {
            "reduce": "channel_att.gate_c.gate_c_fc_0",
            "reduce_norm": "channel_att.gate_c.gate_c_bn_1",
            "expand": "channel_att.gate_c.gate_c_fc_final",
            "spatial_reduce": "spatial_att.gate_s.gate_s_conv_reduce0",
            "spatial_reduce_norm": "spatial_att.gate_s.gate_s_bn_reduce0",
            "spatial_conv1": "spatial_att.gate_s.gate_s_conv_di_0",
            "spatial_conv1_norm": "spatial_att.gate_s.gate_s_bn_di_0",
            "spatial_conv2": "spatial_att.gate_s.gate_s_conv_di_1",
            "spatial_conv2_norm": "spatial_att.gate_s.gate_s_bn_di_1",
            "spatial_expand": "spatial_att.gate_s.gate_s_conv_final",
        },
        (64, 48),
    ),
    Preset(
        "official: SimAM",
        "official_simam",
        lambda channels: _official("SimAM")(),
        {},
        (20,),
        small=(1, 2),  # The unbiased variance of one element is NaN.
    ),
    Preset("timm: `se`", "timm_se", _timm("squeeze_excite", "SEModule"), MLP, (6, 200)),
    Preset(
        "timm: `ese`",
        "timm_ese",
        _timm("squeeze_excite", "EffectiveSEModule"),
        {"excite": "fc"},
        (6, 200),
    ),
    Preset("timm: `eca`", "timm_eca", _timm("eca", "EcaModule"), CONV, (6, 20, 128)),
    Preset("timm: `ceca`", "timm_ceca", _timm("eca", "CecaModule"), CONV, (6, 20, 128)),
    Preset(
        "timm: `lcbam`",
        "timm_lcbam",
        _timm("cbam", "LightCbamModule"),
        CBAM,
        (64, 24),
        shares_ties=True,
    ),
    Preset(
        "timm: `cbam`",
        "timm_cbam",
        _timm("cbam", "CbamModule"),
        CBAM,
        (64, 24),
        mean_first=True,
        shares_ties=True,
    ),
    Preset(
        "timm: `coord`",
        "timm_coordinate",
        _timm("coord_attn", "CoordAttn"),
        {
            "reduce": "conv1",
            "hidden_norm": "bn1",
            "expand_h": "conv_h",
            "expand_w": "conv_w",
        },
        (64, 20),
    ),
    Preset(
        "timm: `gc`",
        "timm_gc",
        _timm("global_context", "GlobalContext"),
        _context("mlp_scale"),
        (64, 20),
        ignored=("conv_attn.bias",),
    ),
    Preset(
        "timm: `gca`",
        "timm_gca",
        _timm("global_context", "GlobalContext", fuse_add=True, fuse_scale=False),
        _context("mlp_add"),
        (64, 20),
        ignored=("conv_attn.bias",),
    ),
    _gathering(),
    _gathering(extent=4),
    _gathering(extent=4, extra_params=True),
    _gathering(extent=4, extra_params=True, use_mlp=True),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """A preset on an input."""

    preset: Preset
    shape: tuple[int, ...]
    """(N, H, W, C)."""
    train: bool = False
    relu: bool = False
    """Whether the input went through a ReLU, so that elements tie at zero."""

    @property
    def name(self):
        size = "x".join(map(str, self.shape))
        flags = "-train" * self.train + "-relu" * self.relu
        return f"{self.preset.name}-{size}{flags}"

    @property
    def has_gradients(self):
        return not (self.relu and self.preset.shares_ties)

    def module(self, **fields):
        return self.preset.make(train=self.train)(**fields)

    def arrays(self):
        """Variables, input and cotangent."""
        seed = zlib.crc32(self.name.encode()) % 10**6
        x = cases.normal(self.shape, seed)
        if self.relu:
            # One whole channel and one whole position are zero.
            x = np.maximum(x, 0)
            x[..., 0] = x[:, 0, 0] = 0
        variables = dict(cases.variables_for(self.module(), x, seed))
        if "batch_stats" in variables:
            variables["batch_stats"] = jax.tree_util.tree_map_with_path(
                lambda path, a: np.abs(a) + 0.5 if path[-1].key == "var" else a,
                variables["batch_stats"],
            )
        return variables, x, cases.normal(self.shape, seed + 1)


def _cases(preset):
    first, *others = preset.channels
    train = preset.has_norm
    yield Case(preset, (2, 5, 7, first))
    # For a few, nearly equal logits, float32 cannot give BatchNorm's gradient to 1e-5,
    # in PyTorch or here.
    yield Case(preset, (8, *preset.small, first), train)
    for channels in others:
        yield Case(preset, (2, 5, 7, channels), train)
    if preset.has_maximum:
        yield Case(preset, (2, 5, 4, first), train, relu=True)


CASES = [case for preset in PRESETS for case in _cases(preset)]


def run_flax(case, implementation, variables, x, cotangent):
    """Our output, gradients and new batch statistics for ``case``."""
    module = case.module(implementation=implementation)

    @jit_as_users_do
    def run(variables, x, cotangent):
        def apply(params, x):
            both = variables | {"params": params}
            return module.apply(both, x, mutable=["batch_stats"])

        y, pullback, state = jax.vjp(apply, variables["params"], x, has_aux=True)
        return y, pullback(cotangent), state

    y, (d_params, d_x), state = run(variables, x, cotangent)
    arrays = {"y": y} | named(state)
    if case.has_gradients:
        arrays |= {"x": d_x} | named({"params": d_params})
    return arrays


def run_torch(case, variables, x, cotangent):
    """The same from the PyTorch module, in Flax's layouts and under our names."""
    import torch

    module = case.preset.torch(x.shape[-1]).train(case.train)
    places = dict(_places(case.preset, variables, module))
    with torch.no_grad():
        for name, leaf in named(variables).items():
            places[name].copy_(_to_torch(case.preset, leaf, places[name].shape))
    counts = _count_samples(module)
    arrays = make_golden.output_and_gradient(module, x, cotangent)
    if not case.has_gradients:
        del arrays["x"]
    for name, leaf in named(variables).items():
        if name.startswith("batch_stats"):
            arrays[name] = places[name].numpy().copy()
            if case.train and name.endswith("var"):
                _, *layer, _ = name.split("/")
                norm = module.get_submodule(case.preset.layers["/".join(layer)])
                n = counts[norm]
                kept = (1 - norm.momentum) * leaf
                # The biased variance, of which Flax keeps the average.
                arrays[name] = kept + (arrays[name] - kept) * (n - 1) / n
        elif case.has_gradients:
            arrays[name] = _to_flax(case.preset, places[name].grad, leaf.shape)
    return arrays


LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def _count_samples(module):
    """The number of samples of each BatchNorm, once ``module`` has been called."""
    import torch

    counts = {}

    def count(norm, arguments, _):
        counts[norm] = arguments[0].numel() // norm.num_features

    for norm in module.modules():
        if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
            norm.register_forward_hook(count)
    return counts


def _places(preset, variables, module):
    """The PyTorch tensor for each of our leaves; none is left over."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    tensors = {n: t for n, t in tensors.items() if t.ndim}  # Without the step counter.
    for name in named(variables):
        _, *layer, leaf = name.split("/")
        yield name, tensors.pop(f"{preset.layers['/'.join(layer)]}.{LEAVES[leaf]}")
    assert set(tensors) == set(preset.ignored)


def _to_torch(preset, leaf, shape):
    import torch

    if leaf.ndim == 1:
        return torch.tensor(leaf)
    if preset.mean_first and leaf.ndim == 4:
        leaf = np.flip(leaf, 2).copy()
    return make_golden.to_torch(leaf).reshape(shape)


def _to_flax(preset, weight, shape):
    if weight.ndim == 1:
        return weight.numpy()
    array = make_golden.to_flax(weight).reshape(shape)
    return np.flip(array, 2) if preset.mean_first and array.ndim == 4 else array


def preset_errors(case):
    """The error of each array in a preset's case, for each implementation."""
    arrays = case.arrays()
    expected = run_torch(case, *arrays)
    return {
        implementation: errors(run_flax(case, implementation, *arrays), expected)
        for implementation in cases.IMPLEMENTATIONS
    }


def article_errors(case, implementation, expected):
    """The error of each array in a case of the article's blocks."""
    variables, x, cotangent = case.arrays()
    module = case.module(implementation=implementation)
    y, d_variables, d_x = cases.forward_and_gradients(
        module, variables, x, cotangent, jit_as_users_do
    )
    actual = {"y": y, "x": d_x, **named(d_variables["params"])}
    return errors(actual, expected)


def _columns(found):
    """The largest error of the output, of the gradients and of the statistics."""
    columns = {"output": [], "gradients": [], "statistics": []}
    for name, error in found:
        statistics = name.startswith("batch_stats/")
        column = "output" if name == "y" else "gradients"
        columns["statistics" if statistics else column].append(error)
    return [np.max(column) if column else None for column in columns.values()]


def article_rows():
    """Every block of the article, with its errors by the name of the array."""
    for block in cases.ARTICLE:
        found = []
        for case in (case for case in cases.LIVE if case.block == block):
            expected = make_golden.run(case)
            for implementation in cases.IMPLEMENTATIONS:
                found += article_errors(case, implementation, expected).items()
        yield "article", "article_" + block.replace("-", "_"), found


def preset_rows():
    """Every other preset, with its errors by the name of the array."""
    for preset in PRESETS:
        found = []
        for case in (case for case in CASES if case.preset == preset):
            for errors_of in preset_errors(case).values():
                found += errors_of.items()
        yield preset.reference, preset.name, found


def main():
    """Prints the table."""
    print("| reference | preset | output | gradients | batch statistics |")
    print("|---|---|---|---|---|")
    for reference, block, found in chain(article_rows(), preset_rows()):
        cells = [_cell(error) for error in _columns(found)]
        print(f"| {reference} | `{block}` | {' | '.join(cells)} |", flush=True)


def _cell(error):
    if error is None:
        return ""
    return f"{error:.0e}" if error else "0"


if __name__ == "__main__":
    main()
