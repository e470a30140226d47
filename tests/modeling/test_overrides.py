"""Keywords and configs of `from_pretrained` that contradict what a folder's weights were trained with."""

import pytest
import tiny
import tiny_models
import tiny_retrieval
import torch
from transformers import AutoModel, AutoProcessor

from lorgnette import (
    LorgnetteConfig,
    LorgnetteForConditionalGeneration,
    LorgnetteForImageTextRetrieval,
    LorgnetteProcessor,
)
from lorgnette.assembly.guards import field_of


@pytest.fixture(scope="module")
def built():
    return tiny_models.model()


@pytest.fixture(scope="module")
def folder(built, tmp_path_factory):
    path = tmp_path_factory.mktemp("full")
    built.save_pretrained(path, save_format="full")
    return path


CONTRADICTIONS = [
    ({"num_query_tokens": 6}, r"num_query_tokens is 4 .* 6"),
    ({"num_query_tokens": 2}, r"num_query_tokens is 4 .* 2"),
    ({"image_token_id": 5}, r"image_token_id is 320 .* 5"),
    ({"vision_feature_layer": -2}, r"vision_feature_layer is None .* -2"),
    ({"vision_feature_select_strategy": "default"}, r"vision_feature_select_strategy is 'full' .* 'default'"),
    ({"lora_config": None}, r"lora_config is .* None"),
    ({"lora_config": {"r": 4}}, r"lora_config\.r is 2 .* 4"),
    ({"qformer_config": {"num_hidden_layers": 1}}, r"qformer_config\.num_hidden_layers is 2 .* 1"),
    ({"qformer_config": {"num_attention_heads": 4}}, r"qformer_config\.num_attention_heads is 2 .* 4"),
    ({"text_config": {"vocab_size": 99}}, r"text_config\.vocab_size is 320 .* 99"),
    ({"vocab_size": 99}, r"text_config\.vocab_size is 320 .* 99"),
    ({"vision_config": {"image_size": 64}}, r"vision_config\.image_size is 32 .* 64"),
    ({"text_backbone": "some/where"}, r"text_backbone is None .* 'some/where'"),
]


@pytest.mark.parametrize(("override", "message"), CONTRADICTIONS, ids=lambda value: str(value)[:40])
def test_keywords(folder, override, message):
    for cls in (LorgnetteForConditionalGeneration, AutoModel):
        with pytest.raises(ValueError, match=message):
            cls.from_pretrained(folder, **override)


def test_configs(folder, built):
    def described(**changes):
        config = LorgnetteConfig.from_pretrained(folder)
        for path, value in changes.items():
            part, _, field = path.rpartition("__")
            setattr(getattr(config, part) if part else config, field, value)
        return config

    for changes, message in (
        ({"num_query_tokens": 6}, r"num_query_tokens is 4 .* 6"),
        ({"qformer_config__num_attention_heads": 4}, r"qformer_config\.num_attention_heads is 2 .* 4"),
        ({"text_config__num_hidden_layers": 1}, r"text_config\.num_hidden_layers is 2 .* 1"),
        ({"text_config__num_key_value_heads": 4}, r"text_config\.num_key_value_heads is 2 .* 4"),
        ({"lora_config": None}, r"lora_config is .* None"),
    ):
        with pytest.raises(ValueError, match=message):
            LorgnetteForConditionalGeneration.from_pretrained(folder, config=described(**changes))
    batch = tiny_models.inputs()
    same = described(
        qformer_config__hidden_dropout_prob=0.3, lora_config=built.config.lora_config | {"lora_dropout": 0.1}
    )
    loaded = LorgnetteForConditionalGeneration.from_pretrained(folder, config=same)
    assert torch.equal(loaded(**batch).logits, built(**batch).logits)


def test_what_changes_no_weight_may_be_said(folder, built):
    batch = tiny_models.inputs()
    for override in (
        {"num_query_tokens": 4, "image_token_id": 320, "vision_feature_layer": None},
        {"attn_implementation": "eager"},
        {"dtype": "float32"},
    ):
        loaded = LorgnetteForConditionalGeneration.from_pretrained(folder, **override)
        torch.testing.assert_close(loaded(**batch).logits, built(**batch).logits)


def test_a_field_that_each_layer_has_for_itself():
    config = tiny_models.language_model().config
    assert field_of(config, "head_dim") == 8
    assert field_of(config, "no_such_field") is None
    by_layer = pytest.importorskip("transformers", minversion="5.24").Gemma4UnifiedTextConfig
    layers = {"num_hidden_layers": 2, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    one, other = (by_layer(**layers, global_head_dim=size) for size in (16, 32))
    assert (field_of(one, "head_dim"), field_of(other, "head_dim")) == ([8, 16], [8, 32])


def test_stage_1(tmp_path):
    tiny_retrieval.retriever().save_pretrained(tmp_path / "whole", save_format="full")
    tiny_retrieval.retriever(itc_weight=0).save_pretrained(tmp_path / "without", save_format="full")
    load = LorgnetteForImageTextRetrieval.from_pretrained
    with pytest.raises(ValueError, match=r"num_query_tokens is 4 .* 6"):
        load(tmp_path / "whole", num_query_tokens=6)
    with pytest.raises(ValueError, match=r"itc_weight is 0 .* 1\.0 was asked"):
        load(tmp_path / "without", itc_weight=1.0)
    assert load(tmp_path / "whole", itg_weight=3.0).config.itg_weight == 3.0


def test_a_processor(tmp_path):
    LorgnetteProcessor.from_backbones(
        tiny.image_processor(), tiny.chat_tokenizer(), num_query_tokens=4
    ).save_pretrained(tmp_path)
    for cls, trust in ((LorgnetteProcessor, {}), (AutoProcessor, {"trust_remote_code": True})):
        # the model says whether it takes fewer
        assert cls.from_pretrained(tmp_path, num_query_tokens=2, **trust).num_query_tokens == 2
        assert cls.from_pretrained(tmp_path, num_query_tokens=4, query="What is it?", **trust).query == "What is it?"
