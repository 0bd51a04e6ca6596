"""The Python blocks of a Markdown page, run as a reader would paste them."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / ".github" / "docs").glob("*.md"))
PAGES = [README, *sorted((ROOT / ".github").rglob("*.md"))]

# A block, and the output below it in a block of no language, if there is one.
_BLOCK = re.compile(
    r"^```python\n(.*?)^```$(?:\n\n```\n(.*?)^```$)?", re.DOTALL | re.MULTILINE
)
_LINK = re.compile(r"\]\((?!\w+:)([^)#]+)(?:#[^)]*)?\)")


def blocks(page):
    """The program of each block, as code, and what it must print."""
    text = page.read_text()
    for match in _BLOCK.finditer(text):
        # So that a traceback names the line of the page.
        code = "\n" * text[: match.start(1)].count("\n") + match[1]
        yield compile(code, str(page), "exec"), match[2]


def run(code, printed, namespace):
    """Runs a block and compares what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, namespace)
    if printed is not None:
        assert out.getvalue() == printed, out.getvalue()


def fresh():
    """Variables of a program that has not begun."""
    return {"__name__": "__main__"}


def broken_links(page):
    """The files that ``page`` links to and that do not exist."""
    targets = _LINK.findall(page.read_text())
    return [target for target in targets if not (page.parent / target).exists()]
