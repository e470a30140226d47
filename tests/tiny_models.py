"""Tiny random backbones of every architecture that is tested, and models built of them."""

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CohereConfig,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolLM3Config,
    ViTConfig,
    ViTModel,
)

from lorgnette import LorgnetteForConditionalGeneration


IMAGE_SIZE, PATCH_SIZE, NUM_PATCHES = 32, 8, 16
VOCAB_SIZE = 320
NUM_QUERY_TOKENS = 4

_VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
_DINO = {name: value for name, value in _VIT.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
# architecture -> (model class, config, tokens before the patches)
VISION = {
    "vit": (ViTModel, ViTConfig(**_VIT), 1),
    "deit": (DeiTModel, DeiTConfig(**_VIT), 2),
    "clip": (CLIPVisionModel, CLIPVisionConfig(**_VIT), 1),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**_VIT), 0),
    "dinov2": (Dinov2Model, Dinov2Config(**_DINO), 1),
    "dinov2_with_registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**_DINO, num_register_tokens=4), 5),
}
SIGLIP2 = (
    Siglip2VisionModel,
    Siglip2VisionConfig(
        **{name: value for name, value in _VIT.items() if name != "image_size"}, num_patches=NUM_PATCHES
    ),
)

_LM = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = _LM | {"num_key_value_heads": 2}
TEXT = {
    "llama": LlamaConfig(**_GQA),
    "gpt2": GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    "opt": OPTConfig(
        **{name: value for name, value in _LM.items() if name != "intermediate_size"},
        ffn_dim=48,
        word_embed_proj_dim=24,
    ),
    "qwen2": Qwen2Config(**_GQA),
    "qwen3": Qwen3Config(**_GQA, head_dim=8),
    "gemma3_text": Gemma3TextConfig(**_GQA, head_dim=8, sliding_window=16),
    "phi3": Phi3Config(**_GQA),
    "smollm3": SmolLM3Config(**_GQA),
    "gpt_neox": GPTNeoXConfig(**_LM),
    "mistral": MistralConfig(**_GQA, sliding_window=None),
}
# those that do something to their logits
SCALED = {
    "cohere": CohereConfig(**_GQA, logit_scale=0.5),
    "gemma2": Gemma2Config(**_GQA, head_dim=8, final_logit_softcapping=2.0),
    "granite": GraniteConfig(**_GQA, logits_scaling=3.0),
}


def vision_model(architecture: str = "vit", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model_class, config, _ = VISION[architecture]
    return model_class(config.__class__.from_dict(config.to_dict())).eval()


def language_model(architecture: str = "llama", seed: int = 0, **fields) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = (TEXT | SCALED)[architecture]
    config = config.__class__.from_dict(config.to_dict() | fields)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # weights of std 0.02 make all logits alike, and any test of equality too easy
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def bert(**fields) -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(**({"vocab_size": 60, "max_position_embeddings": 40} | sizes | fields))).eval()


QFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def model(
    vision: str = "vit", text: str = "llama", lora: dict | None = None, **kwargs
) -> LorgnetteForConditionalGeneration:
    """A whole tiny model with LoRA whose `lora_B` is not zero, so that adapters on and off differ."""
    kwargs = {"qformer_config": dict(QFORMER), "num_query_tokens": NUM_QUERY_TOKENS} | kwargs
    built = LorgnetteForConditionalGeneration.from_backbones(
        vision_model(vision), language_model(text), lora={"r": 2} if lora is None else lora, **kwargs
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return built.eval()


def inputs(
    rows: int = 2, text_tokens: int = 5, seed: int = 0, image_token_id: int = VOCAB_SIZE
) -> dict[str, torch.Tensor]:
    """`rows` prompts of one image each: BOS, text, the placeholders, text."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, VOCAB_SIZE - 20, (rows, 2 * text_tokens), generator=generator)
    image = torch.full((rows, NUM_QUERY_TOKENS), image_token_id)
    input_ids = torch.cat(
        [torch.ones(rows, 1, dtype=torch.long), words[:, :text_tokens], image, words[:, text_tokens:]], dim=1
    )
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(rows, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
    }
