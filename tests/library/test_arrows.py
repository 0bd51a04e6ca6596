"""The layers of the packages: which module may import which, by their syntax trees."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATHS = [
    path
    for top in ("flax_attn", "train")
    for path in sorted((ROOT / top).rglob("*.py"))
]
LONGEST = 400
# A module may import from the rooms of the lines above its own, and from its own room.
# Of the training room, the configuration and the devices are what everything reads.
FLOORS = (
    ("flax_attn.functional",),
    ("flax_attn.blocks",),
    (
        *("flax_attn.resnet", "flax_attn.presets", "flax_attn.insertion"),
        *("flax_attn.inspect", "flax_attn.cost", "flax_attn.convert", "flax_attn.nnx"),
    ),
    ("flax_attn",),
    ("train.engine.config",),
    ("train.engine.devices",),
    ("train.data",),
    ("train.engine",),
    ("train.study",),
    ("train",),
)
# Within one floor: inspection looks at what insertion has put in, and it names
# submodules in one way for both of Flax's APIs; a pretrained network has the attention
# of a preset and converted weights.
BESIDE = {
    ("flax_attn.resnet", "flax_attn.presets"),
    ("flax_attn.resnet", "flax_attn.convert"),
    ("flax_attn.nnx", "flax_attn.insertion"),
    ("flax_attn.inspect", "flax_attn.insertion"),
}


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PATHS}


def room_of(module):
    """The room that ``module`` is in, the innermost one, and the floor of the room."""
    rooms = [(room, i) for i, floor in enumerate(FLOORS) for room in floor]
    inside = [r for r in rooms if f"{module}.".startswith(f"{r[0]}.")]
    return max(inside, key=lambda r: len(r[0]))


def imports_of(path):
    """(module, name or None, whether it is imported at once) for each import."""
    tree = ast.parse(path.read_text())
    later = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        at_once = id(node) not in later
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, at_once
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in MODULES:
                    yield submodule, None, at_once
                else:
                    yield node.module, alias.name, at_once


IMPORTS = {module: list(imports_of(path)) for module, path in MODULES.items()}
modules = pytest.mark.parametrize("module", MODULES)


@modules
def test_arrows_go_down_only(module):
    """And none to the tests, which are not shipped."""
    room, floor = room_of(module)
    up = []
    for target, _, _ in IMPORTS[module]:
        top = target.split(".")[0]
        assert top != "tests"
        if top not in ("flax_attn", "train"):
            continue
        below, its_floor = room_of(target)
        if target == "flax_attn" and room.startswith("train"):
            continue
        same = its_floor == floor and below == room
        if not (its_floor < floor or same or (room, below) in BESIDE):
            up.append(target)
    assert not up, f"{module}, in the room {room}, imports {up}"


def test_no_circles():
    arrows = defaultdict(set)
    for module, found in IMPORTS.items():
        arrows[module] = {t for t, _, at_once in found if at_once and t in MODULES}
    left = dict(arrows)
    while ready := {m for m, targets in left.items() if not targets & left.keys()}:
        left = {m: targets for m, targets in left.items() if m not in ready}
    assert not left, f"these modules import each other in a circle: {sorted(left)}"


@modules
def test_no_private_names_of_another_room(module):
    room, _ = room_of(module)
    taken = [
        f"{target}.{name or ''}"
        for target, name, _ in IMPORTS[module]
        if target in MODULES
        and room_of(target)[0] != room
        and any(
            part.startswith("_") and not part.startswith("__")
            for part in (*target.split("."), name or "")
        )
    ]
    assert not taken, taken


@pytest.mark.parametrize("heavy", ["torch", "optax", "matplotlib", "orbax"])
def test_what_the_library_imports_at_once(heavy):
    for module, found in IMPORTS.items():
        if module.startswith("flax_attn"):
            tops = {t.split(".")[0] for t, _, at_once in found if at_once}
            assert heavy not in tops, module


@pytest.mark.parametrize("module", ["flax_attn", "flax_attn.convert"])
def test_import_is_light(module):
    """Beyond what Linen itself imports, it brings jax and flax."""
    code = (
        f"import flax.linen, sys; before = set(sys.modules); import {module}; "
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    new = set(result.stdout.split())
    assert "flax_attn" in new and new <= {"flax_attn", "flax", "jax"}, new


def test_no_file_is_too_long():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in PATHS
    }
    long = {path for path, length in lengths.items() if length > LONGEST}
    assert not long, f"more than {LONGEST} lines: {sorted(long)}"


def test_shipped_code_checks_with_errors_and_not_with_assert():
    for path in PATHS:
        asserts = [
            n
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Assert)
        ]
        assert not asserts, f"{path}:{asserts[0].lineno}"
