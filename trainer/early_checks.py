"""Check a command line before torch is imported: the recipe, and the paths that it and the options name."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..assembly.local_paths import is_local, what_is_there
from .arguments import BUILDERS
from .recipe_files import find_recipe, read_recipe


MODELS = ("model", "vision", "text", "qformer")
DATA = ("dataset", "eval_dataset")
DATA_FILES = (*BUILDERS, ".tar")
_HUB_ID = "for a repository of the Hub of that name, run this in another folder"


def check_command_line(argv: Sequence[str]) -> None:
    """Check the options of a command; the recipe's lines count where no option replaces them.

    Raises:
        ValueError: the recipe does not exist or is no mapping.
        FileNotFoundError: a path does not exist; says what its parent folder contains.
    """
    if {"-h", "--help", "--help-all"} & set(argv):
        return
    given = _options(argv)
    if given.get("config") and find_recipe(given["config"]).is_file():  # a pipe can be read only once
        given = read_recipe(given["config"])[0] | given
    for name in MODELS:
        if isinstance(value := given.get(name), str):
            check_model(name, value)
    for name in DATA:
        if isinstance(value := given.get(name), str) and given.get("format") != "hub":
            check_data(name, value)


def check_model(name: str, source: str) -> None:
    """Raise FileNotFoundError if `source` is a path and does not exist."""
    if is_local(source) and not os.path.exists(os.path.expanduser(source)):
        raise FileNotFoundError(f"{name}: there is no folder {source} ({what_is_there(source)}{_hint(source)})")


def check_data(name: str, source: str) -> None:
    """Raise FileNotFoundError if `source` is a path and does not exist; braces stand for several files."""
    path = Path(os.path.expanduser(source))
    if "://" in source or "{" in source or not (path.suffix.lower() in DATA_FILES or is_local(source)):
        return
    if not path.exists():
        raise FileNotFoundError(f"{name} {source!r}: no such file or folder ({what_is_there(source)}{_hint(source)})")


def _hint(source: str) -> str:
    first, _, rest = source.partition("/")
    could_be_hub_id = rest and "/" not in rest and not first.startswith((".", "~")) and first not in ("", "out")
    return f"; {_HUB_ID}" if could_be_hub_id else ""


def _options(argv: Sequence[str]) -> dict[str, str | None]:
    """The values of options; of several values the first."""
    given = {}
    for position, argument in enumerate(argv):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            if not equals:
                value = argv[position + 1] if position + 1 < len(argv) else ""
            if value and not value.startswith("--"):
                given[name.replace("-", "_")] = None if value == "null" else value
    return given
