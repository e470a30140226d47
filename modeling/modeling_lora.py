"""LoRA inside the language model: attached, switched on and off, and saved as peft reads it.

peft's own functions are called. transformers' (`add_adapter`, `enable_adapters`, …) do the same and refuse, in each of
its releases, other versions of peft.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available, requires_backends

from ..configuration.configuration_lorgnette import IN_PACKAGE, LorgnetteConfig, from_package
from .modeling_saving import ADAPTER, keys_to_ignore_on_save, without_lora


LM_ADAPTER = "lm_adapter"  # the sub-folder of a saved model: at the top transformers would put it on the whole model
PEFT_PREFIX = "base_model.model."  # what peft's own wrapper puts before the names of an LM's weights


def lora_layers(language_model: PreTrainedModel) -> dict[str, nn.Module]:
    """peft's layers, by their names in the LM: each holds a `base_layer` and LoRA's matrices. Needs no peft."""
    return {name: layer for name, layer in language_model.named_modules() if hasattr(layer, "lora_A")}


def attach_lora(language_model: PreTrainedModel, lora_config: dict[str, Any]) -> None:
    """Put LoRA, switched on, on the layers that a complete `lora_config` names.

    It goes into the LM, where the config describes it: a plain reload finds every key, and targets cannot match the
    ViT's layers.

    Raises:
        ValueError: where the package is installed, what [`~lorgnette.assembly.lora_targets.check_lora_config`] refuses.
    """
    requires_backends(attach_lora, "peft")
    if is_peft_available():  # so that transformers asks for peft only where there is LoRA
        from peft import LoraConfig, inject_adapter_in_model

    if IN_PACKAGE:
        from_package("assembly.lora_targets", "").check_lora_config(lora_config)
    inject_adapter_in_model(LoraConfig(**lora_config), language_model, ADAPTER)
    language_model._hf_peft_config_loaded = True  # where transformers looks whether a model has LoRA
    for name, module in language_model.named_modules():
        if "lora_" in name:
            module._is_hf_initialized = True  # transformers would overwrite the zeros of lora_B


def switch_lora(language_model: PreTrainedModel, enabled: bool) -> None:
    """Let LoRA take part in what the language model computes, or not.

    Raises:
        ValueError: there is none.
    """
    layers = lora_layers(language_model)
    if not layers:
        raise ValueError("No adapter loaded: this language model has no LoRA")
    for layer in layers.values():
        layer.enable_adapters(enabled)
    # kept here: the adapter set in use may have no LoRA to be off, and the next one has
    language_model._lora_is_off = not enabled


@contextmanager
def disabled_lora(language_model: PreTrainedModel) -> Iterator[None]:
    """Within the block the language model is the original one; after it, what it was before."""
    was_off = lora_is_off(language_model)
    switch_lora(language_model, False)
    try:
        yield
    finally:
        language_model._lora_is_off = was_off
        if not was_off and lora_layers(language_model):
            switch_lora(language_model, True)


def lora_is_off(language_model: PreTrainedModel) -> bool:
    """Whether LoRA was switched off, also where there is none now."""
    return getattr(language_model, "_lora_is_off", False)


def check_loaded_lora(model: PreTrainedModel, missing: set[str], unexpected: set[str]) -> None:
    """Initialise LoRA that a checkpoint does not hold, as peft does.

    Raises:
        ValueError: the base weights under it have the names of a model without LoRA.
    """
    unfilled = sorted(key for key in missing if without_lora(key) in unexpected)
    if unfilled:
        raise ValueError(
            f"{len(unfilled)} weights under LoRA are not in the checkpoint ({unfilled[0]}, …): it was saved "
            "without the LoRA that lora_config describes. from_backbones(lora=…) is where a model gets its LoRA"
        )
    for name, layer in model.language_model.named_modules():
        if f"language_model.{name}.lora_A.{ADAPTER}.weight" in missing:
            layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)


def lora_weights(language_model: PreTrainedModel, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
    """The tensors of LoRA by their names in the LM, without the adapter's: `model.layers.0.….lora_A.weight`."""
    if is_peft_available():
        from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(language_model, state_dict, save_embedding_layers=False)


def save_lm_adapter(
    folder: str | Path, language_model: PreTrainedModel, config: LorgnetteConfig, state_dict: dict | None = None
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained(lm, folder)` loads.

    Args:
        folder: made where it does not exist.
        language_model: with LoRA attached.
        config: the whole model's; the LM is named by its Hub id, or not at all.
        state_dict: the whole model's weights, where they were gathered from several devices.
    """
    if is_peft_available():  # so that transformers asks for peft only where there is LoRA
        from peft import LoraConfig
    from safetensors.torch import save_file

    if state_dict is not None:
        prefix = "language_model."
        state_dict = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
    weights = lora_weights(language_model, state_dict)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(
        {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in weights.items()},
        Path(folder, "adapter_model.safetensors"),
        metadata={"format": "pt"},
    )
    adapter = LoraConfig(
        **config.lora_config,
        base_model_name_or_path=config.text_backbone,
        revision=config.text_backbone_revision,
        inference_mode=True,
    )
    for name in ("target_modules", "exclude_modules"):
        if isinstance(value := getattr(adapter, name), set):  # peft's own, in another order in each process
            setattr(adapter, name, sorted(value))
    adapter.save_pretrained(str(folder))


def refresh_ignored_keys(model: PreTrainedModel) -> None:
    """Called where LoRA was replaced: the weights under it have other names then."""
    if model.has_loaded_backbones:
        model._keys_to_ignore_on_save = keys_to_ignore_on_save(model)


__all__ = [
    "LM_ADAPTER",
    "PEFT_PREFIX",
    "attach_lora",
    "check_loaded_lora",
    "disabled_lora",
    "lora_is_off",
    "lora_layers",
    "lora_weights",
    "refresh_ignored_keys",
    "save_lm_adapter",
    "switch_lora",
]
