"""What an Inference Endpoint finds in a repository besides the model: `handler.py`, and which packages it runs on."""

import shutil
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement


HANDLER = Path(__file__).parents[1] / "serving" / "handler.py"
REQUIREMENTS = "requirements.txt"
_NEEDED = ("transformers", "peft", "pillow", "safetensors")  # torch is the Endpoint's own, built for its GPU


def write_endpoint(folder: str | Path) -> None:
    """Put both into an exported folder of stage 2. The Endpoint installs what `requirements.txt` says."""
    shutil.copyfile(HANDLER, Path(folder, HANDLER.name))
    ours = [Requirement(line) for line in requires("lorgnette") or ()]
    lines = [f"{one.name}{one.specifier}\n" for one in ours if one.name in _NEEDED and one.marker is None]
    Path(folder, REQUIREMENTS).write_text("".join(lines), encoding="utf-8")
