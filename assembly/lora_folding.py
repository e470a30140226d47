"""Fold LoRA into the language model's weights for the length of a `generate` call.

On a GPU a decoding step is a few large products and, with LoRA, several times as many small ones, whose launches cost
more than their arithmetic. Folded, a layer is one product, `(W + scaling · B A) x`. The original tensors are put aside
and put back: no arithmetic undoes the sum, so that they are the same bit for bit.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers import PreTrainedModel

from ..modeling.modeling_lora import lora_layers
from ..modeling.modeling_saving import ADAPTER


_ROOM = 2.0  # times the folded weights that have to be free: keys and values need memory, too


def for_generation(language_model: PreTrainedModel) -> AbstractContextManager[None]:
    """[`folded`] where it [`pays`]."""
    return folded(language_model) if pays(language_model) else nullcontext()


def pays(language_model: PreTrainedModel) -> bool:
    """Whether folding saves time here: on a GPU with room for a second copy of these weights, outside of training."""
    if language_model.device.type != "cuda" or language_model.training:
        return False
    layers = foldable(language_model)
    if not layers or any(parameter.device.type != "cuda" for parameter in language_model.parameters()):
        return False
    needed = sum(p.numel() * p.element_size() for layer in layers for p in layer.get_base_layer().parameters())
    free, _ = torch.cuda.mem_get_info(layers[0].get_base_layer().weight.device)
    return free > _ROOM * needed


def foldable(language_model: PreTrainedModel) -> list[nn.Module]:
    """The layers whose LoRA is on, alone and plain: no variant such as DoRA, no quantised weights, no nesting."""
    return [
        layer
        for layer in lora_layers(language_model).values()
        if type(layer) is Linear
        and not layer.disable_adapters
        and not layer.merged
        and layer.active_adapters == [ADAPTER]
        and not getattr(layer, "lora_variant", None)
        and type(layer.get_base_layer()) is nn.Linear
        and layer.get_base_layer().weight.is_floating_point()
    ]


@contextmanager
@torch.no_grad()
def folded(language_model: PreTrainedModel) -> Iterator[None]:
    """Within the block LoRA is part of the weights of [`foldable`] layers; after it, their own tensors are back."""
    layers = foldable(language_model)
    kept = [(p, p.data) for layer in layers for p in layer.get_base_layer().parameters()]
    try:
        for parameter, data in kept:
            parameter.data = data.clone()
        for layer in layers:
            layer.merge(adapter_names=[ADAPTER])
        yield
    finally:
        for layer in layers:
            layer.merged_adapters.clear()
        for parameter, data in kept:
            parameter.data = data


__all__ = ["foldable", "folded", "for_generation", "pays"]
