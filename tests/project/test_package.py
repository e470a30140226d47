"""The package as it is installed: light to import, whole as a wheel."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from repository import ROOT

from lorgnette.assembly.endpoint import REQUIREMENTS


TRAIN_AND_SAVE = """
import sys
import torch
from pathlib import Path
import lorgnette
assert "site-packages" in lorgnette.__file__ and "wheel-env" in lorgnette.__file__, lorgnette.__file__
import lorgnette.hub_upload
from lorgnette.publishing.card import TEMPLATE
assert TEMPLATE.is_file(), TEMPLATE
from lorgnette.trainer.recipe_files import RECIPES, find_recipe
assert RECIPES.parent == Path(lorgnette.__file__).parent and find_recipe("stage2").is_file(), RECIPES
sys.path.insert(0, sys.argv[1])
from saved import assert_same, build, logits_and_captions
from without_lorgnette import load_without_lorgnette
from datasets import Dataset
from tiny import picture
from transformers import Trainer, TrainingArguments

here = Path.cwd()
model, processor = build()
rows = Dataset.from_list([{"image": picture(seed), "text": f"a {seed}"} for seed in range(4)])
arguments = TrainingArguments("run", max_steps=2, per_device_train_batch_size=2, remove_unused_columns=False,
                              report_to="none", use_cpu=True, save_strategy="no")
trainer = Trainer(model, arguments, data_collator=lorgnette.LorgnetteCollator(processor), train_dataset=rows,
                  processing_class=processor)
assert trainer.train().global_step == 2
trainer.save_model("saved.model-1")
logits, caption = logits_and_captions(model.eval(), processor, here)
assert_same(*load_without_lorgnette(here / "saved.model-1", here), model, logits, caption)
"""


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = (
        "import sys, lorgnette; dir(lorgnette); print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_every_public_name_can_be_imported_and_others_cannot():
    import lorgnette

    for name in lorgnette.__all__:
        assert getattr(lorgnette, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Monocle'"):
        _ = lorgnette.Monocle


def test_versions_outside_the_range_are_one_error_at_import(monkeypatch):
    """Whichever module is asked for: the package itself comes first."""
    import lorgnette

    def version(name):
        if name == "peft":
            raise PackageNotFoundError(name)
        return {"transformers": "4.57.1"}.get(name, "9999.0")

    spec = importlib.util.spec_from_file_location("lorgnette", lorgnette.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    monkeypatch.setattr(importlib.metadata, "version", version)
    message = r"lorgnette .* needs transformers.*>=5\.17.* \(4\.57\.1 is installed\), peft.* \(nothing is installed\)$"
    with pytest.raises(ImportError, match=message):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.slow
def test_the_wheel_trains_saves_and_its_model_loads_elsewhere(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__")
    )
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("lorgnette-*.whl")

    # an environment of its own that sees the dependencies of this one, but not the checkout installed in it
    environment = tmp_path / "wheel-env"
    venv.create(environment, with_pip=False)
    folder = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(environment)}))
    (folder / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder, wheel], check=True)

    empty = tmp_path / "empty"
    empty.mkdir()
    python = Path(sysconfig.get_path("scripts", "venv", vars={"base": str(environment)})) / "python"
    without_checkout = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-c", TRAIN_AND_SAVE, ROOT / "tests" / "fixtures"]
    finished = subprocess.run(command, cwd=empty, env=without_checkout, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_the_readme_names_what_saved_models_ask_for():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    asked = readme.split("Saved models ask for ", 1)[1].split(", as the package does.", 1)[0]
    assert set(asked.replace(" and ", ", ").split(", ")) == set(REQUIREMENTS)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("given", [None, "torch==2.13.0 --index-url https://example.org/cpu"])
def test_the_clients_torch_is_the_newest_unless_one_is_named(given):
    named = [] if given is None else [f"TORCH={given}"]
    variables = {name: value for name, value in os.environ.items() if name not in ("TORCH", "MAKEFLAGS")}
    process = subprocess.run(
        ["make", "--dry-run", "clients", *named], cwd=ROOT, env=variables, check=True, capture_output=True, text=True
    ).stdout
    assert f'TORCH="{given or "torch"}" ' in process
