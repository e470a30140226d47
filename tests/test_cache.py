"""The feature cache: training on it is training on the pictures, and nothing that does not belong is read or kept."""

import json

import datasets
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value, load_from_disk
from tiny_training import CAPTIONS, write_backbones

from lorgnette.trainer.__main__ import main
from lorgnette.trainer.arguments import DataArguments
from lorgnette.trainer.data import load_pairs


RECIPE = (
    (
        "--qformer_config {hidden_size:16,num_hidden_layers:2,num_attention_heads:2,intermediate_size:32} --lora {r:2} "
        "--num_query_tokens 4 --text_column text --max_steps 3 --per_device_train_batch_size 4 --learning_rate 1e-3 "
        "--logging_steps 1 --eval_strategy steps --eval_steps 3 --eval_split test --save_strategy no --report_to none "
        "--use_cpu --disable_tqdm true"
    )
    .replace("{", '{"')
    .replace(":", '":')
    .replace(",", ',"')
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` prepares out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return write_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two splits of pictures with captions and a column that nobody asks for."""

    def rows(count):
        columns = {"image": [tiny.picture(n) for n in range(count)], "text": CAPTIONS[:count], "extra": range(count)}
        return Dataset.from_dict(columns, features=Features(image=Image(), text=Value("string"), extra=Value("int8")))

    folder = tmp_path_factory.mktemp("pictures") / "saved"
    DatasetDict(train=rows(10), test=rows(4)).save_to_disk(folder)
    return folder


def write(vit, pictures, output, *options):
    command = f"cache --vision {vit} --dataset {pictures} --output_dir {output} --shard_size 4 --batch_size 3"
    main([*command.split(), *options])
    return output


def trained(backbones, dataset, output, *options):
    """The losses of a short run, those of evaluation included."""
    vit, llama = backbones
    command = f"stage2 --vision {vit} --text {llama} --dataset {dataset} --output_dir {output} {RECIPE}"
    main([*command.split(), *options])
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry.get("loss", entry.get("eval_loss")) for entry in history[:-1]]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_training_on_the_cache_is_training_on_the_pictures(backbones, pictures, tmp_path, caplog, dtype, tolerance):
    cache = write(backbones[0], pictures, tmp_path / "cache", "--dtype", dtype)
    bytes_per_image = 17 * 24 * (4 if dtype == "float32" else 2)
    assert f"{bytes_per_image:,} bytes per image" in caplog.text
    expected = trained(backbones, pictures, tmp_path / "uncached")
    assert trained(backbones, cache, tmp_path / "cached") == pytest.approx(expected, abs=tolerance)
    assert len(expected) == 4

    rows, _ = load_pairs(DataArguments(dataset=str(cache)), evaluate=False, seed=0)
    assert set(rows[0]) == {"vision_features", "text", "index"}
    assert rows[0]["vision_features"].dtype == getattr(torch, dtype)
    shard = load_from_disk(next(cache.glob("train/*-00001-of-00003")))
    assert (shard["index"][:], shard["extra"][:]) == ([4, 5, 6, 7], [4, 5, 6, 7])
