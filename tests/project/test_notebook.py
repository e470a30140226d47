"""`examples/first_model.ipynb` runs from top to bottom without a network, and its model has learned to see."""

import json
import os
import subprocess
import sys

import pytest
from repository import ROOT


NOTEBOOK = ROOT / "examples" / "first_model.ipynb"
LEARNED = """
assert shares["right"] > 0.75, shares
assert shares["shuffled"] < 0.3, shares
"""


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_shows_its_results():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert any(cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    assert not any(output["output_type"] == "error" for cell in cells for output in cell.get("outputs", ()))


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    (tmp_path / "cells.py").write_text("\n".join([*code_cells(), LEARNED]), encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "cells.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "first_model" / "report.html").is_file()
