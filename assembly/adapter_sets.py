"""Adapter sets: several sets of Q-Former, projector and LoRA over one ViT and one language model, one of them in use.

The others are kept beside the model, not in it: what trains, is saved or counts as a parameter is the one in use. The
set that a model came with is called `"default"`. A save holds the set in use, which is `"default"` after a reload.
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
from ..modeling.modeling_saving import refuse_offloaded, without_lora
from .foreign_adapters import DetachedLora, lora_weights, replace_lora
from .sources import from_pretrained_arguments


# The config's fields about an adapter set; the others are of the backbones, or have to be the same for all.
_FIELDS = (
    "qformer_config",
    "lora_config",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "qformer_backbone",
    "qformer_backbone_revision",
)
# What all adapter sets of a model share: the backbones' shapes, and the processor's inputs.
_SHARED = (
    *(f"vision_config.{name}" for name in ("model_type", "hidden_size", "num_hidden_layers")),
    *(f"text_config.{name}" for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")),
    "image_token_id",
    "num_query_tokens",
    "qformer_config.use_qformer_text_input",
)


@dataclass
class AdapterSet:
    """All that makes one model differ from another over the same ViT and LM.

    Args:
        fields: of the config.
        qformer, projector: the modules.
        lora: weights, as [`lora_weights`] gives them, until it has been in use, and from then on peft's layers; none
            without LoRA.
        generation_config: what ends an answer, and how one is searched for.
        processor: what the model saves along with itself; None where it knows of none.
    """

    fields: dict[str, Any]
    qformer: PreTrainedModel
    projector: nn.Linear
    lora: dict[str, torch.Tensor] | DetachedLora
    generation_config: GenerationConfig
    processor: Any


def load_bridge(model: PreTrainedModel, source: str | Path, name: str, *, revision: str | None = None) -> None:
    """Load the adapter set of another saved model with the same ViT and LM; [`set_bridge`] puts it to use.

    The whole of that model is read once, to see that its ViT and LM are these, bit for bit.

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
    """Put an adapter set to use. LoRA stays off where it is off; an optimizer made before knows the other's weights.

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
    """All of it but LoRA, which is on the language model."""
    return AdapterSet(
        fields={name: getattr(model.config, name) for name in _FIELDS},
        qformer=model.qformer,
        projector=model.projector,
        lora={},
        generation_config=model.generation_config,
        processor=model._processor,
    )


def _check_shared(ours: LorgnetteConfig, theirs: LorgnetteConfig) -> None:
    """Raises a ValueError that names the field in which two models differ, and both values."""
    for path in _SHARED:
        here, there = ours, theirs
        for name in path.split("."):
            here, there = getattr(here, name, None), getattr(there, name, None)
        if here != there:
            raise ValueError(
                f"The adapter set's {path} is {there!r}, this model's {here!r}: they do not belong together"
            )


def _check_backbones(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """Raises a ValueError that names the backbone whose weights differ, and how many of them."""
    for part, name in (("vision_model", "ViT"), ("language_model", "language model")):
        if getattr(getattr(ours, part), "is_quantized", False):
            here, there = ((c.text_backbone, c.text_backbone_revision) for c in (ours.config, theirs.config))
            merged = "merged" in (ours.config.saved_form, theirs.config.saved_form)
            if merged or None in here or here != there:
                raise ValueError(
                    "The language model is quantised, so that only its name can tell whether the adapter set belongs "
                    f"to it: the set's is {there[0]} at {there[1]}, this one is {here[0]} at {here[1]}"
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
    """The weights of a backbone that anything reads, without LoRA, by the names that they have without it."""
    return {
        without_lora(name): tensor
        for name, tensor in model.get_submodule(part).state_dict().items()
        if ".lora_" not in name and not is_unread(f"{part}.{name}")
    }


__all__ = ["AdapterSet", "load_bridge", "set_bridge"]
