"""What all rows of a batch begin with is run once, not once a row.

In `<SYSTEM> <QUERY> <IMAGE> <OUTPUT>` the tokens before the first picture are often the same in all rows. A causal LM's
states at them depend on nothing that follows, so that one row's keys and values serve all. Values and gradients are
those of the plain run; dropout inside the language model, where there is any, is drawn once for the shared tokens.

Shapes: B rows, S tokens a row, the first P of them shared, M the LM's width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .modeling_outputs_lorgnette import KV_CACHE
from .modeling_packing import unmasked_layers


CONTINUED_BY = ("eager", "sdpa")
NOT_SHARED = ("position_ids", KV_CACHE, "output_attentions", "output_hidden_states")


def can_share(language_model: PreTrainedModel, inputs: Mapping[str, Any]) -> bool:
    """Whether this LM can go on from keys and values of another pass, with gradients through both.

    Gradient checkpointing keeps neither; a state that is carried from token to token is no key and no value; weights in
    shards (FSDP, ZeRO-3) come back for gradients through a layer's output, and those of keys and values go past it.

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


def decoded(
    decoder: PreTrainedModel,
    num_shared_tokens: int,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **inputs: Any,
) -> BaseModelOutputWithPast:
    """What the decoder makes of the tokens after the shared ones.

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


__all__ = ["can_share", "decoded"]
