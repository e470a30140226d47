"""Starts processes that cannot import lorgnette; see `load_without_lorgnette.py`."""

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


def load_without_lorgnette(
    folder: Path, tmp_path: Path, resaved: Path | None = None, without: str = ""
) -> tuple[dict, dict]:
    """What a process without lorgnette gets out of `folder` and `tmp_path/inputs.safetensors`."""
    arguments = [folder, tmp_path / "inputs.safetensors", tmp_path / "seen.json", *([resaved] if resaved else [])]
    run_without_lorgnette(arguments, tmp_path, without)
    return json.loads((tmp_path / "seen.json").read_text()), load_file(tmp_path / "seen.safetensors")


def run_without_lorgnette(arguments: list[Path], tmp_path: Path, without: str = "") -> None:
    """Run `load_without_lorgnette.py` without lorgnette, without the package `without`, and without a Hub."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    environment["WITHOUT"] = without
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("load_without_lorgnette.py")), *map(str, arguments)],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
