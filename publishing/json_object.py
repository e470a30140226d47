"""JSON files that hold one object, read so that an error names the file."""

import json
from pathlib import Path
from typing import Any


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else; names it.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, or no JSON
        raise ValueError(f"{path} is not one JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not one JSON object, but a {type(value).__name__}")
    return value
