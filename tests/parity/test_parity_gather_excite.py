"""GatherExcite against timm's module, with every way to gather and to excite."""

import importlib.util
from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn

from flax_attn import GatherExcite
from tests import cases
from tests.parity import make_golden, parity_table, timm_layers

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "timm"))),
    reason="the comparison needs torch and timm, of the extra `parity`",
)
CHANNELS, HIDDEN, EXTENT = 20, 4, 4


def made(extent, extra_params, use_mlp):
    """timm's module, put together here: its own constructor fails in timm 1.0.31."""
    import torch

    timm = timm_layers.load()
    module = timm.gather_excite.GatherExcite(CHANNELS, extent=extent, use_mlp=False)
    if extra_params:
        halves = [
            timm.create_conv2d(CHANNELS, CHANNELS, 3, stride=2, depthwise=True)
            for _ in range(2)
        ]
        norms = [torch.nn.BatchNorm2d(CHANNELS) for _ in range(2)]
        act = torch.nn.ReLU()
        module.gather = torch.nn.Sequential(
            halves[0], norms[0], act, halves[1], norms[1]
        )
    if use_mlp:
        module.mlp = timm.mlp.ConvMlp(CHANNELS, HIDDEN)
    return module.eval()


LAYERS = {
    "gather1": "gather.0",
    "gather1_norm": "gather.1",
    "gather2": "gather.3",
    "gather2_norm": "gather.4",
    "reduce": "mlp.fc1",
    "expand": "mlp.fc2",
}


@pytest.mark.parametrize("shape", [(2, 8, 12), (2, 7, 9)], ids=str)
@pytest.mark.parametrize(
    "extent, extra_params, use_mlp",
    [
        (0, False, False),
        (0, False, True),
        (EXTENT, False, False),
        (EXTENT, True, False),
        (EXTENT, True, True),
    ],
)
def test_output_and_gradient(extent, extra_params, use_mlp, shape):
    import torch

    ours = GatherExcite(
        extent=extent,
        extra_params=extra_params,
        use_mlp=use_mlp,
        hidden_features=HIDDEN,
        hidden_norm=partial(nn.BatchNorm, use_running_average=True),
        use_bias=True,
    )
    x, cotangent = (cases.normal((*shape, CHANNELS), seed) for seed in (1, 2))
    variables = cases.variables_for(ours, x)
    if "batch_stats" in variables:
        variables["batch_stats"] = jax.tree.map(
            lambda a: np.abs(a) + 0.5, variables["batch_stats"]
        )
    theirs = made(extent, extra_params, use_mlp)
    tensors = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    with torch.no_grad():
        for name, leaf in parity_table.named(variables).items():
            _, layer, kind = name.split("/")
            tensor = tensors[f"{LAYERS[layer]}.{parity_table.LEAVES[kind]}"]
            if leaf.ndim > 1:
                leaf = make_golden.to_torch(leaf).reshape(tensor.shape)
            tensor.copy_(torch.as_tensor(leaf))
    expected = make_golden.output_and_gradient(theirs, x, cotangent)
    y, _, d_x = cases.forward_and_gradients(ours, variables, x, cotangent)
    found = parity_table.errors({"y": y, "x": d_x}, expected)
    assert not {n: e for n, e in found.items() if not e <= parity_table.LIMIT}
