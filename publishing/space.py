"""Write a Space for a model: the demo page and its files, without lorgnette."""

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
    """Write `space/` into an exported folder of stage 2; users upload it as a Space.

    Args:
        repo_id: the model's repository; the Space's README names it, and the page loads it.
    """
    space = Path(folder, FOLDER)
    space.mkdir()
    for source in _SOURCES:  # in one folder, imported as plain modules
        text = _RELATIVE_IMPORT.sub(r"from \1 import", source.read_text(encoding="utf-8"))
        (space / source.name).write_text(text, encoding="utf-8")
    requirements = (str(_requirement("torch")), *REQUIREMENTS)
    (space / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements), encoding="utf-8")
    card = SpaceCardData(
        title=repo_id.split("/")[-1],
        sdk="gradio",
        sdk_version=_lowest("gradio"),
        python_version="3.11",
        app_file="app.py",
        models=[repo_id],
    )
    text = f"---\n{card.to_yaml()}\n---\n\nA demo of [{repo_id}](https://huggingface.co/{repo_id}).\n"
    (space / "README.md").write_text(text, encoding="utf-8")


def _lowest(package: str) -> str:
    """The lowest version that lorgnette requires, which is tested."""
    (lowest,) = (one.version for one in _requirement(package).specifier if one.operator == ">=")
    return lowest


def _requirement(package: str) -> Requirement:
    """lorgnette's requirement for a package."""
    (requirement,) = (one for one in map(Requirement, requires("lorgnette") or ()) if one.name == package)
    return requirement
