"""Select the layers that get LoRA, and check that a LoRA config leaves the base weights unchanged."""

import json
import re
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import requires_backends

from ..modeling.modeling_lora import lora_layers


# Fields of a `LoraConfig` and an adapter_config.json about an adapter's origin and use, not about LoRA itself.
_NO_SETTINGS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
}
# Fields of `peft.LoraConfig` that are known to leave the base weights alone and to read no files. Of the others, and
# each version of peft has more, some truncate base weights (`kasa_config`), load what was pickled (`corda_config`) or
# import a module by its name (`megatron_core`).
_HARMLESS = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "task_type",
    "use_dora",
    "use_rslora",
}
# Ways to initialise LoRA that do not rewrite base weights.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


def resolve_lora_config(lora: Any, language_model: PreTrainedModel) -> dict[str, Any]:
    """A complete, checked dict of `peft.LoraConfig` fields for this language model.

    Args:
        lora: a dict of `peft.LoraConfig` fields, as an adapter_config.json holds them too, or a `LoraConfig`. Without
            `target_modules`, LoRA goes to the attention projections of the architecture.
        language_model: the LM, before LoRA is attached.

    Returns:
        a JSON-serialisable dict: the given fields, and `target_modules` as a list of names or one regex.

    Raises:
        TypeError: `lora` is neither a dict nor a `LoraConfig`.
        ValueError: an unknown field, one that would train or change base weights, or targets that match nothing.
    """
    requires_backends(resolve_lora_config, "peft")
    from peft import LoraConfig

    existing = {field.name for field in fields(LoraConfig)}
    if isinstance(lora, LoraConfig):
        defaults = LoraConfig()
        lora = {
            name: value
            for name, value in lora.to_dict().items()
            if name in existing and value != getattr(defaults, name)
        }
    if not isinstance(lora, dict):
        raise TypeError(f"lora has to be a dict of peft.LoraConfig fields or a LoraConfig, not {type(lora).__name__}")
    if lora.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"lora describes an adapter of the type {lora['peft_type']}; LoRA is needed")
    lora = {name: value for name, value in lora.items() if name not in _NO_SETTINGS}
    unknown = sorted(lora.keys() - existing)
    if unknown:
        raise ValueError(f"lora has fields that peft.LoraConfig does not know: {unknown}; it knows {sorted(existing)}")

    layers = linear_layers(language_model)
    resolved = {name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in lora.items()}
    for name, value in resolved.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(f"lora[{name!r}] cannot be saved in config.json: {error}") from error
    if isinstance(rank := resolved.get("r"), float):  # as YAML reads 8e0
        if not rank.is_integer():
            raise ValueError(f"lora['r'] is {rank}; it has to be a whole number")
        resolved["r"] = int(rank)
    targets = resolved.get("target_modules")
    if targets is None:
        resolved["target_modules"] = attention_projections(language_model)
    elif not targets and not resolved.get("target_parameters"):
        raise ValueError("lora['target_modules'] is empty: name some layers, or leave it out for the attention layers")
    elif not isinstance(targets, str):
        resolved["target_modules"] = sorted(targets)
    targeted = _match_targets(resolved["target_modules"], layers)
    for target in resolved.get("target_parameters") or ():
        hits = {name for name, _ in language_model.named_parameters() if f".{name}".endswith(f".{target}")}
        if not hits:
            raise ValueError(f"lora['target_parameters'] names {target!r}, which no parameter of the LM is called")
        tables = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
        if any(language_model.get_parameter(name) is table.weight for name in hits for table in tables):
            raise ValueError(
                f"lora['target_parameters'] names {target!r}, an embedding table of the LM: it may be tied"
            )
    if targets is None:  # an encoder of the LM's own may have layers of the same names
        read = read_layers(language_model)
        if unread := [name for name in targeted if layers[name] not in read]:
            resolved.setdefault("exclude_modules", unread)
    if nested := [name for name in targeted for other in targeted if name.startswith(f"{other}.")]:
        raise ValueError(
            f"LoRA targets {nested[0]!r}, and the layer that it is a part of: a save would have no name for its "
            "weights. Name the one or the other in lora['target_modules']"
        )
    of_one_weight = layers_of_one_weight(layers)
    if shared := [name for name in targeted if layers[name] in of_one_weight]:
        raise ValueError(
            f"LoRA targets {shared[0]!r}, whose weight is another layer's too: merged, it would have to be two. Name "
            "other layers in lora['target_modules']"
        )
    if targeted and all(isinstance(layers[name], Conv1D) for name in targeted):
        resolved.setdefault("fan_in_fan_out", True)  # GPT-2 keeps its matrices transposed
    resolved.setdefault("task_type", "CAUSAL_LM")
    check_lora_config(resolved)
    return resolved


