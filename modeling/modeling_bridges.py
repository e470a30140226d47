"""Bridges: several sets of Q-Former, projector and LoRA over one ViT and one language model, one of them in use.

The others are kept beside the model, not in it: what trains, is saved or counts as a parameter is the one in use.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ..assembly.sources import from_pretrained_arguments
from ..configuration.configuration_lorgnette import LorgnetteConfig
from .modeling_backbones import is_unread
from .modeling_lm_adapter import DetachedLora, lora_weights
from .modeling_lora import without_lora


# What the config says of a bridge; everything else in it is of the backbones, or has to be the same for all.
_FIELDS = (
    "qformer_config",
    "lora_config",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "qformer_backbone",
    "qformer_backbone_revision",
)
# What all bridges of a model have to share: the backbones' shapes, and what the processor makes for them.
_SHARED = (
    *(f"vision_config.{name}" for name in ("model_type", "hidden_size", "num_hidden_layers")),
    *(f"text_config.{name}" for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")),
    "image_token_id",
    "num_query_tokens",
    "qformer_config.use_qformer_text_input",
)


@dataclass
class Bridge:
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


class Bridges:
    """Mixin: `load_bridge`, `set_bridge`. The bridge that a model came with is called `"default"`.

    Saving saves the bridge in use, as a model like any other; after a reload it is `"default"`.
    """

    active_bridge: str = "default"
    _idle_bridges: Mapping[str, Bridge] = MappingProxyType({})

    @property
    def bridges(self) -> list[str]:
        """The names of all bridges, the one in use (`active_bridge`) among them."""
        return sorted([self.active_bridge, *self._idle_bridges])

    def load_bridge(self, source: str | Path, name: str, *, revision: str | None = None) -> None:
        """Take the bridge of another saved model with the same ViT and LM; [`set_bridge`] puts it to use.

        The whole of that model is read once, to see that its ViT and LM are these, bit for bit.

        Args:
            source: folder or Hub id of a saved [`LorgnetteForConditionalGeneration`].
            name: what the bridge is to be called here.
            revision: branch, tag or commit on the Hub.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the name is taken; the other model's ViT or LM is not this one; its processor makes another
                placeholder, or another number of them, or texts for the Q-Former where this one's does not.
        """
        if name in self.bridges:
            raise ValueError(f"There is a bridge {name!r} already; there are {self.bridges}")
        place, keywords = from_pretrained_arguments(source, revision)
        _check_shared(self.config, self.config_class.from_pretrained(place, **keywords))
        other = type(self).from_pretrained(place, dtype=self.projector.weight.dtype, **keywords)
        _check_backbones(self, other)
        bridge = other._bridge_in_use()
        if other.config.lora_config is not None:
            bridge.lora = lora_weights(other.language_model)
        self._idle_bridges = {**self._idle_bridges, name: bridge}

    def set_bridge(self, name: str) -> None:
        """Put a bridge to use. LoRA stays off where it is off; an optimizer made before knows the other's weights.

        Raises:
            ValueError: there is no bridge of that name.
        """
        if name not in self.bridges:
            raise ValueError(f"There is no bridge {name!r}; there are {self.bridges}")
        if name == self.active_bridge:
            return
        bridge, leaving = self._idle_bridges[name], self._bridge_in_use()
        bridge.qformer.set_attn_implementation(self.qformer.config._attn_implementation)
        self.qformer = bridge.qformer.to(self.projector.weight)  # its dtype and device
        self.projector = bridge.projector.to(self.projector.weight)
        for field, value in bridge.fields.items():
            setattr(self.config, field, value)
        leaving.lora = self._replace_lora(self.config.lora_config, bridge.lora)
        self.generation_config, self._processor = bridge.generation_config, bridge.processor
        others = {other: idle for other, idle in self._idle_bridges.items() if other != name}
        self._idle_bridges, self.active_bridge = {**others, self.active_bridge: leaving}, name

    def _bridge_in_use(self) -> Bridge:
        """All of it but LoRA, which is on the language model."""
        return Bridge(
            fields={name: getattr(self.config, name) for name in _FIELDS},
            qformer=self.qformer,
            projector=self.projector,
            lora={},
            generation_config=self.generation_config,
            processor=self._processor,
        )


def _check_shared(ours: LorgnetteConfig, theirs: LorgnetteConfig) -> None:
    """Raises a ValueError that names the field in which two models differ, and both values."""
    for path in _SHARED:
        here, there = ours, theirs
        for name in path.split("."):
            here, there = getattr(here, name, None), getattr(there, name, None)
        if here != there:
            raise ValueError(f"The bridge's {path} is {there!r}, this model's {here!r}: they do not belong together")


def _check_backbones(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """Raises a ValueError that names the backbone whose weights differ, and how many of them."""
    for part, name in (("vision_model", "ViT"), ("language_model", "language model")):
        if getattr(getattr(ours, part), "is_quantized", False):
            here, there = ((c.text_backbone, c.text_backbone_revision) for c in (ours.config, theirs.config))
            merged = "merged" in (ours.config.saved_form, theirs.config.saved_form)
            if merged or None in here or here != there:
                raise ValueError(
                    f"The language model is quantised, so that only its name can tell whether the bridge belongs to "
                    f"it: the bridge's is {there[0]} at {there[1]}, this one is {here[0]} at {here[1]}"
                    + (", and LoRA is folded into one of them" if merged else "")
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
                why = ". That model was saved merged, its LoRA folded into the language model: save it thin or full"
            raise ValueError(
                f"The bridge was trained with another {name}: {len(differing)} of {len(own)} tensors differ "
                f"({differing[0]}, …){why}"
            )


def _base_weights(model: PreTrainedModel, part: str) -> dict[str, torch.Tensor]:
    """The weights of a backbone that anything reads, without LoRA, by the names that they have without it."""
    return {
        without_lora(name): tensor
        for name, tensor in model.get_submodule(part).state_dict().items()
        if ".lora_" not in name and not is_unread(f"{part}.{name}")
    }


__all__ = ["Bridge", "Bridges"]
