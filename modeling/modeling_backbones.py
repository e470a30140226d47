"""Where the pretrained parts come from: a Hub id, a local folder, a GGUF file or a model that is loaded already."""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from ..assembly.processors import with_image_token
from ..assembly.sources import from_pretrained_arguments, load_tokenizer
from ..configuration.configuration_lorgnette import LorgnetteQFormerConfig
from ..processing.prompt_encoding import IMAGE_TOKEN
from .modeling_backbone_checks import check_language_model, check_vision_model, refuse_own_code


_FINDING = ("cache_dir", "local_files_only")  # of `from_pretrained`, what says where files may be


@dataclass
class Backbone:
    """A pretrained part, and where on the Hub it came from; `name` and `revision` are None for anything local."""

    model: PreTrainedModel
    name: str | None = None
    revision: str | None = None


def load_vision_model(
    source: str | Path | PreTrainedModel, revision: str | None, dtype: torch.dtype | str | None, attn: str | None
) -> Backbone:
    """A ViT: a vision model, or the vision tower of a CLIP, SigLIP or the like.

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
        backbone = from_source(model, source, revision)
    for field in ("hidden_size", "num_hidden_layers", "patch_size"):
        if not hasattr(backbone.model.config, field):
            raise ValueError(f"{type(backbone.model).__name__} is no ViT: its config has no {field}")
    check_vision_model(backbone.model)
    return backbone


def _vision_model_in(model: PreTrainedModel) -> PreTrainedModel:
    """The ViT that is, or is in, a loaded model: of the class that is made of its config where a save is loaded."""
    config = getattr(model.config, "vision_config", model.config)
    if not type(config).__module__.startswith("transformers."):
        refuse_own_code("ViT", model, "AutoModel", MODEL_MAPPING_NAMES)
    wanted = _vision_model_class(config)
    found = next((part for part in model.modules() if type(part) is wanted), None)
    if found is None:
        refuse_own_code("ViT", model, "AutoModel", MODEL_MAPPING_NAMES)
        raise ValueError(
            f"{type(model).__name__} has no {wanted.__name__} in it, which a saved model is loaded with: give "
            f"one, from {wanted.__name__}.from_pretrained(…)"
        )
    return found


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    """`"bfloat16"` to torch's; `"auto"`, each checkpoint's own, and None stay.

    Raises:
        ValueError: torch has no such dtype.
    """
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    parsed = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(parsed, torch.dtype):
        raise ValueError(f'dtype is {dtype!r}: give one of torch\'s ("float32", "bfloat16", "float16"), or "auto"')
    return parsed


def read_vision_model(name: str | Path | None, config: PreTrainedConfig, **keywords: Any) -> PreTrainedModel:
    """The ViT of this config out of a folder or a Hub repository, which may hold more than the ViT.

    Args:
        name: None where `state_dict` is among the keywords.
        keywords: of `from_pretrained`.

    Raises:
        ValueError: its weights are not all there.
    """
    if config.model_type == "blip_2_vision_model":  # which does not know the prefix that it has inside BLIP-2
        keywords = {"key_mapping": {r"^vision_model\.": ""}} | keywords
    model, info = _vision_model_class(config).from_pretrained(name, config=config, output_loading_info=True, **keywords)
    refuse_missing(name, f"a {type(model).__name__}", [f"vision_model.{key}" for key in info["missing_keys"]])
    return model


def read_language_model(name: str | Path | None, **keywords: Any) -> PreTrainedModel:
    """The causal LM out of a folder or a Hub repository, as [`read_vision_model`]; also raises for an encoder."""
    # the Auto class looks for files, and a `state_dict` has none
    model_class = AutoModelForCausalLM if name is not None else MODEL_FOR_CAUSAL_LM_MAPPING[type(keywords["config"])]
    if name is not None:  # it looks for an adapter as well, on the Hub unless told not to once more
        keywords["trust_remote_code"] = False
        keywords["adapter_kwargs"] = {key: keywords[key] for key in _FINDING if key in keywords}
    model, info = model_class.from_pretrained(name, output_loading_info=True, **keywords)
    _check_causal(model)
    refuse_missing(name, f"a {type(model).__name__}", [f"language_model.{key}" for key in info["missing_keys"]])
    return model


def _check_causal(model: PreTrainedModel) -> None:
    is_encoder = model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        model.config, "is_decoder", False
    )
    if is_encoder or not model.can_generate() or model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} is no causal language model (an encoder, or no head over words)")


def refuse_missing(name: Any, what: str, missing: Iterable[str]) -> None:
    """Raise a ValueError where a checkpoint lacks weights of a backbone that anything reads.

    transformers fills them with random numbers, and says so in a warning alone.
    """
    lacking = sorted(key for key in missing if not is_unread(key))
    if lacking:
        raise ValueError(f"{name or 'The checkpoint'} lacks {len(lacking)} weights of {what} ({lacking[0]}, …)")


def is_unread(key: str) -> bool:
    """Whether a weight of this name in the whole model pools what the ViT sees into one vector: nothing reads that.

    Many a checkpoint has no such weights, and then each load draws others.
    """
    return re.match(r"(vision_model\.)+(pooler|head)\.", key) is not None


def new_vision_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A ViT of this config, not yet trained."""
    return _vision_model_class(config)._from_config(config)


