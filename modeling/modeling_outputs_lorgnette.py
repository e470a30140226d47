"""What the models return, and what transformers calls the cache of keys and values in it."""

import sys
import warnings
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithPast,
)
from transformers.utils import ModelOutput


# The one name that is used for the cache: transformers 5.24 renamed `past_key_values`, in outputs and keywords alike.
# Of two names, both given, its decoders heed `cache` alone, None or not.
KV_CACHE = "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else "past_key_values"


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


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache that was given, by either name.

    Raises:
        ValueError: by both.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one thing, and both were given")
    if past_key_values is not None and KV_CACHE == "cache":
        warnings.warn("`past_key_values` is deprecated in transformers 5.24: it is `cache` there", FutureWarning, 3)
    return past_key_values if cache is None else cache


@dataclass
class LorgnetteModelOutputWithPast(BaseModelOutputWithPast):
    """What [`LorgnetteModel`] returns.

    Args:
        last_hidden_state: `(B, S, M)` states of the language model's decoder, before its head.
        cache: the language model's; `past_key_values` before transformers 5.24.
        hidden_states, attentions: the language model's, on request.
        image_hidden_states: `(N, Q, M)` visual tokens, where there were images.
        image_outputs: what ViT and Q-Former gave besides, as [`~LorgnetteModel.get_image_features`] returns it.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: LorgnetteImageFeatures | None = None


@dataclass
class LorgnetteCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` of the language model, and the visual tokens it was given.

    Args:
        loss: the language model's own loss, where `labels` were given.
        logits: `(B, S, vocabulary)`.
        cache: the language model's; `past_key_values` before transformers 5.24.
        hidden_states, attentions: the language model's, on request.
        image_hidden_states: `(N, Q, M)` visual tokens, where there were images.
        image_outputs: what ViT and Q-Former gave besides, as [`~LorgnetteModel.get_image_features`] returns it.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: LorgnetteImageFeatures | None = None

    def __getitem__(self, key: Any) -> Any:
        if key == "logits" and not torch.compiler.is_compiling():
            _check_label_smoother(sys._getframe(1).f_locals, super().__getitem__(key).shape[-1])
        return super().__getitem__(key)


def _check_label_smoother(reader: dict[str, Any], vocab_size: int) -> None:
    """Refuse what Trainer's `LabelSmoother` would get wrong: the model sees no labels where it computes the loss.

    Args:
        reader: the local variables of the function that reads the logits.

    Raises:
        ValueError: it is that one, and would compare each token's logits with that token; or has labels past the
            vocabulary.
    """
    if type(reader.get("self")).__name__ != "LabelSmoother":
        return
    labels = reader.get("labels")
    if isinstance(labels, torch.Tensor) and (labels >= vocab_size).any():
        raise ValueError(
            f"label_smoothing_factor is {reader['self'].epsilon}, and labels of the batch are on image placeholders "
            f"(id {labels.max()}, past the vocabulary of {vocab_size}): TRL labels them in rows of messages. Give rows "
            "of prompt and completion, LorgnetteCollator as data_collator, or no label smoothing"
        )
    if reader.get("shift_labels") is False:
        raise ValueError(
            f"label_smoothing_factor is {reader['self'].epsilon}, and Trainer would not shift the labels: it would "
            "teach each token to predict itself, and not the next. It shifts them for models whose class it knows by "
            "name, which torch_compile and other wrappers hide, and Seq2SeqTrainer's predict_with_generate never does: "
            "set label_smoothing_factor to 0, or leave that out"
        )


@dataclass
class LorgnetteLossOutput(ModelOutput):
    """What [`LorgnetteForConditionalGeneration`] returns in training, where the head saw supervised positions alone.

    Reading its `logits` raises AttributeError, KeyError or IndexError, which says how to get some; `getattr(…, None)`
    is None. By number, and in a tuple, their place is the second, as it is in evaluation.

    Args:
        loss, hidden_states, attentions, image_hidden_states: see [`LorgnetteCausalLMOutputWithPast`].
    """

    loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:  # called for what is not there
        raise AttributeError(
            _NO_LOGITS if name == "logits" else f"'LorgnetteLossOutput' object has no attribute {name!r}"
        )

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            raise KeyError(_NO_LOGITS)
        if key == 1 or (isinstance(key, slice) and 1 in range(len(self) + 1)[key]):
            raise IndexError(_NO_LOGITS)
        return super().__getitem__(key)

    def to_tuple(self) -> tuple:
        """As `ModelOutput.to_tuple`, with None in the place of the logits."""
        loss, *others = super().to_tuple()
        return (loss, None, *others)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key == "logits" else super().get(key, default)


_NO_LOGITS = (
    "In training with labels the model computes the loss on supervised positions, and no logits. Give forward "
    "logits_to_keep=0 for those of all positions, or no labels; a compute_loss_func of Trainer gets them as it is"
)


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


__all__ = [
    "KV_CACHE",
    "LorgnetteCausalLMOutputWithPast",
    "LorgnetteImageFeatures",
    "LorgnetteImageTextOutput",
    "LorgnetteLossOutput",
    "LorgnetteModelOutputWithPast",
    "one_cache",
]
