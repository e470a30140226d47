"""Device maps that offload a part of the language model: accelerate dispatches the model when it is complete.

transformers offloads during loading, before LoRA is attached, which would stay without weights.
"""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import disk_offload, dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..modeling.modeling_loading import load_in_parts, parse_dtype, vision_model_class
from ..modeling.modeling_saving import BACKBONES


_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
_PLACING = ("device_map", "max_memory", "offload_folder", "offload_buffers")


def refuse_offloaded(model: PreTrainedModel, part: str = "") -> None:
    """Raises a ValueError where weights, those of a part alone, are offloaded: they are on meta between two uses."""
    offloaded = [key for key, value in model.named_parameters() if value.is_meta and key.startswith(part)]
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} weights are offloaded ({offloaded[0]}, …), and such a model is neither trained nor "
            "saved, nor given another LoRA: load it without device_map, or with one that offloads nothing"
        )


def load_on_devices(
    cls: type[PreTrainedModel], name: str | Path, *args: Any, is_offloaded: bool = False, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """[`~modeling_loading.load_in_parts`] with a `device_map`, which may offload a part of the language model.

    Args:
        is_offloaded: transformers has offloaded a part by this map: remote code finds that out as it loads.

    Raises:
        ValueError: the map names no module, or offloads what cannot be offloaded, or to the disk without an
            `offload_folder`.
    """
    placing = {key: kwargs[key] for key in _PLACING if kwargs.get(key) is not None}
    devices = device_of_parts(cls, placing["device_map"])
    if devices is not None:
        placing["device_map"] = {"": devices[cls.backbones[0]]}
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        config, _ = cls.config_class.from_pretrained(config or name, return_unused_kwargs=True, **kwargs)
    offloads = _is_offloading(cls, config, placing, kwargs.get("quantization_config"), kwargs.get("dtype"))
    if not (offloads or is_offloaded):
        return load_in_parts(cls, name, *args, devices=devices, **kwargs)
    rest = {key: value for key, value in kwargs.items() if key not in _PLACING}
    model, info = load_in_parts(cls, name, *args, **rest)
    _dispatch(model, placing, None if devices is None else devices["vision_model"])
    return model, info


def device_of_parts(cls: type[PreTrainedModel], device_map: Any) -> dict[str, Any] | None:
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


def _is_offloading(
    cls: type[PreTrainedModel], config: PreTrainedConfig, placing: dict[str, Any], quantization: Any, dtype: Any
) -> bool:
    """Whether `device_map` would offload, as a model without weights shows."""
    what, prefix = BACKBONES[cls.backbones[0]]
    own_config = copy.deepcopy(getattr(config, f"{prefix}_config"))
    if hasattr(own_config, "quantization_config"):
        quantization = own_config.quantization_config
        del own_config.quantization_config
    has_language_model = "language_model" in cls.backbones
    build = AutoModelForCausalLM.from_config if has_language_model else vision_model_class(own_config)._from_config
    with torch.device("meta"):
        bare = build(own_config).to(parse_dtype(config.dtype or torch.float32 if dtype in (None, "auto") else dtype))
    if isinstance(placing["device_map"], dict):
        names = dict((*bare.named_modules(), *bare.named_parameters()))
        if odd := sorted(name for name in placing["device_map"] if name not in names):
            raise ValueError(
                f"device_map names {odd[0]!r}, which is no module of the {what}: it names the {what}'s modules as they "
                f"are called there ({next(iter(dict(bare.named_children())))!r}, …), or all parts "
                f"({', '.join(cls.backbones)})"
            )
    devices = sorted(set(map(str, _device_map(bare, placing).values())))
    if "disk" not in devices and not ("cpu" in devices and len(devices) > 1):
        return False
    if "language_model" not in cls.backbones:
        raise ValueError(
            f"device_map offloads a part of the ViT (to {devices}), and only a language model can be offloaded, which "
            f"a {cls.__name__} has not: leave device_map out, or give one that offloads nothing"
        )
    if quantization is not None:
        raise ValueError(f"device_map offloads a part of a quantised language model (to {devices})")
    lora = config.lora_config or {}
    if lora.get("use_dora") or lora.get("target_parameters"):
        raise ValueError(
            "device_map offloads a part of a language model with DoRA or LoRA on parameters: peft needs it"
        )
    if "disk" in devices and "offload_folder" not in placing:
        raise ValueError("device_map offloads a part of the language model to the disk: give an offload_folder")
    return True


def _device_map(language_model: PreTrainedModel, placing: dict[str, Any]) -> dict[str, Any]:
    """Modules of the language model and their devices, where accelerate is asked to find them."""
    device_map = placing["device_map"]
    if isinstance(device_map, dict):
        return device_map
    if device_map not in _AUTOMATIC:
        return {"": device_map}
    language_model.tie_weights()
    rules = {
        "no_split_module_classes": list(language_model._no_split_modules or ()),
        "max_memory": placing.get("max_memory"),
    }
    if device_map != "sequential":
        rules["max_memory"] = get_balanced_memory(language_model, low_zero=device_map == "balanced_low_0", **rules)
    return infer_auto_device_map(language_model, offload_buffers=placing.get("offload_buffers", False), **rules)


def _dispatch(model: PreTrainedModel, placing: dict[str, Any], vision_device: Any) -> None:
    """Offload the language model, which has all its weights, and put the rest where it computes."""
    language_model = model.language_model
    device_map = _device_map(language_model, placing)
    computing = [device for device in device_map.values() if device not in ("cpu", "disk")]
    device = torch.device(computing[0] if computing else "cpu")
    for name, part in model.named_children():
        if name != "language_model":
            part.to(vision_device if name == "vision_model" and vision_device is not None else device)
    keywords: dict[str, Any] = {"offload_buffers": placing.get("offload_buffers", False)}
    if "disk" in device_map.values():  # a new folder: accelerate reads what an older load has left in one
        Path(placing["offload_folder"]).mkdir(parents=True, exist_ok=True)
        model._offload_folder = TemporaryDirectory(dir=placing["offload_folder"])  # removed with the model
        keywords["offload_dir"] = model._offload_folder.name
    if set(device_map.values()) == {"disk"}:
        disk_offload(language_model, execution_device=device, **keywords)
    else:
        skip = language_model._skip_keys_device_placement
        dispatch_model(language_model, device_map, main_device=device, skip_keys=skip, **keywords)


__all__ = ["load_on_devices"]
