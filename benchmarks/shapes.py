"""Backbones with real shapes and random weights, for speed: `python -m benchmarks.shapes SHAPE FOLDER`."""

import sys
from argparse import ArgumentParser
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)


# A ViT's config gives the shape of google/vit-*-patch16-224
VISION: dict[str, PreTrainedConfig] = {
    "vit-s-16": ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536),
    "vit-b-16": ViTConfig(),
}
# BLIP-2's default of 1e-10 gives equal features for all pictures
_DRAWN = {"initializer_range": 0.02}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_VIT_B_16 = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
             "patch_size": 16}  # fmt: skip
_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@dataclass(frozen=True)
class Preset:
    """A BLIP-2: fields of `transformers.Blip2Config`, and LoRA's target modules."""

    vision: dict[str, Any]
    qformer: dict[str, Any]
    text: PreTrainedConfig
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    num_query_tokens: int = 32

    def config(self, **fields: Any) -> Blip2Config:
        """Args: fields: of the LM's config, or `image_token_index`."""
        own = {"image_token_index": fields.pop("image_token_index", None)}
        return Blip2Config(
            vision_config=_DRAWN | self.vision,
            qformer_config=self.qformer,
            text_config=self.text.to_dict() | fields,
            num_query_tokens=self.num_query_tokens,
            **own,
        )

    def without_dropout(self) -> "Preset":
        """The preset without dropout, so that runs are deterministic."""
        text = type(self.text).from_dict(self.text.to_dict() | {"dropout": 0.0})  # OPT's
        return replace(self, text=text, qformer=self.qformer | _NO_DROPOUT)


PRESETS = {
    "tiny": Preset(
        vision=_TINY | {"image_size": 32, "patch_size": 8},
        qformer=_TINY | {"vocab_size": 512, "max_position_embeddings": 64},
        text=LlamaConfig(**_TINY, vocab_size=640, num_key_value_heads=1, max_position_embeddings=1024),
        num_query_tokens=4,
    ),
    # ViT-B/16, HuggingFaceTB/SmolLM2-135M, and a Q-Former of half of BERT-base's layers
    "smollm2": Preset(
        vision=_VIT_B_16,
        qformer={"num_hidden_layers": 6, "vocab_size": 30_523},
        text=LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        ),
    ),
    # Salesforce/blip2-opt-2.7b: ViT-g/14, a Q-Former of BERT-base's shape, OPT-2.7B
    "blip2-opt-2.7b": Preset(
        vision={},
        qformer={"vocab_size": 30_523},
        text=OPTConfig(
            vocab_size=50_304,
            hidden_size=2560,
            num_hidden_layers=32,
            num_attention_heads=32,
            ffn_dim=10_240,
            word_embed_proj_dim=2560,
        ),
        lora_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
    ),
}


def write_vision(shape: str, folder: Path) -> Path:
    """Write a ViT of 16 x 16 patches at 224 px, 197 tokens, with its image processor, unless it exists."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        ViTImageProcessorPil().save_pretrained(folder)
        ViTModel(VISION[shape], add_pooling_layer=False).save_pretrained(folder)
    return folder


def bytes_needed(preset: Preset, batch_size: int) -> dict[str, int]:
    """Estimate the benchmark's peak bytes from shapes alone, by purpose.

    Both models are in memory in float32, and one trains: its step keeps about twelve widths and two feed-forwards per
    layer and token, and three copies of all logits.
    """
    config = preset.config()
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    text, image_tokens = config.text_config, (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.qformer.parameters())
    tokens = batch_size * (preset.num_query_tokens + 16)
    feed_forward = getattr(text, "intermediate_size", None) or text.ffn_dim
    kept = tokens * text.num_hidden_layers * (12 * text.hidden_size + 2 * feed_forward)
    kept += batch_size * image_tokens * config.qformer_config.num_hidden_layers * config.qformer_config.hidden_size
    return {
        "weights of both models": 2 * 4 * parameters,
        "gradients and optimizer state": 3 * 4 * trained,
        "activations": 4 * kept,
        "logits": 3 * 4 * tokens * text.vocab_size,
    }


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.shapes", description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=VISION)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    write_vision(args.shape, args.folder)


if __name__ == "__main__":
    main(sys.argv[1:])
