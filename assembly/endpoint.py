"""Write the files of an Inference Endpoint: `handler.py`, its import, `requirements.txt`."""

import shutil
from pathlib import Path


# As pyproject.toml says; torch is the Endpoint's own, built for its GPU
REQUIREMENTS = ("transformers>=5.17,<5.25", "peft>=0.19.1", "pillow>=11.0", "safetensors>=0.6")
_SERVING = Path(__file__).parents[1] / "serving"


def write_endpoint(folder: str | Path) -> None:
    """Write the Endpoint's files into the folder of a stage-2 model."""
    for name in ("handler.py", "web_images.py"):
        shutil.copyfile(_SERVING / name, Path(folder, name))
    Path(folder, "requirements.txt").write_text("".join(f"{line}\n" for line in REQUIREMENTS), encoding="utf-8")


__all__ = ["REQUIREMENTS", "write_endpoint"]
