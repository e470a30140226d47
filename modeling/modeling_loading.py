"""How a saved model is loaded part by part: thin models, quantised language models, and parts on given devices.

transformers fills what a checkpoint lacks with random numbers. So the backbones are loaded first, each by its own
`from_pretrained`, then joined, and the model's own weights are loaded over that.
"""

import copy
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from ..configuration.configuration_lorgnette import from_package
from .modeling_saving import BACKBONES, FINGERPRINT, is_backbone_key, without_lora


logger = logging.get_logger(__name__)

_FOLDER = ("revision", "subfolder")  # keywords that say where in a repository the model's own files are
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "token")  # and how any repository is reached
WHERE = (*_FOLDER, *_HUB)
_PLACING = ("device_map", "max_memory", "offload_folder", "offload_buffers")
# keywords without a meaning here: there is one kind of file, and no adapter of the whole model
_IGNORED = ("_from_auto", "_from_pipeline", "adapter_kwargs", "low_cpu_mem_usage", "offload_state_dict",
            "trust_remote_code", "use_safetensors", "weights_only")  # fmt: skip


def is_in_parts(name: str | Path | None, **kwargs: Any) -> bool:
    """Whether [`load_in_parts`] has to load this: a thin model, or keywords that are for a part."""
    for_part = kwargs.get("quantization_config") is not None or kwargs.get("device_map") is not None
    return name is not None and (for_part or is_thin(name, **kwargs))


def is_thin(name: str | Path, config: PreTrainedConfig | None = None, **kwargs: Any) -> bool:
    """Whether a folder or a Hub repository holds a model without its backbones."""
    try:
        fields = PreTrainedConfig.get_config_dict(name, **{key: kwargs[key] for key in WHERE if key in kwargs})[0]
    except OSError:
        if config is None:
            raise
        return False  # weights alone
    return fields.get("saved_form") == "thin"


