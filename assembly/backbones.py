"""The pretrained parts: each a Hub id, a local folder, a GGUF file or a loaded model."""

import copy
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import extract_commit_hash

from ..modeling.modeling_loading import is_unread, read_language_model, read_vision_model, vision_model_class
from ..modeling.modeling_saving import is_backbone_key
from ..processing.prompt_encoding import IMAGE_TOKEN
from .backbone_checks import check_language_model, check_vision_model, refuse_own_code
from .processor_checks import check_token_ids
from .processors import with_image_token
from .sources import from_pretrained_arguments, load_tokenizer
from .structure import refuse_other_structure


logger = logging.get_logger(__name__)


@dataclass
class Backbone:
    """A pretrained part with its Hub id and revision, which are None for local sources, or its local folder."""

    model: PreTrainedModel
    name: str | None = None
    revision: str | None = None
    folder: str | None = None


def load_vision_model(
    source: str | Path | PreTrainedModel,
    revision: str | None,
    dtype: torch.dtype | str | None,
    attn: str | None,
    layer: int | None = None,
) -> Backbone:
    """A ViT: a vision model, or the vision tower of a CLIP, SigLIP or the like.

    Args:
        layer: the `vision_feature_layer`.

    Raises:
        ValueError: the model does not read pixels into a sequence of vectors, always the same ones of one picture, its
            weights are not all there, or it has code of its own.
    """
    if isinstance(source, PreTrainedModel):
        backbone = Backbone(_vision_model_in(source))
    else:
        name, keywords = from_pretrained_arguments(source, revision)
        refuse_own_code("ViT", name, "AutoModel", MODEL_MAPPING_NAMES, **keywords)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **keywords)
        keywords |= {"dtype": dtype or torch.float32, "attn_implementation": attn}
        model = read_vision_model(name, getattr(config, "vision_config", config), **keywords)
        backbone = from_source(model, name, revision)
    for field in ("hidden_size", "num_hidden_layers", "patch_size"):
        if not hasattr(backbone.model.config, field):
            raise ValueError(f"{type(backbone.model).__name__} is no ViT: its config has no {field}")
    check_vision_model(backbone.model, layer)
    return backbone


def _vision_model_in(model: PreTrainedModel) -> PreTrainedModel:
    """The ViT that is, or is inside, a loaded model, of the class that a reload builds from its config."""
    config = getattr(model.config, "vision_config", model.config)
    if not type(config).__module__.startswith("transformers."):
        refuse_own_code("ViT", model, "AutoModel", MODEL_MAPPING_NAMES)
    wanted = vision_model_class(config)
    found = next((part for part in model.modules() if type(part) is wanted), None)
    if found is None:
        refuse_own_code("ViT", model, "AutoModel", MODEL_MAPPING_NAMES)
        raise ValueError(
            f"{type(model).__name__} has no {wanted.__name__} in it, which a saved model is loaded with: give "
            f"one, from {wanted.__name__}.from_pretrained(…)"
        )
    refuse_other_structure("ViT", found, lambda name: is_unread(f"vision_model.{name}"))
    return found


def load_language_model(
    source: str | Path | PreTrainedModel,
    revision: str | None,
    dtype: torch.dtype | str | None,
    attn: str | None,
    quantization_config: Any = None,
) -> Backbone:
    """A causal LM; transformers dequantises a `.gguf` file into a plain model.

    Raises:
        ValueError: it is no causal LM, it carries an adapter already, its weights are not all there, or it cannot be
            quantised while it is loaded.
    """
    named = isinstance(source, (str, Path))
    if quantization_config is not None and (not named or str(source).endswith(".gguf")):
        what = f"{source} is a GGUF file" if named else f"this {type(source).__name__} is loaded already"
        raise ValueError(f"quantization_config takes effect while a Hub id or a folder is loaded, and {what}")
    if not named:
        model = source
        if isinstance(model, PreTrainedModel):
            refuse_own_code("language model", model, "AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        backbone = Backbone(model)
    elif str(source).endswith(".gguf"):
        folder, keywords = from_pretrained_arguments(source)
        loaded = read_language_model(folder, dtype=dtype or torch.float32, **keywords)
        # save_pretrained refuses a model whose config still tells of the quantisation it was read from
        config = copy.deepcopy(loaded.config)
        del config.quantization_config
        config.name_or_path = ""
        model = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype, attn_implementation=attn)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        backbone = Backbone(model)
    else:
        name, keywords = from_pretrained_arguments(source, revision)
        refuse_own_code("language model", name, "AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **keywords)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **keywords)
        _refuse_encoder(config, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, name))
        if quantization_config is not None:
            keywords["quantization_config"] = quantization_config
        model = read_language_model(name, dtype=dtype or torch.float32, attn_implementation=attn, **keywords)
        backbone = from_source(model, name, revision)
    if not isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        raise ValueError(
            f"The language model is a {type(model).__name__} with an adapter, or no transformers model: give the bare "
            "LM (peft's merge_and_unload() makes one) and describe the LoRA in `lora`"
        )
    _refuse_encoder(model.config, type(model).__name__)
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} is no causal language model: it has no head over words")
    if not named:
        refuse_other_structure("language model", model, is_unread)
    check_language_model(model)
    return backbone


