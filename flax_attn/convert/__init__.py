"""PyTorch weights to Flax variables and back, for the blocks and for whole ResNets.

The same is a command, which needs no model::

  python -m flax_attn.convert resnet.safetensors flax.safetensors --to flax

Modules are translated by name. ``naming`` says whose names they are:

* ``"timm"``: SE's ``fc1`` and ``fc2`` are 1x1 convolutions, CBAM is ``channel.fc1``,
  ``spatial.conv.conv`` and ``spatial.conv.bn``, and the spatial kernel's inputs are
  [mean, max], which are swapped here. In a residual block all of it lies under ``se``.
* ``"torchvision"``: ResNets without attention, and ``torchvision.ops``'s
  ``SqueezeExcitation``.
* ``"article"``: the classes of the article, with ``fc_layers.0``, ``fc_layers.2`` and
  ``conv``; in CBAM under ``channel_attention_block`` and ``spatial_attention_block``;
  in a residual block under ``attention``.

ResNets have the same names in all three: ``conv1``, ``bn1``, ``layer1.0.conv1``,
``layer1.0.downsample.0``, ``fc``; here they are ``conv_stem``, ``norm_stem``,
``stage1_block1/conv1``, ``conv_shortcut`` and ``head``. ``linear`` is read as ``fc``
and ``shortcut`` as ``downsample``, since PyTorch code for CIFAR often has them. timm's
deep stem and pooled shortcut (its "d" variants) are known as well.

A PyTorch file is safetensors with dotted keys; a Flax file is safetensors with keys
like ``params/head/kernel``. Files ending in ``.pth`` or ``.pt`` are read by PyTorch's
unpickler for weights alone, which runs no code from them, and are never written.
"""

import argparse
import dataclasses
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_attn.functional import checks

Naming = Literal["timm", "torchvision", "article"]
_Side = Literal["torch", "flax"]
_Arrays = dict[str, np.ndarray]
_Shape = tuple[int | None, ...]
"""Of an array; None is any size."""
_Block = tuple[int, int] | None
"""The stage of a residual block from 1, its place there from 0; None is outside."""

_PICKLES = (".pth", ".pt")


class ConversionError(ValueError):
    """Keys are unused, missing, of the wrong shape or there twice; the text lists them.

    Attributes:
      report: the lists of keys, a ``Report``.
    """

    def __init__(self, report: "Report") -> None:
        """Makes the error that says what ``report`` says."""
        super().__init__(str(report))
        self.report = report


@dataclasses.dataclass
class Report:
    """What stood in the way of a conversion, a line for each key.

    Attributes:
      headline: what it is about.
      unused: keys that no rule knows, or that the template lacks.
      missing: keys of the template that nothing gave; without a template, keys that a
        module lacks of which others are there.
      misshapen: keys whose array has another shape than it should have.
      repeated: keys that lead to a place which another key has filled.
    """

    headline: str = ""
    unused: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    misshapen: list[str] = dataclasses.field(default_factory=list)
    repeated: list[str] = dataclasses.field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is anything to report."""
        return any([self.unused, self.missing, self.misshapen, self.repeated])

    def __str__(self) -> str:
        """The headline, then every list with its length."""
        lists = {
            "unused": self.unused,
            "missing": self.missing,
            "of the wrong shape": self.misshapen,
            "for a place that is taken": self.repeated,
        }
        lines = [self.headline]
        for name, keys in lists.items():
            if keys:
                lines += [f"{len(keys)} {name}:", *(f"  {key}" for key in keys)]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a module holds, and how its weight moves from one side to the other."""

    shapes: dict[_Side, _Shape]
    """Of the weight."""
    moves: dict[_Side, Callable[[np.ndarray], np.ndarray]]
    """Of the weight, to each side from the other one."""
    leaves: dict[str, str | None]
    """PyTorch's names of the arrays, the weight first, to ours; None is dropped."""
    whole: bool = False
    """Whether a module has all of the arrays. Otherwise it has the weight at least."""

    def targets(self, source: _Side) -> Mapping[str, str | None]:
        """The names of the arrays on ``source`` to those on the other side."""
        if source == "torch":
            return self.leaves
        return {ours: theirs for theirs, ours in self.leaves.items() if ours}

    def needed(self, source: _Side) -> list[str]:
        """The names on ``source`` of the arrays without which there is no module."""
        names = [name for name, other in self.targets(source).items() if other]
        return names if self.whole else names[:1]

    def shape(self, leaf: str, arrays: _Arrays, source: _Side) -> _Shape:
        """Of the array ``leaf`` among those of its module."""
        weight = next(iter(self.targets(source)))
        if leaf == weight:
            return self.shapes[source]
        if weight not in arrays or not arrays[weight].ndim:
            return (None,)
        return (arrays[weight].shape[0 if source == "torch" else -1],)

    def move(self, array: np.ndarray, target: _Side) -> np.ndarray:
        """A copy as it is on ``target``; arrays of one axis are alike everywhere."""
        moved = self.moves[target](array) if array.ndim > 1 else array
        return np.array(moved, order="C")


