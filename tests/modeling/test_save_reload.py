"""Any save reloads: where lorgnette is not installed, offline, with equal logits and both pipelines."""

import shutil
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from saved import assert_same, build, logits_and_captions, processor
from tiny import bert_tokenizer, chat_tokenizer, image_processor, picture
from tiny_forms import keep_uploads
from tiny_models import NUM_QUERY_TOKENS, VISION, bert, model, vision_model
from transformers import Trainer, TrainingArguments
from without_lorgnette import load_without_lorgnette, run_without_lorgnette

from lorgnette import (
    LorgnetteCollator,
    LorgnetteForConditionalGeneration,
    LorgnetteForImageTextRetrieval,
    LorgnetteProcessor,
)


@pytest.mark.slow
def test_save_pretrained_and_re_saves_without_lorgnette(tmp_path):
    """A process without lorgnette saves the model and both pipelines as completely as it loaded them."""
    built, made = build()
    logits, caption = logits_and_captions(built, made, tmp_path)
    folder = tmp_path / "my-model.v1.0-final"
    built.save_pretrained(folder)
    made.save_pretrained(folder)
    assert_same(*load_without_lorgnette(folder, tmp_path, resaved=tmp_path / "re-saved.2"), built, logits, caption)
    names = {path.name for path in folder.iterdir()}
    assert "modeling_lorgnette.py" in names
    assert not [name for name in names if name.endswith((".bin", ".pkl", ".pt"))]
    for what in ("model", "captions", "answers"):
        again = tmp_path / f"re-saved.2-{what}"
        assert names - {"lm_adapter"} <= {path.name for path in again.iterdir()}, what  # which needs the package
    assert_same(*load_without_lorgnette(tmp_path / "re-saved.2-answers", tmp_path), built, logits, caption)


def test_a_model_saves_the_processor_it_was_joined_with_or_loaded_beside(tmp_path):
    built, made = build()
    built.save_pretrained(tmp_path / "joined")
    loaded = LorgnetteForConditionalGeneration.from_pretrained(tmp_path / "joined")
    loaded.save_pretrained(tmp_path / "again")
    for folder in ("joined", "again"):
        theirs = LorgnetteProcessor.from_pretrained(tmp_path / folder)
        assert theirs.build_prompt() == made.build_prompt()
        assert theirs.num_query_tokens == made.num_query_tokens
    own = processor()
    own.query = "What else?"
    own.save_pretrained(tmp_path / "own")
    loaded.save_pretrained(tmp_path / "own")
    assert LorgnetteProcessor.from_pretrained(tmp_path / "own").query == "What else?"


LOAD = """
import sys
from lorgnette import LorgnetteProcessor
from transformers import AutoProcessor

for auto_class in (LorgnetteProcessor, AutoProcessor):
    for folder in sys.argv[1:]:
        assert type(auto_class.from_pretrained(folder)) is LorgnetteProcessor
"""


@pytest.mark.slow
def test_who_has_lorgnette_is_not_asked_about_remote_code(tmp_path):
    """In a process of its own, since here all classes are registered; a question would fail there, with no stdin."""
    built, made = build()
    folders = [tmp_path / "whole", tmp_path / "processor-alone"]
    built.save_pretrained(folders[0])
    made.save_pretrained(folders[1])
    command = [sys.executable, "-c", LOAD, *map(str, folders)]
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "[y/N]" not in finished.stdout + finished.stderr


def test_a_trainer_checkpoint_and_what_the_trainer_saves(tmp_path):
    built, made = build()
    rows = Dataset.from_list([{"image": picture(seed), "text": f"a {seed}"} for seed in range(4)])
    arguments = TrainingArguments(
        tmp_path / "run-1.0",
        max_steps=1,
        save_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        built, arguments, data_collator=LorgnetteCollator(made), train_dataset=rows, processing_class=made
    )
    trainer.train()
    built.eval()
    logits, caption = logits_and_captions(built, made, tmp_path)
    assert_same(*load_without_lorgnette(tmp_path / "run-1.0" / "checkpoint-1", tmp_path), built, logits, caption)


