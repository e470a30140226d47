"""Tiny BLIP-2 models of transformers, with weights large enough for their parts to matter."""

import torch
from tiny_models import IMAGE_SIZE, PATCH_SIZE, TEXT
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, PreTrainedModel


VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
QFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "cross_attention_frequency": 2,
    "vocab_size": 120,
    "max_position_embeddings": 40,
}
NUM_QUERY_TOKENS = 4


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """BLIP-2's queries start at zero, and its ViT near it."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def blip2(text: str = "opt", **fields) -> Blip2ForConditionalGeneration:
    config = TEXT[text].to_dict() | {"word_embed_proj_dim": 32} | fields
    return shaken(
        Blip2ForConditionalGeneration(
            Blip2Config(
                vision_config=VISION,
                qformer_config=QFORMER,
                text_config=config,
                num_query_tokens=NUM_QUERY_TOKENS,
                image_token_index=config["vocab_size"] - 1,
            )
        )
    )


def blip2_retrieval(**qformer_fields) -> Blip2ForImageTextRetrieval:
    return shaken(
        Blip2ForImageTextRetrieval(
            Blip2Config(
                vision_config=VISION,
                qformer_config=QFORMER | {"use_qformer_text_input": True} | qformer_fields,
                num_query_tokens=NUM_QUERY_TOKENS,
                image_text_hidden_size=8,
            )
        )
    )
