"""A GGUF file as the language model: read by transformers, dequantised, and from then on a plain model."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny import chat_tokenizer, image_processor, picture
from tiny_models import QFORMER, TEXT, language_model, vision_model
from transformers import LlamaForCausalLM

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteProcessor


# transformers' names of one Llama layer -> GGUF's
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """The model and the byte-level tokenizer of these tests, in float32."""
    config, tokenizer = model.config, chat_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)

    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges(["Ġ t", "Ġ a"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)

    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        array = tensor.numpy().astype(np.float32)
        if module in TOP:
            writer.add_tensor(f"{TOP[module]}.weight", array)
            continue
        _, _, layer, part = module.split(".", 3)
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}.get(
            part
        )
        if heads:  # GGUF pairs the rotary halves the other way round
            array = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"blk.{layer}.{LAYER[part]}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", language_model(vocab_size=len(chat_tokenizer())))
    return folder


def test_a_gguf_file_is_an_lm_that_can_be_saved_again(folder: Path, tmp_path):
    file = folder / "tiny.gguf"
    processor = LorgnetteProcessor.from_backbones(image_processor(), file, num_query_tokens=3)
    built = LorgnetteForConditionalGeneration.from_backbones(
        vision_model(), file, num_query_tokens=3, lora={"r": 2}, qformer_config=QFORMER
    ).eval()
    built.check_processor(processor)
    assert built.config.image_token_id == len(chat_tokenizer())
    assert built.config.text_config.model_type == TEXT["llama"].model_type

    original, ids = language_model(vocab_size=len(chat_tokenizer())), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(built(ids).logits, original(ids).logits)
        batch = processor(images=picture(), return_tensors="pt")
        built.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        loaded = LorgnetteForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(**batch).logits, built(**batch).logits)
    assert not hasattr(loaded.config.text_config, "quantization_config")
    assert str(folder) not in (tmp_path / "config.json").read_text()