def load_in_parts(
    cls: type[PreTrainedModel], name: str | Path, *args: Any, devices: dict[str, Any] | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model of class `cls` from its folder or Hub repository, with the backbones that it names if it is thin.

    Args:
        devices: of each backbone as a whole, where a `device_map` has named parts.
        kwargs: as `PreTrainedModel.from_pretrained` takes them. `quantization_config` and `device_map` are for the
            language model; LoRA lies over it, and the rest lies where it begins.

    Returns:
        the model in eval mode, and the loading info: `missing_keys` are weights that no file held.

    Raises an OSError for a backbone that cannot be loaded, with its commit and what to do; a ValueError for one without
    all its weights; an ImportError where `device_map` names or offloads parts, and the package is not installed.
    """
    arguments = dict(kwargs)
    hub = {key: kwargs.pop(key) for key in _HUB if key in kwargs}
    folder = {key: kwargs.pop(key) for key in _FOLDER if key in kwargs}
    where = hub | {key: value for key, value in folder.items() if value}
    placing = {key: kwargs.pop(key) for key in _PLACING if key in kwargs}
    names_parts = isinstance(placing.get("device_map"), dict) and set(cls.backbones) & set(placing["device_map"])
    if names_parts and devices is None:
        offloading = from_package("assembly.offloading", "A device_map that names parts")
        return offloading.load_on_devices(cls, name, *args, **arguments)
    quantization, generation = kwargs.pop("quantization_config", None), kwargs.pop("generation_config", None)
    wished_dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
    variant = kwargs.pop("variant", None)
    kwargs = {key: value for key, value in kwargs.items() if key not in _IGNORED}
    if quantization is not None and "language_model" not in cls.backbones:
        raise ValueError(f"quantization_config is for a language model, and {cls.__name__} has none")

    config, kwargs = _resolve_config(cls, name, where, kwargs)
    dtype = parse_dtype(config.dtype or torch.float32 if wished_dtype in (None, "auto") else wished_dtype)
    weights = {key: tensor for file in weight_files(name, variant, **where) for key, tensor in load_file(file).items()}
    parts: dict[str, PreTrainedModel] = {}
    for part in cls.backbones:
        prefix = BACKBONES[part][1]
        keywords: dict[str, Any] = {"dtype": dtype, "config": getattr(config, f"{prefix}_config")}
        keywords |= placing if devices is None else placing | {"device_map": {"": devices[part]}}
        if quantization is not None and not parts:
            keywords["quantization_config"] = quantization
        if config.saved_form == "thin":
            parts[part] = _load_backbone(part, config, name, hub, keywords)
        else:
            parts[part] = _READERS[part](None, state_dict=_take_backbone(part, weights), **keywords)
        used = set(map(str, (getattr(parts[part], "hf_device_map", None) or {}).values()))
        if "disk" in used or ("cpu" in used and len(used) > 1):  # LoRA would not be offloaded with it
            offloading = from_package("assembly.offloading", "A model of which a part is offloaded")
            return offloading.load_on_devices(cls, name, *args, is_offloaded=True, **arguments)
        setattr(config, f"{prefix}_config", parts[part].config)
        if placing or quantization is not None:  # what comes next lies where the first begins
            placing = {"device_map": {"": next(iter(parts.values())).device}}

    with no_init_weights():
        model = cls(config, *args, **parts, **kwargs)
    missing, unexpected = _load_own_weights(model, name, weights, dtype)
    if model.can_generate():
        model.generation_config = generation or GenerationConfig.from_pretrained(name, **where)
    info = {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": set(), "error_msgs": []}
    return model.eval(), info


def _resolve_config(
    cls: type[PreTrainedModel], name: str | Path, where: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """A config of this model's own, and those keywords that are no fields of it."""
    given = kwargs.pop("config", None)
    if isinstance(given, PreTrainedConfig):
        config = copy.deepcopy(given)
        if "attn_implementation" in kwargs:
            config._attn_implementation = kwargs.pop("attn_implementation")
    else:
        config, kwargs = cls.config_class.from_pretrained(given or name, return_unused_kwargs=True, **where, **kwargs)
    own = PreTrainedConfig.get_config_dict(name, **where)[0]
    names = [f"{BACKBONES[part][1]}_backbone" for part in cls.backbones]
    for field in ("saved_form", *names, *(f"{name}_revision" for name in names)):  # the folder says what it holds
        setattr(config, field, own.get(field))
    config.name_or_path = str(name)
    return config, kwargs


def _load_backbone(
    part: str, config: PreTrainedConfig, name: str | Path, hub: dict[str, Any], keywords: dict[str, Any]
) -> PreTrainedModel:
    """A backbone from the repository and commit that a thin model names."""
    what, prefix = BACKBONES[part]
    source, revision = getattr(config, f"{prefix}_backbone"), getattr(config, f"{prefix}_backbone_revision")
    try:
        return _READERS[part](source, use_safetensors=True, revision=revision, **hub, **keywords)
    except OSError as error:
        raise OSError(missing_backbone(name, what, source, revision, error)) from error


def missing_backbone(name: str | Path, what: str, source: str, revision: str, error: Exception) -> str:
    """The message for a thin model whose backbone cannot be loaded."""
    place = f"{source} at commit {revision}"
    how = f"Fetch it with `hf download {source} --revision {revision}` (for a gated repository after `hf auth login`)"
    if revision.startswith(FINGERPRINT):
        place, how = f"in the folder {source}", "Put that folder back, or run `lorgnette export` where it is"
    return (
        f"{name} was saved thin, without its {what}, which is {place} and cannot be loaded. {how}, or have the model "
        f"saved with save_pretrained(…, save_format='full') by someone who has it. {error}"
    )


def _take_backbone(part: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take a backbone's weights out of the whole model's, with the names that they have in the backbone alone."""
    taken = [key for key in weights if key.startswith(f"{part}.") and ".lora_" not in key]
    return {without_lora(key).removeprefix(f"{part}."): weights.pop(key) for key in taken}


def _load_own_weights(
    model: PreTrainedModel, name: str | Path, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[set[str], set[str]]:
    """Load what is not the backbones'; returns what the files lack, and what the model does not use."""
    devices = {key: value.device for key, value in model.state_dict().items()}  # peft has put LoRA beside its layer
    result = model.load_state_dict(weights, strict=False, assign=True)
    lacking = {key for key in result.missing_keys if not is_backbone_key(model, key)}
    unknown = [key for key in result.unexpected_keys if ".lora_" in key]
    if unknown and any(".lora_" in key for key in lacking):
        older = f"{len(unknown)} weights of LoRA have names of an older format ({unknown[0]}, …)"
        raise ValueError(f"{name}: {older}. Load it without device_map and quantization_config and save it again")
    if lacking:
        logger.warning(f"{name} lacks {len(lacking)} weights, which are as a new model's: {sorted(lacking)}")
        for key, tensor in model.named_parameters():
            tensor._is_hf_initialized = key not in lacking
        model.initialize_weights()
    device = next(model.get_submodule(model.backbones[0]).parameters()).device
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not is_backbone_key(model, key):
            beside = devices[key] if ".lora_" in key else device
            tensor.data = tensor.data.to(beside, dtype if tensor.is_floating_point() else tensor.dtype)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unexpected = {key for key in result.unexpected_keys if not any(re.search(rule, key) for rule in ignored)}
    if unexpected:
        logger.warning(f"{name} has {len(unexpected)} weights that its model does not use: {sorted(unexpected)}")
    return lacking, unexpected


def weight_files(name: str | Path, variant: str | None = None, **where: Any) -> list[str]:
    """The safetensors of a folder or a Hub repository, as paths on this machine's disk; an OSError without any."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if variant is not None:
        names = tuple(f"{stem}.{variant}.{ending}" for stem, _, ending in (file.rpartition(".") for file in names))
    have = partial(cached_file, name, _raise_exceptions_for_missing_entries=False, **where)
    if (file := have(names[0])) is not None:
        return [file]
    if (index := have(names[1])) is None:
        raise OSError(f"{name} holds neither {names[0]} nor {names[1]}")
    return get_checkpoint_shard_files(name, index, **where)[0]


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    """`"bfloat16"` to torch's, a ValueError where it has none; `"auto"`, each checkpoint's own, and None stay."""
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    parsed = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(parsed, torch.dtype):
        raise ValueError(f'dtype is {dtype!r}: give one of torch\'s ("float32", "bfloat16", "float16"), or "auto"')
    return parsed


def vision_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the ViT of this config; a ValueError where transformers has none that stands alone."""
    if config.model_type == "blip_2_vision_model":  # AutoModel's list has BLIP-2's Q-Former, and not its ViT
        from transformers import Blip2VisionModel

        return Blip2VisionModel
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f'transformers has no model of the kind "{config.model_type}" that stands alone: no ViT')
    return MODEL_MAPPING[type(config)]


def read_vision_model(name: str | Path | None, config: PreTrainedConfig, **keywords: Any) -> PreTrainedModel:
    """The ViT of this config out of a folder, or a `state_dict`, which may hold more; a ValueError if weights lack."""
    if config.model_type == "blip_2_vision_model":  # which does not know the prefix that it has inside BLIP-2
        keywords = {"key_mapping": {r"^vision_model\.": ""}} | keywords
    read = partial(vision_model_class(config).from_pretrained, name, config=config, output_loading_info=True)
    model, info = read(**keywords)
    lacking = [key for key in info["missing_keys"] if not is_unread(f"vision_model.{key}")]
    inside = _prefix_of(lacking, info["unexpected_keys"])
    if inside is not None:  # the folder holds a larger model, whose names the ViT's class does not know
        model, info = read(**{"key_mapping": {rf"^{re.escape(inside)}": ""}} | keywords)
    refuse_missing(name, f"a {type(model).__name__}", [f"vision_model.{key}" for key in info["missing_keys"]])
    return model


def _prefix_of(missing: Iterable[str], others: Iterable[str]) -> str | None:
    """What stands before all `missing` names in `others`; None where nothing is missing, or is there."""
    missing, others = sorted(missing), set(others)
    found = [key.removesuffix(missing[0]) for key in others if missing and key.endswith(f".{missing[0]}")]
    return next((prefix for prefix in sorted(found) if all(f"{prefix}{key}" in others for key in missing)), None)


def read_language_model(name: str | Path | None, **keywords: Any) -> PreTrainedModel:
    """The causal LM out of a folder or a Hub repository, as [`read_vision_model`]."""
    # the Auto class looks for files, and a `state_dict` has none
    model_class = AutoModelForCausalLM if name is not None else MODEL_FOR_CAUSAL_LM_MAPPING[type(keywords["config"])]
    if name is not None:  # it looks for an adapter as well, on the Hub unless the keywords are repeated
        keywords["trust_remote_code"] = False
        repeated = ("cache_dir", "local_files_only")
        keywords["adapter_kwargs"] = {key: keywords[key] for key in repeated if key in keywords}
    model, info = model_class.from_pretrained(name, output_loading_info=True, **keywords)
    refuse_missing(name, f"a {type(model).__name__}", [f"language_model.{key}" for key in info["missing_keys"]])
    return model


def refuse_missing(name: Any, what: str, missing: Iterable[str]) -> None:
    """Raise a ValueError where a checkpoint lacks weights of a backbone: transformers would make them random."""
    lacking = sorted(key for key in missing if not is_unread(key))
    if lacking:
        raise ValueError(f"{name or 'The checkpoint'} lacks {len(lacking)} weights of {what} ({lacking[0]}, …)")


def is_unread(key: str) -> bool:
    """Whether nothing here reads a weight of the whole model, as it pools the ViT's features, or masks patches."""
    return re.match(r"(vision_model\.)+((pooler|head)\.|(\w+\.)*mask_token$)", key) is not None


_READERS = {"language_model": read_language_model, "vision_model": read_vision_model}
