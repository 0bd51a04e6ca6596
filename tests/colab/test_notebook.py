import json
import os
import re
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

import flax_attn

COLAB = Path(__file__).parents[2] / "colab"


def test_runs_from_top_to_bottom():
    notebook = nbformat.read(COLAB / "flax_attn.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=170, resources={"metadata": {"path": str(COLAB)}}
    )
    client.execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    text = "".join(o.get("text", "") for o in outputs)
    assert "backend: cpu" in text and "WARNING: no accelerator" in text
    assert "ResNet-8, attention cbam, on digits" in text
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
    if folder := os.environ.get("SAVE_NOTEBOOK"):
        nbformat.write(notebook, Path(folder) / "flax_attn.ipynb")


def test_the_form_offers_every_block():
    text = (COLAB / "flax_attn.py").read_text()
    (choices,) = re.findall(r"^attention = .*@param (\[.*\])$", text, re.MULTILINE)
    assert json.loads(choices) == ["none", *flax_attn.BLOCKS]


def test_the_pair_is_in_step_and_has_no_outputs():
    script = jupytext.read(COLAB / "flax_attn.py")
    notebook = nbformat.read(COLAB / "flax_attn.ipynb", as_version=4)
    assert [c.source for c in notebook.cells] == [c.source for c in script.cells]
    assert not any(cell.get("outputs") for cell in notebook.cells)
    badge = "colab.research.google.com/github/"
    assert badge in notebook.cells[0].source
