"""A model is put together part by part: the backbones of a thin one from the Hub, and its own weights over that.

transformers builds a model on the meta device and fills what a checkpoint lacks with random numbers. So the backbones
are loaded first, each by its own `from_pretrained`, and joined as `from_backbones` joins them. A full model is loaded
in the same way where its language model is to be quantised, and nothing else.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration.configuration_lorgnette import SIZES
from .modeling_backbones import new_vision_model, parse_dtype, read_language_model, read_vision_model
from .modeling_forms import BACKBONES, is_backbone_key
from .modeling_lora import without_lora
from .modeling_weight_files import field_of, weight_files


logger = logging.get_logger(__name__)

_READERS = {"language_model": read_language_model, "vision_model": read_vision_model}
_FOLDER = ("revision", "subfolder")  # of a load, what says where in a repository the thin model's own files are
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "token")  # and how any repository is reached
WHERE = (*_FOLDER, *_HUB)
_PLACING = ("max_memory", "offload_folder", "offload_buffers")  # go with device_map
# what means nothing here: there is one kind of file, and no adapter of its own
_MOOT = ("_from_auto", "_from_pipeline", "adapter_kwargs", "low_cpu_mem_usage", "offload_state_dict",
         "trust_remote_code", "use_safetensors", "weights_only")  # fmt: skip


def is_thin(name: str | Path | None, config: PreTrainedConfig | None = None, **kwargs: Any) -> bool:
    """Whether a folder or a Hub repository holds a thin model.

    Args:
        name: the folder or the Hub id; None where weights come from elsewhere.
        config: the config that the caller wishes, which does not say what lies there; without any there, it has to do.
        kwargs: of `from_pretrained`.
    """
    if name is None:
        return False
    where = {key: kwargs[key] for key in WHERE if key in kwargs}
    try:
        return PreTrainedConfig.get_config_dict(name, **where)[0].get("saved_form") == "thin"
    except OSError:
        if config is None:
            raise
        return False  # weights alone: what they lack is found out when they are loaded


def load_in_parts(
    cls: type[PreTrainedModel], name: str | Path, files: list[str], *args: Any, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model of class `cls` from its folder or Hub repository, with the backbones that it names if it is thin.

    Args:
        files: its own weights, see [`~modeling_weight_files.weight_files`].
        kwargs: as `PreTrainedModel.from_pretrained` takes them. `quantization_config` is for the language model alone,
            and LoRA lies over it; so is `device_map`, and all else goes where the language model begins. A `device_map`
            that names parts, `{"language_model": 0, "vision_model": 1}`, places each as a whole. Where it offloads to
            the CPU or the disk, all is loaded first, LoRA included, and accelerate dispatches what is complete.

    Returns:
        the model in eval mode, and the loading info: `missing_keys` are weights that no file held.

    Raises:
        OSError: a backbone cannot be loaded; names it, its commit and what to do. Or `name` cannot.
        ValueError: `quantization_config` for a model that has no language model; a backbone without all its weights; a
            `device_map` that names some parts, but not all, or puts Q-Former and language model apart, or offloads
            without an `offload_folder`, or what cannot be offloaded.
    """
    hub = {key: kwargs.pop(key) for key in _HUB if key in kwargs}
    folder = {key: kwargs.pop(key, None) for key in _FOLDER}
    where = hub | {key: value for key, value in folder.items() if value}
    placing = {key: kwargs.pop(key) for key in ("device_map", *_PLACING) if key in kwargs}
    places = _places_of_parts(cls, placing.get("device_map"))
    quantization, generation = kwargs.pop("quantization_config", None), kwargs.pop("generation_config", None)
    wished_dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
    kwargs = {key: value for key, value in kwargs.items() if key not in _MOOT}
    if quantization is not None and "language_model" not in cls.backbones:
        raise ValueError(f"quantization_config is for a language model, and {cls.__name__} has none")

    config, kwargs = _resolve_config(cls, name, where, kwargs)
    dtype = parse_dtype(config.dtype or torch.float32 if wished_dtype in (None, "auto") else wished_dtype)
    weights = {key: tensor for file in files for key, tensor in load_file(file).items()}
    for part in cls.backbones if config.saved_form == "thin" else ():
        _check_backbone(part, config, name, hub)
    offload = _offloading(cls, config, placing, places, quantization, dtype)
    if offload is not None:
        placing, places = {}, None
    parts: dict[str, PreTrainedModel] = {}
    for part in cls.backbones:
        extra = {"quantization_config": quantization} if quantization is not None and not parts else {}
        if places is not None:
            placing = {"device_map": {"": places[part]}}
        extra |= {"dtype": dtype, "config": getattr(config, f"{BACKBONES[part][1]}_config"), **placing}
        if config.saved_form == "thin":
            with _backbone(part, config, name, hub) as (source, keywords):
                parts[part] = _READERS[part](source, use_safetensors=True, **extra, **keywords)
        else:
            parts[part] = _READERS[part](None, state_dict=_take_backbone(part, weights), **extra)
        setattr(config, f"{BACKBONES[part][1]}_config", parts[part].config)
        if placing or quantization is not None:  # what comes next lies where the first begins, or was put by itself
            placing = {"device_map": {"": next(iter(parts.values())).device}}

    model = cls(config, *args, **parts, **kwargs)
    missing, unexpected = _load_own_weights(model, name, weights, dtype)
    if model.can_generate():
        model.generation_config = generation or GenerationConfig.from_pretrained(name, **where)
    if offload is not None:
        _dispatch(model, offload)
    return model.eval(), {
        "missing_keys": missing,
        "unexpected_keys": unexpected,
        "mismatched_keys": set(),
        "error_msgs": [],
    }