def check_lora_config(lora_config: dict[str, Any]) -> None:
    """Refuse a LoRA config that would train or rewrite base weights, or read other files.

    The config may be untrusted. Fields at peft's defaults are allowed.

    Raises:
        ValueError: names the field and its value.
    """
    from peft import LoraConfig

    if lora_config.get("modules_to_save") or lora_config.get("trainable_token_indices"):
        raise ValueError("lora_config.modules_to_save and trainable_token_indices would train base weights of the LM")
    if lora_config.get("layer_replication"):
        raise ValueError("lora_config.layer_replication makes layers share weights, which cannot be saved apart")
    if lora_config.get("bias", "none") != "none":
        raise ValueError(
            f'lora_config.bias is "{lora_config["bias"]}" and would train biases of the LM; it has to be "none"'
        )
    init = lora_config.get("init_lora_weights", True)
    if init not in _INITIALISATIONS:
        raise ValueError(
            f'lora_config.init_lora_weights "{init}" rewrites base weights of the LM, or may; those that do not are '
            f"{', '.join(map(repr, _INITIALISATIONS))}"
        )
    defaults = LoraConfig()
    for name in sorted(lora_config.keys() - _HARMLESS):
        if lora_config[name] != getattr(defaults, name, None):
            raise ValueError(
                f"lora_config.{name} is {str(lora_config[name])[:100]}; peft's fields that are known to concern LoRA "
                f"alone are {', '.join(sorted(_HARMLESS))}"
            )


def attention_projections(language_model: PreTrainedModel) -> list[str]:
    """Names of the linear layers inside the attention modules, with their parent's: `["self_attn.k_proj", …]`.

    The parent's name keeps out a feed-forward layer of the same name (GPT-2 has two `c_proj`). Layers that read no text
    (cross-attention, an encoder of the LM's own) and those that have no gradient (an index of keys) are left out.

    Raises:
        ValueError: the architecture has no module whose class is called an attention; lists its linear layers.
    """
    found, read = set(), read_layers(language_model)
    fused = any(name.endswith("gate_up_proj") for name, _ in language_model.named_parameters())
    for name, module in language_model.named_modules():
        if re.search(r"Attention\d*$", type(module).__name__):  # and no DecoderLayer whose name holds the word
            parent = name.rsplit(".", 1)[-1]
            for child, layer in module.named_modules():
                inside = any(child.startswith(f"{other}.") for other, one in module.named_modules() if _is_linear(one))
                # what makes a convolution's kernel has another name in files; peft takes a gate_proj for an expert's
                inside = inside or "conv" in child or (fused and child.split(".")[-1] == "gate_proj")
                if _is_linear(layer) and layer in read and not inside:
                    found.add(f"{parent}.{child}")
    if not found:
        raise ValueError(
            f"No attention layers were found in {type(language_model).__name__}: name lora['target_modules']. "
            f"Its linear layers: {_kinds(linear_layers(language_model))}"
        )
    return sorted(found)


def linear_layers(language_model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every layer that LoRA can adapt, by its name in the LM; not the output embedding, which may be tied."""
    head = language_model.get_output_embeddings()
    return {name: layer for name, layer in language_model.named_modules() if _is_linear(layer) and layer is not head}


def read_layers(language_model: PreTrainedModel) -> set[nn.Module]:
    """The linear layers that a text's gradient reaches; all, if the LM has no weights yet or is quantised."""
    layers, outputs = linear_layers(language_model), {}
    table = language_model.get_input_embeddings().weight
    if table.is_meta or getattr(language_model, "hf_quantizer", None) is not None:
        return set(layers.values())

    def keep(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            outputs[layer] = output

    hooks, was_training = [layer.register_forward_hook(keep) for layer in layers.values()], language_model.training
    try:
        with torch.enable_grad():
            ids = torch.arange(3, device=table.device)[None] + language_model.config.vocab_size // 2
            embeds = language_model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = language_model.eval()(inputs_embeds=embeds.clone(), use_cache=False, return_dict=True).logits
            gradients = torch.autograd.grad(logits.float().sum(), list(outputs.values()), allow_unused=True)
    finally:
        language_model.train(was_training)
        for hook in hooks:
            hook.remove()
    return {layer for layer, gradient in zip(outputs, gradients, strict=True) if gradient is not None}


def layers_of_one_weight(layers: dict[str, nn.Module]) -> set[nn.Module]:
    """Layers that share their weight with another, as in Zamba's repeated block."""
    by_weight: dict[int, list[nn.Module]] = {}
    for layer in layers.values():
        by_weight.setdefault(id(layer.weight), []).append(layer)
    return {layer for sharing in by_weight.values() if len(sharing) > 1 for layer in sharing}


def outermost_lora_layers(language_model: PreTrainedModel) -> dict[str, nn.Module]:
    """Those of [`lora_layers`] in no other: over two parameters of one module peft puts one layer around another."""
    layers = lora_layers(language_model)
    inner = {f"{name}.base_layer" for name in layers}
    return {name: layer for name, layer in layers.items() if name not in inner}


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, Conv1D))


def _match_targets(targets: str | list[str], layers: dict[str, nn.Module]) -> list[str]:
    """The layers named by peft's rules: a string is a regex for the whole name, a list holds name endings."""
    if targets == "all-linear":
        return list(layers)
    matched = []
    for target in [targets] if isinstance(targets, str) else targets:
        if isinstance(targets, str):
            hits = [name for name in layers if re.fullmatch(target, name)]
        else:
            hits = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not hits:
            raise ValueError(
                f"LoRA target {target!r} matches no linear layer of the language model, which has: {_kinds(layers)}"
            )
        matched += hits
    return matched


def _kinds(layers: dict[str, nn.Module]) -> list[str]:
    """Distinct layer names without prefixes: `model.layers.0.self_attn.q_proj` becomes `self_attn.q_proj`."""
    return sorted({".".join(name.split(".")[-2:]) for name in layers})


__all__ = [
    "attention_projections",
    "check_lora_config",
    "layers_of_one_weight",
    "linear_layers",
    "outermost_lora_layers",
    "read_layers",
    "resolve_lora_config",
]
