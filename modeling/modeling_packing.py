"""Several documents in a row, in place of padding: which tokens see each other, and where positions are counted from.

Language models guess documents from positions that start again, or do not, and then tokens see the documents before
their own. So the masks are made here, by `transformers.masking_utils`, and handed over with the positions: a token sees
those before it in its own document, and of these what the LM's sliding window leaves.

Shapes: B rows, S tokens a row, D documents in all, T tokens in all.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate, packed_sequence_mask_function
from transformers.utils.generic import is_flash_attention_requested

from .modeling_checks import IGNORED, checked_documents
from .modeling_outputs_lorgnette import KV_CACHE


PADDING = -1  # in place of a document's number
MASKED_BY = ("eager", "sdpa", "flex_attention")
MASKED_LAYERS = ("full_attention", "sliding_attention")  # of `config.layer_types`; convolutions, say, heed no mask


def unmasked_layers(language_model: PreTrainedModel) -> list[str]:
    """Kinds of layers in which tokens reach each other otherwise than a causal mask, or a sliding window, says."""
    kinds = getattr(language_model.config, "layer_types", None) or ()
    return [kind for kind in kinds if kind not in MASKED_LAYERS]


def check_documents(
    document_ids: torch.Tensor, language_model: PreTrainedModel, keywords: dict[str, Any]
) -> torch.Tensor:
    """Refuse what would let documents see each other; `document_ids` otherwise.

    Args:
        document_ids: `(B, S)`, see [`packed`].
        keywords: what else the language model is given.

    Raises:
        ValueError: numbers out of order, a language model or an attention implementation that cannot tell documents
            apart, an input that goes with one document a row.
    """
    in_the_way = [name for name in ("position_ids", KV_CACHE) if keywords.get(name) is not None]
    if in_the_way:
        raise ValueError(f"document_ids and {', '.join(in_the_way)}: positions are counted from each document's first")
    if language_model._is_stateful:
        raise ValueError(f"{type(language_model).__name__} carries a state from token to token: it cannot be packed")
    if kinds := unmasked_layers(language_model):
        raise ValueError(
            f"{type(language_model).__name__} has layers of {kinds[0]}, in which documents would see each other: it "
            "cannot be packed"
        )
    if "position_ids" not in inspect.signature(language_model.forward).parameters:
        raise ValueError(f"{type(language_model).__name__} takes no position_ids: it cannot be packed")
    if getattr(language_model.config, "alibi", False):
        raise ValueError(
            f"{type(language_model).__name__} counts positions by its padding mask (ALiBi), which knows no documents: "
            "it cannot be packed"
        )
    attention = language_model.config._attn_implementation
    if attention not in MASKED_BY and not is_flash_attention_requested(language_model.config):
        raise ValueError(
            f"attn_implementation {attention!r} cannot mask documents: take {', '.join(MASKED_BY)} or FlashAttention"
        )
    return checked_documents(document_ids, _starts(document_ids))


def packed(
    language_model: PreTrainedModel,
    document_ids: torch.Tensor,
    inputs_embeds: torch.Tensor,
    labels: torch.Tensor | None,
) -> dict[str, Any]:
    """What a causal LM is given so that no document sees another.

    Args:
        document_ids: `(B, S)` int64, each token's document, numbered from 0 through the batch; -1 for padding.
        inputs_embeds: `(B, S, M)`.
        labels: `(B, S)`; a document's first is left out, as a row's is.

    Returns:
        `inputs_embeds`, `attention_mask`, `position_ids` `(B, S)` and `labels`. With FlashAttention, which takes
        lengths in place of a mask, all tokens in one row `(1, T)`.
    """
    if labels is not None:
        labels = labels.masked_fill(_starts(document_ids), IGNORED)
    if is_flash_attention_requested(language_model.config):
        kept = document_ids != PADDING
        document_ids, inputs_embeds = document_ids[kept][None], inputs_embeds[kept][None]
        labels = None if labels is None else labels[kept][None]
        bounds = [*_starts(document_ids)[0].nonzero()[:, 0].tolist(), document_ids.shape[1]]
        lengths = torch.tensor(bounds, dtype=torch.int32, device=document_ids.device)
        longest = int(lengths.diff().max())
        seeing = {"attention_mask": None, "cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
        seeing |= {"max_length_q": longest, "max_length_k": longest}
    else:
        mask = create_masks_for_generate(
            language_model.config,
            inputs_embeds,
            attention_mask=document_ids != PADDING,
            and_mask_function=packed_sequence_mask_function(document_ids),
            **{KV_CACHE: None},
        )
        seeing = {"attention_mask": mask}
    return seeing | {"inputs_embeds": inputs_embeds, "position_ids": positions(document_ids), "labels": labels}


def positions(document_ids: torch.Tensor) -> torch.Tensor:
    """`(B, S)` int64, counted from the beginning of each document."""
    places = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    return places - places.masked_fill(~_starts(document_ids), 0).cummax(dim=1).values


def _starts(document_ids: torch.Tensor) -> torch.Tensor:
    """`(B, S)` bool: where a document, or padding, begins."""
    before = nn.functional.pad(document_ids[:, :-1], (1, 0), value=PADDING - 1)
    return document_ids != before


__all__ = ["PADDING", "check_documents", "packed", "positions", "unmasked_layers"]
