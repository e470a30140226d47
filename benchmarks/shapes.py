"""Backbones of true shapes and random weights, for speed alone: `python -m benchmarks.shapes SHAPE FOLDER`."""

import sys
from argparse import ArgumentParser
from pathlib import Path

import torch
from transformers import PreTrainedConfig, ViTConfig, ViTImageProcessorPil, ViTModel


# A ViT's config gives the shape of google/vit-*-patch16-224
VISION: dict[str, PreTrainedConfig] = {
    "vit-s-16": ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536),
    "vit-b-16": ViTConfig(),
}


def write_vision(shape: str, folder: Path) -> Path:
    """A ViT of 16 x 16 patches at 224 px, 197 tokens, with its image processor; made once."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        ViTImageProcessorPil().save_pretrained(folder)
        ViTModel(VISION[shape], add_pooling_layer=False).save_pretrained(folder)
    return folder


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.shapes", description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=VISION)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    write_vision(args.shape, args.folder)


if __name__ == "__main__":
    main(sys.argv[1:])
