"""Adapter sets: several sets of Q-Former, projector and LoRA over one ViT and one language model, with one active.

Only the active set's modules are in the model: it trains, counts as parameters and is saved. A model's own set is
called `"default"`. A save holds the active set, which is `"default"` after a reload.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration.configuration_lorgnette import LorgnetteConfig
from ..modeling.modeling_loading import is_unread
from ..modeling.modeling_saving import without_lora
from .foreign_adapters import DetachedLora, lora_weights, replace_lora
from .offloading import refuse_offloaded
from .sources import from_pretrained_arguments


# Config fields of an adapter set; all others belong to the backbones, or must be equal in all sets.
_FIELDS = (
    "qformer_config",
    "lora_config",
    "elastic_queries",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "qformer_backbone",
    "qformer_backbone_revision",
)
# Fields that all adapter sets share: the backbones' shapes, and the processor's inputs.
_SHARED = (
    *(f"vision_config.{name}" for name in ("model_type", "hidden_size", "num_hidden_layers")),
    *(f"text_config.{name}" for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")),
    "image_token_id",
    "num_query_tokens",
    "qformer_config.use_qformer_text_input",
)


@dataclass
class AdapterSet:
    """The parts in which models over the same ViT and LM differ.

    Args:
        fields: of the config.
        qformer, projector: the modules.
        lora: weights as [`lora_weights`] gives them, or peft's layers once the set has been active; None without LoRA.
        generation_config: the set's generation config.
        processor: saved with the model; may be None.
    """

    fields: dict[str, Any]
    qformer: PreTrainedModel
    projector: nn.Linear
    lora: dict[str, torch.Tensor] | DetachedLora
    generation_config: GenerationConfig
    processor: Any


def load_bridge(model: PreTrainedModel, source: str | Path, name: str, *, revision: str | None = None) -> None:
    """Load the adapter set of another saved model with the same ViT and LM; [`set_bridge`] activates it.

    Reads the other model once in full, to check that its ViT and LM are equal, bit for bit.

    Args:
        model: a [`LorgnetteForConditionalGeneration`].
        source: folder or Hub id of a saved [`LorgnetteForConditionalGeneration`].
        name: of the set here.
        revision: branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the name is taken; the other model's ViT or LM is not this one; its processor makes another
            placeholder, or another number of them, or texts for the Q-Former where this one's does not; weights are
            offloaded.
    """
    refuse_offloaded(model, "language_model.")
    if name in model.bridges:
        raise ValueError(f"There is an adapter set {name!r} already; there are {model.bridges}")
    place, keywords = from_pretrained_arguments(source, revision)
    _check_shared(model.config, model.config_class.from_pretrained(place, **keywords))
    other = type(model).from_pretrained(place, dtype=model.projector.weight.dtype, **keywords)
    _check_backbones(model, other)
    entering = _set_in_use(other)
    if other.config.lora_config is not None:
        entering.lora = lora_weights(other.language_model)
    model._idle_bridges = {**model._idle_bridges, name: entering}


def set_bridge(model: PreTrainedModel, name: str) -> None:
    """Activate an adapter set. LoRA stays disabled if it is; an existing optimizer still holds the other set's weights.

    Raises:
        ValueError: there is no adapter set of that name; weights are offloaded.
    """
    refuse_offloaded(model, "language_model.")
    if name not in model.bridges:
        raise ValueError(f"There is no adapter set {name!r}; there are {model.bridges}")
    entering, leaving = model._idle_bridges[name], _set_in_use(model)
    entering.qformer.set_attn_implementation(model.qformer.config._attn_implementation)
    model.qformer = entering.qformer.to(model.projector.weight)  # its dtype and device
    model.projector = entering.projector.to(model.projector.weight)
    for field, value in entering.fields.items():
        setattr(model.config, field, value)
    leaving.lora = replace_lora(model, model.config.lora_config, entering.lora)
    model.generation_config, model._processor = entering.generation_config, entering.processor
    others = {other: idle for other, idle in model._idle_bridges.items() if other != name}
    model._idle_bridges, model.active_bridge = {**others, model.active_bridge: leaving}, name


def _set_in_use(model: PreTrainedModel) -> AdapterSet:
    """The active set without its LoRA, which is on the language model."""
    return AdapterSet(
        fields={name: getattr(model.config, name) for name in _FIELDS},
        qformer=model.qformer,
        projector=model.projector,
        lora={},
        generation_config=model.generation_config,
        processor=model._processor,
    )


def _check_shared(ours: LorgnetteConfig, theirs: LorgnetteConfig) -> None:
    """Raise a ValueError for a field in which two models differ, with both values."""
    for path in _SHARED:
        this, other = ours, theirs
        for name in path.split("."):
            this, other = getattr(this, name, None), getattr(other, name, None)
        if this != other:
            raise ValueError(
                f"The adapter set's {path} is {other!r}, this model's {this!r}: they do not belong together"
            )


def _check_backbones(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """Raise a ValueError for a backbone whose weights differ, with their number."""
    for part, name in (("vision_model", "ViT"), ("language_model", "language model")):
        if getattr(getattr(ours, part), "is_quantized", False):
            this, other = ((c.text_backbone, c.text_backbone_revision) for c in (ours.config, theirs.config))
            merged = "merged" in (ours.config.saved_form, theirs.config.saved_form)
            if merged or None in this or this != other:
                raise ValueError(
                    "The language model is quantised, so that only its name can tell whether the adapter set belongs "
                    f"to it: the set's is {other[0]} at {other[1]}, this one is {this[0]} at {this[1]}"
                    + (", and LoRA is merged into one of them" if merged else "")
                )
            continue
        own, other = _base_weights(ours, part), _base_weights(theirs, part)
        differing = sorted(own.keys() ^ other.keys())
        for weight in logging.tqdm(sorted(own.keys() & other.keys()), desc=f"comparing the {name}"):
            if not torch.equal(own[weight], other[weight].to(own[weight])):
                differing.append(weight)
        if differing:
            why = ""
            if part == "language_model" and theirs.config.saved_form == "merged":
                why = ". That model was saved merged, its LoRA merged into the language model: save it thin or full"
            raise ValueError(
                f"The adapter set was trained with another {name}: {len(differing)} of {len(own)} tensors differ "
                f"({differing[0]}, …){why}"
            )


def _base_weights(model: PreTrainedModel, part: str) -> dict[str, torch.Tensor]:
    """A backbone's used weights without LoRA, by their names without peft."""
    return {
        without_lora(name): tensor
        for name, tensor in model.get_submodule(part).state_dict().items()
        if ".lora_" not in name and not is_unread(f"{part}.{name}")
    }


__all__ = ["AdapterSet", "load_bridge", "set_bridge"]
