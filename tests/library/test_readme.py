"""Each Python block of the README runs alone and prints what the README says."""

import pytest

from flax_attn.resnet import _pretrained
from tests import tiny_hub
from tests.docs import markdown

BLOCKS = list(markdown.blocks(markdown.README))


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number, tmp_path, monkeypatch):
    tiny_hub.write(tmp_path)
    # Without the Hub, every repository is the same small one.
    monkeypatch.setattr(
        _pretrained, "_download", lambda _, name, *rest: tmp_path / name
    )
    markdown.run(*BLOCKS[number], markdown.fresh())


def test_there_are_blocks():
    assert len(BLOCKS) >= 5 and any(printed for _, printed in BLOCKS)


def test_it_is_short():
    assert len(markdown.README.read_text().splitlines()) <= 200