def _places_of_parts(cls: type[PreTrainedModel], device_map: Any) -> dict[str, Any] | None:
    """The device of each backbone, where a device map names parts; None where it is of another kind."""
    if not isinstance(device_map, dict) or not set(cls.backbones) & set(device_map):
        return None
    if missing := sorted(set(cls.backbones) - set(device_map)):
        raise ValueError(f"device_map names {', '.join(sorted(device_map))}, and not {', '.join(missing)}")
    first = cls.backbones[0]
    if "disk" in (device_map[part] for part in cls.backbones if part != first):
        raise ValueError(f"device_map: only the {BACKBONES[first][0]} can be offloaded to the disk")
    for part, device in device_map.items():
        if part not in cls.backbones and device != device_map[first]:
            raise ValueError(f"device_map: {part} lies beside {first}; here on {device} and {device_map[first]}")
    return {part: device_map[part] for part in cls.backbones}


@dataclass
class _Offload:
    """How accelerate is to place a language model of which a part is offloaded."""

    device_map: Any
    max_memory: dict | None
    offload_folder: str | Path | None
    offload_buffers: bool
    vision_device: Any  # None: where the rest is


def _offloading(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    placing: dict[str, Any],
    places: dict[str, Any] | None,
    quantization: Any,
    dtype: torch.dtype,
) -> _Offload | None:
    """What `device_map` would offload, seen on a model without weights; None where it offloads nothing."""
    device_map, vision_device = placing.get("device_map"), None
    if places is not None:
        device_map, vision_device = {"": places[cls.backbones[0]]}, places.get("vision_model")
    if device_map is None:
        return None
    first, prefix = BACKBONES[cls.backbones[0]]
    own_config = copy.deepcopy(getattr(config, f"{prefix}_config"))
    if hasattr(own_config, "quantization_config"):
        quantization = own_config.quantization_config
        del own_config.quantization_config
    build = AutoModelForCausalLM.from_config if "language_model" in cls.backbones else new_vision_model
    with torch.device("meta"):
        bare = build(own_config).to(dtype)
    if isinstance(device_map, dict):
        names = dict((*bare.named_modules(), *bare.named_parameters()))
        if odd := sorted(name for name in device_map if name not in names):
            raise ValueError(
                f"device_map names {odd[0]!r}, which is no module of the {first}: it names the {first}'s modules as "
                f"they are called there ({next(iter(dict(bare.named_children())))!r}, …), or all parts "
                f"({', '.join(cls.backbones)})"
            )
    offload = _Offload(
        device_map,
        placing.get("max_memory"),
        placing.get("offload_folder"),
        placing.get("offload_buffers", False),
        vision_device,
    )
    devices = _devices(bare, offload)
    if "disk" not in devices and not ("cpu" in devices and len(devices) > 1):
        return None
    if "language_model" not in cls.backbones:
        raise ValueError(
            f"device_map offloads a part of the ViT (to {sorted(map(str, devices))}), and only a language model can be "
            f"offloaded, which a {cls.__name__} has not: leave device_map out, or give one that offloads nothing"
        )
    if quantization is not None:
        raise ValueError(f"device_map offloads a part of a quantised language model (to {sorted(map(str, devices))})")
    lora = getattr(config, "lora_config", None) or {}
    if lora.get("use_dora") or lora.get("target_parameters"):
        raise ValueError(
            "device_map offloads a part of a language model with DoRA or LoRA on parameters: peft needs it"
        )
    if "disk" in devices and offload.offload_folder is None:
        raise ValueError("device_map offloads a part of the language model to the disk: give an offload_folder")
    return offload


def _devices(language_model: PreTrainedModel, offload: _Offload) -> dict[str, Any]:
    return {str(device): device for device in _device_map(language_model, offload).values()}


def _device_map(language_model: PreTrainedModel, offload: _Offload) -> dict[str, Any]:
    """Modules of the language model and their devices, where accelerate is asked to find them."""
    if isinstance(offload.device_map, dict):
        return offload.device_map
    if offload.device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
        return {"": offload.device_map}
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    language_model.tie_weights()
    rules = {"no_split_module_classes": list(language_model._no_split_modules or ()), "max_memory": offload.max_memory}
    if offload.device_map != "sequential":
        low = offload.device_map == "balanced_low_0"
        rules["max_memory"] = get_balanced_memory(language_model, low_zero=low, **rules)
    return infer_auto_device_map(language_model, offload_buffers=offload.offload_buffers, **rules)


