"""Parse a YAML recipe and the command line into argument dataclasses with `HfArgumentParser`."""

import argparse
import difflib
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn

from transformers import HfArgumentParser

from .recipe_files import read_recipe


def parse_recipe(
    dataclass_types: Sequence[type],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    check: Callable[..., None] = lambda *_: None,
    common: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Fill `dataclass_types` from `--config RECIPE`, then from the other command-line options, which have priority.

    The recipe, a file or one of the package by its name, is one flat mapping from field names to values. `null` stands
    for None in it and on the command line; mappings are written as JSON on the command line. `defaults` replace those
    of the dataclasses' own.

    An error in either (an unknown field, a wrong type, a ValueError of a dataclass' `__post_init__` or of `check`)
    prints one message naming the field and exits with status 2, as argparse does, but without the usage of all options,
    which would fill several screens.

    Args:
        common: the options that `--help` lists; `--help-all` then lists all. Without it `--help` lists all.
    """
    parser = _Parser(dataclass_types, prog=prog, description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", metavar="RECIPE", help="A .yaml file of options, `name: value`; or a recipe of the package: stage2."
    )
    if common:
        parser.usage = "%(prog)s [--config RECIPE] [--OPTION VALUE …]"
        parser.add_argument("--help-all", action="help", help="List all options.")
        if "--help-all" not in argv:
            parser.list_only({*common, "config", "help", "help_all"})
    for kind in (str, int, float):
        parser.register("type", kind, partial(_or_null, kind))
    hints = {name: hint for cls in dataclass_types for name, hint in typing.get_type_hints(cls).items()}

    parser.set_defaults(**defaults)
    command_line, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
        parser.error(f"unknown option {unknown[0]!r}{_did_you_mean(name, hints)}")
    if command_line.config is not None:
        parser.set_defaults(**_read_yaml(parser, command_line.config, hints))
    try:
        *filled, _config = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        check(*filled)
    except json.JSONDecodeError as error:  # from a mapping of TrainingArguments, without the field's name
        names = [name for name, value in vars(command_line).items() if value == error.doc]
        parser.error(f"{' or '.join(names) or 'a mapping'} is no JSON: {error.doc!r:.200} ({error})")
    except ValueError as error:
        parser.error(str(error))
    return tuple(filled)


class _Parser(HfArgumentParser):
    help_option = "--help"

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} {self.help_option} lists all options\n")

    def list_only(self, names: set[str]) -> None:
        """Leave all other options out of the help."""
        self.help_option = "--help-all"
        self.epilog = f"{self.prog} --help-all lists the other options, those of transformers.TrainingArguments too."
        for action in self._actions:
            if action.dest not in names:
                action.help = argparse.SUPPRESS


def _read_yaml(parser: HfArgumentParser, path: str, hints: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's mapping with scalars as text; the parser converts them by the field's type."""
    try:
        typed, plain = read_recipe(path)
    except ValueError as error:
        parser.error(str(error))
    values = {}
    for name, value in zip(plain, typed.values(), strict=True):
        is_scalar = not (value is None or isinstance(value, dict | list))
        if name not in hints:
            parser.error(f"{path}: unknown field {name!r}{_did_you_mean(name, hints)}")
        if not is_scalar and not _accepts(hints[name], type(value)):
            kind = "null" if value is None else f"a {type(value).__name__}"
            parser.error(f"{path}: {name} takes a single value, not {kind}")
        values[name] = plain[name] if is_scalar else value
    return values


def _or_null(kind: type, text: str) -> Any:
    return None if text == "null" else kind(text)


def _accepts(hint: Any, kind: type) -> bool:
    """Whether a type hint such as `dict | str | None` or `list[str]` admits values of `kind`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_accepts(member, kind) for member in typing.get_args(hint))
    return (typing.get_origin(hint) or hint) is kind


def _did_you_mean(name: str, existing: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, existing, n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
