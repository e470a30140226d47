"""Run what the prompts of a batch begin with once in `generate`, and keep its keys and values between calls.

In `<SYSTEM> <QUERY> <IMAGE> <OUTPUT>` the tokens before the first picture are often the same in all rows, and in all
batches of a data set. Their states do not depend on later tokens, so one row is run (a batch of one) and its keys and
values serve all rows and beams. Tokens are those of the plain run, up to rounding.

Shapes: B rows, S tokens a row, the first P of them shared, M the LM's width.
"""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..modeling.modeling_base import KV_CACHE
from ..modeling.modeling_checks import setting_of
from ..modeling.modeling_lora import lora_layers
from .shared_prefix import can_share


MAX_BYTES = 64 * 2**20  # of keys and values that a `PromptCache` keeps
MAX_PROMPTS = 1024  # that it knows, most of them seen once
# A pass of its own costs as much as so many tokens in a batch: it reads all weights once more. For SmolLM2-135M on a
# CPU it was 20 to 60; accelerators compute more while they read.
TOKENS_PER_PASS = {"cpu": 64}
TOKENS_PER_PASS_ON_ACCELERATORS = 512
FEWEST_TOKENS = 8  # fewer, such as a single BOS, are not worth the look-up
EXPANDABLE = (DynamicLayer, DynamicSlidingWindowLayer)  # exactly: others hold more than keys and values
# settings with which `generate` makes a cache of its own, runs prompts in its own way, or returns what is there of them
_OWN_PREFILL = (
    *("cache_implementation", "constraints", "custom_generate", "dola_layers", "force_words_ids", "guidance_scale"),
    *("num_beam_groups", "output_attentions", "output_hidden_states", "penalty_alpha", "synced_gpus"),
)
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # a prompt's length changes what its first tokens become


def can_continue(language_model: PreTrainedModel) -> bool:
    """Whether an LM's cache of one row can be expanded, and its states at first tokens depend on these alone."""
    return (
        language_model._supports_default_dynamic_cache()
        and can_share(language_model, {})
        and not _rope_types(getattr(language_model.config, "rope_parameters", None)) & {*_LENGTH_DEPENDENT_ROPE}
        and all(type(layer) in EXPANDABLE for layer in new_cache(language_model).layers)
    )


def can_prefill(model: PreTrainedModel, kwargs: Mapping[str, Any], *configs: GenerationConfig | None) -> bool:
    """Whether `generate` with these settings runs prompts as any other tokens; see [`can_continue`] for the LM.

    Args:
        model: a [`LorgnetteForConditionalGeneration`].
        kwargs: of `generate`, with `inputs_embeds`; they go before `configs`.
    """
    mask, others = kwargs.get("attention_mask"), set(kwargs) - {"attention_mask", "inputs_embeds"}
    return (
        not model.training  # dropout would be drawn once for all rows
        and mask is not None
        and mask.ndim == 2
        and not any(isinstance(kwargs[name], (torch.Tensor, Cache)) for name in others)
        and not any(_is_set(name, kwargs, *configs) for name in _OWN_PREFILL)
    )


def prefilled(
    model: PreTrainedModel, input_ids: torch.Tensor | None, kwargs: Mapping[str, Any], *configs: GenerationConfig | None
) -> dict[str, Any]:
    """Keywords of `generate` for prompts that begin alike: a cache with their first P tokens, and the mask for it.

    There are none where [`can_prefill`] or [`can_continue`] says no, where nothing is shared and where a pass of its
    own would cost more than it saves: then `generate` runs all rows in full.

    Args:
        model: a [`LorgnetteForConditionalGeneration`].
        input_ids: `(B, S)`, padded on the left.
        kwargs: of `generate`, with `inputs_embeds` `(B, S, M)` and `attention_mask` `(B, S)`.
    """
    if input_ids is None:
        return {}
    beams = (setting_of(name, kwargs, *configs) or 1 for name in ("num_beams", "num_return_sequences"))
    num_rows, kept = len(input_ids) * max(beams), _kept_for(model)
    if (num_rows == 1 and kept is None) or not can_prefill(model, kwargs, *configs):
        return {}
    mask, embeds = kwargs["attention_mask"], kwargs["inputs_embeds"]
    padding = mask.shape[1] - mask.bool().sum(dim=1)  # (B,), on the left
    columns = torch.arange(mask.shape[1], device=mask.device)
    if not torch.equal(mask.bool(), columns >= padding[:, None]):  # holes
        return {}
    num_shared = common_length(input_ids, padding, model.config.image_token_id)
    per_pass = TOKENS_PER_PASS.get(embeds.device.type, TOKENS_PER_PASS_ON_ACCELERATORS)
    pays = (num_rows - 1) * num_shared >= per_pass
    if num_rows * num_shared < FEWEST_TOKENS or (kept is None and not pays):
        return {}
    language_model = model.language_model
    if not (can_continue(language_model) if kept is None else kept.can_continue):
        return {}
    if padding.any() and not _can_pad_behind(language_model, kwargs, *configs):
        return {}
    shared = slice(int(padding[0]), int(padding[0]) + num_shared)

    def prefill() -> DynamicCache:
        cache = new_cache(language_model)
        language_model.base_model(inputs_embeds=embeds[:1, shared], use_cache=True, **{KV_CACHE: cache})
        return cache

    if kept is None:
        cache = prefill()
    else:
        key = (input_ids[0, shared].cpu().numpy().tobytes(), *_state(model, embeds))
        cache = kept.get(key, prefill, pays)
    if cache is None:
        return {}
    # the shared tokens come first, then each row's padding. A row's own tokens stay in their columns: `generate` cuts
    # the first P off the embeddings, and what is left of them in a padded row is in masked columns
    behind = (columns < num_shared) | (columns >= padding[:, None] + num_shared)
    return {KV_CACHE: expanded(cache, num_rows), "attention_mask": behind.to(mask.dtype)}


