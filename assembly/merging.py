"""Merge LoRA into the language model's weights, for the save format `merged`."""

import copy

import torch
from transformers import PreTrainedModel

from ..modeling.modeling_lora import lora_layers
from ..modeling.modeling_saving import ADAPTER, without_lora
from .lora_targets import outermost_lora_layers


def merge_lora(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict of the model without LoRA that answers as `model` does: `W + scaling · B A`, as peft merges.

    A layer at a time is merged, on a copy: adding and subtracting again would not give back the weights bit for bit.

    Raises:
        ValueError: a merged weight is not finite, or is of a kind that peft cannot merge; the merged language model
            answers otherwise, by how much.
    """
    prefix, merged, layers = "language_model.", {}, outermost_lora_layers(model.language_model)
    for name, layer in layers.items():
        layer = copy.deepcopy(layer)
        while hasattr(layer, "lora_A"):
            layer.merge(safe_merge=True, adapter_names=[ADAPTER])
            layer = layer.base_layer
        merged |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    _check_merged(model.language_model, merged)
    replaced = tuple(f"{prefix}{name}." for name in layers)
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith(replaced)}
    return weights | {prefix + key: value for key, value in merged.items()}


@torch.no_grad()
def _check_merged(language_model: PreTrainedModel, merged: dict[str, torch.Tensor]) -> None:
    """Run `language_model` with LoRA and with the `merged` weights in its place: the logits are equal but for rounding.

    Raises:
        ValueError: they are not.
    """
    keys = {without_lora(key): key for key, _ in language_model.named_parameters() if ".lora_" not in key}
    length = min(32, getattr(language_model.config, "max_position_embeddings", None) or 32)
    ids = torch.arange(3, 3 + 2 * length, device=language_model.device).view(2, length)
    ids = ids % language_model.config.vocab_size
    inputs = {"input_ids": ids, "use_cache": False}
    layers, training = lora_layers(language_model).values(), language_model.training
    were_off = [layer._disable_adapters for layer in layers]  # peft's public switch would thaw and freeze as well
    language_model.eval()
    try:
        for layer in layers:
            layer._disable_adapters = False
        expected = language_model(**inputs).logits.float()
        for layer in layers:
            layer._disable_adapters = True
        weights = {keys[key]: value for key, value in merged.items() if key in keys}
        found = torch.func.functional_call(language_model, weights, (), inputs).logits.float()
    finally:
        for layer, was_off in zip(layers, were_off, strict=True):
            layer._disable_adapters = was_off
        language_model.train(training)
    error = ((found - expected).abs().mean() / expected.std()).item()
    allowed = 1e-3 if language_model.dtype == torch.float32 else 0.05  # weights are rounded when they are merged
    if not error <= allowed:
        raise ValueError(
            f"Merged, the language model gives other logits: they differ by {error:.2g} of their standard deviation, "
            f"and rounding explains {allowed}. Save it with save_format='full'"
        )


__all__ = ["merge_lora"]
