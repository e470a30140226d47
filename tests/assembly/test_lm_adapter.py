"""The LM's LoRA as peft's own adapter: out of our models into the bare LM, and from there into ours."""

import json

import pytest
import tiny_training
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import QFORMER, inputs, language_model, model, vision_model

from lorgnette import LorgnetteForConditionalGeneration
from lorgnette.assembly import foreign_adapters
from lorgnette.assembly.foreign_adapters import replace_lora


IDS = inputs()["input_ids"][:, :6]


def shaken(built: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Give LoRA something to say: it starts as zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return built.eval()


def trained_elsewhere(folder, text: str = "llama", base: str | None = None, fields: dict | None = None, **lora):
    """What peft alone makes of the bare LM; returns its logits for `IDS`."""
    lora = {"r": 3, "target_modules": ["q_proj", "up_proj"]} | lora
    built = shaken(get_peft_model(language_model(text, **(fields or {})), LoraConfig(**lora, task_type="CAUSAL_LM")))
    built.peft_config["default"].base_model_name_or_path = base
    built.save_pretrained(folder)
    with torch.no_grad():
        return built(IDS).logits


@pytest.mark.parametrize(
    ("text", "flags"), [("llama", {"use_dora": True}), ("gpt2", {}), ("opt", {"use_rslora": True})]
)
def test_peft_loads_what_we_save(text: str, flags: dict, tmp_path):
    built = model(text=text, lora={"r": 2} | flags)
    built.config.text_backbone, built.config.text_backbone_revision = "me/lm", "abc"
    built.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter_*"))  # transformers would take them for the whole model's
    settings = json.loads((tmp_path / "lm_adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("me/lm", "abc")
    assert settings["target_modules"] == sorted(settings["target_modules"])  # the same file in every process
    size = (tmp_path / "lm_adapter" / "adapter_model.safetensors").stat().st_size
    assert size < 20_000 < (tmp_path / "model.safetensors").stat().st_size  # LoRA alone
    theirs = PeftModel.from_pretrained(language_model(text), tmp_path / "lm_adapter").eval()
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, built(IDS).logits)


def test_no_path_of_ours_is_told(tmp_path):
    language_model().save_pretrained(tmp_path / "llama")
    built = LorgnetteForConditionalGeneration.from_backbones(
        vision_model(), tmp_path / "llama", qformer_config=QFORMER, lora={}
    )
    built.save_pretrained(tmp_path / "ours")
    written = (tmp_path / "ours" / "lm_adapter" / "adapter_config.json").read_text()
    assert json.loads(written)["base_model_name_or_path"] is None
    assert str(tmp_path) not in written


def test_without_lora_there_is_none(tmp_path):
    built = model()
    replace_lora(built, None, {})
    assert built.config.lora_config is None
    with torch.no_grad():
        assert torch.equal(built(IDS).logits, language_model()(IDS).logits)
    built.save_pretrained(tmp_path)
    assert not (tmp_path / "lm_adapter").exists()
    LorgnetteForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_lora_of_peft_comes_in(lora, tmp_path):
    """In the place of another one, or of none; and is trained, saved and loaded like one of ours."""
    logits = trained_elsewhere(tmp_path / "peft")
    built = model(lora={"r": 2})
    if lora is None:
        replace_lora(built, None, {})
    built.load_lm_adapter(tmp_path / "peft")
    assert built.config.lora_config == {"r": 3, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    with torch.no_grad():
        assert torch.equal(built(IDS).logits, logits)
        with built.disable_adapter():
            assert torch.equal(built(IDS).logits, language_model()(IDS).logits)
    trainable = {name for name, p in built.language_model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in built.language_model.named_parameters() if "lora_" in name}
    assert len(trainable) == 8  # A and B, of two projections, in two layers
    built.save_pretrained(tmp_path / "ours")
    again = LorgnetteForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, logits)


def test_it_lies_beside_the_layers_that_it_adapts(tmp_path):
    """Which device_map may have put elsewhere than the projector, and each elsewhere."""
    built = model()
    built.save_pretrained(tmp_path)
    built.projector.to("meta")
    built.load_lm_adapter(tmp_path / "lm_adapter")
    assert {p.device.type for name, p in built.named_parameters() if "lora_" in name} == {"cpu"}


def test_ours_comes_in_again(tmp_path):
    built = model()
    built.save_pretrained(tmp_path)
    other = model(lora={"r": 4, "target_modules": ["v_proj"]})
    other.load_lm_adapter(tmp_path / "lm_adapter")
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, built(IDS).logits)


def test_what_does_not_fit_is_refused_before_anything_moves(tmp_path):
    built = model()
    built.config.text_backbone = "me/lm"
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    trained_elsewhere(tmp_path / "gpt2", "gpt2", target_modules=["c_attn"])
    trained_elsewhere(tmp_path / "wide", fields={"hidden_size": 64})
    trained_elsewhere(tmp_path / "deep", fields={"num_hidden_layers": 3})
    trained_elsewhere(tmp_path / "other", base="you/lm")
    trained_elsewhere(tmp_path / "head", modules_to_save=["lm_head"])
    trained_elsewhere(tmp_path / "cut")
    weights = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, tmp_path / "cut" / "adapter_model.safetensors", metadata={"format": "pt"})
    for folder, message in {
        "gpt2": "'c_attn' matches no linear layer",
        "wide": r"lora_A.weight is \(3, 64\) there, and \(3, 32\) here",
        "deep": r"has 12 tensors and LoRA on this language model 8: model.layers.2\S+ is only there",
        "other": "was trained on you/lm; the language model here is me/lm",
        "head": "modules_to_save",
        "cut": r"has 7 tensors and LoRA on this language model 8: model.layers.0\S+ is only here",
    }.items():
        with pytest.raises(ValueError, match=message):
            built.load_lm_adapter(tmp_path / folder)
    built.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="is a whole model: the LoRA of its language model lies in its folder lm_ad"):
        built.load_lm_adapter(tmp_path / "whole")
    pickled = tmp_path / "whole" / "lm_adapter"
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no adapter_model.safetensors; pickled weights \(.bin\) are not read"):
        built.load_lm_adapter(pickled)
    with pytest.raises(FileNotFoundError):
        built.load_lm_adapter(tmp_path / "nowhere")
    after = built.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_a_trainer_checkpoint_has_it_and_resumes(tmp_path):
    """It is small, and a checkpoint is a folder like any other."""
    backbones = tiny_training.write_backbones(tmp_path)
    built, processor = tiny_training.joined(backbones, dropout=0)
    tiny_training.trainer(built, processor, tmp_path / "out", max_steps=1, save_steps=1, save_strategy="steps").train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    adapter = load_file(checkpoint / "lm_adapter" / "adapter_model.safetensors")
    trained = built.language_model.state_dict()
    assert torch.equal(
        adapter["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"],
        trained["model.layers.0.self_attn.q_proj.lora_A.default.weight"],
    )
    again, _ = tiny_training.joined(backbones, dropout=0)
    result = tiny_training.trainer(again, processor, tmp_path / "more", max_steps=2).train(
        resume_from_checkpoint=str(checkpoint)
    )
    assert result.global_step == 2


def test_a_lora_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    model(lora={"r": 4}).save_pretrained(tmp_path)
    built, batch = model(), inputs()
    expected, config = built(**batch).logits, built.config.lora_config

    def fail(*_):
        raise TypeError("as peft 0.19 does where LoRA is on experts")

    monkeypatch.setattr(foreign_adapters, "load_lora_weights", fail)
    before = list(built.state_dict())
    with pytest.raises(TypeError, match="as peft"):
        built.load_lm_adapter(tmp_path / "lm_adapter")
    assert built.config.lora_config is config
    assert list(built.state_dict()) == before
    assert torch.equal(built(**batch).logits, expected)
