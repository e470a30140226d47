"""Ten language models through assembly, forward, backward, generate, save and reload."""

import pytest
import torch
from tiny_models import SCALED, TEXT, VOCAB_SIZE, inputs, language_model, model
from transformers import AutoModelForCausalLM, FalconH1Config

from lorgnette import LorgnetteForConditionalGeneration
from lorgnette.modeling import modeling_loss


# What peft should adapt in each architecture: its attention projections, and nothing else.
PROJECTIONS = {
    "gpt2": {"attn.c_attn", "attn.c_proj"},
    "opt": {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    "phi3": {"self_attn.qkv_proj", "self_attn.o_proj"},
    "gpt_neox": {"attention.query_key_value", "attention.dense"},
}
LLAMA_PROJECTIONS = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}


@pytest.mark.parametrize("architecture", TEXT)
def test_the_whole_loop(architecture: str, tmp_path):
    built, batch = model(text=architecture), inputs()
    assert set(built.config.lora_config["target_modules"]) == PROJECTIONS.get(architecture, LLAMA_PROJECTIONS)

    ids = batch["input_ids"][:, :6]
    with torch.no_grad(), built.disable_adapter():
        assert torch.equal(built(ids).logits, language_model(architecture)(ids).logits)

    labels = batch["input_ids"].clone()
    labels[:, :10] = -100
    built.train()(**batch, labels=labels).loss.backward()
    cut_off = [name for name, p in built.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert cut_off == []
    assert all(parameter.grad is None for parameter in built.parameters() if not parameter.requires_grad)

    built.eval()
    continued = built.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(continued[:, :15], batch["input_ids"])
    assert continued.shape[1] <= 19

    built.save_pretrained(tmp_path)
    loaded = LorgnetteForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, built(**batch).logits)
    assert torch.equal(loaded.generate(**batch, max_new_tokens=4, do_sample=False), continued)


@pytest.mark.parametrize(("at_once", "items"), [(2**25, None), (6 * VOCAB_SIZE, 7)])
@pytest.mark.parametrize("architecture", [*TEXT, *SCALED])
def test_the_loss_of_supervised_positions_alone_is_the_language_models_own(
    architecture: str, at_once, items, monkeypatch
):
    """In one piece, and six positions at a time; the head sees six positions, filled up to 16, and no other."""
    monkeypatch.setattr(modeling_loss, "LOGITS_AT_ONCE", at_once)
    built, batch = model(text=architecture).train(), inputs()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == built.config.image_token_id, -100)
    labels[0, :11] = labels[1, :13] = -100
    recorded: list[int] = []
    built.get_output_embeddings().register_forward_hook(lambda _, states, __: recorded.append(states[0].shape[1]))
    losses, gradients = [], []
    for keep in ({}, {"logits_to_keep": 0}):  # 0: all of them
        torch.manual_seed(0)  # dropout
        outputs = built(**batch, labels=labels, num_items_in_batch=items, **keep)
        assert recorded == ([15] if keep else [16] if at_once > 16 * VOCAB_SIZE else [6, 6, 4])
        assert ("logits" in outputs) == hasattr(outputs, "logits") == bool(keep)
        built.zero_grad()
        outputs.loss.backward()
        recorded.clear()
        losses.append(outputs.loss)
        gradients.append({name: p.grad.clone() for name, p in built.named_parameters() if p.requires_grad})
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_head_may_ask_its_decoder_for_a_scale():
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 16, "mamba_d_ssm": 16, "mamba_n_heads": 2}
    config = FalconH1Config(**sizes, mamba_d_head=8, mamba_d_state=4, lm_head_multiplier=3.0)
    falcon, states = AutoModelForCausalLM.from_config(config), torch.randn(5, 16)
    logits = type(falcon).forward(modeling_loss._HeadAlone(falcon), inputs_embeds=states[None]).logits[0]
    torch.testing.assert_close(logits, 3 * falcon.get_output_embeddings()(states))


@pytest.mark.parametrize("architecture", TEXT)
def test_cached_decoding_equals_a_full_pass(architecture: str):
    """The greedy continuation, token by token through the cache, is what a pass without a cache predicts."""
    built, batch = model(text=architecture), inputs(rows=1)
    continued = built.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad():
        logits = built(continued[:, :-1], pixel_values=batch["pixel_values"], use_cache=False).logits
    expected = logits[:, 14:].clone()
    expected[:, :, 2] = -torch.inf  # min_new_tokens forbids EOS
    assert torch.equal(expected.argmax(-1), continued[:, 15:])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "qwen3", "gemma3_text", "gpt_neox"])
def test_left_padding_changes_nothing(architecture: str):
    built, long, short = model(text=architecture), inputs(rows=1, text_tokens=7), inputs(rows=1, text_tokens=4, seed=1)
    missing = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    pad = torch.zeros(1, missing, dtype=torch.long)
    batch = {
        "input_ids": torch.cat([long["input_ids"], torch.cat([pad, short["input_ids"]], dim=1)]),
        "attention_mask": torch.cat([long["attention_mask"], torch.cat([pad, short["attention_mask"]], dim=1)]),
        "pixel_values": torch.cat([long["pixel_values"], short["pixel_values"]]),
    }
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    together = built.generate(**batch, **settings)
    assert torch.equal(together[:1], built.generate(**long, **settings))
    assert torch.equal(together[1:, missing:], built.generate(**short, **settings))
