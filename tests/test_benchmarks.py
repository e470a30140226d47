"""The benchmarks run, and their figures are what they say."""

import json

import datasets
import pytest
import tiny
import tiny_models
from datasets import Dataset, DatasetDict, Features, Image, Value
from tiny_training import joined, pairs, write_backbones

from benchmarks import cache, forms


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` prepares out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_an_epoch_on_the_cache_is_timed_and_has_the_losses_of_the_pictures(tmp_path, capsys):
    _, text = write_backbones(tmp_path)
    for part in (tiny_models.vision_model("dinov2"), tiny.image_processor()):  # which takes pictures of any size
        part.save_pretrained(tmp_path / "dinov2")
    for part in (tiny_models.bert(vocab_size=len(tiny.bert_tokenizer())), tiny.bert_tokenizer()):
        part.save_pretrained(tmp_path / "bert")
    rows = [{name: row[name] for name in ("image", "text")} for row in pairs(6)]
    DatasetDict(train=Dataset.from_list(rows, Features(image=Image(), text=Value("string")))).save_to_disk(
        tmp_path / "rows"
    )
    options = f"--vision {tmp_path}/dinov2 --text {text} --qformer {tmp_path}/bert --dataset {tmp_path}/rows --rows 4"
    options += f" --batch_size 4 --repeats 1 --image_size 48 --stages stage2 --output {tmp_path}/report.json"
    assert cache.main(options.split()) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    patches = (48 // tiny_models.PATCH_SIZE) ** 2
    assert report["caches"]["float16"]["bytes_per_image"] == (patches + 1) * 24 * 2
    assert report["stages"]["stage2"]["losses_apart"]["float32"] <= cache.TOLERANCE["float32"]
    assert len(report["stages"]["stage2"]["losses"]) == 1
    assert "stage2: " in capsys.readouterr().out


def test_the_forms_are_weighed_and_loaded_and_give_the_same_logits(tmp_path, capsys):
    vision, text = write_backbones(tmp_path)
    model, processor = joined((vision, text))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    options = f"--model {tmp_path}/model --vision {vision} --text {text} --repeats 1 --output {tmp_path}/report.json"
    assert forms.main(options.split()) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())["forms"]
    assert report["thin"]["bytes"] < report["merged"]["bytes"] <= report["full"]["bytes"]
    assert all(len(found["seconds"]) == 1 for found in report.values())
    assert "| `thin` | " in capsys.readouterr().out
