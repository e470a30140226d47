"""What a training step asks for at least: its operations by part, from shapes alone: `python -m benchmarks.operations`.

A product of an `(n, a)` and an `(a, b)` matrix is 2 n a b operations. Its backward pass is as many again for the
gradient of what comes in, where that has one, and as many for the weight's, where it trains: three times in all for the
Q-Former, twice for a frozen LM behind something that trains, once for a frozen ViT. What is no matrix product is left
out, as `torch.utils.flop_counter` leaves it out, by which the benchmark itself counts.
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


Parts = dict[str, dict[str, float]]  # a way of doing it: operations of a batch by part


@dataclass
class Options:
    preset: str = "smollm2"
    batch_size: int = 8
    seed: int = 0


def stage2(preset: Preset, rows: list[dict[str, Any]]) -> Parts:
    """Of a step of `theirs`, `uncached` and `cached` over the same rows."""
    batch = LorgnetteCollator(data.processor(preset))(rows)
    return stage2_of(preset, *batch["input_ids"].shape, int((batch["labels"] != IGNORED).sum()))


def stage2_of(preset: Preset, pairs: int, length: int, supervised: int) -> Parts:
    """Of rows of so many tokens, placeholders included, and with so many labels in all of them."""
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
    uncached = common | {"LM's head": filled_up(supervised) * head}
    return {
        "theirs": common | {"LM's head": pairs * length * head},
        "uncached": uncached,
        "cached": uncached | {"ViT": 0},
    }


def stage1(preset: Preset, rows: list[dict[str, Any]]) -> Parts:
    """Of a step of `separate`, `plain` and `ours`; see plain_stage1.py."""
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
        "head of ITG": filled_up(predicted) * token,
    }
    # ITC and ITG, and three times the pairs in ITM
    again = {"Q-Former, keys and values of pictures": 4 * keys, "head of ITG": predicted * token}
    separate = {
        "ViT": 3 * ours["ViT"],
        "Q-Former, keys and values of pictures": 5 * keys,
        "Q-Former, queries and texts": alone + 4 * both + pairs * reading(preset, queries=queries),
    }
    return {"separate": ours | again | separate, "plain": ours | again, "ours": ours}


def filled_up(places: int) -> int:
    """So many places a head sees where a loss asks for fewer."""
    return places + -places % POSITIONS_MULTIPLE


def vision(preset: Preset) -> float:
    """A picture's forward pass through the frozen ViT."""
    config = preset.config().vision_config
    patches, width = (config.image_size // config.patch_size) ** 2, config.hidden_size
    weights = 4 * width**2 + 2 * width * config.intermediate_size
    layer = 2 * (patches + 1) * weights + attention(patches + 1, patches + 1, width)
    return 2 * patches * 3 * config.patch_size**2 * width + config.num_hidden_layers * layer


def keys_and_values(preset: Preset) -> float:
    """What cross-attention reads of a picture, and the gradients of these weights; features have none."""
    config, seen = preset.config().qformer_config, preset.config().vision_config
    tokens = (seen.image_size // seen.patch_size) ** 2 + 1
    return 2 * looking_layers(config) * 2 * 2 * tokens * seen.hidden_size * config.hidden_size


def reading(preset: Preset, queries: int = 0, words: int = 0) -> float:
    """A pass through the Q-Former, there and back, without the above."""
    config, seen = preset.config().qformer_config, preset.config().vision_config
    width, tokens = config.hidden_size, (seen.image_size // seen.patch_size) ** 2 + 1
    layer = 2 * (queries + words) * (4 * width**2 + 2 * width * config.intermediate_size)
    layer += attention(queries + words, queries + words, width)
    looking = 2 * queries * 2 * width**2 + attention(queries, tokens, width)
    return 3 * (config.num_hidden_layers * layer + looking_layers(config) * looking)


def looking_layers(config: Any) -> int:
    """Layers with cross-attention."""
    return len(range(0, config.num_hidden_layers, config.cross_attention_frequency))


def attention(queries: int, keys: int, width: int) -> float:
    """Scores, and the sum of values by them; masks spare nothing."""
    return 2 * 2 * queries * keys * width


def table(parts: Parts, pairs: int, reference: str) -> str:
    """Markdown: 10⁹ operations a pair, and what is left of the `reference`'s."""
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
