"""Tell paths from Hub ids, and say what is there in place of a path that does not exist. Imports nothing heavy."""

import os
from pathlib import Path


_SHOWN = 8  # entries of a folder in a message


def is_path(source: str | Path) -> bool:
    """Whether a name can only be a path: Hub ids start otherwise, and have one slash at most."""
    name = str(source)
    return isinstance(source, Path) or name.startswith((".", "~")) or Path(name).is_absolute() or name.count("/") > 1


def is_local(name: str) -> bool:
    """Whether a name on the command line is meant as a path: its first folder may exist, or be the recipes' `out`."""
    first, slash, _ = name.partition("/")
    return is_path(name) or (bool(slash) and (first == "out" or Path(first).is_dir()))


def what_is_there(path: str | Path) -> str:
    """For a path that does not exist, what its parent folder contains, or that there is no such folder."""
    parent = Path(os.path.expanduser(path)).parent
    if parent.is_dir():
        return f"{parent} contains {listing(parent)}"
    existing = next((folder for folder in parent.parents if folder.is_dir()), None)
    return f"no folder {parent}" + (f"; {existing} contains {listing(existing)}" if existing else "")


def listing(folder: Path) -> str:
    """The first names in a folder, and the number of the others."""
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}" if names else "nothing"


__all__ = ["is_local", "is_path", "listing", "what_is_there"]
