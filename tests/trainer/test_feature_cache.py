"""The feature cache: training on it is training on the pictures, and nothing that does not belong is read or kept."""

import json
import os
import shutil
import subprocess
import sys
import time

import datasets
import pytest
import tiny
import tiny_models
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_from_disk
from repository import ROOT
from tiny_training import write_backbones
from transformers import ViTModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from lorgnette import (
    LorgnetteCollator,
    LorgnetteForConditionalGeneration,
    LorgnetteForImageTextRetrieval,
    LorgnetteProcessor,
)
from lorgnette.configuration.configuration_lorgnette import LorgnetteBridgeConfig
from lorgnette.trainer import cache as cache_module
from lorgnette.trainer.__main__ import main
from lorgnette.trainer.arguments import DataArguments, SourceArguments, VisionArguments
from lorgnette.trainer.cache import CacheArguments
from lorgnette.trainer.data import load_pairs
from lorgnette.trainer.feature_cache import METADATA, _hash_of, check_cache, read_metadata, vision_settings
from lorgnette.trainer.recipe import parse_recipe
from lorgnette.trainer.vision_tower import FeatureEncoder, VisionTower, load_tower


QFORMER = '{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}'
CAPTIONS = [f"picture {n}, a cat" for n in range(10)]  # all different: stage 1 tells them apart
TRAINING = (
    "--num_query_tokens 4 --max_steps 3 --per_device_train_batch_size 4 --learning_rate 1e-3 --logging_steps 1 "
    "--eval_strategy steps --eval_steps 3 --eval_split test --save_strategy no --report_to none --use_cpu"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` prepares out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    for part in (tiny_models.bert(vocab_size=len(tiny.bert_tokenizer())), tiny.bert_tokenizer()):
        part.save_pretrained(folder / "bert")
    return *write_backbones(folder), str(folder / "bert")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two splits of pictures with captions and a column that nobody asks for."""

    def rows(count):
        columns = {"image": [tiny.picture(n) for n in range(count)], "text": CAPTIONS[:count], "extra": range(count)}
        return Dataset.from_dict(columns, features=Features(image=Image(), text=Value("string"), extra=Value("int8")))

    folder = tmp_path_factory.mktemp("pictures") / "saved"
    DatasetDict(train=rows(10), test=rows(4)).save_to_disk(folder)
    return folder


@pytest.fixture
def cache(backbones, pictures, tmp_path):
    return write(backbones[0], pictures, tmp_path / "cache")


def command(vit, dataset, output):
    return f"cache --vision {vit} --dataset {dataset} --output_dir {output} --shard_size 4 --batch_size 3".split()


def write(vit, dataset, output, *options):
    main([*command(vit, dataset, output), *options])
    return output


def losses(stage, backbones, dataset, output, *options):
    """Those of a short run, evaluation's included."""
    vit, llama, bert = backbones
    joined = ["--text", llama, "--lora", '{"r": 2}', "--qformer_config", QFORMER] if stage == "stage2" else []
    joined += ["--qformer", bert] if stage == "stage1" else []
    given = f"{stage} --vision {vit} --dataset {dataset} --output_dir {output} {TRAINING}".split()
    main([*given, *joined, *options])
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry.get("loss", entry.get("eval_loss")) for entry in history[:-1]]


def arrow_files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.arrow"))}


@pytest.mark.parametrize(
    ("stage", "dtype", "tolerance"),
    [("stage2", "float32", 0), ("stage2", "float16", 1e-3), ("stage2", "bfloat16", 1e-2), ("stage1", "float32", 0)],
)
def test_training_on_the_cache_is_training_on_the_pictures(
    backbones, pictures, tmp_path, caplog, stage, dtype, tolerance
):
    cache = write(backbones[0], pictures, tmp_path / "cache", "--dtype", dtype)
    assert f"{17 * 24 * (4 if dtype == 'float32' else 2):,} bytes per image" in caplog.text
    expected = losses(stage, backbones, pictures, tmp_path / "uncached")
    assert losses(stage, backbones, cache, tmp_path / "cached") == pytest.approx(expected, abs=tolerance)
    assert len(expected) == 4


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_five_captions_a_picture_are_learned_from_the_cache_as_from_pictures(backbones, tmp_path, stage):
    """In columns of their own, as recipes name them; stage 1's evaluation reads them in order."""
    rows = {f"caption_{n}": [f"{text}, {'cat ' * n}" for text in CAPTIONS] for n in range(5)}
    rows["image"] = [tiny.picture(n) for n in range(10)]
    data = Dataset.from_dict(rows).cast_column("image", Image())
    DatasetDict(train=data, test=data.select(range(4))).save_to_disk(tmp_path / "saved")
    cache = write(backbones[0], tmp_path / "saved", tmp_path / "cache", "--dtype", "float32")
    columns = ["--text_column", json.dumps([f"caption_{n}" for n in range(5)])]
    expected = losses(stage, backbones, tmp_path / "saved", tmp_path / "uncached", *columns)
    assert losses(stage, backbones, cache, tmp_path / "cached", *columns) == pytest.approx(expected, abs=1e-4)
    drawn = losses(stage, backbones, cache, tmp_path / "drawn", *columns, "--texts_per_image", "2")
    assert drawn != pytest.approx(expected, abs=1e-4)
    assert len(drawn) == len(expected) == 4


def test_stage_1_asks_for_a_new_cache_where_pictures_have_no_numbers(backbones, cache, tmp_path):
    for shard in sorted(cache.glob("*/vision_features-*")):
        older = load_from_disk(shard).remove_columns("image_id")
        older.save_to_disk(tmp_path / "older" / shard.relative_to(cache))
    shutil.copy(cache / METADATA, tmp_path / "older")
    with pytest.raises(ValueError, match=r"does not say which of its rows have the same picture.*write it again"):
        losses("stage1", backbones, tmp_path / "older", tmp_path / "out")
    losses("stage2", backbones, tmp_path / "older", tmp_path / "out2")


def test_rows_keep_their_columns_and_numbers(cache):
    shard = load_from_disk(next(cache.glob("train/*-00001-of-00003")))
    assert set(shard.column_names) == {"text", "extra", "index", "image_id", "vision_features"}
    assert (shard["index"][:], shard["extra"][:], shard["text"][:]) == ([4, 5, 6, 7], [4, 5, 6, 7], CAPTIONS[4:8])
    train, evaluation = load_pairs(DataArguments(dataset=str(cache), eval_split="test"), evaluate=True, seed=0)
    assert (len(train), len(evaluation)) == (10, 4)
    assert set(train[5]) == {"vision_features", "text", "index", "image_id"}
    assert train[5]["vision_features"].dtype == torch.float16
    assert train[5]["vision_features"].shape == (17, 24)
    parts, _ = load_pairs(DataArguments(dataset=str(cache), eval_fraction=0.5), evaluate=True, seed=0)
    assert all(row["text"] == CAPTIONS[row["index"]] for row in parts)
    stream, _ = load_pairs(DataArguments(dataset=str(cache), streaming=True), evaluate=False, seed=0)
    row = next(iter(stream))
    assert torch.equal(row["vision_features"], train[row["index"]]["vision_features"])


def test_an_error_in_training_names_the_row_of_the_source(backbones, pictures, tmp_path):
    rows = load_from_disk(pictures)["train"].select(range(4))
    rows = rows.map(
        lambda row, n: {"text": "" if n == 2 else row["text"]}, with_indices=True, load_from_cache_file=False
    )
    rows.save_to_disk(tmp_path / "rows")
    cache = write(backbones[0], tmp_path / "rows", tmp_path / "cache")
    with pytest.raises(ValueError, match="row 2: column 'text' is empty"):
        losses("stage2", backbones, cache, tmp_path / "out", "--eval_strategy", "no")


def test_what_is_whole_is_kept_and_the_rest_made_again(backbones, pictures, tmp_path, caplog):
    cache = write(backbones[0], pictures, tmp_path / "cache")
    whole = arrow_files(cache)
    kept, gone, cut = (cache / "train" / f"vision_features-{n:05}-of-00003" for n in range(3))
    shutil.rmtree(gone)
    file = next(cut.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:1000])
    message = "half written: of split 'train' 2 of 3 shards .* vision_features-00001-of-00003 first; run the command"
    with pytest.raises(ValueError, match=message):
        load_pairs(DataArguments(dataset=str(cache)), evaluate=False, seed=0)
    before = next(kept.glob("*.arrow")).stat()
    write(backbones[0], pictures, cache)
    assert "2 of 4 shards are complete already" in caplog.text
    assert next(kept.glob("*.arrow")).stat() == before
    assert arrow_files(cache) == whole
    write(backbones[0], pictures, cache)
    assert "nothing left to do" in caplog.text


def test_an_interruption_keeps_complete_shards_and_says_so(backbones, pictures, tmp_path, monkeypatch, capsys, caplog):
    run, written, save = command(backbones[0], pictures, tmp_path / "cache"), [], cache_module._write_shard

    def interrupted(*arguments):
        if written:
            raise KeyboardInterrupt
        written.append(save(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_write_shard", interrupted)
        with pytest.raises(SystemExit) as ended:
            main(run)
    assert ended.value.code == 130
    kept = "interrupted: complete shards are kept, and the same command continues after them"
    assert capsys.readouterr().err.splitlines()[-1] == f"python -m lorgnette.trainer cache: {kept}"
    with caplog.at_level("INFO", logger="lorgnette"):
        main(run)
    assert "1 of 4 shards are complete already" in caplog.text


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(backbones, pictures, tmp_path):
    rows = load_from_disk(pictures)["test"]
    datasets.concatenate_datasets([rows] * 100).save_to_disk(tmp_path / "rows")
    vit, cache = backbones[0], tmp_path / "cache"
    run = [sys.executable, "-m", "lorgnette.trainer", *command(vit, tmp_path / "rows", cache)]
    with subprocess.Popen(run, stderr=subprocess.DEVNULL) as process:
        while not list(cache.glob("train/*-of-00100")) and process.poll() is None:
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -9, "the run was over before it could be killed"
    with pytest.raises(ValueError, match="half written"):
        load_pairs(DataArguments(dataset=str(cache)), evaluate=False, seed=0)
    first = next(cache.glob("train/*-00000-of-00100/*.arrow"))
    before = first.stat()
    write(vit, tmp_path / "rows", cache)
    assert first.stat() == before
    assert not list(cache.glob("**/*.unfinished"))
    train, _ = load_pairs(DataArguments(dataset=str(cache)), evaluate=False, seed=0)
    assert train.with_format(None)["index"][:] == list(range(400))
    assert len(set(train.with_format(None)["vision_features"][:])) == 4


def test_each_cache_of_a_process_has_its_own_precision(backbones, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    bf16 = write(backbones[0], pictures, tmp_path / "bf16")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    fp32 = write(backbones[0], pictures, tmp_path / "fp32", "--dtype", "float32")
    found = [read_metadata(folder)["mixed_precision"] for folder in (bf16, fp32)]
    assert found == ["bf16", "no"]


def test_an_unknown_precision_is_refused_before_anything_is_written(backbones, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="mixed_precision is 'fp8'"):
        write(backbones[0], pictures, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_two_processes_write_what_one_does(backbones, pictures, tmp_path):
    # `accelerate launch --cpu --num_processes 2` would start one; of a GPU both would want the first
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = [*launch, "-m", "lorgnette.trainer", *command(backbones[0], pictures, tmp_path / "two")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stderr.count("is complete") == 1  # two that do not know of each other would both say it
    assert arrow_files(tmp_path / "two") == arrow_files(write(backbones[0], pictures, tmp_path / "one"))


def other_vit(folder):
    tiny_models.vision_model(seed=1).save_pretrained(folder)
    tiny.image_processor().save_pretrained(folder)


def other_size(folder):
    tiny_models.vision_model().save_pretrained(folder)
    processor = tiny.image_processor()
    processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (other_vit, [], "vision_weights_sha256 is '[0-9a-f]{64}' in the cache, '[0-9a-f]{64}' here"),
        (other_size, [], r"image_processor.image_mean is \[0.5, 0.5, 0.5\] in the cache, \[0.1, 0.2, 0.3\] here"),
        (None, ["--vision_feature_layer", "-2"], "vision_feature_layer is None in the cache, -2 here"),
        (None, ["--vision_feature_select_strategy", "default"], "strategy is 'full' in the cache, 'default' here"),
    ],
)
def test_another_models_cache_is_refused(backbones, pictures, cache, tmp_path, change, options, message):
    if change is not None:
        change(tmp_path / "other")
        backbones = (str(tmp_path / "other"), *backbones[1:])
    with pytest.raises(ValueError, match=f"does not belong to this model: .*{message}"):
        losses("stage2", backbones, cache, tmp_path / "out", *options)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    evaluation = ["--eval_dataset", str(cache), *options]
    with pytest.raises(ValueError, match=message):
        losses("stage2", backbones, pictures, tmp_path / "out", *evaluation)


def test_nothing_is_overwritten(backbones, pictures, cache, tmp_path):
    before = arrow_files(cache)
    with pytest.raises(FileExistsError, match="other settings: dtype is 'float16' there, 'float32' here"):
        write(backbones[0], pictures, cache, "--dtype", "float32")
    with pytest.raises(FileExistsError, match=r"splits\.train is 10 there, None here"):
        write(backbones[0], pictures, cache, "--splits", "test")
    assert arrow_files(cache) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="is not empty, and no feature cache"):
        write(backbones[0], pictures, tmp_path / "mine")
    (cache / METADATA).write_text((cache / METADATA).read_text()[:100])
    with pytest.raises(ValueError, match=f"{METADATA} cannot be read .*: write the feature cache again"):
        load_pairs(DataArguments(dataset=str(cache)), evaluate=False, seed=0)
    (cache / METADATA).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {METADATA}"):
        load_pairs(DataArguments(dataset=str(cache)), evaluate=False, seed=0)


def test_a_run_killed_before_its_first_shard_begins_again(backbones, pictures, tmp_path):
    (tmp_path / "cache").mkdir()
    for name in ("unreadable.json", f"{METADATA}.unfinished"):  # all that stands before the metadata does
        (tmp_path / "cache" / name).write_text("{")
    write(backbones[0], pictures, tmp_path / "cache", "--skip-unreadable")
    assert len(load_pairs(DataArguments(dataset=str(tmp_path / "cache")), evaluate=False, seed=0)[0]) == 10
    assert not list((tmp_path / "cache").glob("*.unfinished"))


@pytest.mark.parametrize("kind", ["jsonl", "saved"])
def test_a_run_does_not_go_on_with_other_rows(backbones, tmp_path, kind):
    for n in range(2):
        tiny.picture(n).save(tmp_path / f"{n}.png")

    def write_rows(order):
        rows = Dataset.from_list([{"image": f"{n}.png", "text": CAPTIONS[n]} for n in order])
        if kind == "jsonl":
            rows.to_json(tmp_path / "rows")
        else:
            shutil.rmtree(tmp_path / "rows", ignore_errors=True)
            rows.save_to_disk(tmp_path / "rows")
            for n in range(2):
                tiny.picture(n).save(tmp_path / "rows" / f"{n}.png")
        return (tmp_path / "rows").rename(tmp_path / "rows.jsonl") if kind == "jsonl" else tmp_path / "rows"

    cache = write(backbones[0], write_rows([0, 1]), tmp_path / "cache")
    write(backbones[0], write_rows([0, 1]) if kind == "saved" else tmp_path / "rows.jsonl", cache)
    with pytest.raises(FileExistsError, match=r"dataset_fingerprints.train is '\w+' there, '\w+' here"):
        write(backbones[0], write_rows([1, 0]), cache)


def test_what_cannot_be_cached_is_said(backbones, pictures, cache, tmp_path):
    def attempt(*options, dataset=pictures):
        write(backbones[0], dataset, tmp_path / "new", *options)

    with pytest.raises(ValueError, match="is a feature cache itself"):
        attempt(dataset=cache)
    with pytest.raises(ValueError, match="no split dev; it has train, test"):
        attempt("--splits", "dev")
    with pytest.raises(ValueError, match="no column 'photo'; it has image, text, extra"):
        attempt("--image_column", "photo")
    load_from_disk(pictures)["test"].rename_column("extra", "index").save_to_disk(tmp_path / "index")
    with pytest.raises(ValueError, match="column 'index' has to be renamed"):
        attempt(dataset=tmp_path / "index")
    empty = load_from_disk(pictures)
    empty["test"] = empty["test"].filter(lambda number: False, input_columns="extra")
    empty.save_to_disk(tmp_path / "empty")
    for options in ([], ["--skip-unreadable"]):
        with pytest.raises(ValueError, match=r"empty \(test\) has no rows: name the splits"):
            attempt(*options, dataset=tmp_path / "empty")
    attempt("--splits", "train", dataset=tmp_path / "empty")
    with pytest.raises(SystemExit):
        attempt("--dtype", "int8")

    tower = VisionTower(
        LorgnetteBridgeConfig(vision_config=tiny_models.SIGLIP2[1]), tiny_models.SIGLIP2[0](tiny_models.SIGLIP2[1])
    )
    with pytest.raises(ValueError, match=r"variable resolution \(pixel_attention_mask, spatial_shapes\)"):
        FeatureEncoder(tower, Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16), torch.float16, 1)


def test_features_past_float16_name_the_row(backbones, pictures, tmp_path):
    vit = ViTModel.from_pretrained(backbones[0])
    with torch.no_grad():
        vit.layernorm.weight.fill_(1e5)
    vit.save_pretrained(tmp_path / "vit")
    tiny.image_processor().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"row 0: .* go up to \d+, and torch.float16 ends at 65504"):
        write(tmp_path / "vit", pictures, tmp_path / "cache")
    write(tmp_path / "vit", pictures, tmp_path / "bfloat16", "--dtype", "bfloat16")
    with torch.no_grad():
        vit.layernorm.weight.fill_(float("nan"))
    vit.save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="row 0: the ViT's features are not all finite"):
        write(tmp_path / "vit", pictures, tmp_path / "nan", "--dtype", "float32")


def test_rows_with_several_pictures(backbones, tmp_path):
    columns = {"image": [[tiny.picture(0), tiny.picture(1)], [tiny.picture(2)]], "text": ["two", "one"]}
    rows = Dataset.from_dict(columns, features=Features(image=List(Image()), text=Value("string")))
    rows.save_to_disk(tmp_path / "rows")
    cache = write(backbones[0], tmp_path / "rows", tmp_path / "cache", "--dtype", "float32")
    train, _ = load_pairs(DataArguments(dataset=str(cache)), evaluate=False, seed=0)
    assert [row["vision_features"].shape for row in train] == [(2, 17, 24), (1, 17, 24)]

    processor = LorgnetteProcessor.from_backbones(*backbones[:2], num_query_tokens=tiny_models.NUM_QUERY_TOKENS)
    model = LorgnetteForConditionalGeneration.from_backbones(*backbones[:2], processor=processor)
    batch, expected = (LorgnetteCollator(processor)(list(data)) for data in (train, rows))
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    features = model.get_vision_features(expected["pixel_values"]).last_hidden_state
    torch.testing.assert_close(batch["vision_features"], features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", tiny_models.VISION)
def test_a_saved_model_has_the_cache_of_its_vit(architecture, tmp_path):
    model = tiny_models.model(architecture, vision_feature_layer=-2)
    model.save_pretrained(tmp_path / "model")
    tiny.image_processor().save_pretrained(tmp_path / "model")
    tower, image_processor = load_tower(VisionArguments(model=str(tmp_path / "model")))
    assert vision_settings(tower, image_processor) == vision_settings(model, tiny.image_processor())
    assert [name for name, _ in tower.named_children()] == ["vision_model"]
    pixels = torch.rand(1, 3, tiny_models.IMAGE_SIZE, tiny_models.IMAGE_SIZE)
    assert torch.equal(*(m.get_vision_features(pixels).last_hidden_state for m in (tower, model)))


def test_a_stage_1_model_has_it_too_and_others_do_not(backbones, tmp_path):
    vit, _, bert = backbones
    processor = LorgnetteProcessor.from_backbones(vit, None, qformer=bert, num_query_tokens=4)
    model = LorgnetteForImageTextRetrieval.from_backbones(vit, qformer=bert, processor=processor, num_query_tokens=4)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    tower, image_processor = load_tower(VisionArguments(model=str(tmp_path / "model")))
    assert vision_settings(tower, image_processor) == vision_settings(model, processor.image_processor)
    with pytest.raises(ValueError, match="is a vit model, not one of lorgnette, lorgnette_retrieval"):
        load_tower(VisionArguments(model=vit))


def test_a_pooler_that_transformers_makes_up_does_not_count(backbones, pictures, tmp_path):
    ViTModel(tiny_models.VISION["vit"][1], add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    tiny.image_processor().save_pretrained(tmp_path / "vit")
    write(tmp_path / "vit", pictures, tmp_path / "cache")
    check_cache(tmp_path / "cache", *load_tower(VisionArguments(vision=str(tmp_path / "vit"))))


def test_rows_without_a_readable_picture_are_left_out_on_request(backbones, pictures, tmp_path):
    rows = list(load_from_disk(pictures)["train"].cast_column("image", Image(decode=False)))
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:200]
    rows[6]["image"] = {"bytes": None, "path": "gone.png"}
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="row 1: "):
        write(backbones[0], tmp_path / "rows.parquet", tmp_path / "strict")
    cache = write(backbones[0], tmp_path / "rows.parquet", tmp_path / "cache", "--skip-unreadable")
    report = json.loads((cache / "unreadable.json").read_text())
    assert list(report["train"]) == ["1", "6"]
    assert "gone.png" in report["train"]["6"]
    train, _ = load_pairs(DataArguments(dataset=str(cache)), evaluate=False, seed=0)
    assert [(row["index"], row["text"]) for row in train] == [(n, CAPTIONS[n]) for n in (0, 2, 3, 4, 5, 7, 8, 9)]
    shutil.rmtree(next(cache.glob("train/*-00001-of-00002")))
    write(backbones[0], tmp_path / "rows.parquet", cache, "--skip-unreadable")
    assert len(load_pairs(DataArguments(dataset=str(cache)), evaluate=False, seed=0)[0]) == 8


def test_the_recipe_that_is_shipped_can_be_read():
    path = ROOT / "recipes" / "cache.yaml"
    kinds = (VisionArguments, SourceArguments, CacheArguments)
    _, _, args = parse_recipe(kinds, ["--config", str(path), "--splits", "train", "test"], prog="", description="")
    assert (args.dtype, args.splits, args.shard_size) == ("float16", ["train", "test"], 1000)


def test_a_head_that_nothing_reads_is_no_part_of_the_hash():
    """Many a SigLIP checkpoint lacks it, and each load draws another."""
    vit = tiny_models.vision_model("siglip")
    before = _hash_of(vit)
    with torch.no_grad():
        unread = [parameter.normal_() for name, parameter in vit.named_parameters() if "head." in name]
        assert unread
        assert _hash_of(vit) == before
        vit.embeddings.patch_embedding.weight.normal_()
    assert _hash_of(vit) != before
