"""A causal LM works in every step or is refused at the join: by its signature and a few tokens, not by its name."""

import pytest
import torch
from tiny_models import QFORMER, inputs, language_model, vision_model
from transformers import (
    AfmoeConfig,
    AutoModelForCausalLM,
    BartConfig,
    BertGenerationConfig,
    CLIPTextConfig,
    CTRLConfig,
    FalconConfig,
    FalconH1Config,
    Gemma3nTextConfig,
    GPT2DoubleHeadsModel,
    JambaConfig,
    MiniMaxConfig,
    OpenAIGPTConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    WhisperConfig,
)

from lorgnette import LorgnetteForConditionalGeneration
from lorgnette.assembly.backbone_checks import check_language_model
from lorgnette.assembly.lora_targets import attention_projections, read_layers, resolve_lora_config


SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEAD = SIZES | {"head_dim": 8}
BART = {
    "vocab_size": 320,
    "d_model": 32,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
JAMBA = JambaConfig(
    **SIZES | {"num_hidden_layers": 4},
    attn_layer_period=2,
    attn_layer_offset=1,
    num_experts=2,
    mamba_d_state=4,
    mamba_dt_rank=4,
    use_mamba_kernels=False,
)
# what the error names, where an architecture is refused
REFUSED = {
    "gpt-1": (OpenAIGPTConfig(vocab_size=320, n_embd=32, n_layer=2, n_head=4), "takes no (cache|past_key_values)"),
    "rwkv": (RwkvConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2), "takes no .*(cache|past_key_values)"),
    "recurrent_gemma": (
        RecurrentGemmaConfig(**HEAD | {"num_hidden_layers": 3}, lru_width=32),
        "(takes|returns) no .*(cache|past_key_values)",
    ),
    "gemma3n": (
        Gemma3nTextConfig(
            **HEAD | {"intermediate_size": [48, 48]},
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=320,
            laurel_rank=8,
            num_kv_shared_layers=0,
            layer_types=["sliding_attention", "full_attention"],
            activation_sparsity_pattern=[0.0, 0.0],
        ),
        "logits of embeddings are not those of their ids|does not continue",
    ),
    "whisper": (
        WhisperConfig(**BART, max_target_positions=64, num_mel_bins=8, suppress_tokens=[], begin_suppress_tokens=[]),
        "loss is not the cross entropy of the next token",
    ),
    "bart": (BartConfig(**BART), "loss is not the cross entropy of the next token"),
    "an encoder": (
        BertGenerationConfig(**{name: value for name, value in SIZES.items() if name != "num_key_value_heads"}),
        "(takes|returns) no (cache|past_key_values)|as in an encoder",
    ),
}
WORKS = {
    "ctrl": CTRLConfig(vocab_size=320, n_embd=32, dff=48, n_layer=2, n_head=4, n_positions=128),  # scales in place
    "jamba": JAMBA,
    "minimax": MiniMaxConfig(
        **HEAD, num_local_experts=2, layer_types=["linear_attention", "full_attention"], block_size=4
    ),
    "afmoe": AfmoeConfig(
        **HEAD,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_shared_experts=1,
        num_dense_layers=1,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
    ),
    "falcon_h1": FalconH1Config(**SIZES, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4),
    "falcon with alibi": FalconConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
}


def text_of(config) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config.__class__.from_dict(config.to_dict()))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def join(text, lora=None) -> LorgnetteForConditionalGeneration:
    return LorgnetteForConditionalGeneration.from_backbones(
        vision_model(), text, qformer_config=QFORMER, num_query_tokens=4, lora=lora
    ).eval()


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_with_the_reason(kind: str, tmp_path):
    config, reason = REFUSED[kind]
    text = text_of(config)
    before = {name: weight.clone() for name, weight in text.state_dict().items()}
    text.save_pretrained(tmp_path)
    for given in (text, tmp_path):
        with pytest.raises(ValueError, match=f"cannot be joined: .*({reason})"):
            join(given)
    assert all(torch.equal(weight, before[name]) for name, weight in text.state_dict().items())


@pytest.mark.parametrize("kind", WORKS)
def test_it_works_in_every_step(kind: str, tmp_path):
    built, batch = join(text_of(WORKS[kind]), lora={"r": 2}), inputs()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == built.config.image_token_id, -100)
    built.train()(**batch, labels=labels).loss.backward()
    idle = [name for name, weight in built.named_parameters() if weight.requires_grad and weight.grad is None]
    assert idle == []
    built.eval()
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    continued = built.generate(**batch, **settings)
    for form in ("full", "merged"):
        built.save_pretrained(tmp_path / form, save_format=form)
        loaded = LorgnetteForConditionalGeneration.from_pretrained(tmp_path / form).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**batch).logits, built(**batch).logits, rtol=0, atol=1e-5)
    assert torch.equal(loaded.generate(**batch, **settings), continued)


def test_alibi_cannot_be_packed():
    built = join(text_of(WORKS["falcon with alibi"]))
    with pytest.raises(ValueError, match=r"FalconForCausalLM counts positions .*ALiBi.*cannot be packed"):
        built(torch.arange(3, 9)[None], sequence_ids=torch.tensor([[0, 0, 0, 1, 1, 1]]))


