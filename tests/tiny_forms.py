"""Models of Hub backbones, to be saved in one form or another, and a look at what was saved."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import chat_tokenizer, image_processor
from tiny_hub import TinyHub
from tiny_models import NUM_QUERY_TOKENS, QFORMER, inputs, language_model, vision_model

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteProcessor
from lorgnette.publishing import model_push


BACKBONES = ("tiny/vit", "tiny/llama")
PT = {"format": "pt"}


def hub_with_backbones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> TinyHub:
    hub = TinyHub(folder, monkeypatch)
    tokenizer = chat_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    hub.add("tiny/vit", vision_model(), image_processor())
    hub.add("tiny/llama", language_model(vocab_size=len(tokenizer), **ids), tokenizer)
    return hub


def joined(lora: dict | None = None, seed: int = 1) -> LorgnetteForConditionalGeneration:
    """A model of Hub backbones, with its processor; LoRA does something."""
    torch.manual_seed(seed)
    built = LorgnetteForConditionalGeneration.from_backbones(
        *BACKBONES,
        processor=LorgnetteProcessor.from_backbones(*BACKBONES, num_query_tokens=NUM_QUERY_TOKENS),
        lora={"r": 2} if lora is None else lora,
        qformer_config=QFORMER,
    )
    return stirred(built)


def stirred(built: LorgnetteForConditionalGeneration) -> LorgnetteForConditionalGeneration:
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return built.eval()


def load(folder: Path, **kwargs) -> LorgnetteForConditionalGeneration:
    return LorgnetteForConditionalGeneration.from_pretrained(folder, **kwargs)


def logits(built: LorgnetteForConditionalGeneration) -> torch.Tensor:
    batch = inputs(image_token_id=built.config.image_token_id)
    with torch.no_grad():
        return built(**{name: value.to(built.device) for name, value in batch.items()}).logits


def form_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["saved_form"]


def keys_in(folder: Path) -> set[str]:
    keys: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            keys |= set(tensors.keys())
    return keys


def rewrite(folder: Path, keep: Callable[[str], bool]) -> None:
    """Leave in a folder's weights only those that `keep` says."""
    weights = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in weights.items() if keep(key)}, folder / "model.safetensors", PT)


@contextmanager
def rewritten(folder: Path, keep: Callable[[str], bool]) -> Iterator[None]:
    """[`rewrite`] a folder for a while."""
    whole = (folder / "model.safetensors").read_bytes()
    rewrite(folder, keep)
    try:
        yield
    finally:
        (folder / "model.safetensors").write_bytes(whole)


def copy_of(built: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in built.state_dict().items()}


def assert_equal_weights(built: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert [name for name, value in built.state_dict().items() if not torch.equal(value, before[name])] == []


def keep_uploads(monkeypatch, place: Path, sent: Callable[[Path], None] = lambda folder: None) -> None:
    """What a model pushes is kept as `place / repo_id`, and no Hub is asked."""

    def keep(self, *, repo_id: str, folder_path: str, **kwargs) -> None:
        sent(Path(shutil.copytree(folder_path, place / repo_id, dirs_exist_ok=True)))

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", keep)
    monkeypatch.setattr(model_push, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("A model."))
