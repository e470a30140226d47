"""Logits where something is to be learned, and nowhere else: the other rows of the largest product are never made."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


IGNORED = -100  # as transformers' losses have it


def supervised_only(language_model: PreTrainedModel, labels: torch.Tensor) -> dict[str, Any]:
    """Keywords with which a causal LM computes its own loss from the logits of supervised positions alone.

    A position is kept where any row of the batch learns its next token: `logits_to_keep`. The labels, shifted here,
    are cut the same way: `shift_labels` of `ForCausalLMLoss` (transformers/loss/loss_utils.py). What an LM does to its
    logits, soft-capping for one, it still does.

    Args:
        labels: `(B, S)`, -100 where nothing is to be learned.

    Returns:
        `labels` as they were, for an LM that does not take `logits_to_keep`.
    """
    if "logits_to_keep" not in inspect.signature(language_model.forward).parameters:
        return {"labels": labels}
    next_tokens = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    positions = (next_tokens != IGNORED).any(0).nonzero().squeeze(1)  # (K,)
    return {"labels": labels, "shift_labels": next_tokens[:, positions], "logits_to_keep": positions}


__all__ = ["supervised_only"]
