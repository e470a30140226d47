"""A language model in 8 or 4 bit: its base weights are quantised, and nothing else is; LoRA over them trains."""

import pytest
import tiny_forms
import tiny_training
import torch
from tiny_models import NUM_QUERY_TOKENS, QFORMER, inputs, language_model, model, vision_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from lorgnette import LorgnetteForConditionalGeneration
from lorgnette.trainer.arguments import Stage2Arguments
from lorgnette.trainer.stage2 import build
from lorgnette.trainer.vision_tower import VisionTower


needs_bitsandbytes = pytest.mark.skipif(
    not is_bitsandbytes_available(), reason="bitsandbytes, which quantises, is not installed"
)


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("settings", "stored"), [({"load_in_4bit": True}, torch.uint8), ({"load_in_8bit": True}, torch.int8)]
)
def test_only_base_weights_of_the_language_model_are_quantised(
    settings: dict, stored: torch.dtype, tmp_path, monkeypatch
):
    tiny_forms.hub_with_backbones(tmp_path, monkeypatch)  # of a folder it could not be saved, and does not train
    made = LorgnetteForConditionalGeneration.from_backbones(
        *tiny_forms.BACKBONES,
        qformer_config=QFORMER,
        num_query_tokens=NUM_QUERY_TOKENS,
        lora={"r": 2},
        quantization_config=BitsAndBytesConfig(**settings),
    )
    quantised = {name for name, parameter in made.named_parameters() if parameter.dtype != torch.float32}
    assert "language_model.model.layers.0.self_attn.q_proj.base_layer.weight" in quantised
    assert len(quantised) == 2 * 7  # the projections of attention and feed-forward, in two layers
    assert all(name.startswith("language_model.model.layers") and "lora_" not in name for name in quantised)
    assert {made.get_parameter(name).dtype for name in quantised} == {stored}

    before = {name: parameter.detach().clone() for name, parameter in made.named_parameters()}
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
    batch = inputs(image_token_id=made.config.image_token_id)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == made.config.image_token_id, -100)
    made.train()
    for _ in range(2):  # LoRA's B is zero in the first step, and with it A's gradient
        made(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, parameter in made.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in moved)


@needs_bitsandbytes
def test_what_could_not_be_saved_is_not_trained(tmp_path):
    """Its weights are no longer floats, and no Hub repository has them."""
    vit, llama = tiny_training.write_backbones(tmp_path)
    settings = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=settings).save_pretrained(llama)
    with pytest.raises(
        ValueError, match=r"quantised .*only the thin format can be saved, and its language model comes"
    ):
        build(Stage2Arguments(vision=vit, text=llama, num_query_tokens=NUM_QUERY_TOKENS))


def test_what_cannot_be_quantised_is_refused(tmp_path):
    settings = {"quantization_config": {"load_in_8bit": True}}
    with pytest.raises(ValueError, match="this LlamaForCausalLM is loaded already"):
        LorgnetteForConditionalGeneration.from_backbones(vision_model(), language_model(), **settings)
    model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization_config is for a language model, and VisionTower has none"):
        VisionTower.from_pretrained(tmp_path, config=model().config, **settings)


@needs_bitsandbytes
@pytest.mark.parametrize("form", ["full", "merged"])
def test_a_saved_model_is_quantised_while_it_is_loaded(form: str, tmp_path):
    """Its language model's base weights are, which lie beside all others in the folder."""
    made = model()
    made.save_pretrained(tmp_path, save_format=form, max_shard_size="50KB")
    settings = BitsAndBytesConfig(load_in_8bit=True)
    loaded, info = LorgnetteForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=settings, output_loading_info=True
    )
    assert not any(info.values())
    quantised = {name for name, parameter in loaded.named_parameters() if parameter.dtype != torch.float32}
    assert len(quantised) == 2 * 7
    assert all(name.startswith("language_model.model.layers") and "lora_" not in name for name in quantised)
    before = made.state_dict()
    others = {name: value for name, value in loaded.state_dict().items() if value.dtype == torch.float32}
    assert {"qformer", "projector", "vision_model"} < {name.split(".")[0] for name in others}
    assert [n for n, v in others.items() if n in before and not torch.equal(v, before[n])] == []
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs()).logits, made(**inputs()).logits, atol=0.2, rtol=0.1)
