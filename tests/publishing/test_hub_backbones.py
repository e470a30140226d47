"""Models whose backbones are repositories of the same Hub: uploaded thin, read by name, pushed by model and Trainer."""

import json
import re
from pathlib import Path

import pytest
import torch
from hub_server import run_client
from huggingface_hub import ModelCard
from repository import ROOT
from safetensors.torch import load_file, save_file
from tiny import picture
from tiny_models import QFORMER
from tiny_training import joined, write_backbones, write_pairs
from without_lorgnette import WITHOUT_LORGNETTE

from lorgnette.publishing.export import draw


UPLOAD = ROOT / "hub_upload.py"
TASK = "image-text-to-text"
# A card from before, whose figures are of other weights
OLD_CARD = """---
license: cc0-1.0
tags: [mine]
model-index:
- name: eyes
  results:
  - task: {type: image-text-to-text}
    dataset: {type: people/pictures, name: people/pictures}
    metrics: [{type: cider, value: 9.9}]
---
What I say of it.
"""
READ = (
    WITHOUT_LORGNETTE
    + """
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, pipeline

inputs, picture, seen, fresh = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained("me/thin", trust_remote_code=True).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(inputs)).logits}, seen)
for task, question in (("image-to-text", {}), ("image-text-to-text", {"text": "<image>"})):
    pipe = pipeline(task, model="me/thin", trust_remote_code=True)
    pipe(picture, **question, generate_kwargs={"max_new_tokens": 2})
model.push_to_hub("them/new")
model.push_to_hub("them/old")
HfApi().delete_repo("them/llama")
try:
    AutoModelForImageTextToText.from_pretrained("me/thin", trust_remote_code=True, cache_dir=fresh)
except OSError as error:
    print("refused:", error)
"""
)


@pytest.fixture(scope="module")
def backbones(hub, tmp_path_factory):
    """A ViT and a language model on the Hub, under one licence: their commits, and their folders."""
    folder = tmp_path_factory.mktemp("backbones")
    folders = write_backbones(folder)
    for part in folders:
        Path(part, "README.md").write_text("---\nlicense: bsd-3-clause\n---\nA backbone.")
    return {
        name: (hub.add(f"them/{name}", Path(part)), part) for name, part in zip(("vit", "llama"), folders, strict=True)
    }


def files_of(hub, repo_id):
    repo = hub.repos[repo_id]
    return {path: blob.content for path, blob in repo.commits[repo.branches["main"]].items()}


def card_of(hub, repo_id):
    return ModelCard(files_of(hub, repo_id)["README.md"].decode())


@pytest.mark.slow
def test_trainer_pushes_a_clean_repository(hub, backbones, tmp_path):
    data = write_pairs(tmp_path / "pictures")
    command = f"""-m lorgnette.trainer stage2 --vision them/vit --text them/llama --num_query_tokens 4 --dataset {data}
        --output_dir {tmp_path}/run --max_steps 1 --save_strategy steps --save_steps 1 --report_to none --use_cpu
        --push_to_hub true --hub_model_id me/run --per_device_train_batch_size 2 --bf16 false"""
    sizes = ["--lora", '{"r": 2}', "--qformer_config", json.dumps(QFORMER)]
    done = run_client(hub, tmp_path / "me", *command.split(), *sizes, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    files = files_of(hub, "me/run")
    assert {"config.json", "model.safetensors", "processor_config.json", "modeling_lorgnette.py", "handler.py"} <= set(
        files
    )
    every = {name for files in hub.repos["me/run"].commits.values() for name in files}
    assert not {name for name in every if re.search(r"\.bin$|\.pt$|trainer_state|\.gitignore", name)}
    assert (tmp_path / "run" / "training_args.bin").is_file()
    assert not hub.holds(str(tmp_path).encode())
    data, text = card_of(hub, "me/run").data, card_of(hub, "me/run").text
    assert (data.license, data.pipeline_tag, data.library_name) == ("bsd-3-clause", TASK, "transformers")
    assert (data.base_model, data.base_model_relation) == (["them/vit", "them/llama"], "adapter")
    assert "model-index" not in data.to_dict()
    assert "Training hyperparameters" in text


@pytest.mark.slow
def test_a_thin_model_is_published_and_read_by_name(hub, backbones, tmp_path):
    """Its source is full, so that the backbones are in nobody's cache."""
    model, processor = joined([folder for _, folder in backbones.values()])
    for part, name in (("vision", "vit"), ("text", "llama")):
        setattr(model.config, f"{part}_backbone", f"them/{name}")
        setattr(model.config, f"{part}_backbone_revision", backbones[name][0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.eval().save_pretrained(tmp_path / "full", save_format="full")
    done = run_client(hub, tmp_path / "me", UPLOAD, tmp_path / "full", "--repo-id", "me/thin", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "token-of-me" not in done.stdout + done.stderr
    files = files_of(hub, "me/thin")
    assert b"vision_model" not in files["model.safetensors"]
    assert card_of(hub, "me/thin").data.license == "bsd-3-clause"

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "README.md").write_text(OLD_CARD)
    hub.add("them/old", tmp_path / "old")
    batch = dict(processor(images=picture(), text=processor.build_prompt(), return_tensors="pt"))
    save_file(batch, tmp_path / "inputs.safetensors")
    seen, cat = tmp_path / "seen.safetensors", draw(tmp_path / "cat.png")
    arguments = [tmp_path / "inputs.safetensors", cat, seen, tmp_path / "fresh"]
    commit = backbones["llama"][0]
    read = run_client(hub, tmp_path / "them", "-c", READ, *arguments, token="token-of-them", timeout=900)
    assert read.returncode == 0, read.stderr[-3000:]
    with torch.no_grad():
        assert torch.equal(load_file(seen)["logits"], model(**batch).logits)
    assert f"without its language model, which is them/llama at commit {commit} and cannot be loaded" in read.stdout
    model_files = {name for name in files if name != ".gitattributes" and not name.startswith("space/")}
    of_the_package = {"handler.py", "requirements.txt", "web_images.py"}
    of_the_package |= {name for name in files if name.startswith("lm_adapter/")}
    for name in ("new", "old"):
        assert model_files - of_the_package <= set(files_of(hub, f"them/{name}"))
        assert set(card_of(hub, f"them/{name}").data.tags) >= {"lorgnette", "q-former"}
    assert card_of(hub, "them/old").data.license == "cc0-1.0"
    assert "What I say of it." in card_of(hub, "them/old").text
    assert not hub.leaks
    assert not hub.holds(b"token-of-")
