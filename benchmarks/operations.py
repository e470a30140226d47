"""Count a training step's minimum operations by part, from shapes alone: `python -m benchmarks.operations`.

A product of an `(n, a)` and an `(a, b)` matrix is 2 n a b operations. Its backward pass is as many again for the
input's gradient, if needed, and as many for the weight's, if it trains: a factor of three for the Q-Former, two for a
frozen LM after trained parts, one for a frozen ViT. Only matrix products count, as in `torch.utils.flop_counter`, which
the benchmark uses.
"""

import sys
from dataclasses import dataclass
from typing import Any

from transformers import HfArgumentParser

from benchmarks import rows as data
from benchmarks.shapes import PRESETS, Preset
from benchmarks.sides import LORA
from lorgnette import LorgnetteCollator
from lorgnette.modeling.modeling_checks import IGNORED
from lorgnette.modeling.modeling_loss import POSITIONS_MULTIPLE


Parts = dict[str, dict[str, float]]  # variant -> operations of a batch by part


@dataclass
class Options:
    preset: str = "smollm2"
    batch_size: int = 8
    seed: int = 0


def stage2(preset: Preset, rows: list[dict[str, Any]]) -> Parts:
    """Operations of a step of `theirs`, `uncached` and `cached` over the same rows."""
    batch = LorgnetteCollator(data.processor(preset))(rows)
    return stage2_of(preset, *batch["input_ids"].shape, int((batch["labels"] != IGNORED).sum()))


def stage2_of(preset: Preset, pairs: int, length: int, supervised: int) -> Parts:
    """Operations for rows of so many tokens, placeholders included, and so many labels in total."""
    text = preset.config().text_config
    width, layers = text.hidden_size, text.num_hidden_layers
    keys = width // text.num_attention_heads * getattr(text, "num_key_value_heads", text.num_attention_heads)
    projections = [(width, width), (width, keys), (width, keys), (width, width)]
    feed_forward = 3 * text.intermediate_size if hasattr(text, "intermediate_size") else 2 * text.ffn_dim  # OPT's
    weights = sum(a * b for a, b in projections) + width * feed_forward
    lora = sum(LORA["r"] * (a + b) for a, b in projections)
    qformer, queries = preset.config().qformer_config, preset.num_query_tokens
    common = {
        "ViT": pairs * vision(preset),
        "Q-Former, keys and values of pictures": pairs * keys_and_values(preset),
        "Q-Former, queries": pairs * reading(preset, queries=queries),
        "projector": pairs * 3 * 2 * queries * qformer.hidden_size * width,
        "LM's layers": pairs * layers * (2 * 2 * length * weights + 3 * attention(length, length, width)),
        "LoRA": pairs * layers * 3 * 2 * length * lora,
    }
    head = 2 * 2 * width * text.vocab_size
    uncached = common | {"LM's head": padded_positions(supervised) * head}
    return {
        "theirs": common | {"LM's head": pairs * length * head},
        "uncached": uncached,
        "cached": uncached | {"ViT": 0},
    }


def stage1(preset: Preset, rows: list[dict[str, Any]]) -> Parts:
    """Operations of a step of `separate`, `plain` and `ours`; see plain_stage1.py."""
    batch, qformer = LorgnetteCollator(data.stage1_processor(preset))(rows), preset.config().qformer_config
    (pairs, words), predicted = batch["input_ids"].shape, int(batch["attention_mask"][:, 1:].sum())
    queries, width, keys = preset.num_query_tokens, qformer.hidden_size, pairs * keys_and_values(preset)
    both = pairs * reading(preset, queries=queries, words=words)
    alone = pairs * reading(preset, words=words)
    token = 3 * 2 * width * (width + qformer.vocab_size)
    ours = {
        "ViT": pairs * vision(preset),
        "Q-Former, keys and values of pictures": keys,
        "Q-Former, queries and texts": alone + 4 * both,  # ITC's text, ITC and ITG, and ITM
        "head of ITG": padded_positions(predicted) * token,
    }
    # ITC and ITG, and ITM with three times the pairs
    again = {"Q-Former, keys and values of pictures": 4 * keys, "head of ITG": predicted * token}
    separate = {
        "ViT": 3 * ours["ViT"],
        "Q-Former, keys and values of pictures": 5 * keys,
        "Q-Former, queries and texts": alone + 4 * both + pairs * reading(preset, queries=queries),
    }
    return {"separate": ours | again | separate, "plain": ours | again, "ours": ours}


