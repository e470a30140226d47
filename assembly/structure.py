"""Check that a model equals what a reload builds from its config: modules, names and shapes of weights, and ties."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.modeling_loading import is_unread
from ..modeling.modeling_saving import is_backbone_key, keys_never_saved


# their hooks and patches do not change the results
_TRUSTED_PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "kernels",
    "liger_kernel",
    "peft",
    "torch",
    "transformers",
    "trl",
)


def refuse_other_structure(what: str, model: PreTrainedModel, unread: Callable[[str], bool]) -> None:
    """Refuse a loaded part that was changed by hand, since a reload rebuilds it from its config.

    Args:
        what: its name in errors.
        unread: whether a weight of this name is unused, so that it may exist or not.

    Raises:
        ValueError: a module of another class than its config says, or with a hook that changes what it computes; a
            weight that is missing, is too many, or has another shape; weights that are tied and should not be, or the
            reverse. Names the first.
    """
    found = _hooked(model)
    if found is None and getattr(model, "hf_quantizer", None) is None:  # which puts other modules in
        skeleton = without_weights(partial(type(model)._from_config, copy.deepcopy(model.config)))
        weights = model.state_dict(keep_vars=True)
        ties = not any(value.is_meta for value in weights.values())
        found = _other_class(model, skeleton, unread) or difference(weights, skeleton, unread, ties)
    if found is not None:
        raise ValueError(
            f"The {what} {type(model).__name__} is not what its config describes: {found}. A saved model is built of "
            "the config alone, and would answer otherwise: give the part as from_pretrained loads it, or change its "
            "config too (resize_token_embeddings does)"
        )


def without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model on the meta device.

    Raises:
        ValueError: no model can be built from its config.
    """
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:  # classes raise different exceptions
        raise ValueError(f"no model can be built of its config: {error or type(error).__name__}") from error


def difference(
    weights: Mapping[str, torch.Tensor], skeleton: nn.Module, ignored: Callable[[str], bool], ties: bool
) -> str | None:
    """The first difference of `weights` from those of `skeleton`, a model on the meta device; None if there is none.

    Args:
        ties: whether to compare ties; False for copies of the weights, which lose them.
    """
    expected = skeleton.state_dict(keep_vars=True)
    for key in sorted(weights.keys() ^ expected.keys()):
        if not ignored(key):
            return f"{key} is {'there, and is none of its weights' if key in weights else 'missing'}"
    shared = sorted(weights.keys() & expected.keys())
    for key in shared:
        ours, theirs = tuple(weights[key].shape), tuple(expected[key].shape)
        if ours != theirs:
            return f"{key} is {ours}, and {theirs} by its config"
    if ties:
        ours, theirs = _tied({key: weights[key] for key in shared}), _tied({key: expected[key] for key in shared})
        for key in shared:
            if ours[key] != theirs[key]:
                tied, other = ("is", "is not") if ours[key] > theirs[key] else ("is not", "is")
                return f"{key} {tied} tied to {min(ours[key] ^ theirs[key])}, and by its config it {other}"
    return None


def _tied(weights: dict[str, torch.Tensor]) -> dict[str, set[str]]:
    """Each weight's name, and the names of the weights tied to it."""
    groups: dict[Any, set[str]] = {}
    storages = {}
    for key, value in weights.items():
        plain = type(value) in (torch.Tensor, nn.Parameter) and not value.is_meta and value.numel()
        storages[key] = (value.data_ptr(), value.shape) if plain else id(value)
        groups.setdefault(storages[key], set()).add(key)
    return {key: groups[storage] - {key} for key, storage in storages.items()}


def _other_class(model: nn.Module, skeleton: nn.Module, unread: Callable[[str], bool]) -> str | None:
    ours, theirs = dict(model.named_modules()), dict(skeleton.named_modules())
    for name in sorted(ours.keys() | theirs.keys()):
        kinds = [f"{type(parts[name]).__module__}.{type(parts[name]).__qualname__}" if name in parts else "not there"
                 for parts in (ours, theirs)]  # fmt: skip
        if kinds[0] != kinds[1] and not unread(f"{name}."):
            return f"its module {name} is {kinds[0]}, and by its config {kinds[1]}"
    return None


def _hooked(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        own_forward = [module.__dict__["forward"]] if "forward" in module.__dict__ else []
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *own_forward):
            while isinstance(hook, partial):
                hook = hook.func
            origin = getattr(hook, "__module__", None) or type(hook).__module__
            if origin.split(".")[0] not in _TRUSTED_PACKAGES:
                return f"its module {name} has a hook or a forward of its own, from {origin}"
    return None


def check_save_keywords(model: PreTrainedModel, save_format: str, keywords: Mapping[str, Any]) -> None:
    """Check transformers' keywords of a save against its format.

    Raises:
        TypeError: `form`, which is `save_format` now.
        ValueError: one that the format has no names of files, or of weights, for.
    """
    if "form" in keywords:
        raise TypeError("save_pretrained takes no form=: it is save_format= now")
    for name in ("variant", "save_original_format"):
        if keywords.get(name) and save_format == "thin":
            raise ValueError(f"{name} is for the formats that transformers loads by itself, and this save is thin")
    if save_format == "full" and keywords.get("save_original_format") and getattr(model.config, "lora_config", None):
        raise ValueError("save_original_format knows no names of weights under LoRA: save merged, or leave it out")


def check_described(
    model: PreTrainedModel, save_format: str, weights: dict[str, torch.Tensor] | None, ties: bool
) -> None:
    """Check the config of a save against the weights that it writes (None for all).

    Raises:
        ValueError: a model of that config has other weights, or cannot be built; a reload would differ.
    """
    config = copy.deepcopy(model.config)
    if thin := save_format == "thin":  # and its language model may be quantised
        getattr(config, "text_config", config).__dict__.pop("quantization_config", None)
    never_saved = keys_never_saved(model)

    def ignored(key: str) -> bool:
        return key in never_saved or is_unread(key) or (thin and is_backbone_key(model, key))

    weights = model.state_dict(keep_vars=True) if weights is None else weights
    weights = {key: value for key, value in weights.items() if not ignored(key)}
    try:
        found = difference(weights, without_weights(lambda: type(model)(config)), ignored, ties)
    except ValueError as error:
        text = getattr(config, "text_config", None)
        sizes = {name: getattr(text, name, None) for name in ("vocab_size", "pad_token_id")}
        found = f"{error}" + (f" (of its text_config: {sizes})" if text is not None else "")
    if found is not None:
        raise ValueError(
            f"This model cannot be saved {save_format}, for it is no longer what its config describes: {found}. Its "
            "reload would be another model: undo that, or change the config too (resize_token_embeddings does)"
        )


__all__ = ["check_described", "difference", "refuse_other_structure", "without_weights"]
