"""Command lines from dataclasses, whose help is wrapped at the terminal's width.

Tyro keeps the line breaks of docstrings, and shows ``{None}|INT (default: None)`` where
the text of an option says what its default does.
"""

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import docstring_parser
import tyro

T = TypeVar("T")


def parse(
    options: type[T],
    *,
    prog: str,
    args: Sequence[str] | None,
    default: T | None = None,
    notes: Mapping[str, str] | None = None,
) -> T:
    """The dataclass ``options`` from the command line ``args``, as ``tyro.cli``.

    Args:
      options: a dataclass with defaults, whose docstrings are the help.
      prog: module name of the command.
      args: by default those of the process.
      default: an instance with the defaults (default: ``options()``).
      notes: by name of an option, text that follows its help.
    """
    shown = _with_help(options, notes or {})
    given: Any = {} if default is None else {"default": shown(**vars(default))}
    return _expanded(tyro.cli(shown, prog=f"python -m {prog}", args=args, **given))


def _expanded(value: Any) -> Any:
    """``value`` with the home folder for ``~``, which no shell expands after ``=``."""
    if isinstance(value, Path):
        return value.expanduser()
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {name: _expanded(field) for name, field in vars(value).items()}
        return dataclasses.replace(value, **changed)
    return value


def block_names(args: Sequence[str] | None, *more: str) -> str:
    """The names of all blocks in a sentence, or nothing if ``args`` request no help.

    Only for help, since it imports jax.

    Args:
      args: the command line; None for that of the process.
      *more: names to list before the blocks.
    """
    if not {"-h", "--help"} & set(sys.argv[1:] if args is None else args):
        return ""
    from flax_attn.blocks import BLOCKS

    return f"Blocks: {', '.join((*more, *BLOCKS))}."


def _with_help(options: type[T], notes: Mapping[str, str]) -> type[T]:
    """A subclass with the same fields, in which tyro finds their help."""
    texts: dict[str, str] = {}
    for base in reversed(options.__mro__[:-1]):
        params = docstring_parser.parse_from_object(base).params
        texts |= {p.arg_name: p.description for p in params if p.description}
    hints = typing.get_type_hints(options, include_extras=True)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(cast(Any, options)):
        hint, default = hints[field.name], field.default
        inner, *metadata = (
            typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        )
        if dataclasses.is_dataclass(inner):
            inner = _with_help(cast(type[Any], inner), notes)
            default = inner(**vars(default))
        elif field.name in texts:
            text = f"{texts[field.name]} {notes.get(field.name, '')}"
            metadata = [_argument(inner, text, default, bool(metadata)), *metadata]
        if metadata:
            inner = Annotated[(inner, *metadata)]
        fields.append((field.name, inner, dataclasses.field(default=default)))
    return dataclasses.make_dataclass(
        options.__name__,
        fields,
        bases=(options,),
        namespace={"__doc__": options.__doc__},
        frozen=True,
    )


def _argument(hint: Any, text: str, default: Any, has_choices: bool) -> Any:
    """The help of an option, without a default where that is no value."""
    metavar = None
    if default is None and not has_choices:
        metavar = "|".join(
            kind.__name__.upper()
            for kind in typing.get_args(hint)
            if kind is not types.NoneType
        )
    return tyro.conf.arg(
        help=" ".join(text.split()),
        metavar=metavar,
        help_behavior_hint="" if default in (None, ()) else None,
    )
