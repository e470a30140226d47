"""Backbone weights that a change of dtype narrows are still those that were loaded: a save may leave them out."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..modeling.modeling_saving import checksum, without_lora


def keep_checksums(model: PreTrainedModel, fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    """`fn` of an `nn.Module._apply`; weights that it narrows, as a reload in that dtype does, count as loaded."""
    if not (checksums := model._backbone_checksums):
        return fn
    keys = {id(value): without_lora(key) for key, value in (*model.named_parameters(), *model.named_buffers())}

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        result, key = fn(tensor), keys.get(id(tensor))
        narrowed = key in checksums and tensor.dtype == torch.float32 != result.dtype and not tensor.is_meta
        if narrowed and checksums[key] == checksum(tensor.data):
            checksums[key] = checksum(result.data)
        return result

    return apply


__all__ = ["keep_checksums"]
