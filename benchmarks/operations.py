"""Count a training step's minimum operations by part, from shapes alone: `python -m benchmarks.operations`.

A product of an `(n, a)` and an `(a, b)` matrix is 2 n a b operations. Its backward pass is as many again for the
input's gradient, if needed, and as many for the weight's, if it trains: a factor of three for the Q-Former, two for a
frozen LM after trained parts, one for a frozen ViT. Only matrix products count, as in `torch.utils.flop_counter`, which
the benchmark uses.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import HfArgumentParser

from benchmarks import rows as data
from benchmarks.rows import PICTURES, TEXTS
from benchmarks.shapes import PRESETS, Preset
from benchmarks.sides import LORA, Batch, RowByRow
from lorgnette import LorgnetteCollator
from lorgnette.modeling.modeling_checks import IGNORED
from lorgnette.modeling.modeling_loss import POSITIONS_MULTIPLE


Parts = dict[str, dict[str, float]]  # variant -> operations of a batch by part


@dataclass
class Options:
    preset: str = "smollm2"
    batch_size: int = 8
    pictures: int = PICTURES
    texts: int = TEXTS
    seed: int = 0


def stage2(preset: Preset, rows: list[dict[str, Any]], chat: bool = False) -> Parts:
    """Operations of a step of `theirs`, `uncached` and `cached` over the same rows, of one or several texts each.

    Theirs gets each pair as a row of its own.

    Args:
        chat: with chat prompts instead of BLIP-2's.
    """
    collator = LorgnetteCollator(data.processor(preset, chat))
    uncached = stage2_of(preset, collator(rows))
    theirs = stage2_of(preset, RowByRow(collator)(data.pairs(rows)), all_logits=True)
    return {"theirs": theirs, "uncached": uncached, "cached": uncached | {"ViT": 0}}


def stage2_of(preset: Preset, batch: Batch, all_logits: bool = False) -> dict[str, float]:
    """Operations of a step over a batch, by part.

    Args:
        all_logits: theirs computes logits of all positions; ours of those with labels.
    """
    rows, length = batch["input_ids"].shape
    is_cached = "vision_features" in batch
    return stage2_step(
        preset,
        pictures=len(batch["vision_features" if is_cached else "pixel_values"]),
        rows=rows,
        length=length,
        logits=rows * length if all_logits else padded_positions(int((batch["labels"] != IGNORED).sum())),
        shared=batch["shared_input_ids"].shape[1] if "shared_input_ids" in batch else 0,
        is_cached=is_cached,
    )


def stage2_step(
    preset: Preset, *, pictures: int, rows: int, length: int, logits: int, shared: int = 0, is_cached: bool = False
) -> dict[str, float]:
    """Operations of a step over rows of so many tokens, placeholders included, by part.

    Args:
        logits: positions that the LM's head computes in all.
        shared: tokens that all rows begin with, and that run once.
    """
    text, qformer, queries = text_shape(preset), preset.config().qformer_config, preset.num_query_tokens
    own = length - shared  # tokens of a row that it has by itself
    layers = rows * text.layers * (2 * 2 * own * text.weights + 3 * attention(own, length, text.width))
    lora = rows * text.layers * 3 * 2 * own * text.lora
    if shared:  # of the last layer keys and values alone are read, and have gradients
        once = 2 * 2 * shared * text.weights + 3 * attention(shared, shared, text.width)
        unread = 2 * shared * (text.weights - text.keys_and_values) + 2 * attention(shared, shared, text.width)
        layers += text.layers * once - unread
        lora += text.layers * 3 * 2 * shared * text.lora - 2 * 2 * shared * text.lora_of_queries
    return {
        "ViT": 0 if is_cached else pictures * vision(preset),
        "Q-Former, keys and values of pictures": pictures * keys_and_values(preset),
        "Q-Former, queries": pictures * reading(preset, queries=queries),
        "projector": pictures * 3 * 2 * queries * qformer.hidden_size * text.width,
        "LM's layers": layers,
        "LoRA": lora,
        "LM's head": logits * 2 * 2 * text.width * text.vocabulary,
    }


def stage1(preset: Preset, rows: list[dict[str, Any]]) -> Parts:
    """Operations of a step of `separate`, `plain` and `ours`, see plain_stage1.py; rows have one or several texts.

    The first two get each pair with a picture of its own.
    """
    batch, qformer = LorgnetteCollator(data.stage1_processor(preset))(rows), preset.config().qformer_config
    (texts, words), predicted = batch["input_ids"].shape, int(batch["attention_mask"][:, 1:].sum())
    pictures, queries, width = len(batch["pixel_values"]), preset.num_query_tokens, qformer.hidden_size
    alone, both = texts * reading(preset, words=words), texts * reading(preset, queries=queries, words=words)
    most = max(len(data.texts_of(row)) for row in rows)  # ITG's rows are a picture's texts, where that is less
    written = both
    if pictures * (queries + most * words) < texts * (queries + words):
        written = pictures * reading(preset, queries=queries, words=most * words)
    token = 3 * 2 * width * (width + qformer.vocab_size)
    ours = {
        "ViT": pictures * vision(preset),
        "Q-Former, keys and values of pictures": pictures * keys_and_values(preset),
        "Q-Former, queries and texts": alone + written + 3 * both,  # ITC's text, ITC and ITG, and ITM
        "head of ITG": padded_positions(predicted) * token,
    }
    keys = texts * keys_and_values(preset)
    plain = {
        "ViT": texts * vision(preset),
        "Q-Former, keys and values of pictures": 4 * keys,  # ITC and ITG, and ITM with three times the pairs
        "Q-Former, queries and texts": alone + 4 * both,
        "head of ITG": predicted * token,
    }
    separate = plain | {
        "ViT": 3 * plain["ViT"],
        "Q-Former, keys and values of pictures": 5 * keys,
        "Q-Former, queries and texts": alone + 4 * both + texts * reading(preset, queries=queries),
    }
    return {"separate": separate, "plain": plain, "ours": ours}


def captions(preset: Preset, pictures: int, prompt: int, tokens: int, shared: int = 0) -> Parts:
    """Operations of `theirs` and `ours` for so many greedy tokens behind prompts of equal length.

    Args:
        prompt: tokens, placeholders included.
        shared: tokens before the picture, which are the same in all of a data set: ours runs them once, and keeps them.
    """
    text, qformer, queries = text_shape(preset), preset.config().qformer_config, preset.num_query_tokens

    def lm(rows: int, length: int, keys: int) -> float:
        layer = 2 * length * (text.weights + text.lora) + attention(length, keys, text.width)
        return rows * text.layers * layer

    common = {
        "ViT": pictures * vision(preset),
        "Q-Former": pictures * (keys_and_values(preset) / 2 + reading(preset, queries=queries) / 3),
        "projector": pictures * 2 * queries * qformer.hidden_size * text.width,
        "LM, later tokens": sum(lm(pictures, 1, prompt + number) for number in range(1, tokens)),
        "LM's head": pictures * tokens * 2 * text.width * text.vocabulary,
    }
    own = prompt - shared
    return {
        "theirs": common | {"LM, prompt": lm(pictures, prompt, prompt)},
        "ours": common | {"LM, prompt": lm(pictures, own, prompt)},
    }


def bound(parts: Parts, ours: str, theirs: str = "theirs") -> float:
    """How many times as fast `ours` is, if both reach the same share of the machine."""
    return sum(parts[theirs].values()) / sum(parts[ours].values())


@dataclass(frozen=True)
class TextShape:
    """An LM's shape.

    Args:
        weights, keys_and_values: a layer's weights, and those of the projections to keys and values.
        lora, lora_of_queries: LoRA's weights in a layer, and those of them that are not in these projections.
    """

    width: int
    layers: int
    vocabulary: int
    weights: int
    keys_and_values: int
    lora: int
    lora_of_queries: int


def text_shape(preset: Preset) -> TextShape:
    text = preset.config().text_config
    width = text.hidden_size
    keys = width // text.num_attention_heads * getattr(text, "num_key_value_heads", text.num_attention_heads)
    projections = [(width, keys), (width, keys), (width, width), (width, width)]
    feed_forward = 3 * text.intermediate_size if hasattr(text, "intermediate_size") else 2 * text.ffn_dim  # OPT's
    lora = [LORA["r"] * (a + b) for a, b in projections]
    return TextShape(
        width,
        text.num_hidden_layers,
        text.vocab_size,
        weights=sum(a * b for a, b in projections) + width * feed_forward,
        keys_and_values=2 * width * keys,
        lora=sum(lora),
        lora_of_queries=sum(lora[2:]),
    )


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


def table(parts: Parts, pairs: int, references: Sequence[str]) -> str:
    """Markdown: 10⁹ operations a pair, and the ratios of the `references` to each."""
    names = list(next(iter(parts.values())))
    lines = [f"| 10⁹ operations a pair | {' | '.join(parts)} |", "|---" * (len(parts) + 1) + "|"]
    for name in names:
        lines.append(f"| {name} | {' | '.join(f'{way[name] / pairs / 1e9:.2f}' for way in parts.values())} |")
    totals = {name: sum(way.values()) for name, way in parts.items()}
    lines.append(f"| all | {' | '.join(f'{total / pairs / 1e9:.2f}' for total in totals.values())} |")
    for reference in references:
        ratios = [f"{totals[reference] / total:.2f}" for total in totals.values()]
        lines.append(f"| {reference} over this | {' | '.join(ratios)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(argv)
    preset, rows = PRESETS[options.preset], data.rows(options.batch_size, options.seed)
    several = data.with_texts(data.rows(options.pictures, options.seed), options.texts, options.seed)
    pairs = f"{options.pictures * options.texts} pairs, {options.texts} texts a picture"
    tables = [
        ("stage 2", stage2(preset, rows), len(rows), ["theirs"]),
        ("stage 1", stage1(preset, rows), len(rows), ["separate", "plain"]),
        (f"stage 2, {pairs}", stage2(preset, several), options.pictures * options.texts, ["theirs"]),
        (
            f"stage 2, {pairs}, chat prompts",
            stage2(preset, several, True),
            options.pictures * options.texts,
            ["theirs"],
        ),
        (f"stage 1, {pairs}", stage1(preset, several), options.pictures * options.texts, ["separate", "plain"]),
    ]
    prompt, shared = data.chat_prompt(preset)
    tables.append(("first token, chat prompts", captions(preset, 1, prompt, 1, shared), 1, ["theirs"]))
    for title, parts, count, references in tables:
        sys.stdout.write(f"{title}\n\n{table(parts, count, references)}\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
