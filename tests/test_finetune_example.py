"""`examples/finetune.py` runs as it stands, and is what the README shows."""

import runpy
from pathlib import Path

import datasets
import tiny_models
from tiny_training import write_backbones, write_pairs

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteProcessor


ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "finetune.py"


def test_the_example_trains_and_saves(tmp_path, monkeypatch):
    vision, text = write_backbones(tmp_path)
    data, bert, output = write_pairs(tmp_path / "pictures"), tmp_path / "bert", tmp_path / "out"
    tiny_models.bert().save_pretrained(bert)
    options = f"--vision {vision} --text {text} --qformer {bert} --dataset {data} --text_column text --max_steps 2"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *options.split(), "--output_dir", str(output)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    model = LorgnetteForConditionalGeneration.from_pretrained(output)
    model.check_processor(LorgnetteProcessor.from_pretrained(output))


def test_the_readme_shows_the_example():
    assert EXAMPLE.read_text().strip() in (ROOT / "README.md").read_text()
