"""The guides run from top to bottom, and the reference has every public name."""

import re
from types import FunctionType

import pytest

import flax_attn
from flax_attn import convert, functional, insertion, inspect, nnx, presets, resnet
from tests.docs import markdown

# What `functional` imports is for the blocks.
DEFINED_THERE = {
    name
    for name, value in vars(functional).items()
    if getattr(value, "__module__", "") == functional.__name__ and name[0] != "_"
}
REFERENCE = markdown.ROOT / ".github" / "docs" / "reference"


@pytest.mark.parametrize("page", markdown.GUIDES, ids=lambda page: page.stem)
def test_guide(page):
    namespace = markdown.fresh()
    for code, printed in markdown.blocks(page):
        markdown.run(code, printed, namespace)


def test_guides_have_programs_and_outputs():
    found = [block for page in markdown.GUIDES for block in markdown.blocks(page)]
    assert len(found) >= 20
    assert sum(printed is not None for _, printed in found) >= 5


@pytest.mark.parametrize(
    "page", markdown.PAGES, ids=lambda page: str(page.relative_to(markdown.ROOT))
)
def test_links_to_files_exist(page):
    assert markdown.broken_links(page) == []


def test_the_index_links_to_every_guide():
    text = (markdown.ROOT / ".github" / "docs" / "index.md").read_text()
    names = {page.name for page in markdown.GUIDES} - {"index.md"}
    assert {name for name in names if f"]({name})" not in text} == set()


def test_the_reference_has_every_public_name():
    text = "\n".join(page.read_text() for page in REFERENCE.glob("*.md"))
    documented = set(re.findall(r"auto\w+:: (flax_attn[\w.]*)", text))
    assert {f"flax_attn.{name}" for name in flax_attn.__all__} <= documented
    missing = {
        f"{module.__name__}.{value.__name__}"
        for module in (convert, functional, insertion, inspect, nnx, presets, resnet)
        for name, value in vars(module).items()
        if name in (DEFINED_THERE if module is functional else module.__all__)
        if isinstance(value, type | FunctionType) and name not in flax_attn.__all__
    }
    assert missing - documented == set()
    # The presets that are no functions are in a table.
    assert {n for n in presets.__all__ if f"``{n}" not in presets.__doc__} == set()
