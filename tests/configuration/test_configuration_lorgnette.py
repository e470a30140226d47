"""`LorgnetteConfig`: round trips, what follows what, and contradictions that are refused."""

import json

import pytest
from tiny_models import TEXT, VISION
from transformers import AutoConfig, Blip2QFormerConfig

from lorgnette import LorgnetteConfig, LorgnetteQFormerConfig


def config(**fields) -> LorgnetteConfig:
    vision = VISION["vit"][1]
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LorgnetteConfig(**{"vision_config": vision, "text_config": TEXT["llama"], "qformer_config": small} | fields)


@pytest.mark.parametrize("use_diff", [True, False])
def test_json_round_trip_keeps_every_field(use_diff: bool):
    original = config(num_query_tokens=6, lora_config={"r": 4, "target_modules": ["q_proj"]}, vision_feature_layer=None)
    again = LorgnetteConfig.from_dict(json.loads(original.to_json_string(use_diff=use_diff)))
    assert again.to_dict() == original.to_dict()
    assert again.vision_feature_layer is None
    assert type(again.text_config) is type(original.text_config)


def test_saved_config_names_its_classes_and_loads(tmp_path):
    config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"]["AutoModelForImageTextToText"] == "modeling_lorgnette.LorgnetteForConditionalGeneration"
    assert saved["custom_pipelines"]["image-to-text"]["impl"] == "pipeline_lorgnette.LorgnetteImageToTextPipeline"
    loaded = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    ours, theirs = LorgnetteConfig.from_pretrained(tmp_path).to_dict(), loaded.to_dict()
    assert theirs | {"_name_or_path": ""} == ours | {"_name_or_path": ""}


def test_qformer_has_the_fields_of_blip2():
    theirs = {name for name in Blip2QFormerConfig().to_dict() if not name.startswith("_")} - {"model_type"}
    assert theirs <= set(LorgnetteQFormerConfig().to_dict())


def test_qformer_follows_the_vit_and_the_number_of_queries():
    built = config(num_query_tokens=9)
    assert built.qformer_config.encoder_hidden_size == built.vision_config.hidden_size == 24
    assert built.qformer_config.num_query_tokens == 9


def test_placeholder_is_the_first_id_past_the_vocabulary_by_default():
    assert config().image_token_id == TEXT["llama"].vocab_size


def test_attention_of_a_loaded_backbone_is_kept():
    vision = VISION["vit"][1].__class__(attn_implementation="eager")
    assert config(vision_config=vision).vision_config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"qformer_config": {"hidden_size": 30, "num_attention_heads": 4}},
            r"hidden_size \(30\).*num_attention_heads \(4\)",
        ),
        ({"qformer_config": {"cross_attention_frequency": 0}}, "cross_attention_frequency is 0"),
        (
            {"qformer_config": {"encoder_hidden_size": 99}},
            r"encoder_hidden_size \(99\).*vision_config.hidden_size \(24\)",
        ),
        ({"qformer_config": {"num_query_tokens": 3}, "num_query_tokens": 5}, "is 5: the Q-Former has learned 3"),
        ({"num_query_tokens": 0}, "num_query_tokens is 0"),
        ({"qformer_config": {"intermediate_size": 0}}, "intermediate_size is 0"),
        ({"qformer_config": {"hidden_dropout_prob": 3.0}}, "hidden_dropout_prob is 3.0"),
        ({"image_token_id": -1}, "image_token_id is -1"),
        ({"image_token_id": 2}, r"image_token_id \(2\) is also text_config.eos_token_id"),
        ({"vision_config": {"model_type": "llama"}}, '"llama" has no patch_size'),
        ({"text_config": {"model_type": "vit"}}, '"vit" has no vocab_size'),
        ({"vision_feature_layer": 7}, r"vision_feature_layer \(7\).*3 hidden states"),
        ({"vision_feature_layer": -4}, r"vision_feature_layer \(-4\)"),
        ({"vision_feature_select_strategy": "cls"}, '"cls"'),
        ({"text_config": {"vocab_size": 5}}, "text_config has no model_type"),
        ({"text_config": {"model_type": "t5"}}, "encoder-decoder"),
        ({"saved_form": "thin"}, 'saved_form is "thin", and vision_backbone does not say'),
        (
            {"saved_form": "thin", "vision_backbone": "me/vit", "vision_backbone_revision": "abc"},
            "text_backbone does not say",
        ),
    ],
)
def test_contradictions_name_the_fields(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_config_of_another_architecture_is_refused(tmp_path):
    TEXT["llama"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='"llama" checkpoint, not a "lorgnette"'):
        LorgnetteConfig.from_pretrained(tmp_path)
