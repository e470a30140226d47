"""Packing: several sequences in a row, in place of padding, with masks and positions that separate them.

Some language models detect sequences by restarting positions; others do not, and tokens would attend to earlier
sequences. So this module makes the masks with `transformers.masking_utils`, and passes them with the positions: a token
attends to earlier tokens of its own sequence, within the LM's sliding window.

A sequence may hold several texts for one prompt, `[prompt][text 1][text 2] …`: a text attends to the prompt and to
itself, and its positions go on from the prompt's end. Each text begins with the prompt's last token, whose state
predicts its first. Values and gradients are those of a sequence for each text.

Shapes: B rows, S tokens a row, D sequences in all, T tokens in all.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    create_masks_for_generate,
    packed_sequence_mask_function,
)
from transformers.utils.generic import is_flash_attention_requested

from ..modeling.modeling_base import KV_CACHE
from ..modeling.modeling_checks import IGNORED, row_name


PADDING = -1  # in place of a sequence's number
MASKED_BY = ("eager", "sdpa", "flex_attention")
MASKED_LAYERS = ("full_attention", "sliding_attention")  # of `config.layer_types`; convolutions, say, read no mask


def unmasked_layers(language_model: PreTrainedModel) -> list[str]:
    """Layer types that do not follow a causal or sliding-window mask."""
    kinds = getattr(language_model.config, "layer_types", None) or ()
    return [kind for kind in kinds if kind not in MASKED_LAYERS]


def in_order(sequence_ids: torch.Tensor, text_ids: torch.Tensor | None, context: int) -> torch.Tensor:
    """Whether [`check_numbers`] will not raise, as one value: Python waits for a GPU's to read it."""
    starts = (_starts(sequence_ids) & (sequence_ids >= 0)).flatten()
    sound = (~starts | (sequence_ids.flatten() == starts.cumsum(0) - 1)).all()
    if text_ids is not None:
        sound &= ~_texts_out_of_order(sequence_ids, text_ids).any()
    if sequence_ids.numel() and 0 < context < sequence_ids.shape[1]:  # a row may be longer than each of its sequences
        sound &= positions(sequence_ids, text_ids).max() < context
    return sound


def check_numbers(
    sequence_ids: torch.Tensor, text_ids: torch.Tensor | None, context: int, row_index: torch.Tensor | None
) -> None:
    """Check `(B, S)` int64 numbers of sequences; below 0 is padding.

    Raises:
        ValueError: they, or the texts of a sequence, are not in order; a sequence longer than the `context`, with its
            row `(D,)`.
    """
    numbers = sequence_ids[_starts(sequence_ids) & (sequence_ids >= 0)]
    if not torch.equal(numbers, torch.arange(len(numbers), device=numbers.device)):
        raise ValueError(f"the sequences of a batch are numbered in their order, from 0; these are {numbers.tolist()}")
    if text_ids is not None:
        wrong = _texts_out_of_order(sequence_ids, text_ids)
        if wrong.any():
            number = int(sequence_ids.flatten()[wrong][0])
            texts = text_ids[_starts(sequence_ids, text_ids) & (sequence_ids == number)].tolist()
            raise ValueError(
                "text_ids are 0 at a sequence's prompt and count its texts from 1; those of sequence "
                f"{number} are {texts}"
            )
    last = positions(sequence_ids, text_ids)
    if last.numel() and 0 < context <= last.max():
        row = row_name(int(sequence_ids.flatten()[last.argmax()]), row_index)
        raise ValueError(f"{row} has {int(last.max()) + 1} tokens; the language model's context is {context}")


def _texts_out_of_order(sequence_ids: torch.Tensor, text_ids: torch.Tensor) -> torch.Tensor:
    """`(B * S,)` bool: where a text begins that does not follow the one before it in its sequence."""
    begins = (_starts(sequence_ids, text_ids) & (sequence_ids >= 0)).flatten()
    sequences, texts = sequence_ids.flatten(), text_ids.flatten()
    place = torch.arange(len(begins), device=begins.device).masked_fill(~begins, -1).cummax(0).values
    before = nn.functional.pad(place, (1, 0), value=-1)[:-1]  # where the last one began
    is_first = (before < 0) | (sequences != sequences[before])
    # a prompt of one token has no part of its own: its text comes first
    wrong = torch.where(is_first, (texts != 0) & (texts != 1), texts != texts[before] + 1)
    return wrong & begins