def test_lora_goes_to_attention_and_not_to_layers_that_have_it_in_their_name():
    assert set(attention_projections(text_of(JAMBA))) == {f"self_attn.{name}_proj" for name in "qkvo"}
    assert "self_attn.gate_proj" not in attention_projections(text_of(WORKS["afmoe"]))


def test_lora_goes_to_no_layer_that_reads_no_text():
    bart = text_of(BartConfig(**BART))
    assert {name.split(".")[0] for name in attention_projections(bart)} == {"self_attn"}


def test_a_layer_of_the_same_name_that_reads_no_text_is_left_out():
    text = language_model()
    text.model.extra = language_model(seed=1).model.layers[0]
    resolved = resolve_lora_config({}, text)
    assert set(resolved["exclude_modules"]) == {f"model.extra.self_attn.{name}_proj" for name in "qkvo"}


def test_one_target_inside_another_is_refused():
    text = language_model()
    text.model.layers[0].self_attn.q_proj.inner = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"targets 'model.layers.0.self_attn.q_proj.inner', and the layer that"):
        resolve_lora_config({"target_modules": ["q_proj", "inner"]}, text)


def test_layers_that_share_a_weight_have_no_lora_each():
    text = language_model()
    first, second = (layer.self_attn for layer in text.model.layers[:2])
    second.q_proj.weight = first.q_proj.weight
    with pytest.raises(ValueError, match=r"targets 'model.layers.0.self_attn.q_proj', whose weight is another layer's"):
        resolve_lora_config({}, text)
    assert resolve_lora_config({"target_modules": ["k_proj"]}, text)["target_modules"] == ["k_proj"]


def test_a_type_that_the_auto_class_does_not_know():
    text = language_model()
    text.config = CLIPTextConfig()
    with pytest.raises(
        ValueError, match=r"cannot be joined: AutoModelForCausalLM.*none of the type \"clip_text_model\""
    ):
        check_language_model(text)


def test_a_class_that_the_auto_class_does_not_load():
    text = GPT2DoubleHeadsModel(language_model("gpt2").config)
    with pytest.raises(ValueError, match="GPT2DoubleHeadsModel would come back as GPT2LMHeadModel"):
        join(text)


def test_the_trial_leaves_everything_as_it_was():
    text = language_model("gpt2").train()
    state = torch.get_rng_state()
    check_language_model(text)
    read_layers(text)
    assert text.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in text.modules())
    assert all(weight.grad is None for weight in text.parameters())


class Own(torch.nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * (x if self.inner is None else self.inner(x))


def _mlp(text):
    text.model.layers[0].mlp = Own(text.model.layers[0].mlp)


def _activation(text):
    text.model.layers[0].mlp.act_fn = Own()


def _other_activation(text):
    text.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def _pruned(text):
    text.model.layers = text.model.layers[:1]


def _hook(text):
    text.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)


def _pre_hook(text):
    text.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _forward(text):
    norm = text.model.norm
    norm.forward = lambda x, inner=norm.forward: 2 * inner(x)


def _tied(text):
    text.lm_head.weight = text.model.embed_tokens.weight


def _wider(text):
    text.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 60, bias=False)
    text.model.layers[1].mlp.gate_proj = torch.nn.Linear(32, 60, bias=False)
    text.model.layers[1].mlp.down_proj = torch.nn.Linear(60, 32, bias=False)


CHANGED = {
    _mlp: r"its module model.layers.0.mlp is \S+Own, and by its config \S+LlamaMLP",
    _activation: r"its module model.layers.0.mlp.act_fn is \S+Own",
    _other_activation: r"its module model.layers.0.mlp.act_fn is \S+ReLU, and by its config",
    _pruned: "its module model.layers.1 is not there, and by its config",
    _hook: r"its module model.layers.0 has a hook or a forward of its own, from \S*test_joined_language_models",
    _pre_hook: "its module model.layers.0.mlp has a hook",
    _forward: "its module model.norm has a hook or a forward of its own",
    _tied: "lm_head.weight is tied to model.embed_tokens.weight, and by its config it is not",
    _wider: r"model.layers.1.mlp.down_proj.weight is \(32, 60\), and \(32, 48\) by its config",
}


@pytest.mark.parametrize("change", CHANGED, ids=lambda change: change.__name__[1:])
def test_a_model_that_its_config_does_not_describe_is_not_joined(change):
    text = language_model()
    change(text)
    with pytest.raises(ValueError, match=f"LlamaForCausalLM is not what its config describes: .*{CHANGED[change]}"):
        join(text, lora={"r": 2})
    assert not any("lora" in name for name, _ in text.named_parameters())


def test_a_head_that_was_untied_by_hand_is_not_joined():
    text = language_model("gemma3_text")
    text.lm_head.weight = torch.nn.Parameter(text.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match=r"weight is not tied to .*, and by its config it is"):
        join(text)


def test_hooks_of_transformers_and_accelerate_are_none_of_ones_own():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    text = language_model()
    text.enable_input_require_grads()
    add_hook_to_module(text.model.layers[0], AlignDevicesHook())
    assert join(text).language_model is text
