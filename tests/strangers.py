"""Starts the processes of strangers, who have no lorgnette: see `stranger.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file


# What a script for `python -c` begins with, so that lorgnette is not installed for it
WITHOUT_LORGNETTE = """
import sys
from importlib.abc import MetaPathFinder

class WithoutLorgnette(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lorgnette":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, WithoutLorgnette())
"""


def visit(folder: Path, tmp_path: Path, resaved: Path | None = None, without: str = "") -> tuple[dict, dict]:
    """What a process without lorgnette gets out of `folder` and `tmp_path/inputs.safetensors`."""
    arguments = [folder, tmp_path / "inputs.safetensors", tmp_path / "seen.json", *([resaved] if resaved else [])]
    run_stranger(arguments, tmp_path, without)
    return json.loads((tmp_path / "seen.json").read_text()), load_file(tmp_path / "seen.safetensors")


def run_stranger(arguments: list[Path], tmp_path: Path, without: str = "") -> None:
    """Run `stranger.py` where lorgnette is not installed, nor the package `without`, and no Hub can be reached."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    environment["WITHOUT"] = without
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("stranger.py")), *map(str, arguments)],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
