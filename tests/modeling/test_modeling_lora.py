"""LoRA: where it goes, what it may not touch, and errors that list what exists."""

import json

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny_models import QFORMER, inputs, language_model, model, vision_model

from lorgnette import LorgnetteForConditionalGeneration


def build(lora, text: str = "llama") -> LorgnetteForConditionalGeneration:
    return LorgnetteForConditionalGeneration.from_backbones(
        vision_model(), language_model(text), lora=lora, qformer_config=QFORMER
    )


def adapted(built: LorgnetteForConditionalGeneration) -> set[str]:
    names = {name.split(".lora_A")[0] for name, _ in built.named_parameters() if ".lora_A" in name}
    return {".".join(name.split(".")[-2:]) for name in names}


def test_gpt2_feed_forward_of_the_same_name_is_left_alone():
    assert adapted(build({}, "gpt2")) == {"attn.c_attn", "attn.c_proj"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], {"self_attn.q_proj", "self_attn.v_proj"}),
        (r".*layers\.1\.mlp\.\w+_proj", {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
    ],
)
def test_targets_of_ones_own(targets, expected: set[str]):
    assert adapted(build({"target_modules": targets})) == expected


def test_all_linear_stays_inside_the_language_model():
    built = build({"target_modules": "all-linear"})
    assert "mlp.up_proj" in adapted(built)
    outside = [
        name for name, _ in built.named_parameters() if "lora_" in name and not name.startswith("language_model.")
    ]
    assert outside == []


def test_a_lora_config_object_is_taken_as_well():
    built = build(LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]))
    assert built.config.lora_config == {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }


@pytest.mark.parametrize("as_dict", [False, True])
def test_what_a_lora_config_says_of_its_origin_is_left_out(as_dict: bool, tmp_path):
    """It would be said twice when the adapter is written, and a frozen LoRA is none that trains."""
    lora = LoraConfig(r=2, inference_mode=True, base_model_name_or_path="you/lm", revision="abc", task_type="CAUSAL_LM")
    if as_dict:
        lora.save_pretrained(tmp_path)
        lora = json.loads((tmp_path / "adapter_config.json").read_text())
        assert {"peft_type", "auto_mapping", "peft_version", "inference_mode"} <= lora.keys()
    built = build(lora)
    built.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "lm_adapter" / "adapter_config.json").read_text())["revision"] is None
    assert [name for name, p in built.language_model.named_parameters() if p.requires_grad]
    assert LorgnetteForConditionalGeneration.from_pretrained(tmp_path / "saved").config.lora_config["r"] == 2


@pytest.mark.parametrize("flags", [{"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.1}])
def test_flags_pass_through_and_survive_a_save(flags: dict, tmp_path):
    built = model(lora={"r": 2} | flags)
    layer = built.language_model.model.layers[0].self_attn.q_proj
    if "use_rslora" in flags:
        assert layer.scaling["default"] == pytest.approx(8 / 2**0.5)
    if "use_dora" in flags:
        assert built.language_model.get_parameter(
            "model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight"
        ).requires_grad
    built.save_pretrained(tmp_path)
    loaded = LorgnetteForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs()).logits, built(**inputs()).logits)
    assert loaded.config.lora_config == built.config.lora_config


def test_lora_that_a_checkpoint_lacks_is_an_error(tmp_path):
    """transformers alone would fill the LM's own projections, whose names LoRA changes, with noise."""
    build(None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lora_config is None in its config, .* and \{'r': 2, .*\} was asked for"):
        LorgnetteForConditionalGeneration.from_pretrained(tmp_path, lora_config={"r": 2, "target_modules": ["q_proj"]})


@pytest.mark.parametrize(
    ("lora", "error", "message"),
    [
        ({"target_modules": ["q_prj"]}, ValueError, r"'q_prj' matches no linear layer.*self_attn.q_proj"),
        ({"target_modules": ["q_proj", "vision_model.encoder"]}, ValueError, "'vision_model.encoder' matches no"),
        ({"target_modules": "vision_model.*"}, ValueError, "'vision_model.*' matches no"),
        ({"target_modules": ["lm_head"]}, ValueError, "'lm_head' matches no"),
        ({"rank": 4}, ValueError, r"does not know: \['rank'\]"),
        ({"modules_to_save": ["lm_head"]}, ValueError, "modules_to_save"),
        ({"bias": "all"}, ValueError, 'bias is "all"'),
        ({"layer_replication": [[0, 2], [0, 2]]}, ValueError, "layer_replication"),
        ({"target_modules": []}, ValueError, "is empty"),
        ({"init_lora_weights": "pissa"}, ValueError, '"pissa" rewrites base weights'),
        ({"peft_type": "LOHA", "r": 4}, ValueError, "of the type LOHA; LoRA is needed"),
        (8, TypeError, "not int"),
    ],
)
def test_bad_lora_is_refused(lora, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        build(lora)


def test_sets_become_lists_that_json_can_hold(tmp_path):
    built = build(LoraConfig(r=2, exclude_modules=["k_proj"]))
    built.save_pretrained(tmp_path)
    assert LorgnetteForConditionalGeneration.from_pretrained(tmp_path).config.lora_config == built.config.lora_config
    assert "self_attn.k_proj" not in adapted(built)


def test_adapters_that_a_save_would_lose_are_refused(tmp_path):
    built, second = build({}), LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="saved without the Q-Former"):
        built.add_adapter(second)
    inject_adapter_in_model(second, built.language_model, "second")
    with pytest.raises(ValueError, match=r"\['second'\].*would be lost"):
        built.save_pretrained(tmp_path)


def test_a_language_model_that_has_an_adapter_already():
    wrapped = language_model()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), wrapped)
    with pytest.raises(ValueError, match="give the bare LM"):
        LorgnetteForConditionalGeneration.from_backbones(vision_model(), wrapped)
