"""LoRA inside the language model, by peft's functions: those of transformers refuse, in each release, some of peft."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available, requires_backends

from ..configuration.configuration_lorgnette import IN_PACKAGE, from_package
from .modeling_saving import ADAPTER, without_lora


def lora_layers(language_model: PreTrainedModel) -> dict[str, nn.Module]:
    """peft's layers, by their names in the LM: each holds a `base_layer` and LoRA's matrices. Needs no peft."""
    return {name: layer for name, layer in language_model.named_modules() if hasattr(layer, "lora_A")}


def attach_lora(language_model: PreTrainedModel, lora_config: dict[str, Any]) -> None:
    """Put LoRA, switched on, on the layers of the LM that a complete `lora_config` names."""
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
    """Let LoRA take part in what the language model computes, or not; a ValueError where there is none."""
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
    """Initialise LoRA that a checkpoint lacks, as peft does; a ValueError for a checkpoint of a model without LoRA."""
    if unfilled := sorted(key for key in missing if without_lora(key) in unexpected):
        raise ValueError(
            f"{len(unfilled)} weights under LoRA are not in the checkpoint ({unfilled[0]}, …), which was saved without "
            "the LoRA that lora_config describes: from_backbones(lora=…) is where a model gets its LoRA"
        )
    for name, layer in lora_layers(model.language_model).items():
        if any(key.startswith(f"language_model.{name}.lora_") for key in missing):
            layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)
