"""The dtypes of the parts, and what bf16 leaves as it is."""

from functools import partial

import pytest
import torch
from tiny_forms import hub_with_backbones, load, logits, stirred
from tiny_models import QFORMER, inputs, language_model, vision_model
from transformers import AutoModelForCausalLM

from lorgnette import LorgnetteForConditionalGeneration


@pytest.mark.parametrize("text", ["by name", "loaded"])
def test_bf16_leaves_the_language_model_what_it_is(text: str, tmp_path, monkeypatch):
    """RoPE's frequencies are a buffer and stay in float32, as when transformers loads the model alone."""
    hub = hub_with_backbones(tmp_path / "hub", monkeypatch)
    alone = AutoModelForCausalLM.from_pretrained(hub.snapshot("tiny/llama"), dtype=torch.bfloat16).eval()
    lm = language_model(vocab_size=alone.config.vocab_size) if text == "loaded" else "tiny/llama"
    built = stirred(
        LorgnetteForConditionalGeneration.from_backbones(
            "tiny/vit", lm, lora={"r": 2}, qformer_config=QFORMER, num_query_tokens=4, dtype="bfloat16"
        )
    )
    assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}
    ids = inputs()["input_ids"][:, :6]
    with torch.no_grad(), built.disable_adapter():
        assert torch.equal(built(ids).logits, alone(ids).logits)
    for form in ("full",) if text == "loaded" else ("thin", "full"):
        built.save_pretrained(tmp_path / form, save_format=form)
        assert torch.equal(logits(load(tmp_path / form)), logits(built))


def test_dtypes_by_name(tmp_path):
    parts = [vision_model(), language_model()]
    for part, name in zip(parts, ("vit", "lm"), strict=True):
        part.to(torch.float16).save_pretrained(tmp_path / name)
    build = partial(LorgnetteForConditionalGeneration.from_backbones, qformer_config=QFORMER)
    assert build(tmp_path / "vit", tmp_path / "lm", dtype="auto").qformer.dtype == torch.float16
    assert build(*parts, dtype="torch.float32").dtype == torch.float32
    vision_model().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"The ViT is torch.float32, the LM torch.float16"):
        build(tmp_path / "vit", tmp_path / "lm", dtype="auto")
    with pytest.raises(ValueError, match="dtype is 'bf16': give one of torch's"):
        build(tmp_path / "vit", tmp_path / "lm", dtype="bf16")
