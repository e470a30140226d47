"""A model of which a part of the language model is offloaded: accelerate dispatches it when it is complete.

transformers offloads while it loads, before LoRA is there, which would stay without weights.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import disk_offload, dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from transformers import PreTrainedModel

from ..modeling.modeling_loading import load_in_parts


_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def load_and_dispatch(
    cls: type[PreTrainedModel],
    name: str | Path,
    *args: Any,
    device_map: Any,
    max_memory: dict | None = None,
    offload_folder: str | Path | None = None,
    offload_buffers: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """[`~modeling_loading.load_in_parts`] without a device map, then dispatched as `device_map` says.

    Raises:
        ValueError: no language model, or one that cannot be offloaded; no `offload_folder` for what goes to the disk.
    """
    if "language_model" not in cls.backbones:
        raise ValueError(
            f"device_map offloads a part of the ViT of a {cls.__name__}, which is neither trained nor used so"
        )
    vision_device = None
    if isinstance(device_map, dict) and "language_model" in device_map:
        device_map, vision_device = {"": device_map["language_model"]}, device_map["vision_model"]
    if kwargs.get("quantization_config") is not None:
        raise ValueError("device_map offloads a part of a quantised language model, which accelerate cannot dispatch")
    model, info = load_in_parts(cls, name, *args, **kwargs)
    lora = model.config.lora_config or {}
    if lora.get("use_dora") or lora.get("target_parameters"):
        raise ValueError(
            "device_map offloads a part of a language model with DoRA or LoRA on parameters: peft needs it"
        )
    language_model = model.language_model
    device_map = _device_map(language_model, device_map, max_memory, offload_buffers)
    computing = [device for device in device_map.values() if device not in ("cpu", "disk")]
    device = torch.device(computing[0] if computing else "cpu")
    for part_name, part in model.named_children():
        if part_name != "language_model":
            own = vision_device if part_name == "vision_model" else None
            part.to(device if own is None else own)
    keywords: dict[str, Any] = {"offload_buffers": offload_buffers}
    if "disk" in device_map.values():  # a new folder: accelerate reads what an older load has left in one
        if offload_folder is None:
            raise ValueError("device_map offloads a part of the language model to the disk: give an offload_folder")
        Path(offload_folder).mkdir(parents=True, exist_ok=True)
        model._offload_folder = TemporaryDirectory(dir=offload_folder)  # removed with the model
        keywords["offload_dir"] = model._offload_folder.name
    if set(device_map.values()) == {"disk"}:
        disk_offload(language_model, execution_device=device, **keywords)
    else:
        skip = language_model._skip_keys_device_placement
        dispatch_model(language_model, device_map, main_device=device, skip_keys=skip, **keywords)
    return model, info


def _device_map(
    language_model: PreTrainedModel, device_map: Any, max_memory: dict | None, offload_buffers: bool
) -> dict[str, Any]:
    """Modules of the language model and their devices, where accelerate is asked to find them."""
    if isinstance(device_map, dict):
        return device_map
    if device_map not in _AUTOMATIC:
        return {"": device_map}
    language_model.tie_weights()
    rules = {"no_split_module_classes": list(language_model._no_split_modules or ()), "max_memory": max_memory}
    if device_map != "sequential":
        rules["max_memory"] = get_balanced_memory(language_model, low_zero=device_map == "balanced_low_0", **rules)
    return infer_auto_device_map(language_model, offload_buffers=offload_buffers, **rules)


__all__ = ["load_and_dispatch"]