def _refuse_encoder(config: PreTrainedConfig, name: str) -> None:
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise ValueError(f"{name} is no causal language model (an encoder)")


def load_bert(source: str | Path | PreTrainedModel, revision: str | None) -> Backbone:
    """The BERT whose weights initialise a Q-Former.

    Raises:
        ValueError: it is a lorgnette model, or has code of its own.
    """
    if isinstance(source, PreTrainedModel):
        refuse_own_code("BERT", source, "AutoModel", MODEL_MAPPING_NAMES)
        return Backbone(source)
    name, keywords = from_pretrained_arguments(source, revision)
    refuse_own_code("BERT", name, "AutoModel", MODEL_MAPPING_NAMES, **keywords)
    model_type = PreTrainedConfig.get_config_dict(name, **keywords)[0].get("model_type", "")
    if model_type.startswith("lorgnette"):
        raise ValueError(f"{name} is a {model_type} model: the Q-Former starts from a BERT, or in stage 2 from stage 1")
    model = AutoModel.from_pretrained(name, dtype=torch.float32, trust_remote_code=False, **keywords)
    return from_source(model, name, revision)


def pooling_of(source: str | Path | PreTrainedModel | None, revision: str | None) -> str:
    """How a text encoder pools its tokens, by sentence-transformers' `1_Pooling/config.json`; "cls" without it.

    Raises:
        ValueError: in a way that stage 1 does not have.
    """
    if source is None or isinstance(source, PreTrainedModel):
        return "cls"
    found = cached_file(source, "1_Pooling/config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return "cls"
    fields = json.loads(Path(found).read_text(encoding="utf-8"))
    modes = fields.get("pooling_mode")
    if modes is None:  # older files have a flag for each
        flags = [name.removeprefix("pooling_mode_") for name, used in fields.items() if used is True]
        modes = [
            name.removesuffix("_tokens").removesuffix("_token") for name in flags if f"pooling_mode_{name}" in fields
        ]
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in ("cls", "mean"):
        raise ValueError(
            f"{source} pools its tokens by {', '.join(modes) or 'nothing'}, and stage 1 has cls and mean: give "
            'text_pooling="cls" or "mean"'
        )
    logger.info(f"Texts are pooled by {modes[0]}, as 1_Pooling/config.json of {source} says")
    return modes[0]


def next_free_token_id(source: str | Path | PreTrainedModel, revision: str | None, vocab_size: int) -> int:
    """The id that `<image>` has, or would get, in the tokenizer beside the language model.

    Without a tokenizer in reach (a model made in memory, a folder of weights alone) it is `vocab_size`.

    Raises:
        ValueError: see [`check_token_ids`].
    """
    name = source.name_or_path if isinstance(source, PreTrainedModel) else str(source)
    if not name or not (name.endswith(".gguf") or _has_tokenizer(name, revision)):
        return vocab_size
    tokenizer = with_image_token(load_tokenizer(name, revision))
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    check_token_ids(tokenizer, image_token_id, vocab_size)
    return image_token_id


def _has_tokenizer(name: str, revision: str | None) -> bool:
    return (
        cached_file(name, "tokenizer_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
        is not None
    )


def from_source(model: PreTrainedModel, source: str | Path, revision: str | None) -> Backbone:
    """Record the Hub id and the commit, or the local folder, which no config names.

    A source of pickled weights is not recorded: models do not load from it, so a save holds the backbone.
    """
    have = partial(
        cached_file, source, revision=revision, local_files_only=True, _raise_exceptions_for_missing_entries=False
    )
    has_safetensors = bool(have(SAFE_WEIGHTS_NAME) or have(SAFE_WEIGHTS_INDEX_NAME))
    if Path(source).is_dir() or not has_safetensors:
        model.config.name_or_path = ""
        return Backbone(model, folder=str(Path(source).resolve()) if has_safetensors else None)
    config_file = cached_file(source, "config.json", revision=revision, local_files_only=True)
    return Backbone(model, str(source), extract_commit_hash(config_file, None))


def folders_of(**backbones: Backbone) -> dict[str, str]:
    """The local folder of each backbone that was read from one, by its name in the model."""
    return {name: backbone.folder for name, backbone in backbones.items() if backbone.folder is not None}


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast all parameters of a joined model to one dtype, except those of backbones loaded in it.

    Buffers keep their dtype, as in `from_pretrained`: RoPE's frequencies are float32 in every model.
    """
    loaded_so = [name for name in model.backbones if model.get_submodule(name).dtype == dtype]
    for key, parameter in model.named_parameters():
        # transformers keeps some weights of some models in float32 on purpose
        apart = is_backbone_key(model, key) and key.split(".", 1)[0] in loaded_so
        if parameter.is_floating_point() and not apart:
            parameter.data = parameter.data.to(dtype)


__all__ = [
    "Backbone",
    "cast_parameters",
    "folders_of",
    "from_source",
    "load_bert",
    "load_language_model",
    "load_vision_model",
    "next_free_token_id",
]