def test_answers_end_where_the_processor_says():
    """The language model's own generation config knows neither the end of a turn nor what to pad with."""
    built, made = build()
    assert built.generation_config.eos_token_id == sorted({2, *made.stop_token_ids})  # 2 is the tiny LM's own
    assert built.generation_config.pad_token_id == made.tokenizer.pad_token_id


def test_a_checkpoint_that_trainer_deleted_does_not_fail_a_save(tmp_path, monkeypatch):
    built, made = build()
    built.save_pretrained(tmp_path / "checkpoint-1")
    monkeypatch.chdir(tmp_path)
    loaded = LorgnetteForConditionalGeneration.from_pretrained("checkpoint-1")
    shutil.rmtree(tmp_path / "checkpoint-1")
    loaded.save_pretrained("checkpoint-2")
    assert LorgnetteProcessor.from_pretrained(tmp_path / "checkpoint-2").build_prompt() == made.build_prompt()


@pytest.mark.parametrize("by_save", [pytest.param(False, marks=pytest.mark.slow), True])
def test_push_to_hub_sends_a_whole_folder(by_save: bool, tmp_path, monkeypatch):
    """The upload is caught on its way and kept as a folder."""
    built, made = build()
    logits, caption = logits_and_captions(built, made, tmp_path)
    repository = tmp_path / "me" / "eyes"

    keep_uploads(monkeypatch, tmp_path)
    if by_save:
        built.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/eyes")
    else:
        built.push_to_hub("me/eyes")
    wanted = {"processor_config.json", "tokenizer.json", "modeling_lorgnette.py", "handler.py", "requirements.txt"}
    assert {path.name for path in repository.iterdir()} >= wanted
    assert ModelCard.load(repository / "README.md").data.pipeline_tag == "image-text-to-text"
    if not by_save:
        assert_same(*load_without_lorgnette(repository, tmp_path), built, logits, caption)


@pytest.mark.parametrize("architecture", ["clip", "dinov2_with_registers"])
def test_in_process_reload_keeps_the_logits(architecture: str, tmp_path):
    from tiny_models import inputs

    built = model(architecture)
    built.save_pretrained(tmp_path)
    loaded = LorgnetteForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert type(loaded.vision_model) is VISION[architecture][0]
    with torch.no_grad():
        assert torch.equal(loaded(**inputs()).logits, built(**inputs()).logits)


@pytest.mark.slow
def test_a_stage1_folder(tmp_path):
    """Retrieves where lorgnette is not installed, and so does what is saved there."""
    made = LorgnetteProcessor.from_backbones(image_processor(), None, qformer=bert_tokenizer(), num_query_tokens=4)
    stage1 = LorgnetteForImageTextRetrieval.from_backbones(
        vision_model(), qformer=bert(vocab_size=len(made.qformer_tokenizer)), processor=made
    ).eval()
    stage1.save_pretrained(tmp_path / "a.b-1")
    images = [Image.new("RGB", (40, 30), colour) for colour in ((200, 30, 30), (0, 0, 200))]
    texts = ["the cat", "a dog", "a picture"]
    batch = dict(made(images=images, text=texts[:2], padding=True, return_tensors="pt"))
    save_file(batch, tmp_path / "inputs.safetensors")
    folder = tmp_path / "a.b-1"
    for turn in ("first", "again"):
        recorded, resaved = tmp_path / f"{turn}.safetensors", tmp_path / f"resaved.{turn}"
        run_without_lorgnette([folder, tmp_path / "inputs.safetensors", recorded, resaved], tmp_path)
        outputs = load_file(recorded)
        assert torch.equal(outputs["logits"], stage1(**batch).logits_per_image)
        assert torch.equal(outputs["scores"], stage1.retrieve(images, texts, rerank=1))
        folder = resaved


def test_chat_templates_with_names_are_saved_again(tmp_path):
    templates = {"default": chat_tokenizer().chat_template, "tool_use": "{{ messages[0]['content'] }}"}
    made = LorgnetteProcessor(image_processor(), chat_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS)
    made.chat_template = templates
    model(processor=made).save_pretrained(tmp_path / "first")
    LorgnetteForConditionalGeneration.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert LorgnetteProcessor.from_pretrained(tmp_path / "second").chat_template == templates
