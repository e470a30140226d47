"""Load weights by the names that they have in files, where transformers has others in memory.

A save in full writes the names of the files that a backbone came from. `from_pretrained` translates them;
`load_state_dict`, by which Trainer restores checkpoints, does not: it would leave such weights out, and list them all.
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def accept_names_in_files(model: PreTrainedModel) -> None:
    """Let `load_state_dict` take the names that `PreTrainedModel.save_pretrained` writes, besides those in memory."""
    model.register_load_state_dict_pre_hook(_rename)


def _rename(model: PreTrainedModel, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    weights = model.state_dict()
    if all(key.removeprefix(prefix) in weights for key in state_dict):
        return
    names = {id(value): name for name, value in weights.items()}
    for in_file, value in revert_weight_conversion(model, weights).items():
        name = names.get(id(value))  # None where several weights are one in the file
        if name not in (None, in_file) and prefix + in_file in state_dict and prefix + name not in state_dict:
            state_dict[prefix + name] = state_dict.pop(prefix + in_file)


__all__ = ["accept_names_in_files"]
