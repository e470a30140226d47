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
    Path(folder, REQUIREMENTS).write_text(requirements(*_NEEDED), encoding="utf-8")


def requirements(*packages: str) -> str:
    """Lines of a requirements file: what lorgnette asks of these packages."""
    ours = map(Requirement, requires("lorgnette") or ())
    return "".join(f"{one.name}{one.specifier}\n" for one in ours if one.name in packages)