def padded_positions(positions: int) -> int:
    """Positions of a head, padded to a multiple."""
    return positions + -positions % POSITIONS_MULTIPLE


def vision(preset: Preset) -> float:
    """A picture's forward pass through the frozen ViT."""
    config = preset.config().vision_config
    patches, width = (config.image_size // config.patch_size) ** 2, config.hidden_size
    weights = 4 * width**2 + 2 * width * config.intermediate_size
    layer = 2 * (patches + 1) * weights + attention(patches + 1, patches + 1, width)
    return 2 * patches * 3 * config.patch_size**2 * width + config.num_hidden_layers * layer


def keys_and_values(preset: Preset) -> float:
    """Keys and values of a picture for cross-attention, and their weights' gradients; features need none."""
    config, vision_config = preset.config().qformer_config, preset.config().vision_config
    tokens = (vision_config.image_size // vision_config.patch_size) ** 2 + 1
    return 2 * cross_attention_layers(config) * 2 * 2 * tokens * vision_config.hidden_size * config.hidden_size


def reading(preset: Preset, queries: int = 0, words: int = 0) -> float:
    """A forward and backward pass of the Q-Former, without the above."""
    config, vision_config = preset.config().qformer_config, preset.config().vision_config
    width, tokens = config.hidden_size, (vision_config.image_size // vision_config.patch_size) ** 2 + 1
    layer = 2 * (queries + words) * (4 * width**2 + 2 * width * config.intermediate_size)
    layer += attention(queries + words, queries + words, width)
    looking = 2 * queries * 2 * width**2 + attention(queries, tokens, width)
    return 3 * (config.num_hidden_layers * layer + cross_attention_layers(config) * looking)


def cross_attention_layers(config: Any) -> int:
    """Layers with cross-attention."""
    return len(range(0, config.num_hidden_layers, config.cross_attention_frequency))


def attention(queries: int, keys: int, width: int) -> float:
    """Attention scores and the weighted sum of values; masks save nothing."""
    return 2 * 2 * queries * keys * width


def table(parts: Parts, pairs: int, reference: str) -> str:
    """Markdown: 10⁹ operations a pair, and the ratio to the `reference`."""
    names = list(next(iter(parts.values())))
    lines = [f"| 10⁹ operations a pair | {' | '.join(parts)} |", "|---" * (len(parts) + 1) + "|"]
    for name in names:
        lines.append(f"| {name} | {' | '.join(f'{way[name] / pairs / 1e9:.2f}' for way in parts.values())} |")
    totals = {name: sum(way.values()) for name, way in parts.items()}
    lines.append(f"| all | {' | '.join(f'{total / pairs / 1e9:.2f}' for total in totals.values())} |")
    ratios = [f"{totals[reference] / total:.2f}" for total in totals.values()]
    return "\n".join([*lines, f"| {reference} over this | {' | '.join(ratios)} |"])


def main(argv: list[str]) -> int:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(argv)
    preset, rows = PRESETS[options.preset], data.rows(options.batch_size, options.seed)
    sys.stdout.write(f"{table(stage2(preset, rows), len(rows), 'theirs')}\n\n")
    found = stage1(preset, rows)
    sys.stdout.write(f"{table(found, len(rows), 'separate')}\n\n")
    sys.stdout.write(f"{table({name: found[name] for name in ('plain', 'ours')}, len(rows), 'plain')}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