def check_sequences(
    sequence_ids: torch.Tensor,
    language_model: PreTrainedModel,
    keywords: dict[str, Any],
    text_ids: torch.Tensor | None = None,
) -> None:
    """Raise if sequences could attend to each other; their numbers are for [`check_numbers`].

    Args:
        sequence_ids, text_ids: `(B, S)`, see [`packed`].
        keywords: what else the language model is given.

    Raises:
        ValueError: a language model or an attention implementation that cannot tell sequences apart, an input that
            goes with one sequence a row.
    """
    if sequence_ids is None:
        raise ValueError("text_ids are given without the sequence_ids whose texts they count")
    in_the_way = [name for name in ("position_ids", KV_CACHE) if keywords.get(name) is not None]
    if in_the_way:
        raise ValueError(f"sequence_ids and {', '.join(in_the_way)}: positions are counted from each sequence's first")
    if language_model._is_stateful:
        raise ValueError(f"{type(language_model).__name__} carries a state from token to token: it cannot be packed")
    if kinds := unmasked_layers(language_model):
        raise ValueError(
            f"{type(language_model).__name__} has layers of {kinds[0]}, in which sequences would see each other: it "
            "cannot be packed"
        )
    if "position_ids" not in inspect.signature(language_model.forward).parameters:
        raise ValueError(f"{type(language_model).__name__} takes no position_ids: it cannot be packed")
    if getattr(language_model.config, "alibi", False):
        raise ValueError(
            f"{type(language_model).__name__} counts positions by its padding mask (ALiBi), which knows no sequences: "
            "it cannot be packed"
        )
    attention = language_model.config._attn_implementation
    if text_ids is not None and "local" in (getattr(language_model.config, "attention_layers", None) or ()):
        raise ValueError(
            f"{type(language_model).__name__} counts its window in columns, of which other texts take some: give one "
            "text a row (texts_per_image: 1)"
        )
    if text_ids is not None and attention not in MASKED_BY:
        raise ValueError(
            f"attn_implementation {attention!r} cannot mask several texts of one prompt: take "
            f"{', '.join(MASKED_BY)}, or one text a row (texts_per_image: 1)"
        )
    if attention not in MASKED_BY and not is_flash_attention_requested(language_model.config):
        raise ValueError(
            f"attn_implementation {attention!r} cannot mask sequences: take {', '.join(MASKED_BY)} or FlashAttention"
        )


def pack(
    language_model: PreTrainedModel,
    sequence_ids: torch.Tensor,
    text_ids: torch.Tensor | None,
    inputs: dict[str, Any],
) -> dict[str, Any]:
    """The inputs of a language model for packed rows: checked, and [`packed`].

    Raises:
        ValueError: what [`check_sequences`] raises.
    """
    check_sequences(sequence_ids, language_model, inputs, text_ids)
    return packed(language_model, sequence_ids, inputs["inputs_embeds"], inputs["labels"], text_ids)


