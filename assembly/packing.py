"""Packing: several sequences in a row, in place of padding, with masks and positions that separate them.

Some language models detect sequences by restarting positions; others do not, and tokens would attend to earlier
sequences. So this module makes the masks with `transformers.masking_utils`, and passes them with the positions: a token
attends to earlier tokens of its own sequence, within the LM's sliding window.

Shapes: B rows, S tokens a row, D sequences in all, T tokens in all.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate, packed_sequence_mask_function
from transformers.utils.generic import is_flash_attention_requested

from ..modeling.modeling_base import KV_CACHE
from ..modeling.modeling_checks import IGNORED, value_check


PADDING = -1  # in place of a sequence's number
MASKED_BY = ("eager", "sdpa", "flex_attention")
MASKED_LAYERS = ("full_attention", "sliding_attention")  # of `config.layer_types`; convolutions, say, read no mask


def unmasked_layers(language_model: PreTrainedModel) -> list[str]:
    """Layer types that do not follow a causal or sliding-window mask."""
    kinds = getattr(language_model.config, "layer_types", None) or ()
    return [kind for kind in kinds if kind not in MASKED_LAYERS]


@value_check
def checked_sequences(sequence_ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """`(B, S)` int64 numbers of sequences, which begin where `starts` `(B, S)` is True; below 0 is padding.

    Raises:
        ValueError: they are not in order.
    """
    numbers = sequence_ids[starts & (sequence_ids >= 0)]
    if not torch.equal(numbers, torch.arange(len(numbers), device=numbers.device)):
        raise ValueError(f"the sequences of a batch are numbered in their order, from 0; these are {numbers.tolist()}")
    return sequence_ids.clone()


def check_sequences(
    sequence_ids: torch.Tensor, language_model: PreTrainedModel, keywords: dict[str, Any]
) -> torch.Tensor:
    """Raise if sequences could attend to each other; else return `sequence_ids`.

    Args:
        sequence_ids: `(B, S)`, see [`packed`].
        keywords: what else the language model is given.

    Raises:
        ValueError: numbers out of order, a language model or an attention implementation that cannot tell sequences
            apart, an input that goes with one sequence a row.
    """
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
    if attention not in MASKED_BY and not is_flash_attention_requested(language_model.config):
        raise ValueError(
            f"attn_implementation {attention!r} cannot mask sequences: take {', '.join(MASKED_BY)} or FlashAttention"
        )
    return checked_sequences(sequence_ids, _starts(sequence_ids))


def pack(language_model: PreTrainedModel, sequence_ids: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a language model for packed rows: checked, and [`packed`]; raises what [`check_sequences`] does."""
    sequence_ids = check_sequences(sequence_ids, language_model, inputs)
    return packed(language_model, sequence_ids, inputs["inputs_embeds"], inputs["labels"])


def packed(
    language_model: PreTrainedModel,
    sequence_ids: torch.Tensor,
    inputs_embeds: torch.Tensor,
    labels: torch.Tensor | None,
) -> dict[str, Any]:
    """The inputs of a causal LM in which no sequence attends to another.

    Args:
        sequence_ids: `(B, S)` int64, each token's sequence, numbered from 0 through the batch; -1 for padding.
        inputs_embeds: `(B, S, M)`.
        labels: `(B, S)`; a sequence's first is left out, as a row's is.

    Returns:
        `inputs_embeds`, `attention_mask`, `position_ids` `(B, S)` and `labels`. With FlashAttention, which takes
        lengths in place of a mask, all tokens in one row `(1, T)`.
    """
    if labels is not None:
        labels = labels.masked_fill(_starts(sequence_ids), IGNORED)
    if is_flash_attention_requested(language_model.config):
        kept = sequence_ids != PADDING
        sequence_ids, inputs_embeds = sequence_ids[kept][None], inputs_embeds[kept][None]
        labels = None if labels is None else labels[kept][None]
        bounds = [*_starts(sequence_ids)[0].nonzero()[:, 0].tolist(), sequence_ids.shape[1]]
        lengths = torch.tensor(bounds, dtype=torch.int32, device=sequence_ids.device)
        longest = int(lengths.diff().max())
        seeing = {"attention_mask": None, "cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
        seeing |= {"max_length_q": longest, "max_length_k": longest}
    else:
        mask = create_masks_for_generate(
            language_model.config,
            inputs_embeds,
            attention_mask=sequence_ids != PADDING,
            and_mask_function=packed_sequence_mask_function(sequence_ids),
            **{KV_CACHE: None},
        )
        seeing = {"attention_mask": mask}
    return seeing | {"inputs_embeds": inputs_embeds, "position_ids": positions(sequence_ids), "labels": labels}


def positions(sequence_ids: torch.Tensor) -> torch.Tensor:
    """`(B, S)` int64, counted from the beginning of each sequence."""
    columns = torch.arange(sequence_ids.shape[1], device=sequence_ids.device).expand_as(sequence_ids)
    return columns - columns.masked_fill(~_starts(sequence_ids), 0).cummax(dim=1).values


def _starts(sequence_ids: torch.Tensor) -> torch.Tensor:
    """`(B, S)` bool: where a sequence, or padding, begins."""
    before = nn.functional.pad(sequence_ids[:, :-1], (1, 0), value=PADDING - 1)
    return sequence_ids != before


__all__ = ["PADDING", "check_sequences", "pack", "packed", "positions", "unmasked_layers"]
