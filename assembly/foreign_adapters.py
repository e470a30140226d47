"""LoRA of the language model in peft's own format: saved beside a model, and loaded in the place of its LoRA."""

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from ..assembly.sources import from_pretrained_arguments
from ..configuration.configuration_lorgnette import LorgnetteConfig
from ..modeling.modeling_lora import attach_lora, lora_is_off, lora_layers, switch_lora
from ..modeling.modeling_saving import keys_to_ignore_on_save
from .card_metadata import hub_source
from .lora_targets import outermost_lora_layers, resolve_lora_config
from .offloading import refuse_offloaded


LM_ADAPTER = "lm_adapter"  # the sub-folder of a saved model: at the top transformers would put it on the whole model
PEFT_PREFIX = "base_model.model."  # what peft's own wrapper puts before the names of an LM's weights


def lora_weights(language_model: PreTrainedModel, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
    """The tensors of LoRA by their names in the LM, without the adapter's: `model.layers.0.….lora_A.weight`."""
    return get_peft_model_state_dict(language_model, state_dict, save_embedding_layers=False)


def save_lm_adapter(model: PreTrainedModel, folder: Path, state_dict: dict | None = None) -> None:
    """Write into `lm_adapter/` of a folder what `peft.PeftModel.from_pretrained(lm, …)` loads.

    Args:
        model: with LoRA. Its config names the LM by its Hub id, or not at all.
        state_dict: its weights, where they were gathered from several devices.
    """
    config, folder = model.config, folder / LM_ADAPTER
    if state_dict is not None:
        prefix = "language_model."
        state_dict = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
    weights = lora_weights(model.language_model, state_dict)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in weights.items()},
        folder / "adapter_model.safetensors",
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


def load_lm_adapter(model: PreTrainedModel, source: str | Path, *, revision: str | None = None) -> None:
    """Replace this model's LoRA by one that peft trained on the bare language model.

    Args:
        model: a [`LorgnetteForConditionalGeneration`].
        source: a folder or Hub repository as `PeftModel.save_pretrained` writes them; `lm_adapter/` of a saved model is
            one too.
        revision: branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it does not fit, see [`read_lm_adapter`]; or weights are offloaded. Nothing has changed then.
    """
    refuse_offloaded(model, "language_model.")
    replace_lora(model, *read_lm_adapter(source, model.config, revision))


def replace_lora(
    model: PreTrainedModel, lora_config: dict[str, Any] | None, lora: "dict[str, torch.Tensor] | DetachedLora | None"
) -> "DetachedLora":
    """Replace the LoRA, enabled or disabled as before, or remove it; returns the old one.

    Args:
        lora: its weights, or one that was on this language model before, which is put back as it is: building peft's
            layers again takes as long as a short answer.

    Raises:
        ValueError: weights are offloaded.
    """
    refuse_offloaded(model, "language_model.")
    before, config_before = detach_lora(model.language_model), model.config.lora_config
    try:
        _put_on_lora(model, lora_config, lora)
    except Exception:  # peft refuses some LoRA only while its weights are loaded
        detach_lora(model.language_model)
        model.config.lora_config = config_before
        put_back_lora(model.language_model, before)
        raise
    if model.has_loaded_backbones:  # weights under LoRA have other names now
        model._keys_to_ignore_on_save = keys_to_ignore_on_save(model)
    model.freeze()
    model.train(model.training)  # new layers are in train mode
    if lora_config is not None:
        switch_lora(model.language_model, not lora_is_off(model.language_model))
    return before


def _put_on_lora(
    model: PreTrainedModel, lora_config: dict[str, Any] | None, lora: "dict[str, torch.Tensor] | DetachedLora | None"
) -> None:
    """Attach LoRA to a language model without one."""
    model.config.lora_config = lora_config
    if isinstance(lora, DetachedLora):
        put_back_lora(model.language_model, lora)
    elif lora_config is not None:
        attach_lora(model.language_model, lora_config)
    for layer in lora_layers(model.language_model).values():
        beside = next(layer.get_base_layer().parameters())  # which may have been moved meanwhile
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(beside.device, model.projector.weight.dtype)
    if lora_config is not None and not isinstance(lora, DetachedLora):
        load_lora_weights(model.language_model, lora)


