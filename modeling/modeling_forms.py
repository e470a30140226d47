"""The forms in which a model is saved, and what each leaves out.

| form     | in the folder                                                        | loading it needs             |
|----------|----------------------------------------------------------------------|------------------------------|
| `thin`   | what trains; of the backbones their Hub ids and commits              | the backbones from the Hub   |
| `full`   | everything                                                           | nothing else                 |
| `merged` | everything, LoRA folded into the language model, which is then plain | nothing else, not even peft  |

`modeling_thin.py` loads the first; the others are loaded as transformers loads any model.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration.configuration_lorgnette import FORMS
from .modeling_lora import lora_layers


logger = logging.get_logger(__name__)

# A submodule that is a backbone -> how errors call it, and the prefix of the config's fields about it.
BACKBONES = {"language_model": ("language model", "text"), "vision_model": ("ViT", "vision")}


def resolve_form(model: PreTrainedModel, form: str | None) -> str:
    """The form that `model` is saved in where `form` is asked for, or nothing is.

    By default it is `thin` where every backbone is a Hub id with a commit, and `full` otherwise. A merged model has
    all its weights and no LoRA, unless it got another one since: whatever is asked for but `thin`, it is saved as
    `merged`.

    Raises:
        ValueError: no such form; one that this model cannot have, with the reason.
    """
    if form is not None and form not in FORMS:
        raise ValueError(f"form is {form!r}; a model is saved as {', '.join(FORMS)}")
    obstacle = why_not_thin(model)
    if form == "thin" and obstacle:
        raise ValueError(f"This model cannot be saved thin: {obstacle}")
    if form == "thin" or (form is None and not obstacle):
        return "thin"
    if quantizer_of(model) is not None:
        raise ValueError(
            f"The language model is quantised ({quantizer_of(model).quantization_config.quant_method}): only the thin "
            "form can be saved" + (f", and {obstacle}" if obstacle else "")
        )
    if model.config.saved_form == "merged" and model.config.lora_config is None:
        return "merged"
    if form == "merged" and getattr(model.config, "lora_config", None) is None:
        raise ValueError("This model has no LoRA to merge: save it full")
    if form is None:
        logger.warning_once(f"Models are saved in full, with all weights of their backbones: {obstacle}")
    return form or "full"


def why_not_thin(model: PreTrainedModel) -> str | None:
    """What keeps a model from being saved without its backbones, or None."""
    config = model.config
    if config.saved_form == "merged":
        return f"LoRA is folded into its language model, which is no longer {config.text_backbone or 'what it was'}"
    for name in model.backbones:
        what, prefix = BACKBONES[name]
        if None in (getattr(config, f"{prefix}_backbone"), getattr(config, f"{prefix}_backbone_revision")):
            return f"its {what} comes from a folder or from memory, not from a Hub repository at a commit"
        if not model.has_loaded_backbones:
            return f"its {what} is random, and not what {getattr(config, f'{prefix}_backbone')} holds"
    trained = trained_backbone_weights(model)
    return f"{len(trained)} weights of its backbones train ({trained[0]}, …)" if trained else None


def trained_backbone_weights(model: PreTrainedModel) -> list[str]:
    """The weights of backbones that have a gradient, and so are not, or will not be, what the Hub holds."""
    return [key for key, value in model.named_parameters() if value.requires_grad and is_backbone_key(model, key)]


def strayed_backbones(model: PreTrainedModel, form: str) -> set[str]:
    """The backbones that are no longer what the config names, and whose save in `form` would not tell."""
    if not model.has_loaded_backbones:
        return set(model.backbones)
    strayed = {key.split(".", 1)[0] for key in trained_backbone_weights(model)}
    if model.config.saved_form == "merged" and form != "merged":  # there is new LoRA over what was merged
        strayed.add("language_model")
    return strayed


def is_backbone_key(model: PreTrainedModel | type[PreTrainedModel], key: str) -> bool:
    """Whether a weight of this name comes with a backbone."""
    return key.split(".", 1)[0] in model.backbones and ".lora_" not in key


def keys_never_saved(model: PreTrainedModel) -> set[str]:
    """What the parts themselves leave out of any save, by its name in the whole."""
    return {
        f"{name}.{key}"
        for name, part in model.named_children()
        for key in getattr(part, "_keys_to_ignore_on_save", None) or ()
    }


def keys_not_to_miss(model: PreTrainedModel) -> set[str]:
    """`_keys_to_ignore_on_save`: Trainer does not warn that a checkpoint lacks exactly these when it restores it."""
    if why_not_thin(model):
        return keys_never_saved(model)
    return keys_never_saved(model) | {key for key in model.state_dict() if is_backbone_key(model, key)}


@contextmanager
def in_form(model: PreTrainedModel, form: str, state_dict: dict[str, torch.Tensor] | None) -> Iterator[dict]:
    """Within the block `model.config` and `_keys_to_ignore_on_save` are those of the save; its weights never change.

    Args:
        state_dict: what Trainer has gathered from several devices, or None.

    Yields:
        what `PreTrainedModel.save_pretrained` is to be called with.
    """
    config, not_to_miss, strayed = model.config, model._keys_to_ignore_on_save, strayed_backbones(model, form)
    model.config, model._keys_to_ignore_on_save = copy.deepcopy(config), keys_never_saved(model)
    model.config.saved_form = form
    for part, (_, prefix) in ((part, BACKBONES[part]) for part in model.backbones):
        if part in strayed:
            setattr(model.config, f"{prefix}_backbone", None)
            setattr(model.config, f"{prefix}_backbone_revision", None)
        # a path of this machine is nobody else's business
        getattr(model.config, f"{prefix}_config").name_or_path = getattr(model.config, f"{prefix}_backbone") or ""
    arguments: dict = {"state_dict": state_dict}
    try:
        if form == "thin":
            weights = model.state_dict() if state_dict is None else state_dict
            arguments["state_dict"] = {key: weights[key] for key in weights if not is_backbone_key(model, key)}
            arguments["save_original_format"] = False  # names as in memory: they are loaded by `load_state_dict`
            if quantizer_of(model) is not None and not quantizer_of(model).pre_quantized:
                del model.config.text_config.quantization_config  # how this process has loaded it is not what it is
        elif form == "merged" and config.lora_config is not None:
            arguments["state_dict"] = merge_lora(model)
            model.config.lora_config = None
        yield arguments
    finally:
        model.config, model._keys_to_ignore_on_save = config, not_to_miss


def merge_lora(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict of the model without LoRA that answers as `model` does: `W + scaling · B A`, as peft merges.

    A layer at a time is merged, on a copy: adding and subtracting again would not give back the weights bit for bit.

    Raises:
        ValueError: a merged weight is not finite, or is of a kind that peft cannot merge.
    """
    weights = dict(model.state_dict())
    for name, layer in lora_layers(model.language_model).items():
        merged = copy.deepcopy(layer)
        merged.merge(safe_merge=True, adapter_names=["default"])
        prefix = f"language_model.{name}."
        weights = {key: value for key, value in weights.items() if not key.startswith(prefix)}
        weights |= {prefix + key: value for key, value in merged.get_base_layer().state_dict().items()}
    return weights


def quantizer_of(model: PreTrainedModel):
    """transformers' quantizer of the language model, where it was loaded with one."""
    return getattr(getattr(model, "language_model", None), "hf_quantizer", None)


__all__ = ["BACKBONES", "in_form", "is_backbone_key", "keys_not_to_miss", "merge_lora", "resolve_form"]