def _dispatch(model: PreTrainedModel, offload: _Offload) -> None:
    """Offload the language model, which has all its weights, and put the rest where it computes."""
    from accelerate import disk_offload, dispatch_model

    language_model = model.language_model
    device_map = _device_map(language_model, offload)
    computing = [device for device in device_map.values() if device not in ("cpu", "disk")]
    device = torch.device(computing[0] if computing else "cpu")
    for name, part in model.named_children():
        if name != "language_model":
            own = offload.vision_device if name == "vision_model" else None
            part.to(device if own is None else own)
    keywords: dict[str, Any] = {"offload_buffers": offload.offload_buffers}
    if "disk" in device_map.values():  # a new folder, for accelerate reads what an older load has left in one
        Path(offload.offload_folder).mkdir(parents=True, exist_ok=True)
        model._offload_folder = TemporaryDirectory(dir=offload.offload_folder)  # removed with the model
        keywords["offload_dir"] = model._offload_folder.name
    if set(device_map.values()) == {"disk"}:
        disk_offload(language_model, execution_device=device, **keywords)
    else:
        skip = language_model._skip_keys_device_placement
        dispatch_model(language_model, device_map, main_device=device, skip_keys=skip, **keywords)


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
    for field in ("saved_form", *names, *(f"{name}_revision" for name in names)):  # what is there, the folder says
        setattr(config, field, own.get(field))
    config.name_or_path = str(name)
    return config, kwargs


@contextmanager
def _backbone(
    part: str, config: PreTrainedConfig, name: str | Path, hub: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a backbone's `from_pretrained` is to be called with; within the block errors say what to do."""
    what, prefix = BACKBONES[part]
    source, revision = getattr(config, f"{prefix}_backbone"), getattr(config, f"{prefix}_backbone_revision")
    try:
        yield source, {"revision": revision, **hub}
    except OSError as error:
        raise OSError(
            f"{name} was saved thin, without its {what}, which is {source} at commit {revision} and cannot be loaded. "
            f"Fetch it where the Hub can be reached: `hf download {source} --revision {revision}` (for a gated "
            "repository after `hf auth login`); or have the model saved with save_pretrained(…, form='full') by "
            f"someone who has it. {error}"
        ) from error


def _check_backbone(part: str, config: PreTrainedConfig, name: str | Path, hub: dict[str, Any]) -> None:
    """Refuse a backbone whose files are none to be read, and a config that describes another one than it names."""
    what, prefix = BACKBONES[part]
    with _backbone(part, config, name, hub) as (source, keywords):
        own = AutoConfig.from_pretrained(source, **keywords)
        weight_files(source, **keywords)
    own, described = getattr(own, f"{prefix}_config", own), getattr(config, f"{prefix}_config")
    for field in (*SIZES, "head_dim", "image_size", "num_key_value_heads", "patch_size"):
        here, there = field_of(described, field), field_of(own, field)
        if here != there:
            raise ValueError(f"{name}: its {what} {source} has {field} {there}, and not {here}, as the config says")


def _take_backbone(part: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take a backbone's weights out of the whole model's, with the names that they have in the backbone alone."""
    taken = [key for key in weights if key.startswith(f"{part}.") and ".lora_" not in key]
    return {without_lora(key).removeprefix(f"{part}."): weights.pop(key) for key in taken}


def _load_own_weights(
    model: PreTrainedModel, name: str | Path, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[set[str], set[str]]:
    """Fill what is not the backbones'; returns what the files lack, and what the model has no use for."""
    result = model.load_state_dict(weights, strict=False)
    lacking = {key for key in result.missing_keys if not is_backbone_key(model, key)}
    strange = [key for key in result.unexpected_keys if ".lora_" in key]
    if strange and any(".lora_" in key for key in lacking):
        raise ValueError(
            f"{name}: {len(strange)} weights of LoRA have names of an older format ({strange[0]}, …). Load it without "
            "device_map and quantization_config and save it again"
        )
    if lacking:
        logger.warning(f"{name} lacks {len(lacking)} weights, which are as a new model's: {sorted(lacking)}")
    device = next(model.get_submodule(model.backbones[0]).parameters()).device
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not is_backbone_key(model, key):
            place = tensor.device if ".lora_" in key else device  # peft has put LoRA beside the layer it adapts
            tensor.data = tensor.data.to(place, dtype if tensor.is_floating_point() else tensor.dtype)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unexpected = {key for key in result.unexpected_keys if not any(re.search(rule, key) for rule in ignored)}
    if unexpected:
        logger.warning(f"{name} has {len(unexpected)} weights that its model does not use: {sorted(unexpected)}")
    return lacking, unexpected


__all__ = ["WHERE", "is_thin", "load_in_parts"]
