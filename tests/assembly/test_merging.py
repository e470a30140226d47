"""Merging LoRA of any kind of layer gives the logits that the model had, or the save says that it does not."""

from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from tiny_experts import EXPERTS, joined, with_experts
from tiny_forms import load, logits
from tiny_models import VOCAB_SIZE, language_model, model

from lorgnette import LorgnetteForConditionalGeneration
from lorgnette.assembly import merging
from lorgnette.assembly.foreign_adapters import replace_lora
from lorgnette.assembly.lora_targets import resolve_lora_config
from lorgnette.modeling.modeling_lora import lora_layers


MERGED = {"atol": 1e-4, "rtol": 1e-4}
loads_experts = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.20"), reason="this peft raises a TypeError where it loads LoRA on experts"
)
BOTH = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
TARGETS = {
    "all of both": {"target_parameters": BOTH},
    "experts alone": {"target_parameters": BOTH, "target_modules": []},
    "one of them": {"target_parameters": BOTH[:1], "target_modules": []},
    "three kinds": {"target_parameters": [*BOTH, "mlp.gate.weight"]},
}


def assert_all_forms(made: LorgnetteForConditionalGeneration, folder: Path) -> None:
    before = logits(made)
    for form in ("full", "merged"):
        made.save_pretrained(folder / form, save_format=form)
        torch.testing.assert_close(logits(load(folder / form)), before, **MERGED)
        torch.testing.assert_close(logits(load(folder / form, device_map="cpu")), before, **MERGED)
    assert torch.equal(logits(made), before)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", EXPERTS)
def test_lora_on_experts(kind: str, targets: str, tmp_path):
    lora = TARGETS[targets]
    if kind == "gpt_oss" and targets == "three kinds":
        lora = {"target_parameters": [*BOTH, "mlp.router.weight"]}
    made = joined(with_experts(kind), **lora)
    assert any("experts" in name for name in lora_layers(made.language_model))
    with made.disable_adapter():
        without = logits(made)
    assert (logits(made) - without).abs().max() > 1e-2  # LoRA does something
    assert_all_forms(made, tmp_path)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_all_linear_on_experts(kind: str, tmp_path):
    try:
        made = joined(with_experts(kind), target_modules="all-linear")
    except ValueError as error:
        pytest.skip(f"this peft puts it on no experts: {error}")
    assert_all_forms(made, tmp_path)


@loads_experts
def test_peft_reads_the_lora_of_experts(tmp_path):
    made = joined(with_experts("mixtral"), **TARGETS["experts alone"])
    made.save_pretrained(tmp_path)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        by_peft = PeftModel.from_pretrained(with_experts("mixtral"), tmp_path / "lm_adapter")(ids).logits
        assert torch.equal(by_peft, made.language_model(ids).logits)
        assert not torch.allclose(by_peft, with_experts("mixtral")(ids).logits)


@loads_experts
def test_lora_of_experts_is_taken_off_and_put_on_again(tmp_path):
    made = joined(with_experts("mixtral"), **TARGETS["all of both"])
    made.save_pretrained(tmp_path)
    before = logits(made)
    with made.disable_adapter():
        without = logits(made)
    lora_config = made.config.lora_config
    kept = replace_lora(made, None, None)
    assert torch.equal(logits(made), without)
    assert made.language_model.state_dict().keys() == with_experts("mixtral").state_dict().keys()
    replace_lora(made, lora_config, kept)
    assert torch.equal(logits(made), before)
    replace_lora(made, None, None)
    made.load_lm_adapter(tmp_path / "lm_adapter")
    assert torch.equal(logits(made), before)


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}, {"rank_pattern": {"q": 3}}]
)
@pytest.mark.parametrize("text", ["gpt2", "phi3", "opt"])
def test_other_kinds_of_lora(text: str, lora: dict, tmp_path):
    assert_all_forms(joined(language_model(text), **lora), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_fault(dtype: torch.dtype, tmp_path):
    made = joined(with_experts("qwen3_moe"), **TARGETS["all of both"]).to(dtype)
    made.save_pretrained(tmp_path, save_format="merged")
    error = (logits(load(tmp_path)) - logits(made)).float().abs().mean() / logits(made).float().std()
    assert error < 0.05


@pytest.mark.parametrize("off", [False, True])
def test_a_merge_that_answers_otherwise_is_not_saved(off: bool, monkeypatch, tmp_path):
    made = model().train()
    if off:
        made.disable_adapters()
    made.get_parameter("language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight").requires_grad_(False)
    trained = {name for name, value in made.named_parameters() if value.requires_grad}
    real = merging.outermost_lora_layers
    monkeypatch.setattr(merging, "outermost_lora_layers", lambda lm: dict(list(real(lm).items())[1:]))
    with pytest.raises(ValueError, match=r"other logits: they differ by .* and rounding explains 0.001\. Save it with"):
        made.save_pretrained(tmp_path / "saved", save_format="merged")
    assert not (tmp_path / "saved").exists()
    assert made.language_model.training
    assert not made.vision_model.training
    assert {name for name, value in made.named_parameters() if value.requires_grad} == trained
    assert all(layer.disable_adapters == off for layer in lora_layers(made.language_model).values())


@pytest.mark.parametrize("target", ["lm_head.weight", "embed_tokens.weight"])
def test_tables_are_no_targets(target: str):
    with pytest.raises(ValueError, match=f"'{target}', an embedding table"):
        resolve_lora_config({"target_parameters": [target], "target_modules": []}, language_model())


def test_targets_that_are_not_there():
    with pytest.raises(ValueError, match=r"'experts.down_proj', which no parameter of the LM is called"):
        resolve_lora_config({"target_parameters": ["experts.down_proj"], "target_modules": []}, language_model())
    with pytest.raises(ValueError, match="'target_modules'] is empty"):
        resolve_lora_config({"target_modules": []}, language_model())
    assert language_model().config.vocab_size == VOCAB_SIZE


def test_a_context_shorter_than_the_trial_of_a_merge(tmp_path):
    built = joined(language_model("gpt2", n_positions=24))
    built.save_pretrained(tmp_path, save_format="merged")
    torch.testing.assert_close(logits(load(tmp_path)), logits(built), atol=1e-4, rtol=1e-4)
