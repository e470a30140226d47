"""The loss of a causal LM from the logits of supervised positions alone, some of them at a time.

transformers makes the logits of all positions, and in float32 once more for the loss: the largest tensors of a step.
Here the head runs on the states that predict what is to be learned. Head and loss are the language model's own.
"""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .modeling_base import KV_CACHE
from .modeling_checks import IGNORED


LOGITS_AT_ONCE = 2**25  # elements, 128 MiB in float32
POSITIONS_MULTIPLE = 16  # oneDNN, in bf16 on a CPU, compiles and keeps megabytes of kernels for each number of rows
_NO_LOGITS = (
    "In training with labels the model computes the loss on supervised positions, and no logits. Give forward "
    "logits_to_keep=0 for those of all positions, or no labels; a compute_loss_func of Trainer gets them as it is"
)


@dataclass
class LorgnetteLossOutput(ModelOutput):
    """What is returned in training, where logits of labels alone were computed.

    Reading its `logits` raises AttributeError, KeyError or IndexError, which says how to get some; `getattr(…, None)`
    is None. By number, and in a tuple, their place is the second, as it is in evaluation.
    """

    loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None

    @property
    def logits(self) -> None:
        raise AttributeError(_NO_LOGITS)

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            raise KeyError(_NO_LOGITS)
        if key == 1 or (isinstance(key, slice) and 1 in range(len(self) + 1)[key]):
            raise IndexError(_NO_LOGITS)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key == "logits" else super().get(key, default)

    def to_tuple(self) -> tuple:
        """As `ModelOutput.to_tuple`, with None in the place of the logits."""
        loss, *others = super().to_tuple()
        return (loss, None, *others)


def in_process_group() -> bool:
    """Whether there is a process group; some builds of torch know none."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def can_supervise(language_model: PreTrainedModel, keywords: Collection[str] = ()) -> bool:
    """Whether decoder and head of this LM can be told apart, and its loss is that of its logits alone.

    The keywords of a call may ask for logits, or bring labels of their own.
    """
    return (
        not {"logits_to_keep", "shift_labels"} & set(keywords)
        and language_model.base_model is not language_model
        and "logits_to_keep" in inspect.signature(language_model.forward).parameters
        and not getattr(language_model.config, "output_router_logits", False)
    )


def supervised_loss(
    language_model: PreTrainedModel,
    labels: torch.Tensor,
    supervised_positions: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    decode: Callable[..., ModelOutput] | None = None,
    **inputs: Any,
) -> CausalLMOutputWithPast:
    """What the LM's forward returns, but for logits; the sum over labels is divided by `num_items_in_batch`.

    `decode` may leave out the states of first tokens, the same number in each row.
    """
    outputs = (decode or language_model.base_model)(**inputs)
    states, targets = supervised(outputs.last_hidden_state, labels, supervised_positions)  # (K, M), (K,)
    total = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORED).sum()
    loss_of = partial(_loss, language_model, total)
    at_once = max(1, LOGITS_AT_ONCE // language_model.config.vocab_size)
    if len(targets) > at_once:  # the backward pass makes the logits again
        loss_of = partial(checkpoint, loss_of, use_reentrant=False)
    losses = [loss_of(*piece) for piece in zip(states.split(at_once), targets.split(at_once), strict=True)]
    return CausalLMOutputWithPast(
        loss=torch.stack(losses).sum(),
        hidden_states=getattr(outputs, "hidden_states", None),
        attentions=getattr(outputs, "attentions", None),  # Mamba has none
        **{KV_CACHE: getattr(outputs, KV_CACHE)},
    )


def supervised(
    states: torch.Tensor, labels: torch.Tensor, supervised_positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `(B, S, M)` states the `(K, M)` that predict what is to be learned, and that, `(K,)`; -100 fills K up.

    Args:
        labels: `(B, S)`, -100 where nothing is to be learned.
        supervised_positions: `(K,)` int64, where in `labels`, flat, the others are, in order; 0 for padding. Without
            them K is a multiple of `POSITIONS_MULTIPLE`, or, while compiling, B S: values cannot decide a shape there.
    """
    left_out = labels.shape[1] - states.shape[1]
    # a row's first label is nothing's next token: the place before it, and so padding's, is the end of a row
    next_tokens = nn.functional.pad(labels[:, left_out + 1 :], (0, 1), value=IGNORED).flatten()
    if supervised_positions is not None:
        rows = supervised_positions // labels.shape[1]
        positions = (supervised_positions - (rows + 1) * left_out).clamp(min=0) - 1
    elif torch.compiler.is_compiling():
        positions = torch.arange(len(next_tokens), device=labels.device)
    else:
        positions = (next_tokens != IGNORED).nonzero().squeeze(1)
        positions = nn.functional.pad(positions, (0, -len(positions) % POSITIONS_MULTIPLE), value=-1)
    return states.flatten(0, 1)[positions], next_tokens[positions]


def _loss(
    language_model: PreTrainedModel, total: torch.Tensor | int, states: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Their share of the loss: the sum over `(K, M)` states over the number of all."""
    forward = type(language_model).forward  # not the instance's, which accelerate may have wrapped
    head = _HeadAlone(language_model)
    logits = forward(head, inputs_embeds=states[None], use_cache=False, return_dict=True).logits[0]  # (K, vocabulary)
    return language_model.loss_function(
        logits=logits, labels=None, shift_labels=targets, vocab_size=logits.shape[-1], num_items_in_batch=total
    )


class _HeadAlone:
    """The `self` of a causal LM's forward that is to run the head alone: a [`_Decoded`] is in its decoder's place."""

    def __init__(self, language_model: PreTrainedModel):
        self._language_model = language_model

    def __getattr__(self, name: str) -> Any:
        part = getattr(self._language_model, name)
        return _Decoded(part) if name == self._language_model.base_model_prefix else part


class _Decoded:
    """In a decoder's place: its states are the embeddings that it is given, and all else is the decoder's own."""

    def __init__(self, decoder: PreTrainedModel):
        self._decoder = decoder

    def __call__(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> "_Decoded":
        self.last_hidden_state = inputs_embeds
        return self

    @property
    def decoder(self) -> "_Decoded":  # OPT calls it past its model
        return self

    def __getitem__(self, place: int) -> torch.Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name, None)