def _vision_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    if config.model_type == "blip_2_vision_model":  # AutoModel's list has BLIP-2's Q-Former, and not its ViT
        from transformers import Blip2VisionModel

        return Blip2VisionModel
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f'transformers has no model of the kind "{config.model_type}" that stands alone: no ViT')
    return MODEL_MAPPING[type(config)]


def load_language_model(
    source: str | Path | PreTrainedModel,
    revision: str | None,
    dtype: torch.dtype | str | None,
    attn: str | None,
    quantization_config: Any = None,
) -> Backbone:
    """A causal LM. A `.gguf` file is read by transformers, dequantised, and is a plain model from then on.

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
        if quantization_config is not None:
            keywords["quantization_config"] = quantization_config
        model = read_language_model(name, dtype=dtype or torch.float32, attn_implementation=attn, **keywords)
        backbone = from_source(model, source, revision)
    if not isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        raise ValueError(
            f"The language model is a {type(model).__name__} with an adapter, or no transformers model: give the bare "
            "LM (peft's merge_and_unload() makes one) and describe the LoRA in `lora`"
        )
    _check_causal(model)
    check_language_model(model)
    return backbone


def load_bert(source: str | Path | PreTrainedModel, revision: str | None) -> Backbone:
    """The BERT that a Q-Former starts from.

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
    return from_source(model, source, revision)


def qformer_fields(bert: Backbone | None, given: dict[str, Any] | None) -> dict[str, Any]:
    """Fields of [`LorgnetteQFormerConfig`]: those of the BERT that the Q-Former starts from, and over them the given.

    Raises:
        ValueError: a given field that the config does not know.
    """
    given = given or {}
    unknown = sorted(given.keys() - LorgnetteQFormerConfig().to_dict().keys())
    if unknown:
        raise ValueError(f"qformer_config has fields that LorgnetteQFormerConfig does not know: {unknown}")
    theirs = {} if bert is None else bert.model.config.to_dict()
    return {name: theirs[name] for name in _FROM_BERT if name in theirs} | given


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


def check_token_ids(tokenizer: PreTrainedTokenizerBase, image_token_id: int, num_embeddings: int) -> None:
    """See to it that the language model has an embedding for every token but the placeholder.

    Raises:
        ValueError: it has not; names the first token without one, and what to do.
    """
    ids = {id_: token for token, id_ in tokenizer.get_vocab().items() if id_ != image_token_id}
    past = sorted(id_ for id_ in ids if id_ >= num_embeddings)
    if past:
        raise ValueError(
            f"{len(past)} tokens of the tokenizer are past the language model's table of {num_embeddings} embeddings "
            f"({ids[past[0]]!r} has the id {past[0]}): load the language model, call resize_token_embeddings("
            f"{past[-1] + 1}) on it, and give from_backbones the resized model"
        )


def _has_tokenizer(name: str, revision: str | None) -> bool:
    return (
        cached_file(name, "tokenizer_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
        is not None
    )


def from_source(model: PreTrainedModel, source: str | Path, revision: str | None) -> Backbone:
    """Keep the Hub id and the commit; a local folder is nobody else's business and is not recorded.

    Nor is a repository of pickled weights: whoever loads a model reads none, so that it has to bring them along.
    """
    have = partial(
        cached_file, source, revision=revision, local_files_only=True, _raise_exceptions_for_missing_entries=False
    )
    if Path(source).is_dir() or not (have(SAFE_WEIGHTS_NAME) or have(SAFE_WEIGHTS_INDEX_NAME)):
        model.config.name_or_path = ""
        return Backbone(model)
    config_file = cached_file(source, "config.json", revision=revision, local_files_only=True)
    return Backbone(model, str(source), extract_commit_hash(config_file, None))


_FROM_BERT = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "layer_norm_eps",
    "pad_token_id",
)


__all__ = [
    "Backbone",
    "check_token_ids",
    "from_source",
    "is_unread",
    "load_bert",
    "load_language_model",
    "load_vision_model",
    "new_vision_model",
    "next_free_token_id",
    "parse_dtype",
    "qformer_fields",
    "read_language_model",
    "read_vision_model",
    "refuse_missing",
]
