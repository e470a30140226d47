"""`examples/finetune.py` runs as it stands, and is what docs/training.md shows."""

import runpy
from functools import partial

import datasets
import pytest
import tiny_models
import torch
from repository import ROOT
from tiny_training import write_backbones, write_pairs

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteProcessor


EXAMPLE = ROOT / "examples" / "finetune.py"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the example on tiny parts and the pictures in `pictures`, into `out`."""
    vision, text = write_backbones(tmp_path)
    write_pairs(tmp_path / "pictures")
    tiny_models.bert().save_pretrained(tmp_path / "bert")
    options = f"--vision {vision} --text {text} --qformer {tmp_path}/bert --dataset {tmp_path}/pictures"
    options += f" --text_columns text --max_steps 2 --output_dir {tmp_path}/out"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *options.split()])
    return partial(runpy.run_path, str(EXAMPLE), run_name="__main__")


def test_the_example_trains_and_saves(tmp_path, run):
    run()
    model = LorgnetteForConditionalGeneration.from_pretrained(tmp_path / "out")
    model.check_processor(LorgnetteProcessor.from_pretrained(tmp_path / "out"))


def test_a_broken_picture_is_named_before_a_weight_moves(tmp_path, run, monkeypatch):
    broken = tmp_path / "pictures" / "5.png"
    broken.write_bytes(b"words")
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("a weight moved"))
    with pytest.raises(ValueError, match=r"5\.png is no picture .*b'words'") as raised:
        run()
    rows = datasets.load_dataset(str(broken.parent), split="train").cast_column("image", datasets.Image(decode=False))
    number = [row["path"] for row in rows["image"]].index(str(broken))
    assert str(raised.value).startswith(f"row {number}: ")


def test_the_page_shows_the_example():
    assert EXAMPLE.read_text().strip() in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
