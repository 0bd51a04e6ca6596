import json
import os
import re
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import jupytext
import nbformat
import numpy as np
from nbclient import NotebookClient

import flax_attn
from tests import compilation

COLAB = Path(__file__).parents[2] / "colab"


def run(notebook, epochs):
    """Executes it with the form's number of epochs changed; returns what it printed."""
    (form,) = (
        cell for cell in notebook.cells if "epochs = 10  # @param" in cell.source
    )
    form.source = form.source.replace("epochs = 10", f"epochs = {epochs}")
    client = NotebookClient(
        notebook, timeout=170, resources={"metadata": {"path": str(COLAB)}}
    )
    client.execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return outputs, "".join(o.get("text", "") for o in outputs)


def test_runs_from_top_to_bottom(monkeypatch):
    # Two devices, as a stand-in for the cores of a TPU.
    devices = "--xla_force_host_platform_device_count=2"
    monkeypatch.setenv("XLA_FLAGS", f"{devices} {compilation.QUICK}")
    notebook = nbformat.read(COLAB / "flax_attn.ipynb", as_version=4)
    outputs, text = run(notebook, epochs=2)
    assert f"kept: jax=={version('jax')} jaxlib=={version('jaxlib')} flax==" in text
    assert f"from {COLAB.parent / 'flax_attn'}\n" in text
    assert "backend: cpu" in text and "WARNING: no accelerator" in text
    assert "ResNet-8, attention cbam, " in text and "on 2 × cpu" in text
    losses = [float(loss) for loss in re.findall(r"epoch +\d+: loss ([\d.]+)", text)]
    assert len(losses) == 2 and losses[-1] < losses[0]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
    if folder := os.environ.get("SAVE_NOTEBOOK"):
        nbformat.write(notebook, Path(folder) / "flax_attn.ipynb")


def test_it_needs_no_other_room():
    """Who installed the wheel has the library and its extras, and not ``train``."""
    text = (COLAB / "flax_attn.py").read_text()
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    assert "flax_attn" in imported and not {"train", "tests"} & imported


def test_the_form_offers_every_block():
    text = (COLAB / "flax_attn.py").read_text()
    (choices,) = re.findall(r"^attention = .*@param (\[.*\])$", text, re.MULTILINE)
    assert json.loads(choices) == ["none", *flax_attn.BLOCKS]


def test_every_choice_of_the_form_makes_a_network():
    cells = nbformat.read(COLAB / "flax_attn.ipynb", as_version=4).cells
    (form,) = (cell.source for cell in cells if "attention = " in cell.source[:200])
    (network,) = (cell.source for cell in cells if "make_attention, " in cell.source)
    network = network[: network.index("variables = jax.jit(model.init)")]
    for attention in ["none", *flax_attn.BLOCKS]:
        for init in ("identity", "default"):
            chosen = f'attention, init = "{attention}", "{init}"'
            namespace = {"jax": jax, "np": np, "flax_attn": flax_attn, "classes": 10}
            namespace["train_images"] = np.zeros((640, 32, 32, 3), np.uint8)
            exec("\n".join((form, chosen, network)), namespace)
            images = jnp.zeros((1, 32, 32, 3))
            shapes = jax.eval_shape(namespace["model"].init, jax.random.key(0), images)
            jax.eval_shape(namespace["optimizer"].init, shapes["params"])


def test_the_pair_is_in_step_and_has_no_outputs():
    script = jupytext.read(COLAB / "flax_attn.py")
    notebook = nbformat.read(COLAB / "flax_attn.ipynb", as_version=4)
    assert [c.source for c in notebook.cells] == [c.source for c in script.cells]
    assert not any(cell.get("outputs") for cell in notebook.cells)
    # A heading on the line of a cell's marker would be its title, and not shown.
    assert all(cell.source for cell in notebook.cells)
    assert not any("title" in cell.metadata for cell in notebook.cells)
    # No address of a repository: none is known to exist.
    assert not any("github" in cell.source for cell in notebook.cells)
