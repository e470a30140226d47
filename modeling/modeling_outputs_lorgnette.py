"""What the models return."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import ModelOutput


@dataclass
class LorgnetteImageFeatures(BaseModelOutputWithPooling):
    """What [`~LorgnetteForConditionalGeneration.get_image_features`] returns.

    Args:
        last_hidden_state: `(N, L, E)` vision features, as the Q-Former reads them.
        pooler_output: `(N, Q, M)` soft tokens, as the language model reads them.
        hidden_states, attentions: the ViT's, on request and where it was run.
        qformer_outputs: the Q-Former's, with its own hidden states and attention maps, on request.
    """

    qformer_outputs: BaseModelOutputWithPoolingAndCrossAttentions | None = None


@dataclass
class LorgnetteCausalLMOutputWithPast(ModelOutput):
    """`CausalLMOutputWithPast` of the language model, and the soft tokens it was given.

    Args:
        loss: the language model's own loss, where `labels` were given.
        logits: `(B, S, vocabulary)`; None in training with `labels`.
        past_key_values: the language model's cache.
        hidden_states, attentions: the language model's, on request.
        image_hidden_states: `(N, Q, M)` soft tokens, where there were images.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


@dataclass
class LorgnetteImageTextOutput(ModelOutput):
    """What [`LorgnetteForImageTextRetrieval`] returns.

    Args:
        loss: the weighted sum of the three, where they were asked for.
        loss_itc, loss_itm, loss_itg: scalars; None where the weight is 0.
        logits_per_image: `(B, B)` float32, cosines of the pictures and texts of this process; None without ITC.
    """

    loss: torch.Tensor | None = None
    loss_itc: torch.Tensor | None = None
    loss_itm: torch.Tensor | None = None
    loss_itg: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None


__all__ = ["LorgnetteCausalLMOutputWithPast", "LorgnetteImageFeatures", "LorgnetteImageTextOutput"]
