"""A pretrained network as timm writes it, but small."""

import json

import numpy as np

from flax_attn import convert, presets
from flax_attn.resnet import BasicBlock, ResNet
from tests.cases import variables_for

MODEL = ResNet(
    (1, 1),
    BasicBlock,
    num_classes=3,
    width=8,
    attention=presets.timm_se,
    stem_features=(64,),
)
CONFIG = {
    "architecture": "seresnet18",
    "num_classes": 3,
    "global_pool": "avg",
    "model_args": {"layers": [1, 1], "channels": [8, 16], "num_classes": 3},
    "pretrained_cfg": {
        "input_size": [3, 32, 48],
        "test_input_size": [3, 64, 64],
        "interpolation": "bilinear",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.5, 0.25, 0.125],
        "std": [0.5, 0.5, 0.25],
        "num_classes": 3,
        "pool_size": None,
    },
}


def write(folder, weights="model.safetensors", **changed):
    """Writes a configuration and weights as timm does; returns the variables."""
    variables = variables_for(MODEL, np.zeros((1, 32, 32, 3), np.float32))
    state = convert.to_torch(variables, naming="timm")
    for key in [key for key in state if key.endswith("running_var")]:
        state[key.replace("running_var", "num_batches_tracked")] = np.array(7)
    (folder / "config.json").write_text(json.dumps(CONFIG | changed))
    convert.save(folder / weights, state, overwrite=True)
    return variables