def read_lm_adapter(
    source: str | Path, config: LorgnetteConfig, revision: str | None = None
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read a LoRA that was trained on this language model, and check that it fits.

    Args:
        source: a folder or a Hub repository as peft writes them.
        config: of the model that it is for.
        revision: branch, tag or commit on the Hub.

    Returns:
        `lora_config`, and the weights by the names that [`lora_weights`] gives them.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is a whole model, no LoRA or a pickled one, belongs to another language model, trains base
            weights too, or has targets, names or shapes that the language model has not.
    """
    name, keywords = from_pretrained_arguments(source, revision)
    have = partial(cached_file, name, _raise_exceptions_for_missing_entries=False, **keywords)
    if have("adapter_config.json") is None and have(f"{LM_ADAPTER}/adapter_config.json") is not None:
        raise ValueError(f"{source} is a whole model: the LoRA of its language model lies in its folder {LM_ADAPTER}")
    found = PeftConfig.from_pretrained(name, **keywords)
    if not isinstance(found, LoraConfig):
        raise ValueError(f"{source} holds an adapter of the type {found.peft_type}; LoRA is needed")
    theirs, ours = found.base_model_name_or_path, hub_source(config, "text")[0]
    if config.saved_form == "merged" and theirs is not None and _is_hub_id(theirs):
        raise ValueError(f"{source} was trained on {theirs}; the language model here has another LoRA merged into it")
    if ours is not None and theirs is not None and _is_hub_id(theirs) and theirs != ours:
        raise ValueError(f"{source} was trained on {theirs}; the language model here is {ours}")
    file = have("adapter_model.safetensors")
    if file is None:
        raise ValueError(f"{source} holds no adapter_model.safetensors; pickled weights (.bin) are not read")
    bare = _bare_language_model(config)
    fields = resolve_lora_config(found, bare)
    with torch.device("meta"):
        attach_lora(bare, fields)
    expected = {name: tensor.shape for name, tensor in lora_weights(bare).items()}
    weights = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(file).items()}
    odd = sorted(expected.keys() ^ weights.keys())
    if odd:
        where = "only here" if odd[0] in expected else "only there"
        raise ValueError(
            f"{source} has {len(weights)} tensors and LoRA on this language model {len(expected)}: {odd[0]} is {where}"
        )
    for weight, shape in expected.items():
        if weights[weight].shape != shape:
            raise ValueError(
                f"{source} does not fit the language model: {weight} is {tuple(weights[weight].shape)} there, and "
                f"{tuple(shape)} here"
            )
    return fields, weights


def load_lora_weights(language_model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Load the weights of [`lora_weights`] into a language model's LoRA."""
    set_peft_model_state_dict(language_model, weights)


@dataclass(frozen=True)
class DetachedLora:
    """A LoRA that was detached from a language model, with its layers, for fast attachment to the same model.

    Args:
        layers: peft's, around the base layers, by the names of these in the LM; empty where there was none.
        peft_config: the language model's record of it.
    """

    layers: dict[str, nn.Module]
    peft_config: Any


def detach_lora(language_model: PreTrainedModel) -> DetachedLora:
    """Detach LoRA: the layers are the original ones again, with their original names."""
    lora = DetachedLora(outermost_lora_layers(language_model), getattr(language_model, "peft_config", None))
    for name, layer in lora.layers.items():
        language_model.set_submodule(name, layer.get_base_layer())
    if language_model._hf_peft_config_loaded:
        language_model._hf_peft_config_loaded = False
        del language_model.peft_config
    return lora


def put_back_lora(language_model: PreTrainedModel, lora: DetachedLora) -> None:
    """Attach a LoRA again that was detached from this language model."""
    for name, layer in lora.layers.items():
        language_model.set_submodule(name, layer)
    if lora.peft_config is not None:
        language_model._hf_peft_config_loaded, language_model.peft_config = True, lora.peft_config


def _bare_language_model(config: LorgnetteConfig) -> PreTrainedModel:
    """The language model without LoRA and weights, for its layers' names and shapes."""
    text_config = copy.deepcopy(config.text_config)
    if hasattr(text_config, "quantization_config"):
        del text_config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(text_config)


def _is_hub_id(name: str) -> bool:
    """Whether a name is a Hub id and not a path; peft records either."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


__all__ = [
    "DetachedLora",
    "detach_lora",
    "load_lm_adapter",
    "put_back_lora",
    "read_lm_adapter",
    "replace_lora",
]