def common_length(input_ids: torch.Tensor, padding: torch.Tensor, image_token_id: int) -> int:
    """P: how many first tokens of rows `(B, S)` are the same and before any picture, with one left to each row.

    Args:
        padding: `(B,)`, the number of columns of padding at a row's left.
    """
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    tokens = input_ids.gather(1, (padding[:, None] + columns).clamp(max=len(columns) - 1))
    alike = (tokens == tokens[0]).all(dim=0) & (tokens[0] != image_token_id)
    alike &= columns < len(columns) - padding.max() - 1
    return int(alike.long().cumprod(dim=0).sum())


def new_cache(language_model: PreTrainedModel) -> DynamicCache:
    """An empty cache, as `generate` makes it."""
    return DynamicCache(config=language_model.config.get_text_config(decoder=True))


def expanded(cache: DynamicCache, num_rows: int) -> DynamicCache:
    """A cache of so many rows that all continue from the one row in `cache`, which stays as it is."""
    rows = copy.copy(cache)
    rows.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in rows.layers:
        if layer.is_initialized:  # views: `update` writes into new tensors
            layer.keys = layer.keys.expand(num_rows, *layer.keys.shape[1:])
            layer.values = layer.values.expand(num_rows, *layer.values.shape[1:])
    return rows


@dataclass
class _Entry:
    calls: int = 0
    cache: DynamicCache | None = None
    num_bytes: int = 0


class PromptCache:
    """Keys and values of prompts' first tokens, those used last; for use while no weight changes.

    Args:
        language_model: the one that they are of.
        max_bytes: limit on `num_bytes`, those of all of them together.
    """

    def __init__(self, language_model: PreTrainedModel, max_bytes: int = MAX_BYTES):
        self.language_model, self.max_bytes, self.num_bytes = language_model, max_bytes, 0
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()  # those used last at the end

    @cached_property
    def can_continue(self) -> bool:
        """See [`can_continue`], which takes milliseconds."""
        return can_continue(self.language_model)

    def get(self, key: tuple[bytes, ...], prefill: Callable[[], DynamicCache], pays: bool) -> DynamicCache | None:
        """The cache of one row for `key`; None where it would have to be made, and that does not pay.

        Args:
            key: the tokens, then what else the cache depends on.
            prefill: makes it.
            pays: whether this call alone is worth it; else the second call with a key is.
        """
        entry = self._entries.pop(key, None) or _Entry()
        entry.calls += 1
        cache = entry.cache
        if cache is None and (pays or entry.calls == 2):
            cache = prefill()
            pairs = [(layer.keys, layer.values) for layer in cache.layers if layer.is_initialized]
            size = sum(tensor.untyped_storage().nbytes() for pair in pairs for tensor in pair)
            if size <= self.max_bytes:
                entry.cache, entry.num_bytes = cache, size
                self.num_bytes += size
        self._entries[key] = entry
        while self.num_bytes > self.max_bytes or len(self._entries) > MAX_PROMPTS:
            _, dropped = self._entries.popitem(last=False)
            self.num_bytes -= dropped.num_bytes
        return cache


_KEPT: ContextVar[PromptCache | None] = ContextVar("kept prompts", default=None)


@contextmanager
def kept_prompts(model: PreTrainedModel, max_bytes: int = MAX_BYTES) -> Iterator[PromptCache]:
    """Within the block, `model.generate` in this thread keeps what prompts begin with. No weight may change meanwhile.

    Adapter sets may be switched, and LoRA too: what is kept is of one state of them.
    """
    kept = PromptCache(model.language_model, max_bytes)
    token = _KEPT.set(kept)
    try:
        yield kept
    finally:
        _KEPT.reset(token)


def _kept_for(model: PreTrainedModel) -> PromptCache | None:
    """What the block around this call keeps, if it is about this model."""
    kept = _KEPT.get()
    return None if kept is None or kept.language_model is not model.language_model else kept


def _state(model: PreTrainedModel, embeds: torch.Tensor) -> tuple[Hashable, ...]:
    """What keys and values depend on besides tokens and weights."""
    lora = {(layer.disable_adapters, *layer.active_adapters) for layer in lora_layers(model.language_model).values()}
    device = embeds.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return model.active_bridge, frozenset(lora), embeds.dtype, embeds.device, autocast


def _can_pad_behind(
    language_model: PreTrainedModel, kwargs: Mapping[str, Any], *configs: GenerationConfig | None
) -> bool:
    """Whether padding may stand between shared tokens and a row's own: nothing takes columns for positions."""
    return (
        "position_ids" in inspect.signature(language_model.forward).parameters
        and not any(layer.is_sliding for layer in new_cache(language_model).layers)
        and not _is_set("return_dict_in_generate", kwargs, *configs)  # the caller gets the cache with it
        and not _is_set("repetition_penalty", kwargs, *configs)  # asks the mask where a row begins in `input_ids`
    )


def _is_set(name: str, kwargs: Mapping[str, Any], *configs: GenerationConfig | None) -> bool:
    setting = setting_of(name, kwargs, *configs)
    return setting is not None and setting is not False and (setting is True or setting != 1)


def _rope_types(parameters: Mapping[str, Any] | None) -> set[str]:
    """The kinds of rotary embeddings in a config's `rope_parameters`, which may be one set a layer type."""
    nested = [_rope_types(value) for value in (parameters or {}).values() if isinstance(value, Mapping)]
    return set().union({(parameters or {}).get("rope_type")}, *nested)


__all__ = ["PromptCache", "can_continue", "can_prefill", "kept_prompts", "prefilled"]
