# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Attention blocks for convolutional networks in Flax
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/flax-attn/flax_attn/blob/main/colab/flax_attn.ipynb)
#
# Applies every block to an array, trains a ResNet with one of them and shows where it
# attends. On Colab choose *Runtime → Change runtime type* for a TPU or GPU. Without one
# everything runs on the CPU, only slower.

# %% [markdown]
# ## Install
# The installed versions of jax and flax are kept: another jax may not find the TPU.

# %%
import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

REPOSITORY = "https://github.com/flax-attn/flax_attn"

if importlib.util.find_spec("flax_attn") is None or not Path("../train").exists():
    if not Path("flax_attn").exists():
        subprocess.run(["git", "clone", "--depth", "1", REPOSITORY], check=True)
    pins = Path("constraints.txt")
    pins.write_text("".join(f"{p}=={version(p)}\n" for p in ("jax", "jaxlib", "flax")))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "-e", "flax_attn[train]"]
        + ["-c", str(pins)],
        check=True,
    )
    os.chdir("flax_attn/colab")
sys.path.insert(0, "..")

# %%
import jax

print("backend:", jax.default_backend())
print("devices:", *jax.devices())
if jax.default_backend() == "cpu":
    print(
        "WARNING: no accelerator. Everything below runs, but training is slow. Choose a "
        "TPU or GPU runtime, or train on the digits."
    )

# %% [markdown]
# ## Every block maps a feature map to one of the same shape

# %%
import flax_attn

x = jax.random.normal(jax.random.key(0), (8, 32, 32, 64))  # (batch, H, W, C)
for name in flax_attn.BLOCKS:
    block = flax_attn.create(name)
    y, variables = block.init_with_output(jax.random.key(1), x)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    print(f"{name:13} {x.shape} -> {y.shape}  {parameters:5} parameters")

# %% [markdown]
# ## Train a ResNet with a block in every residual branch
# The digits are 1,797 scans that come with scikit-learn; CIFAR is downloaded. With
# `init = "identity"` every gate starts at 1.

# %%
# @title What to train { display-mode: "form" }
dataset = "digits"  # @param ["digits", "cifar10", "cifar100"]
attention = "cbam"  # @param ["none", "se", "se-max", "eca", "ese", "channel", "channel-conv", "spatial", "cbam", "cbam-conv", "lcbam", "bam", "scse", "scse-max"]
init = "default"  # @param ["default", "identity"]
depth = 8  # @param [8, 20, 32, 44, 56] {type:"raw"}
epochs = 5  # @param {type:"integer"}

# %%
from train.data import cifar as data
from train.engine import loop
from train.engine.config import Config

config = Config(
    dataset=dataset, attention=attention, init=init, depth=depth, epochs=epochs
)
images = data.load(config.dataset, config.data_dir)
run = loop.train(config, images)
print(run.summary())

# %%
# %matplotlib inline
from IPython.display import display
from matplotlib import pyplot as plt

from train.report import plot_curves

display(plot_curves({attention: run.history}))
plt.close("all")

# %% [markdown]
# ## Where it attends
# `flax_attn.inspect.attention_maps(model, variables, x)` reads every gate of a model by
# its path. Here are the spatial gates of the last block of each stage, drawn over test
# images, and how far they are open. Blocks without a spatial gate have nothing to show.

# %%
from flax_attn import inspect
from train.engine import devices
from train.study import gates

inputs = loop.make_inputs(run.config, images, devices.make_mesh(1))
shown, maps = gates.spatial_gates(run.model, run.variables, inputs, count=4)
if maps:
    display(gates.plot(shown, maps))
    print(inspect.statistics(maps))
else:
    print(f"`{attention}` has no spatial gate.")
