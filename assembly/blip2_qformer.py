"""The Q-Former of a BLIP-2 checkpoint, with its queries and its cross-attention, to go under another language model.

Of the files only the Q-Former's weights are read. In InstructBLIP's the LayerNorm of queries and text lies elsewhere.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..configuration.configuration_lorgnette import LorgnetteQFormerConfig
from ..modeling.modeling_loading import weight_files
from ..modeling.modeling_qformer import LorgnetteQFormerModel
from .backbones import Backbone, from_source
from .sources import from_pretrained_arguments, model_type_of


MODEL_TYPES = ("blip-2", "instructblip")
_PARTS = ("qformer", "query_tokens", "embeddings")


def is_blip2(source: str | Path | PreTrainedModel, revision: str | None = None) -> bool:
    """Whether a Hub id, a folder or a loaded model is a BLIP-2 or an InstructBLIP."""
    if isinstance(source, PreTrainedModel):
        return source.config.model_type in MODEL_TYPES
    return model_type_of(source, revision) in MODEL_TYPES


def load_blip2_qformer(source: str | Path | PreTrainedModel, revision: str | None) -> Backbone:
    """The Q-Former as a model of its own, with the text half that the checkpoint has.

    Raises:
        ValueError: the checkpoint lacks weights of it.
        OSError: there is no such checkpoint, or no safetensors in it.
    """
    if isinstance(source, PreTrainedModel):
        config, weights = source.config, {key: value for key, value in source.state_dict().items() if _is_read(key)}
    else:
        name, keywords = from_pretrained_arguments(source, revision)
        config, weights = AutoConfig.from_pretrained(name, **keywords), {}
        for file in weight_files(name, **keywords):
            with safe_open(file, "pt") as opened:
                weights |= {key: opened.get_tensor(key) for key in opened.keys() if _is_read(key)}  # noqa: SIM118 (no mapping)
    weights = {_own_name(key): value for key, value in weights.items()}
    model = LorgnetteQFormerModel(LorgnetteQFormerConfig(**_fields(config, weights)))
    weights["query_tokens.weight"] = weights.get("query_tokens", torch.zeros(0)).squeeze(0)
    own = model.state_dict()
    lacking = sorted(key for key, value in own.items() if key not in weights or weights[key].shape != value.shape)
    if lacking:
        raise ValueError(f"{source} lacks {len(lacking)} weights of a Q-Former of its config ({lacking[0]}, …)")
    model.load_state_dict({key: weights[key] for key in own})
    return Backbone(model) if isinstance(source, PreTrainedModel) else from_source(model, name, revision)


def _is_read(key: str) -> bool:
    return key.split(".", 1)[0] in _PARTS


def _own_name(key: str) -> str:
    """The name that a weight has in [`LorgnetteQFormerModel`]."""
    return key.removeprefix("qformer.").replace("embeddings.layernorm.", "layernorm.")


def _fields(config: PreTrainedConfig, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Fields of [`LorgnetteQFormerConfig`]."""
    theirs = config.qformer_config
    fields = {name: getattr(theirs, name) for name in LorgnetteQFormerConfig.__annotations__ if hasattr(theirs, name)}
    has_text = "embeddings.word_embeddings.weight" in weights
    return fields | {"num_query_tokens": config.num_query_tokens, "use_qformer_text_input": has_text}


__all__ = ["is_blip2", "load_blip2_qformer"]