_WEIGHT: dict[str, str | None] = {"weight": "params/kernel"}
_BIASED: dict[str, str | None] = _WEIGHT | {"bias": "params/bias"}


def _transposed(
    torch: _Shape,
    *axes: int,
    leaves: dict[str, str | None] = _BIASED,
    flip: bool = False,
) -> _Kind:
    """A kind whose weight is transposed on the way to Flax, its inputs reversed."""
    back = tuple(axes.index(i) for i in range(len(axes)))
    order = slice(None, None, -1 if flip else 1)
    return _Kind(
        {"torch": torch, "flax": tuple(torch[i] for i in axes)},
        {
            "flax": lambda w: w[:, order].transpose(axes),
            "torch": lambda k: k.transpose(back)[:, order],
        },
        leaves,
    )


_CONV = _transposed((None,) * 4, 2, 3, 1, 0, leaves=_WEIGHT)
_DENSE = _transposed((None, None), 1, 0)
_ALONG_CHANNELS = _transposed((1, 1, None), 2, 1, 0)
_MAX_MEAN = _transposed((1, 2, None, None), 2, 3, 1, 0)
_MEAN_MAX = _transposed((1, 2, None, None), 2, 3, 1, 0, flip=True)
_DENSE_AS_CONV = _Kind(
    {"torch": (None, None, 1, 1), "flax": (None, None)},
    {"flax": lambda w: w[:, :, 0, 0].T, "torch": lambda k: k.T[:, :, None, None]},
    _BIASED,
)
_NORM = _Kind(
    {"torch": (None,), "flax": (None,)},
    {},
    {
        "weight": "params/scale",
        "bias": "params/bias",
        "running_mean": "batch_stats/mean",
        "running_var": "batch_stats/var",
        "num_batches_tracked": None,
    },
    whole=True,
)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The name of a module on either side, and what it is."""

    torch: str
    flax: str
    kind: _Kind

    def under(self, torch: str, flax: str) -> "_Rule":
        return _Rule(torch + self.torch, flax + self.flax, self.kind)


_SE = (
    _Rule("fc1", "reduce", _DENSE_AS_CONV),
    _Rule("fc2", "expand", _DENSE_AS_CONV),
)
_ECA = (_Rule("conv", "conv", _ALONG_CHANNELS),)
_TIMM_SPATIAL = (
    _Rule("conv.conv", "conv", _MEAN_MAX),
    _Rule("conv.bn", "norm", _NORM),
)
_ARTICLE_CHANNEL = (
    _Rule("fc_layers.0", "reduce", _DENSE),
    _Rule("fc_layers.2", "expand", _DENSE),
    *_ECA,
)
_ARTICLE_SPATIAL = (_Rule("conv", "conv", _MAX_MEAN),)
_BLOCKS: dict[Naming, tuple[_Rule, ...]] = {
    "timm": (
        *_SE,
        *_ECA,
        *_TIMM_SPATIAL,
        *(rule.under("channel.", "channel/") for rule in _SE),
        *(rule.under("spatial.", "spatial/") for rule in _TIMM_SPATIAL),
    ),
    "torchvision": _SE,
    "article": (
        *_ARTICLE_CHANNEL,
        *_ARTICLE_SPATIAL,
        *(r.under("channel_attention_block.", "channel/") for r in _ARTICLE_CHANNEL),
        *(r.under("spatial_attention_block.", "spatial/") for r in _ARTICLE_SPATIAL),
    ),
}
# Where a residual block has its attention. torchvision's have none.
_ATTENTION: dict[Naming, str] = {"timm": "se.", "article": "attention."}

_STEM_AND_HEAD = (
    _Rule("conv1", "conv_stem", _CONV),
    _Rule("bn1", "norm_stem", _NORM),
    _Rule("fc", "head", _DENSE),
)
_RESIDUAL = (
    *(_Rule(f"conv{i}", f"conv{i}", _CONV) for i in (1, 2, 3)),
    *(_Rule(f"bn{i}", f"norm{i}", _NORM) for i in (1, 2, 3)),
    _Rule("downsample.0", "conv_shortcut", _CONV),
    _Rule("downsample.1", "norm_shortcut", _NORM),
)
_TIMM_DEEP_STEM = (
    _Rule("conv1.0", "conv_stem1", _CONV),
    _Rule("conv1.1", "norm_stem1", _NORM),
    _Rule("conv1.3", "conv_stem2", _CONV),
    _Rule("conv1.4", "norm_stem2", _NORM),
    _Rule("conv1.6", "conv_stem3", _CONV),
)
_TIMM_POOLED_SHORTCUT = (
    _Rule("downsample.1", "conv_pooled_shortcut", _CONV),
    _Rule("downsample.2", "norm_pooled_shortcut", _NORM),
)
# Known when they are read; written, they have the names above.
_HEAD_ALIASES = (_Rule("linear", "head", _DENSE),)
_RESIDUAL_ALIASES = (
    _Rule("shortcut.0", "conv_shortcut", _CONV),
    _Rule("shortcut.1", "norm_shortcut", _NORM),
)

_TORCH_BLOCK = re.compile(r"layer([1-9][0-9]*)\.(0|[1-9][0-9]*)\.(.+)")
_FLAX_BLOCK = re.compile(r"stage([1-9][0-9]*)_block([1-9][0-9]*)/(.+)")


def to_flax(
    state: Mapping[str, Any],
    *,
    naming: Naming = "timm",
    like: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> dict[str, Any]:
    """Turns a PyTorch state dict into Flax variables.

    Kernels are transposed, BatchNorm's statistics go to ``batch_stats``,
    ``num_batches_tracked`` is dropped, and the spatial kernel's inputs become
    [max, mean]. No bit of a number changes::

      >>> import jax, numpy as np
      >>> from flax_attn import convert
      >>> state = {
      ...     "fc1.weight": np.ones((4, 64, 1, 1)),
      ...     "fc2.weight": np.ones((64, 4, 1, 1)),
      ... }
      >>> jax.tree.map(np.shape, convert.to_flax(state))
      {'params': {'expand': {'kernel': (4, 64)}, 'reduce': {'kernel': (64, 4)}}}

    Args:
      state: from dotted keys to NumPy, JAX or PyTorch arrays.
      naming: ``"timm"``, ``"torchvision"`` or ``"article"`` (default: "timm").
      like: variables, or what ``jax.eval_shape`` gives for ``init``: the paths and
        shapes of the result. Without it nobody knows which modules are missing, a
        module must have its weight, a norm its statistics too, and the shapes are
        checked as far as a name tells them (default: None).
      strict: whether to raise for what does not fit. If not, it is printed and left
        out, and what is missing is taken from ``like`` if that holds arrays
        (default: True).

    Returns:
      A tree of NumPy arrays, copies, with the dtypes of ``state``; what is taken from
      ``like`` has its dtypes.

    Raises:
      ConversionError: keys are unused, missing, of the wrong shape or lead to the same
        place; or nothing fits, whatever ``strict`` is.
      ValueError: ``naming`` is not one of the three, an argument is no dict with
        strings for keys, or a value is not an array that NumPy can hold.
    """
    arrays = _convert(state, "torch", naming=naming, like=like, strict=strict)
    return unflatten_dict(arrays, sep="/")


def to_torch(
    variables: Mapping[str, Any],
    *,
    naming: Naming = "timm",
    like: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> _Arrays:
    """Turns Flax variables into a PyTorch state dict; undoes ``to_flax``.

    ``num_batches_tracked`` is not written: ``load_state_dict`` does without::

      >>> import jax, numpy as np
      >>> from flax_attn import convert
      >>> variables = {"params": {"conv": {"kernel": np.ones((3, 1, 1))}}}
      >>> jax.tree.map(np.shape, convert.to_torch(variables))
      {'conv.weight': (1, 1, 3)}

    Args:
      variables: the collections ``params`` and, where there is a BatchNorm,
        ``batch_stats``.
      naming: ``"timm"``, ``"torchvision"`` or ``"article"`` (default: "timm").
      like: a state dict with the keys and shapes of the result, such as
        ``model.state_dict()`` (default: None).
      strict: as in ``to_flax`` (default: True).

    Returns:
      A dict of NumPy arrays, copies, with the dtypes of ``variables``; what is taken
      from ``like`` has its dtypes.

    Raises:
      ConversionError: as in ``to_flax``.
      ValueError: as in ``to_flax``.
    """
    return _convert(variables, "flax", naming=naming, like=like, strict=strict)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a file of arrays.

    Args:
      path: a ``.pth`` or ``.pt`` file is read by PyTorch 2.6 or newer with
        ``weights_only=True``; any other is safetensors.

    Returns:
      A dict from keys to NumPy arrays. Keys with slashes, those of Flax files, become
      a tree, so that a Flax file gives variables.

    Raises:
      ValueError: the file is damaged, or holds anything else than arrays by name, or
        arrays that NumPy has no like of, such as those of float8.
      OSError: the file cannot be opened.
      ImportError: safetensors, or PyTorch for its files, is not installed.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"`path` must be a file, got {path}.")
    # Opened here, for the usual errors where that fails.
    with path.open("rb"):
        arrays = _load_torch(path) if path.suffix in _PICKLES else _load(path)
    trees = {key[: slash.start()] for key in arrays for slash in re.finditer("/", key)}
    if clash := sorted(trees & arrays.keys()):
        raise ValueError(f"{path} holds {clash[0]!r} both as an array and as a tree.")
    return unflatten_dict(arrays, sep="/")


def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes a state dict or variables as safetensors, all of it or nothing.

    Args:
      path: the file. Its name must not end in ``.pth`` or ``.pt``.
      state: a dict or a tree of arrays; the keys of a tree are joined by slashes.
      overwrite: whether a file of that name may go (default: False).

    Raises:
      ValueError: for a name or a dtype that safetensors does not have, or that
        ``load`` could not read.
      FileExistsError: the file exists and ``overwrite`` is False.
      OSError: the file cannot be written.
      ImportError: safetensors is not installed.
    """
    path = Path(path)
    _check_output(path, overwrite)
    safetensors = _safetensors()
    # safetensors reads memory as it lies there, whatever the strides are.
    flat = {key: np.array(x, order="C") for key, x in _flat("state", state).items()}
    for key, array in flat.items():
        # safetensors would write these, and not read them.
        if array.dtype.name.startswith(("float8", "float4")):
            raise ValueError(
                f"`{key}` must be of a dtype that NumPy has, got {array.dtype}; pass "
                "its .astype(np.float32)."
            )
    try:
        data = safetensors.numpy.save(flat)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error
    # Not by safetensors.numpy.save_file, whose files are for their owner's eyes alone.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Converts a file; the command line is ``python -m flax_attn.convert --help``.

    Args:
      arguments: those of the command line (default: None, which means the process's).

    Returns:
      The exit code: 0, or 1 after an error, whose text goes to stderr. Wrong arguments
      exit with 2.
    """
    options = _parser().parse_args(arguments)
    try:
        _check_output(options.output, options.overwrite)
        if options.output.exists() and options.output.samefile(options.input):
            raise ValueError("OUT must not be IN, which stays as it is.")
        turn = {"flax": to_flax, "torch": to_torch}[options.to]
        result = turn(
            load(options.input),
            naming=options.naming,
            like=load(options.like) if options.like else None,
            strict=not options.lenient,
        )
        save(options.output, result, overwrite=options.overwrite)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flax_attn.convert",
        description="Convert weights between PyTorch and Flax.",
    )
    add = parser.add_argument
    add("input", metavar="IN", type=Path, help="safetensors, .pth or .pt")
    add("output", metavar="OUT", type=Path, help="safetensors")
    add("--to", choices=("flax", "torch"), required=True)
    add("--naming", choices=tuple(_BLOCKS), default="timm", help="default: timm")
    add(
        "--like",
        metavar="FILE",
        type=Path,
        help="a file with the keys and shapes that OUT must have",
    )
    add(
        "--lenient",
        action="store_true",
        help="print what does not fit, and convert the rest",
    )
    add("--overwrite", action="store_true", help="replace OUT if it exists")
    return parser


def _convert(
    state: Mapping[str, Any],
    source: _Side,
    *,
    naming: Naming,
    like: Mapping[str, Any] | None,
    strict: bool,
) -> _Arrays:
    checks.check_choice("naming", naming, tuple(_BLOCKS))
    report = Report()
    flat = _flat("state" if source == "torch" else "variables", state)
    moved = _translate(flat, source, naming, report)
    template = {} if like is None else _template(like, source)
    if like is not None:
        moved = _compare(moved, template, report)
    if not moved:
        report.headline = _nothing_fits(flat, source, naming)
        raise ConversionError(report)
    report.headline = f"Not all keys fit (naming {naming!r})."
    if report and strict:
        report.headline += " `strict=False` (--lenient) converts the rest."
        raise ConversionError(report)
    if report:
        print(report)
    # Of all others in `like` the shape is enough, and some have nothing else.
    kept = {
        key: np.array(_array(key, x))
        for key, x in template.items()
        if key not in moved and _is_array(x)
    }
    return kept | {key: array for key, (_, array) in moved.items()}


def _translate(
    state: _Arrays, source: _Side, naming: Naming, report: Report
) -> dict[str, tuple[str, np.ndarray]]:
    """From new keys to old keys and new arrays, by the rules alone."""
    moved: dict[str, tuple[str, np.ndarray]] = {}
    target: _Side = "flax" if source == "torch" else "torch"
    for (block, module), keys in _modules(state, source, report).items():
        arrays = {leaf: state[key] for leaf, key in keys.items()}
        rule = _choose(block, module, arrays, source, naming)
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
            new_key = _join(target, block, getattr(rule, target), new_leaf)
            if not _fits(state[key].shape, expected):
                report.misshapen.append(f"{line}: expected {_text(expected)}")
            elif new_key in moved:
                report.repeated.append(f"{line}: {moved[new_key][0]} gives {new_key}")
            else:
                moved[new_key] = key, rule.kind.move(state[key], target)
    return moved


def _absent(rule: _Rule, block: _Block, arrays: _Arrays, source: _Side) -> list[str]:
    """What a module lacks of which other arrays are there."""
    if not arrays.keys() & rule.kind.targets(source).keys():
        return []
    module = getattr(rule, source)
    return [
        f"{_join(source, block, module, leaf)} "
        + _text(rule.kind.shape(leaf, arrays, source))
        for leaf in rule.kind.needed(source)
        if leaf not in arrays
    ]


def _compare(
    moved: dict[str, tuple[str, np.ndarray]], template: dict[str, Any], report: Report
) -> dict[str, tuple[str, np.ndarray]]:
    """What of ``moved`` has a place in ``template``, and the shape of that."""
    fit = {}
    for new_key, (key, array) in moved.items():
        line = f"{key} as {new_key} {array.shape}"
        if new_key not in template:
            report.unused.append(line)
        elif array.shape != (shape := tuple(template[new_key].shape)):
            report.misshapen.append(f"{line}: expected {shape}")
        else:
            fit[new_key] = key, array
    # Instead of what the rules alone find missing: a norm may do without a scale.
    gone = [key for key in template if key not in moved]
    report.missing = [f"{key} {tuple(template[key].shape)}" for key in gone]
    return fit


def _template(like: Mapping[str, Any], source: _Side) -> dict[str, Any]:
    template = _leaves("like", like)
    for key, value in template.items():
        if not hasattr(value, "shape"):
            raise ValueError(
                f"`like` must hold arrays or shapes, got {value!r} at {key!r}; pass "
                "variables, a state dict, or what jax.eval_shape gives."
            )
    if source == "torch" and template and not any(map(_is_ours, template)):
        raise ValueError(
            "`like` must be Flax variables, with the collection `params`, got the key "
            f"{next(iter(template))!r}; pass those of `init`, or what jax.eval_shape "
            "gives for it."
        )
    if source == "flax" and any(map(_is_ours, template)):
        raise ValueError(
            "`like` must be a state dict, got the key "
            f"{next(filter(_is_ours, template))!r}; pass model.state_dict()."
        )
    return {k: x for k, x in template.items() if not k.endswith(".num_batches_tracked")}


def _is_ours(key: str) -> bool:
    return key.startswith(("params/", "batch_stats/"))


def _nothing_fits(state: _Arrays, source: _Side, naming: Naming) -> str:
    if not state:
        return "There is nothing to convert: no arrays."
    dotted = [key for key in state if "." in key]
    if source == "torch" and not dotted and all("/" in key for key in state):
        return "These are Flax variables already; use `to_torch` (--to torch)."
    if source == "flax" and not any(map(_is_ours, state)):
        if dotted:
            return "These are not Flax variables; use `to_flax` (--to flax)."
        return (
            "The collection is missing; pass {'params': ...}, with 'batch_stats' where "
            "there is a BatchNorm."
        )
    hint = "another model, or another naming."
    if source == "torch":
        if outer := [key.partition("/")[0] for key in dotted if "/" in key]:
            hint = f"they lie in a dict within the dict; pass state[{outer[0]!r}]."
        elif prefix := _prefix(state, naming):
            hint = f"all start with {prefix!r}; strip it, as key.removeprefix does."
    return f"No key fits (naming {naming!r}): {hint}"


def _prefix(state: _Arrays, naming: Naming) -> str:
    """What all keys start with and without which some fit; empty if there is none."""
    first = next(iter(state))
    # Nothing comes first: keys that fit as they are do not fit the template alone.
    for end in [0, *(dot.end() for dot in re.finditer(r"\.", first))]:
        prefix = first[:end]
        if not all(key.startswith(prefix) for key in state):
            break
        bare = {key.removeprefix(prefix): array for key, array in state.items()}
        if _translate(bare, "torch", naming, Report()):
            return prefix
    return ""


def _modules(
    state: _Arrays, source: _Side, report: Report
) -> dict[tuple[_Block, str], dict[str, str]]:
    """The keys by module, then by the name of the array in it."""
    modules: dict[tuple[_Block, str], dict[str, str]] = {}
    for key, array in state.items():
        if (parts := _split(source, key)) is None:
            report.unused.append(f"{key} {array.shape}")
        else:
            block, module, leaf = parts
            modules.setdefault((block, module), {})[leaf] = key
    return modules


def _choose(
    block: _Block, module: str, arrays: _Arrays, source: _Side, naming: Naming
) -> _Rule | None:
    """The rule for a module: by its name, and among namesakes by the shapes."""
    rules = _block_rules(source, naming) if block else _top_rules(source, naming)
    rules = [rule for rule in rules if getattr(rule, source) == module]
    # The weight has the most axes; a norm without one has statistics of its shape.
    shape = max((array.shape for array in arrays.values()), key=len)
    axes = [rule for rule in rules if len(rule.kind.shapes[source]) == len(shape)]
    fit = [rule for rule in axes if _fits(shape, rule.kind.shapes[source])]
    return next(iter(fit + axes + rules), None)


def _top_rules(source: _Side, naming: Naming) -> list[_Rule]:
    rules = [*_BLOCKS[naming], *_STEM_AND_HEAD]
    if naming == "timm":
        rules += _TIMM_DEEP_STEM
    return rules + (list(_HEAD_ALIASES) if source == "torch" else [])


def _block_rules(source: _Side, naming: Naming) -> list[_Rule]:
    rules = list(_RESIDUAL)
    if naming == "timm":
        rules += _TIMM_POOLED_SHORTCUT
    if naming in _ATTENTION:
        under = _ATTENTION[naming], "attention/"
        rules += [rule.under(*under) for rule in _BLOCKS[naming]]
    return rules + (list(_RESIDUAL_ALIASES) if source == "torch" else [])


def _split(side: _Side, key: str) -> tuple[_Block, str, str] | None:
    """The residual block, the module in it and the array in that, or None."""
    if side == "torch":
        path, _, leaf = key.rpartition(".")
        match, first = _TORCH_BLOCK.fullmatch(path), 0
    else:
        collection, _, rest = key.partition("/")
        path, _, leaf = rest.rpartition("/")
        leaf = f"{collection}/{leaf}"
        match, first = _FLAX_BLOCK.fullmatch(path), 1
    if match:
        return (int(match[1]), int(match[2]) - first), match[3], leaf
    return (None, path, leaf) if path else None


def _join(side: _Side, block: _Block, module: str, leaf: str) -> str:
    """The key that ``_split`` splits."""
    if side == "torch":
        path = f"layer{block[0]}.{block[1]}.{module}" if block else module
        return f"{path}.{leaf}"
    path = f"stage{block[0]}_block{block[1] + 1}/{module}" if block else module
    collection, leaf = leaf.split("/")
    return f"{collection}/{path}/{leaf}"


def _fits(shape: tuple[int, ...], pattern: _Shape) -> bool:
    return len(shape) == len(pattern) and all(
        want in (None, size) for size, want in zip(shape, pattern, strict=True)
    )


def _text(pattern: _Shape) -> str:
    sizes = ["*" if size is None else str(size) for size in pattern]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"


def _flat(field: str, state: Mapping[str, Any]) -> _Arrays:
    """The arrays of a dict or a tree by their joined keys."""
    return {key: _array(key, value) for key, value in _leaves(field, state).items()}


def _leaves(field: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        raise ValueError(
            f"`{field}` must be a dict, got {type(tree).__name__}; pass a state dict, "
            "such as model.state_dict(), or variables."
        )
    leaves = flatten_dict(dict(tree))
    if other := [key for path in leaves for key in path if not isinstance(key, str)]:
        raise ValueError(
            f"`{field}` must have strings for keys, got {other[0]!r}; pass the state "
            "dict or the variables alone."
        )
    # Out of the boxes of partitioned parameters, as `merge` takes them.
    return {"/".join(path): meta.unbox(value) for path, value in leaves.items()}


def _array(key: str, value: Any) -> np.ndarray:
    """``value`` in NumPy, bit for bit."""
    if hasattr(value, "detach"):
        return _array_of_tensor(key, value)
    try:
        array = np.asarray(value)
    # Random keys, JAX arrays that are deleted or on other hosts, and ragged lists.
    except (TypeError, RuntimeError, ValueError) as error:
        got = getattr(value, "dtype", type(value).__name__)
        raise ValueError(
            f"`{key}` must be an array whose numbers NumPy can read, got {got} "
            f"({error}); pass a copy in NumPy, or leave it out."
        ) from error
    if array.dtype.kind in "OSU":
        raise ValueError(
            f"`{key}` must be an array, got {type(value).__name__}; pass the state "
            "dict or the variables alone."
        )
    return array


def _array_of_tensor(key: str, tensor: Any) -> np.ndarray:
    import torch

    try:
        if tensor.dtype == torch.bfloat16:
            bits = tensor.detach().view(torch.int16)
            return bits.numpy(force=True).view(jnp.bfloat16)
        return tensor.numpy(force=True)
    except (TypeError, RuntimeError) as error:
        if tensor.is_meta:
            way = "load its numbers first"
        elif tensor.is_quantized:
            way = "pass its .dequantize()"
        elif tensor.layout != torch.strided:
            way = "pass its .to_dense()"
        else:
            way = "pass its .float()"
        raise ValueError(
            f"`{key}` must be a dense tensor of a dtype that NumPy has, got "
            f"{tensor.dtype}, {tensor.layout}, device {tensor.device}; {way}."
        ) from error


def _is_array(value: Any) -> bool:
    if hasattr(value, "detach"):
        return not value.is_meta
    return isinstance(value, np.ndarray | jax.Array)


def _load(path: Path) -> _Arrays:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {key: _read(file, key, path) for key in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file, or is not all there ({error})."
        ) from error


def _read(file: Any, key: str, path: Path) -> np.ndarray:
    try:
        return file.get_tensor(key)
    # Which safetensors raises for a dtype that it does not find in NumPy.
    except AttributeError as error:
        raise ValueError(
            f"`{path}: {key}` must be of a dtype that NumPy has, got "
            f"{file.get_slice(key).get_dtype()}; save its .float() with "
            "safetensors.torch.save_file."
        ) from error


def _load_torch(path: Path) -> _Arrays:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} needs PyTorch: pip install torch. Or save the state dict with "
            f"safetensors.torch.save_file where PyTorch is installed ({error})."
        ) from error
    # https://github.com/advisories/GHSA-53q9-r3pm-6pq6: before, `weights_only` did not
    # keep code from running.
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise ImportError(
            f"{path} needs PyTorch 2.6 or newer, which loads no code, got "
            f"{torch.__version__}."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    # What a damaged file raises is nowhere said.
    except Exception as error:
        raise ValueError(
            f"{path} is damaged, or holds more than arrays, which might be code and is "
            "not loaded. Save the state dict alone, best with "
            f"safetensors.torch.save_file ({type(error).__name__})."
        ) from error
    others = [type(state).__name__]
    if isinstance(state, Mapping):
        rest = {key: x for key, x in state.items() if not torch.is_tensor(x)}
        others = [f"{key} ({type(x).__name__})" for key, x in rest.items()]
    if others:
        raise ValueError(
            f"{path} must hold a dict of tensors, got {', '.join(others)}; save the "
            "state dict alone."
        )
    return {str(key): _array(f"{path}: {key}", tensor) for key, tensor in state.items()}


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            f"Weight files need safetensors: pip install safetensors ({error})."
        ) from error
    return safetensors


def _check_output(path: Path, overwrite: bool) -> None:
    if path.suffix in _PICKLES:
        raise ValueError(
            f"{path} would be safetensors, which `{path.suffix}` is not; name it "
            "*.safetensors."
        )
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists; `overwrite=True` (--overwrite) replaces it."
        )
