"""Compute the common prefix of all rows of a batch once, not once per row.

In `<SYSTEM> <QUERY> <IMAGE> <OUTPUT>` the tokens before the first picture are often the same in all rows. A causal LM's
states at them do not depend on later tokens, so all rows can share one row's keys and values. Values and gradients are
those of the plain run; dropout inside the language model is drawn once for the shared tokens.

Shapes: B rows, S tokens a row, the first P of them shared, M the LM's width.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..modeling.modeling_base import KV_CACHE
from ..modeling.modeling_checks import IGNORED, row_name
from .packing import unmasked_layers


CONTINUED_BY = ("eager", "sdpa")
NOT_SHARED = ("position_ids", KV_CACHE, "output_attentions", "output_hidden_states")


def can_share(language_model: PreTrainedModel, inputs: Mapping[str, Any]) -> bool:
    """Whether this LM can continue from keys and values of another pass, with gradients through both.

    Not with gradient checkpointing, which keeps neither; not with recurrent states; not with sharded weights (FSDP,
    ZeRO-3), which are gathered for gradients of a layer's output, while those of keys and values bypass it.

    Args:
        inputs: of the call; some settle positions, or ask for what is there of all of them.
    """
    return (
        all(inputs.get(name) is None for name in NOT_SHARED)
        and not language_model._is_stateful
        and not unmasked_layers(language_model)
        and language_model.config._attn_implementation in CONTINUED_BY
        and not any(
            isinstance(part, FullyShardedDataParallel) or getattr(part, "gradient_checkpointing", False)
            for part in language_model.modules()
        )
        and not any(isinstance(weight, DTensor) or weight.numel() == 0 for weight in language_model.parameters())
    )


def shared_inputs(language_model: PreTrainedModel, inputs: Mapping[str, Any], num_shared_tokens: int) -> dict[str, Any]:
    """Keywords of [`~modeling_loss.supervised_loss`] for rows that begin alike; none where [`can_share`] says no.

    Args:
        inputs: of the call.
        num_shared_tokens: P.
    """
    if not can_share(language_model, inputs):
        return {}
    return {"decode": partial(decode_rest, language_model.base_model, num_shared_tokens)}


def unlike_shared(
    labels: torch.Tensor,
    shared_input_ids: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two `(B,)` bool: which rows begin with others than `shared_input_ids` `(B, P)`, and which cannot share them.

    A row cannot that has padding, a placeholder or a label among them or next.
    """
    num_shared = shared_input_ids.shape[1]
    first = input_ids[:, :num_shared]
    taken = (first == image_token_id).any(dim=1) | (labels[:, : num_shared + 1] != IGNORED).any(dim=1)
    if attention_mask is not None:
        taken = taken | ~attention_mask[:, :num_shared].bool().all(dim=1)
    return (first != shared_input_ids[:1]).any(dim=1), taken


def check_shared(
    labels: torch.Tensor,
    shared_input_ids: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_token_id: int,
    row_index: torch.Tensor | None,
) -> None:
    """Raise a ValueError that names the first of the rows that [`unlike_shared`] finds."""
    other, taken = unlike_shared(labels, shared_input_ids, input_ids, attention_mask, image_token_id)
    for wrong, why in (
        (other, "are not those of the batch's shared_input_ids"),
        (taken, "cannot be shared: padding, a picture or what is to be learned is among them or next"),
    ):
        if wrong.any():
            row = row_name(int(wrong.nonzero()[0]), row_index)
            raise ValueError(f"{row}: its first {shared_input_ids.shape[1]} tokens {why}")


def decode_rest(
    decoder: PreTrainedModel,
    num_shared_tokens: int,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **inputs: Any,
) -> BaseModelOutputWithPast:
    """Run the decoder on the tokens after the shared ones.

    Args:
        decoder: a causal LM's, without its head.
        num_shared_tokens: P; so many first ones are the same in all rows.
        inputs_embeds: `(B, S, M)`.
        attention_mask: `(B, S)`, ones at shared tokens.
        inputs: for both passes.

    Returns:
        `last_hidden_state` `(B, S - P, M)`.
    """
    shared = DynamicCache(config=decoder.config)
    inputs |= {KV_CACHE: shared, "use_cache": True}
    decoder(inputs_embeds=inputs_embeds[:1, :num_shared_tokens], **inputs)
    shared.batch_repeat_interleave(len(inputs_embeds))
    rest = decoder(inputs_embeds=inputs_embeds[:, num_shared_tokens:], attention_mask=attention_mask, **inputs)
    return BaseModelOutputWithPast(last_hidden_state=rest.last_hidden_state)


__all__ = ["can_share", "check_shared", "decode_rest", "shared_inputs", "unlike_shared"]
