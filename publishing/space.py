"""A Space that shows a model: the page, and all that it needs where lorgnette is not installed."""

import re
from importlib.metadata import requires
from pathlib import Path

from huggingface_hub import SpaceCardData
from packaging.requirements import Requirement

from ..assembly.endpoint import REQUIREMENTS


FOLDER = "space"
_ROOT = Path(__file__).parents[1]
_SOURCES = (_ROOT / "serving" / "app.py", _ROOT / "inspection" / "maps.py", _ROOT / "inspection" / "drawing.py")
_RELATIVE_IMPORT = re.compile(r"^from \.+(?:\w+\.)*(\w+) import", flags=re.MULTILINE)


def write_space(folder: str | Path, repo_id: str) -> None:
    """Put `space/` into an exported folder of stage 2, to be uploaded as a Space of its own.

    Args:
        repo_id: where the model will be; the Space's README names it, and the page loads what is named there.
    """
    place = Path(folder, FOLDER)
    place.mkdir()
    for source in _SOURCES:  # side by side, as scripts import one another
        text = _RELATIVE_IMPORT.sub(r"from \1 import", source.read_text(encoding="utf-8"))
        (place / source.name).write_text(text, encoding="utf-8")
    needed = (str(_asked("torch")), *REQUIREMENTS)
    (place / "requirements.txt").write_text("".join(f"{line}\n" for line in needed), encoding="utf-8")
    card = SpaceCardData(
        title=repo_id.split("/")[-1],
        sdk="gradio",
        sdk_version=_lowest("gradio"),
        python_version="3.11",
        app_file="app.py",
        models=[repo_id],
    )
    text = f"---\n{card.to_yaml()}\n---\n\nA page to play with [{repo_id}](https://huggingface.co/{repo_id}).\n"
    (place / "README.md").write_text(text, encoding="utf-8")


def _lowest(package: str) -> str:
    """The lowest version that lorgnette asks for, which it has been tested with."""
    (lowest,) = (one.version for one in _asked(package).specifier if one.operator == ">=")
    return lowest


def _asked(package: str) -> Requirement:
    """What lorgnette asks of a package."""
    (asked,) = (one for one in map(Requirement, requires("lorgnette") or ()) if one.name == package)
    return asked
