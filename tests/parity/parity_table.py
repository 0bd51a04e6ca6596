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
from tests.parity import make_golden, timm_layers

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


def _official(name, *arguments):
    from tests.parity import torch_official

    return getattr(torch_official, name)(*arguments)


def _below(theirs, ours="", **layers):
    """``layers``, from our names to theirs, each below the other's module."""
    return {ours + name: theirs + layer for name, layer in layers.items()}


MLP = {"reduce": "fc1", "expand": "fc2"}
CONV = {"conv": "conv"}
CONV_NORM = {"conv": "conv", "norm": "bn"}
CBAM = {
    **_below("channel.", "channel/", **MLP),
    **_below("spatial.conv.", "spatial/", **CONV_NORM),
}
OFFICIAL_CBAM = {
    **_below("ChannelGate.mlp.", "channel/", reduce="1", expand="3"),
    **_below("SpatialGate.spatial.", "spatial/", **CONV_NORM),
}
BAM_CHANNEL = {"reduce": "fc_0", "reduce_norm": "bn_1", "expand": "fc_final"}
BAM_SPATIAL = {
    "spatial_reduce": "conv_reduce0",
    "spatial_reduce_norm": "bn_reduce0",
    "spatial_conv1": "conv_di_0",
    "spatial_conv1_norm": "bn_di_0",
    "spatial_conv2": "conv_di_1",
    "spatial_conv2_norm": "bn_di_1",
    "spatial_expand": "conv_final",
}
OFFICIAL_BAM = {
    **_below("channel_att.gate_c.gate_c_", **BAM_CHANNEL),
    **_below("spatial_att.gate_s.gate_s_", **BAM_SPATIAL),
}
COORDINATE = dict(
    reduce="conv1", hidden_norm="bn1", expand_h="conv_h", expand_w="conv_w"
)


def _eca(name, widths):
    """A preset of ECA-Net; ``widths`` are its kernel's, by the number of channels."""

    def make(channels):
        return _official("ECANet", widths[channels])

    return Preset("official: ECA-Net", name, make, CONV, tuple(widths))


def _timm(kind, layers, channels, *, name=None, **fields):
    """The preset of what ``timm.layers.create_attn`` calls ``kind``."""

    def make(channels):
        return timm_layers.load().create_attn(kind, channels)

    preset = name or f"timm_{kind}"
    return Preset(f"timm: `{kind}`", preset, make, layers, channels, **fields)


def _context(kind, mlp):
    layers = {"pool": "conv_attn"} | _below(f"{mlp}.", norm="norm", **MLP)
    return _timm(kind, layers, (64, 20), ignored=("conv_attn.bias",))


def _gathering(*, extent=0, extra_params=False, use_mlp=False):
    fields = {"extent": extent, "extra_params": extra_params, "use_mlp": use_mlp}
    given = ", ".join(f"{name}={value}" for name, value in fields.items() if value)
    hidden = 4 if use_mlp else None
    block = partial(GatherExcite, **fields, hidden_features=hidden, use_bias=True)
    layers = _below("mlp.", **MLP) if use_mlp else {}
    if extra_params:
        layers |= _below("gather.", gather1="0", gather1_norm="1")
        layers |= _below("gather.", gather2="3", gather2_norm="4")

    def with_norm(*, train):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        return partial(block, hidden_norm=norm)

    def torch(channels):
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


# 20, 24 and 200 are not multiples of 16; below 8, timm's ECA is wider than the formula.
PRESETS = [
    Preset(
        "official: SENet",
        "official_se",
        partial(_official, "SENet"),
        MLP,
        (64, 20, 200),
    ),
    _eca("official_eca50", {256: 3, 512: 5, 1024: 5, 2048: 7}),
    _eca("official_eca101", {512: 3}),
    Preset(
        "official: CBAM",
        "official_cbam",
        partial(_official, "CBAM"),
        OFFICIAL_CBAM,
        (64, 20),
    ),
    Preset(
        "official: BAM",
        "official_bam",
        partial(_official, "BAM"),
        OFFICIAL_BAM,
        (64, 48),
    ),
    Preset(
        "official: SimAM",
        "official_simam",
        lambda channels: _official("SimAM"),
        {},
        (20,),
        small=(1, 2),  # The unbiased variance of one element is NaN.
    ),
    _timm("se", MLP, (6, 200)),
    _timm("ese", {"excite": "fc"}, (6, 200)),
    _timm("eca", CONV, (6, 20, 128)),
    _timm("ceca", CONV, (6, 20, 128)),
    _timm("lcbam", CBAM, (64, 24), shares_ties=True),
    _timm("cbam", CBAM, (64, 24), mean_first=True, shares_ties=True),
    _timm("coord", COORDINATE, (64, 20), name="timm_coordinate"),
    _context("gc", "mlp_scale"),
    _context("gca", "mlp_add"),
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
        module, variables, x, cotangent, jit=jit_as_users_do
    )
    actual = {"y": y, "x": d_x, **named(d_variables["params"])}
    return errors(actual, expected)


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
        columns = [], [], []  # Of the output, the gradients and the statistics.
        for name, error in found:
            statistics = name.startswith("batch_stats/")
            columns[0 if name == "y" else 2 if statistics else 1].append(error)
        cells = [f"{np.max(column):.0e}" if column else "" for column in columns]
        cells = ["0" if cell == "0e+00" else cell for cell in cells]
        print(f"| {reference} | `{block}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
