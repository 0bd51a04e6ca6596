"""Sphinx configuration: guides in Markdown, API reference from the docstrings."""

import sys
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from flax import linen as nn

import flax_attn

project = "flax_attn"
copyright = "The flax_attn authors"
release = version = flax_attn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"flax_attn {release}"
pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
html_theme_options = {
    "source_repository": pyproject["project"]["urls"]["Repository"],
    "source_branch": "main",
    "source_directory": ".github/docs/",
}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_attr_annotations = False
napoleon_custom_sections = [("Attributes", "params_style")]


def _without_fields(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: Any, result: Any
) -> tuple[str | None, str | None]:
    # Hides Flax's own arguments and long reprs; the docstring lists the fields.
    if what == "class" and issubclass(obj, nn.Module):
        return "(**fields)", None
    return signature, result


def setup(app: Any) -> None:
    """Registers the hook for signatures."""
    app.connect("autodoc-process-signature", _without_fields)