def packed(
    language_model: PreTrainedModel,
    sequence_ids: torch.Tensor,
    inputs_embeds: torch.Tensor,
    labels: torch.Tensor | None,
    text_ids: torch.Tensor | None = None,
) -> dict[str, Any]:
    """The inputs of a causal LM in which no sequence attends to another.

    Args:
        sequence_ids: `(B, S)` int64, each token's sequence, numbered from 0 through the batch; -1 for padding.
        inputs_embeds: `(B, S, M)`.
        labels: `(B, S)`; a sequence's first is left out, as a row's is.
        text_ids: `(B, S)` int64, where sequences hold several texts: 0 at the prompt except its last token, n at text
            n, which begins with that token. Its embeddings in text 1 are taken for the later texts, too.

    Returns:
        `inputs_embeds`, `attention_mask`, `position_ids` `(B, S)` and `labels`. With FlashAttention, which takes
        lengths in place of a mask, all tokens in one row `(1, T)`.
    """
    if labels is not None:
        labels = labels.masked_fill(_starts(sequence_ids, text_ids), IGNORED)
    if is_flash_attention_requested(language_model.config):
        kept = sequence_ids.flatten() >= 0
        last = positions(sequence_ids)
        numbers = torch.stack([kept.sum(), sequence_ids.max() + 1, last.max() + 1])
        tokens, sequences, longest = numbers.tolist()  # one read: FlashAttention wants the longest as a number
        order = (~kept).to(torch.uint8).argsort(stable=True)[:tokens]
        sequence_ids, inputs_embeds = sequence_ids.flatten()[order][None], inputs_embeds.flatten(0, 1)[order][None]
        labels = None if labels is None else labels.flatten()[order][None]
        lengths = torch.searchsorted(sequence_ids[0], torch.arange(sequences + 1, device=order.device)).int()
        seeing = {"attention_mask": None, "cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
        seeing |= {"max_length_q": longest, "max_length_k": longest}
        position_ids = positions(sequence_ids)
    else:
        position_ids = positions(sequence_ids, text_ids)
        if text_ids is not None:
            inputs_embeds = _with_prompt_ends(inputs_embeds, sequence_ids, text_ids)
        masks = _masks(language_model.config.get_text_config(), inputs_embeds, sequence_ids, text_ids, position_ids)
        seeing = {"attention_mask": masks}
    return seeing | {"inputs_embeds": inputs_embeds, "position_ids": position_ids, "labels": labels}


def positions(sequence_ids: torch.Tensor, text_ids: torch.Tensor | None = None) -> torch.Tensor:
    """`(B, S)` int64, counted from the beginning of each sequence; each text goes on from its prompt."""
    columns = _columns(sequence_ids)
    begins = _latest(columns, _starts(sequence_ids))
    if text_ids is not None:
        starts = _starts(sequence_ids, text_ids)
        skipped = _latest(columns, starts) - _latest(columns, starts & (text_ids == 1))  # earlier texts
        begins = begins + torch.where(text_ids > 0, skipped, 0)
    # padding has the first: a row may be longer than the context
    return (columns - begins).masked_fill(sequence_ids == PADDING, 0)


def _with_prompt_ends(inputs_embeds: torch.Tensor, sequence_ids: torch.Tensor, text_ids: torch.Tensor) -> torch.Tensor:
    """`(B, S, M)` embeddings in which each text begins as the first one of its sequence does."""
    columns, starts = _columns(sequence_ids), _starts(sequence_ids, text_ids)
    sources = torch.where(starts & (text_ids > 1), _latest(columns, starts & (text_ids == 1)), columns)
    rows = torch.arange(len(sources), device=sources.device)[:, None] * sources.shape[1]
    return inputs_embeds.flatten(0, 1).index_select(0, (rows + sources).flatten()).view_as(inputs_embeds)


def _masks(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    sequence_ids: torch.Tensor,
    text_ids: torch.Tensor | None,
    position_ids: torch.Tensor,
) -> Any:
    """The LM's attention masks, one, or one for each type of its layers."""
    inputs = {"config": config, "attention_mask": sequence_ids != PADDING}
    if text_ids is None:
        inputs |= {"inputs_embeds": inputs_embeds, KV_CACHE: None}
        return create_masks_for_generate(**inputs, and_mask_function=packed_sequence_mask_function(sequence_ids))
    window = getattr(config, "sliding_window", None)
    rows, length, _ = inputs_embeds.shape

    def mask(window: int | None) -> Any:
        function = _text_mask_function(sequence_ids, text_ids, position_ids, window)
        # as create_causal_mask does, but without vmap, under which it runs such a function
        return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
            **inputs,
            batch_size=rows,
            q_length=length,
            kv_length=length,
            mask_function=and_masks(causal_mask_function, function),
            allow_is_causal_skip=False,
            dtype=inputs_embeds.dtype,
            device=inputs_embeds.device,
        )

    if (kinds := getattr(config, "layer_types", None)) is None:
        return mask(window)
    return {kind: mask(window if kind == "sliding_attention" else None) for kind in set(kinds)}


def _text_mask_function(
    sequence_ids: torch.Tensor, text_ids: torch.Tensor, position_ids: torch.Tensor, window: int | None
) -> Callable:
    """A mask function of `transformers.masking_utils`: a text sees its prompt and itself, in a window of positions."""

    def sees(batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor):
        same_sequence = sequence_ids[batch_idx, q_idx] == sequence_ids[batch_idx, kv_idx]
        text = text_ids[batch_idx, kv_idx]
        seen = same_sequence & ((text == 0) | (text == text_ids[batch_idx, q_idx]))
        if window is None:
            return seen
        # transformers counts a window in columns, of which earlier texts take some
        return seen & (position_ids[batch_idx, kv_idx] > position_ids[batch_idx, q_idx] - window)

    return sees


def _columns(ids: torch.Tensor) -> torch.Tensor:
    """`(B, S)` int64, the column of each token."""
    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


def _latest(columns: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
    """`(B, S)` int64, the last column up to each token that is marked, or 0."""
    return columns.masked_fill(~marked, 0).cummax(dim=1).values


def _starts(sequence_ids: torch.Tensor, text_ids: torch.Tensor | None = None) -> torch.Tensor:
    """`(B, S)` bool: where a sequence, one of its texts, or padding begins."""
    ids = sequence_ids[None] if text_ids is None else torch.stack([sequence_ids, text_ids])
    return (ids != nn.functional.pad(ids[..., :-1], (1, 0), value=PADDING - 1)).any(dim=0)


__all__ = ["PADDING", "check_numbers", "check_sequences", "in_order", "pack", "packed", "positions", "unmasked_layers"]
