"""A Q-Former out of a BLIP-2 checkpoint, under another language model, and under another ViT."""

import pytest
import tiny_blip2
import torch
from safetensors.torch import load_file, save_file
from tiny_forms import hub_with_backbones
from tiny_models import IMAGE_SIZE, language_model, vision_model
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, ViTConfig, ViTModel

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteForImageTextRetrieval
from lorgnette.assembly.blip2_qformer import load_blip2_qformer


PICTURES = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


def instructblip() -> InstructBlipForConditionalGeneration:
    text = tiny_blip2.TEXT["opt"].to_dict() | {"word_embed_proj_dim": 32}
    config = InstructBlipConfig(
        vision_config=tiny_blip2.VISION,
        qformer_config=tiny_blip2.QFORMER,
        text_config=text,
        num_query_tokens=tiny_blip2.NUM_QUERY_TOKENS,
        image_token_index=text["vocab_size"] - 1,
    )
    return tiny_blip2.shaken(InstructBlipForConditionalGeneration(config))


CHECKPOINTS = {"retrieval": tiny_blip2.blip2_retrieval, "generation": tiny_blip2.blip2, "instruct": instructblip}


def queries_of(blip2: torch.nn.Module, features: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
    """What BLIP-2's own Q-Former makes of a ViT's features."""
    queries = blip2.query_tokens.expand(len(features), -1, -1)
    inputs = {"query_embeds": queries, "encoder_hidden_states": features}
    if text is not None:
        inputs["input_ids"] = text
    return blip2.qformer(**inputs).last_hidden_state[:, : queries.shape[1]]


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("is_loaded", [False, True])
def test_its_queries_read_pictures_as_they_did_in_blip2(tmp_path, kind, is_loaded):
    blip2 = CHECKPOINTS[kind]()
    blip2.save_pretrained(tmp_path)
    source = blip2 if is_loaded else tmp_path
    instructs = kind == "instruct"  # whose ViT transformers has no class for by itself
    vision = tiny_blip2.blip2() if instructs else source
    model = LorgnetteForConditionalGeneration.from_backbones(
        vision, language_model(), qformer=source, qformer_config={"use_qformer_text_input": instructs}, lora={"r": 2}
    ).eval()
    text = torch.arange(3, 15).view(2, 6) if instructs else None
    with torch.no_grad():
        features = model.get_vision_features(PICTURES).last_hidden_state
        expected = features if instructs else blip2.vision_model(PICTURES).last_hidden_state
        given = {} if text is None else {"qformer_input_ids": text}
        found = model.get_image_features(PICTURES, **given).qformer_outputs.last_hidden_state
    torch.testing.assert_close(features, expected)
    count = tiny_blip2.NUM_QUERY_TOKENS
    torch.testing.assert_close(found[:, :count], queries_of(blip2, expected, text), atol=1e-5, rtol=1e-5)
    assert model.config.num_query_tokens == count
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert "qformer.query_tokens.weight" in names
    assert not any(name.startswith("vision_model") for name in names)


def test_under_a_vit_of_another_width_keys_and_values_start_anew(tmp_path):
    blip2 = tiny_blip2.blip2_retrieval()
    blip2.save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vision = ViTModel(ViTConfig(**sizes, image_size=IMAGE_SIZE, patch_size=tiny_blip2.VISION["patch_size"]))
    model = LorgnetteForConditionalGeneration.from_backbones(vision, language_model(), qformer=tmp_path)
    theirs = load_blip2_qformer(tmp_path, None).model.state_dict()
    for name, value in model.qformer.state_dict().items():
        anew = "crossattention.attention.key.weight" in name or "crossattention.attention.value.weight" in name
        assert (value.shape != theirs[name].shape) == anew, name
        assert anew or torch.equal(value, theirs[name]), name


def test_a_thin_model_names_the_repository_that_holds_both(tmp_path, monkeypatch):
    hub = hub_with_backbones(tmp_path / "hub", monkeypatch)
    commit = hub.add("tiny/blip2", tiny_blip2.blip2_retrieval())
    model = LorgnetteForConditionalGeneration.from_backbones("tiny/blip2", "tiny/llama", qformer="tiny/blip2").eval()
    model.save_pretrained(tmp_path / "saved")
    config = model.config
    named = [(config.vision_backbone, config.vision_backbone_revision)]
    named += [(config.qformer_backbone, config.qformer_backbone_revision)]
    assert named == [("tiny/blip2", commit)] * 2
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert not any(key.startswith(("vision_model", "language_model")) for key in weights)
    loaded = LorgnetteForConditionalGeneration.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        found, expected = (each.get_image_features(PICTURES).pooler_output for each in (loaded, model))
    assert torch.equal(found, expected)


def test_what_contradicts_the_checkpoint_is_an_error(tmp_path):
    tiny_blip2.blip2().save_pretrained(tmp_path)

    def join(**settings):
        LorgnetteForConditionalGeneration.from_backbones(tmp_path, language_model(), qformer=tmp_path, **settings)

    with pytest.raises(ValueError, match="num_query_tokens is 8; the BLIP-2 Q-Former has 4"):
        join(num_query_tokens=8)
    with pytest.raises(ValueError, match=r"qformer_config\.hidden_size is 32; the BLIP-2 Q-Former's is 16"):
        join(qformer_config={"hidden_size": 32})
    with pytest.raises(ValueError, match="use_qformer_text_input is set, and the BLIP-2 Q-Former has no text half"):
        join(qformer_config={"use_qformer_text_input": True})
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(key for key in weights if ".crossattention.attention.key.weight" in key)
    save_file({key: value for key, value in weights.items() if key != gone}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 weights of a Q-Former of its config \(encoder\.layer\.0"):
        load_blip2_qformer(tmp_path, None)


def test_stage_1_takes_it_by_another_name(tmp_path):
    tiny_blip2.blip2_retrieval().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this is a BLIP-2: from_blip2 takes one with all its heads"):
        LorgnetteForImageTextRetrieval.from_backbones(vision_model(), qformer=tmp_path)
