"""Find and read recipes: a YAML file, or one of the package by its name. Imports nothing heavy."""

import os
import re
from pathlib import Path
from typing import Any

import yaml


RECIPES = Path(__file__).parents[1] / "recipes"


def find_recipe(name: str) -> Path:
    """A file; or, for a name without a suffix, the package's recipe of that name.

    Raises:
        ValueError: there is no such file; names the package's recipes.
    """
    path = Path(os.path.expanduser(name))
    if path.exists() and not path.is_dir():
        return path
    shipped = RECIPES / f"{name}.yaml"
    if path.name == name and shipped.is_file():
        return shipped
    names = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
    raise ValueError(f"cannot read the recipe {name}: no such file. Names of the package's recipes: {names}")


def read_recipe(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The mapping of a recipe twice: with typed values, and with scalars as text.

    YAML 1.1 alone would read `eval_strategy: no` as False and `learning_rate: 1e-4` as a string.

    Raises:
        ValueError: no such recipe, no valid YAML, no mapping, or a field given twice.
    """
    try:
        text = find_recipe(name).read_text(encoding="utf-8")
        typed, plain = yaml.load(text, Loader=_Loader), yaml.load(text, Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the recipe {name}: {' '.join(str(error).split())}") from error
    if not isinstance(typed, dict):
        raise ValueError(f"the recipe {name} is not a mapping of `name: value` lines")
    names = [key.value for key, _ in yaml.compose(text).value]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{name}: {', '.join(twice)} given twice; YAML would take the last")
    return typed, plain


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the floats of YAML 1.2: `1e-6` is a number too."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)
