"""What trains can be saved: what cannot is refused at the first training step, before a weight has moved."""

import pytest
import tiny_forms
import tiny_training
import torch
from tiny_forms import form_of, hub_with_backbones, logits
from tiny_models import NUM_QUERY_TOKENS, QFORMER, inputs, model
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteProcessor


needs_bitsandbytes = pytest.mark.skipif(
    not is_bitsandbytes_available(), reason="bitsandbytes, which quantises, is not installed"
)
EIGHT_BIT = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)} if is_bitsandbytes_available() else {}


def joined(backbones: tuple[str, str], **kwargs) -> tuple[LorgnetteForConditionalGeneration, LorgnetteProcessor]:
    processor = LorgnetteProcessor.from_backbones(*backbones, num_query_tokens=NUM_QUERY_TOKENS)
    made = LorgnetteForConditionalGeneration.from_backbones(
        *backbones, processor=processor, qformer_config=QFORMER, lora={"r": 2}, **kwargs
    )
    return made, processor


def refused_by_trainer(made, processor, folder, match: str) -> None:
    """The stock Trainer stops at its first step, with all weights as they were, and nothing is written."""
    before = {name: value.clone() for name, value in made.state_dict().items() if torch.is_tensor(value)}
    trainer = tiny_training.trainer(made, processor, folder, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0
    after = made.state_dict()
    assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []
    assert not list(folder.glob("checkpoint-*"))


@needs_bitsandbytes
@pytest.mark.parametrize("settings", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=lambda s: next(iter(s)))
def test_a_quantised_language_model_of_a_folder_is_not_trained(settings: dict, tmp_path):
    made, processor = joined(
        tiny_training.write_backbones(tmp_path), quantization_config=BitsAndBytesConfig(**settings)
    )
    match = r"quantised .*only the thin form.*comes from a folder .*Give from_backbones a Hub id, or no quantization"
    refused_by_trainer(made, processor, tmp_path / "out", match)
    if "load_in_8bit" in settings:  # it can be used; 4 bit wants wider layers on a CPU
        assert logits(made.eval()).isfinite().all()


@needs_bitsandbytes
def test_a_quantised_language_model_of_the_hub_trains_and_is_saved(tmp_path, monkeypatch):
    hub_with_backbones(tmp_path / "hub", monkeypatch)
    made, processor = joined(tiny_forms.BACKBONES, **EIGHT_BIT)
    tiny_training.trainer(made, processor, tmp_path / "out", save_strategy="steps", save_steps=1).train()
    assert form_of(tmp_path / "out" / "checkpoint-2") == "thin"
    loaded = tiny_forms.load(tmp_path / "out" / "checkpoint-2", **EIGHT_BIT)
    torch.testing.assert_close(logits(loaded), logits(made.eval()))


@needs_bitsandbytes
def test_a_quantised_language_model_that_was_changed_is_not_trained(tmp_path, monkeypatch):
    hub_with_backbones(tmp_path / "hub", monkeypatch)
    made, processor = joined(tiny_forms.BACKBONES, **EIGHT_BIT)
    with torch.no_grad():
        made.language_model.model.norm.weight.mul_(2)
    refused_by_trainer(made, processor, tmp_path / "out", r"weights .* that were loaded \(language_model.model.norm")


@needs_bitsandbytes
def test_a_quantised_language_model_whose_weights_train_is_not_trained(tmp_path, monkeypatch):
    hub_with_backbones(tmp_path / "hub", monkeypatch)
    made, processor = joined(tiny_forms.BACKBONES, **EIGHT_BIT)
    made.language_model.model.norm.weight.requires_grad_(True)
    refused_by_trainer(made, processor, tmp_path / "out", r"1 weights of its backbones train \(language_model.model.no")


def test_a_second_adapter_is_not_trained():
    from peft import LoraConfig, inject_adapter_in_model

    made = model()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), made.language_model, "other")
    batch = inputs()
    with pytest.raises(ValueError, match=r"Adapters \['other'\] of the language model are not in lora_config"):
        made.train()(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == 320, -100))


def test_the_format_of_names_that_is_saved_with_lora(tmp_path):
    """transformers' older names know no LoRA: False says what is done anyway, and True is refused."""
    built = model()
    with pytest.raises(ValueError, match="save_original_format knows no names of weights under LoRA"):
        built.save_pretrained(tmp_path / "refused", save_original_format=True)
    assert not (tmp_path / "refused").exists()
    built.save_pretrained(tmp_path / "saved", save_original_format=False)
    assert (tmp_path / "saved" / "model.safetensors").is_file()
