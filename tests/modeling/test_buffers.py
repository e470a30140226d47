"""After any load every buffer is what a part that is freshly built has: no file holds those that are not persistent."""

import copy
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_forms import load, logits, stirred
from tiny_models import NUM_QUERY_TOKENS, QFORMER, VISION, language_model, vision_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    DeepseekV3Config,
    FalconH1Config,
    LlamaConfig,
    MptConfig,
    NemotronHConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from lorgnette import LorgnetteForConditionalGeneration


_LM = tiny_models._GQA
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
OTHERS = {
    "falcon_h1": FalconH1Config(**_LM, **_MAMBA, mamba_d_ssm=64, ssm_multipliers=[0.5, 2.0, 0.25, 4.0, 3.0]),
    "bamba": BambaConfig(**_LM, **_MAMBA, attn_layer_indices=[1]),
    "nemotron_h": NemotronHConfig(
        **{name: value for name, value in _LM.items() if name != "num_hidden_layers"},
        layers_block_type=["mamba", "attention"],
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
    ),
    "deepseek_v3": DeepseekV3Config(
        **_LM | {"num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "phi": PhiConfig(**_LM, partial_rotary_factor=0.5),
    "bloom": BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "mpt": MptConfig(vocab_size=320, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "llama_yarn": LlamaConfig(
        **_LM,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama_llama3": LlamaConfig(
        **_LM,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
}


def assert_fresh_buffers(loaded: LorgnetteForConditionalGeneration, text: PreTrainedConfig, vision: PreTrainedConfig):
    """Of the backbones those that are not in any file; all of them where the config alone decides."""
    for part, config in (("language_model", text), ("vision_model", vision)):
        auto = AutoModelForCausalLM if part == "language_model" else AutoModel
        fresh: PreTrainedModel = auto.from_config(copy.deepcopy(config))
        persistent = fresh.state_dict().keys()
        found = {name.replace(".base_layer", ""): value for name, value in getattr(loaded, part).named_buffers()}
        for name, value in fresh.named_buffers():
            assert name in found
            assert name in persistent or torch.equal(found[name], value), f"{part}.{name}"


def joined(vision: PreTrainedModel, text: PreTrainedModel) -> LorgnetteForConditionalGeneration:
    torch.manual_seed(0)
    return stirred(
        LorgnetteForConditionalGeneration.from_backbones(
            vision, text, qformer_config=dict(QFORMER), num_query_tokens=NUM_QUERY_TOKENS, lora={"r": 2}
        )
    )


def saved_and_loaded(text: PreTrainedModel, vision: PreTrainedModel, folder: Path) -> None:
    text_config, vision_config = copy.deepcopy(text.config), copy.deepcopy(vision.config)
    built = joined(vision, text)
    expected = {"full": logits(built), "merged": logits(built)}
    for form, before in expected.items():
        built.save_pretrained(folder / form, save_format=form)
        loaded = load(folder / form)
        assert_fresh_buffers(loaded, text_config, vision_config)
        torch.testing.assert_close(logits(loaded), before, atol=1e-4, rtol=1e-4)
        by_part = load(folder / form, device_map="cpu")
        assert_fresh_buffers(by_part, text_config, vision_config)
        torch.testing.assert_close(logits(by_part), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", [*OTHERS])
def test_language_models(architecture: str, tmp_path):
    torch.manual_seed(0)
    text = AutoModelForCausalLM.from_config(copy.deepcopy(OTHERS[architecture])).eval()
    saved_and_loaded(text, vision_model(), tmp_path)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text", "phi3", "opt", "gpt_neox", "gemma2"])
def test_other_language_models(architecture: str, tmp_path):
    saved_and_loaded(language_model(architecture), vision_model(), tmp_path)


@pytest.mark.parametrize("architecture", [name for name in VISION if name != "vit"])
def test_vision_models(architecture: str, tmp_path):
    saved_and_loaded(language_model(), vision_model(architecture), tmp_path)


def test_a_buffer_that_a_decoder_fills_for_its_layers_is_filled_in_the_whole(tmp_path):
    torch.manual_seed(0)
    text = AutoModelForCausalLM.from_config(copy.deepcopy(OTHERS["falcon_h1"])).eval()
    built = joined(vision_model(), text)
    built.save_pretrained(tmp_path)
    for layer, kept in zip(load(tmp_path).language_model.model.layers, text.model.layers, strict=True):
        assert torch.equal(layer.mamba.mup_vector, kept.mamba.mup_vector)
        assert layer.mamba.mup_vector.unique().numel() > 1
