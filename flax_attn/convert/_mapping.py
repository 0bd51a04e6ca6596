"""State dicts to variables and back, by the rules, with a report of what misfits."""

import re
from collections.abc import Container, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from flax_attn.convert._arrays import (
    Arrays,
    flat_arrays,
    holds_numbers,
    leaves_of,
    to_numpy,
)
from flax_attn.convert._report import ConversionError, Report
from flax_attn.convert._rules import (
    BLOCK_RULES,
    BlockIndex,
    Naming,
    Rule,
    Side,
    fits,
    join_key,
    residual_rules,
    shape_text,
    split_key,
    top_rules,
)
from flax_attn.convert._unwrap import strip_prefixes, unwrap
from flax_attn.functional import checks


def to_flax(
    state: Mapping[str, Any],
    *,
    naming: Naming = "timm",
    like: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> dict[str, Any]:
    """Turns a PyTorch state dict into Flax variables.

    Kernels are transposed, BatchNorm statistics go to ``batch_stats``,
    ``num_batches_tracked`` is dropped, and the inputs of the spatial kernel are
    reordered to [max, mean]. Values are copied bit for bit. A checkpoint is unwrapped:
    the dict ``state_dict`` or ``model`` is used, and the prefixes ``module.`` and
    ``_orig_mod.`` are removed; each of these steps prints a line::

      >>> import jax, numpy as np
      >>> from flax_attn import convert
      >>> state = {
      ...     "fc1.weight": np.ones((4, 64, 1, 1)),
      ...     "fc2.weight": np.ones((64, 4, 1, 1)),
      ... }
      >>> jax.tree.map(np.shape, convert.to_flax(state))
      {'params': {'expand': {'kernel': (4, 64)}, 'reduce': {'kernel': (64, 4)}}}

    Args:
      state: a dict from dotted keys to NumPy, JAX or PyTorch arrays, or a checkpoint.
      naming: one of ``Naming`` (default: "timm").
      like: variables, or the result of ``jax.eval_shape`` for ``init``, with the paths
        and shapes of the result. Without it, missing modules are not detected; only a
        missing weight or norm statistic within a module is, and shapes are checked only
        as far as the names determine them (default: None).
      strict: whether to raise an error for keys that do not fit. If False, they are
        printed and skipped, and missing values are taken from ``like`` if it contains
        arrays (default: True).

    Returns:
      A tree of NumPy arrays, copied, with the dtypes of ``state``; values from ``like``
      keep their dtypes.

    Raises:
      ConversionError: keys are unused, missing, of the wrong shape or repeated. Also
        with ``strict=False`` if no key fits or a key is ambiguous.
      ValueError: ``naming`` is unknown, an argument is not a dict with string keys, a
        checkpoint holds two dicts that may be the weights, or a value is not an array
        that NumPy can hold.
    """
    arrays = _convert(state, "torch", naming=naming, like=like, strict=strict)
    return unflatten_dict(arrays, sep="/")


def to_torch(
    variables: Mapping[str, Any],
    *,
    naming: Naming = "timm",
    like: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> Arrays:
    """Turns Flax variables into a PyTorch state dict; undoes ``to_flax``.

    ``num_batches_tracked`` is not written: ``load_state_dict`` does not need it. A
    ``GlobalContext`` needs ``like``, since timm's ``gc`` and ``gca`` have the same
    parameters under other names; the bias of their ``conv_attn``, which softmax
    cancels, is written as zero, and dropped by ``to_flax``::

      >>> import jax, numpy as np
      >>> from flax_attn import convert
      >>> variables = {"params": {"conv": {"kernel": np.ones((3, 1, 1))}}}
      >>> jax.tree.map(np.shape, convert.to_torch(variables))
      {'conv.weight': (1, 1, 3)}

    Args:
      variables: the collections ``params`` and, where there is a BatchNorm,
        ``batch_stats``.
      naming: one of ``Naming`` (default: "timm").
      like: a state dict with the keys and shapes of the result, such as
        ``model.state_dict()``; it decides where a path has two keys (default: None).
      strict: as in ``to_flax`` (default: True).

    Returns:
      A dict of NumPy arrays, copied, with the dtypes of ``variables``; values from
      ``like`` keep their dtypes.

    Raises:
      ConversionError: as in ``to_flax``.
      ValueError: as in ``to_flax``.
    """
    return _convert(variables, "flax", naming=naming, like=like, strict=strict)


def _convert(
    state: Mapping[str, Any],
    source: Side,
    *,
    naming: Naming,
    like: Mapping[str, Any] | None,
    strict: bool,
) -> Arrays:
    checks.check_choice("naming", naming, tuple(BLOCK_RULES))
    report = Report()
    if source == "torch":
        flat = strip_prefixes(flat_arrays("state", unwrap("`state`", state)))
    else:
        flat = flat_arrays("variables", state)
    template = {} if like is None else _template(like, source)
    moved = _translate(flat, source, naming, report, template)
    if like is not None:
        moved = _compare(moved, template, report)
    if not moved:
        report.headline = _nothing_fits(flat, source, naming, report)
        raise ConversionError(report)
    report.headline = f"Not all keys fit (naming {naming!r}).{_bam_note(report)}"
    if report and strict:
        report.headline += " `strict=False` (--lenient) converts the rest."
        raise ConversionError(report)
    if report:
        print(report)
    # Only these need values: the rest of `like` may be shapes alone.
    kept = {
        key: np.array(to_numpy(key, x))
        for key, x in template.items()
        if key not in moved and holds_numbers(x)
    }
    return kept | {key: array for key, (_, array) in moved.items()}


def _translate(
    state: Arrays,
    source: Side,
    naming: Naming,
    report: Report,
    template: Mapping[str, Any],
) -> dict[str, tuple[str, np.ndarray]]:
    """From new keys to old keys and new arrays, by the rules.

    ``template`` only decides between two readings of a key.
    """
    moved: dict[str, tuple[str, np.ndarray]] = {}
    target: Side = "flax" if source == "torch" else "torch"
    modules = _modules(state, source, report)
    for (block, module), keys in modules.items():
        arrays = {leaf: state[key] for leaf, key in keys.items()}
        rules = _rules_for(block, module, arrays, modules, source, naming)
        rules = _one_reading(rules, block, keys, state, template, source, naming)
        rule = next(iter(rules), None)
        if rule is not None:
            report.missing += _absent(rule, block, arrays, source)
        for leaf, key in keys.items():
            line = f"{key} {state[key].shape}"
            if rule is None or leaf not in rule.kind.targets(source):
                report.unused.append(line)
                continue
            new_leaf = rule.kind.targets(source)[leaf]
            if new_leaf is None:
                continue
            expected = rule.kind.shape(leaf, arrays, source)
            new_key = join_key(target, block, getattr(rule, target), new_leaf)
            if not fits(state[key].shape, expected):
                report.misshapen.append(f"{line}: expected {shape_text(expected)}")
            elif new_key in moved:
                report.repeated.append(f"{line}: {moved[new_key][0]} gives {new_key}")
            else:
                array = rule.kind.move(state[key], target)
                moved[new_key] = key, array
                if source == "flax" and rule.kind.zero_bias:
                    bias = np.zeros(array.shape[:1], array.dtype)
                    moved[join_key(target, block, rule.torch, "bias")] = key, bias
    return moved


def _absent(rule: Rule, block: BlockIndex, arrays: Arrays, source: Side) -> list[str]:
    """The required arrays that an incomplete module lacks."""
    if not arrays.keys() & rule.kind.targets(source).keys():
        return []
    module = getattr(rule, source)
    return [
        f"{join_key(source, block, module, leaf)} "
        + shape_text(rule.kind.shape(leaf, arrays, source))
        for leaf in rule.kind.needed(source)
        if leaf not in arrays
    ]


def _modules(
    state: Arrays, source: Side, report: Report
) -> dict[tuple[BlockIndex, str], dict[str, str]]:
    """The keys by module, then by the name of the array in it."""
    modules: dict[tuple[BlockIndex, str], dict[str, str]] = {}
    for key, array in state.items():
        if (parts := split_key(source, key)) is None:
            report.unused.append(f"{key} {array.shape}")
        else:
            block, module, leaf = parts
            modules.setdefault((block, module), {})[leaf] = key
    return modules


def _rules_for(
    block: BlockIndex,
    module: str,
    arrays: Arrays,
    modules: Container[tuple[BlockIndex, str]],
    source: Side,
    naming: Naming,
) -> list[Rule]:
    """The rules for a module of ``modules``: by its name, then those that fit best."""
    rules = residual_rules(source, naming) if block else top_rules(source, naming)
    rules = [rule for rule in rules if getattr(rule, source) == module]
    marked = [
        rule
        for rule in rules
        if rule.mark and (block, getattr(rule.mark, source)) in modules
    ]
    rules = marked or [rule for rule in rules if rule.mark is None]
    # The weight has the most axes; a norm without one has statistics of its shape.
    shape = max((array.shape for array in arrays.values()), key=len)
    axes = [rule for rule in rules if len(rule.kind.shapes[source]) == len(shape)]
    fit = [rule for rule in axes if fits(shape, rule.kind.shapes[source])]
    return fit or (axes or rules)[:1]


def _one_reading(
    rules: list[Rule],
    block: BlockIndex,
    keys: dict[str, str],
    state: Arrays,
    template: Mapping[str, Any],
    source: Side,
    naming: Naming,
) -> list[Rule]:
    """Of ``rules`` those for one new module, or an error that names all of them."""
    target: Side = "flax" if source == "torch" else "torch"
    places = {
        join_key(target, block, getattr(rule, target), new_leaf): (rule, key)
        for rule in rules
        for leaf, key in keys.items()
        if (new_leaf := rule.kind.targets(source).get(leaf))
    }
    possible = [rule for rule, _ in places.values()]
    wanted = [rule for place, (rule, _) in places.items() if place in template]
    for candidates in (possible, wanted):
        if len({getattr(rule, target) for rule in candidates}) == 1:
            return candidates
    # Without a mark these are aliases, and the first is written.
    if not places or (source == "flax" and rules[0].mark is None):
        return rules[:1]
    key = next(key for _, key in places.values())
    readings = " or ".join(f"`{p}`" for p, (_, old) in places.items() if old == key)
    raise ConversionError(
        Report(
            f"`{key}` {state[key].shape} may be {readings} (naming {naming!r}); pass "
            "`like` (--like) to decide."
        )
    )


def _compare(
    moved: dict[str, tuple[str, np.ndarray]], template: dict[str, Any], report: Report
) -> dict[str, tuple[str, np.ndarray]]:
    """The part of ``moved`` that has a key and a shape of ``template``."""
    fit = {}
    for new_key, (key, array) in moved.items():
        line = f"{key} as {new_key} {array.shape}"
        if new_key not in template:
            report.unused.append(line)
        elif array.shape != (shape := tuple(template[new_key].shape)):
            report.misshapen.append(f"{line}: expected {shape}")
        else:
            fit[new_key] = key, array
    # Replaces what the rules found missing: a norm may have no scale.
    absent = [key for key in template if key not in moved]
    report.missing = [f"{key} {tuple(template[key].shape)}" for key in absent]
    return fit


def _template(like: Mapping[str, Any], source: Side) -> dict[str, Any]:
    template = leaves_of("like", like)
    for key, value in template.items():
        if not hasattr(value, "shape"):
            raise ValueError(
                f"`like` must hold arrays or shapes, got {value!r} at {key!r}; pass "
                "variables, a state dict, or what jax.eval_shape gives."
            )
    if source == "torch" and template and not any(map(_is_variable, template)):
        raise ValueError(
            "`like` must be Flax variables, with the collection `params`, got the key "
            f"{next(iter(template))!r}; pass those of `init`, or what jax.eval_shape "
            "gives for it."
        )
    if source == "flax" and any(map(_is_variable, template)):
        raise ValueError(
            "`like` must be a state dict, got the key "
            f"{next(filter(_is_variable, template))!r}; pass model.state_dict()."
        )
    return {k: x for k, x in template.items() if not k.endswith(".num_batches_tracked")}


def _is_variable(key: str) -> bool:
    return key.startswith(("params/", "batch_stats/"))


def _nothing_fits(state: Arrays, source: Side, naming: Naming, report: Report) -> str:
    """The headline where no key fits: the most likely reason."""
    if not state:
        return "There are no arrays to convert."
    dotted = [key for key in state if "." in key]
    if source == "torch" and not dotted and all("/" in key for key in state):
        return "These are already Flax variables; use `to_torch` (--to torch)."
    if source == "flax" and not any(map(_is_variable, state)):
        if dotted:
            return "These are not Flax variables; use `to_flax` (--to flax)."
        return (
            "The collection is missing; pass {'params': ...}, plus 'batch_stats' if "
            "there is a BatchNorm."
        )
    hint = f"wrong model or wrong naming.{_bam_note(report)}"
    if source == "torch":
        names = [name for name in BLOCK_RULES if _takes(state, name, all_keys=True)]
        if outer := [key.partition("/")[0] for key in dotted if "/" in key]:
            hint = f"they are in a nested dict; pass state[{outer[0]!r}]."
        # Before the prefix: without `ca.`, half of a CBAM would pass for an SE.
        elif names and naming not in names:
            quoted = " or ".join(map(repr, names))
            hint = f"these are names of {quoted}; pass that `naming`."
        elif prefix := _prefix(state, naming):
            hint = f"all start with {prefix!r}; strip it, as key.removeprefix does."
    return f"No key fits (naming {naming!r}): {hint}"


def _takes(state: Arrays, naming: Naming, *, all_keys: bool = False) -> bool:
    """Whether ``naming`` knows some keys of ``state``, or all of them."""
    report = Report()
    try:
        moved = _translate(state, "torch", naming, report, {})
    except ConversionError:  # A key has two readings.
        return True
    return bool(moved) and not (all_keys and report)


def _bam_note(report: Report) -> str:
    if not any("gate_c.gate_c_" in line for line in report.unused):
        return ""
    return (
        " For the official BAM, use naming 'official_bam' and convert each block "
        "separately."
    )


def _prefix(state: Arrays, naming: Naming) -> str:
    """The common prefix without which some keys fit, or an empty string."""
    first = next(iter(state))
    # The empty one first: keys that fit as they are only misfit the template.
    for end in [0, *(dot.end() for dot in re.finditer(r"\.", first))]:
        prefix = first[:end]
        if not all(key.startswith(prefix) for key in state):
            break
        bare = {key.removeprefix(prefix): array for key, array in state.items()}
        if _takes(bare, naming):
            return prefix
    return ""
