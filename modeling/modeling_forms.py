"""The forms in which a model is saved, and what each leaves out.

| form     | in the folder                                                        | loading it needs             |
|----------|----------------------------------------------------------------------|------------------------------|
| `thin`   | what trains; of the backbones their Hub ids and commits              | the backbones from the Hub   |
| `full`   | everything                                                           | nothing else                 |
| `merged` | everything, LoRA folded into the language model, which is then plain | nothing else, not even peft  |

`modeling_thin.py` loads the first; the others are loaded as transformers loads any model.
"""

import copy
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration.configuration_lorgnette import FORMS
from .modeling_lora import ADAPTER, lora_layers, outermost_lora_layers, without_lora


logger = logging.get_logger(__name__)

# A submodule that is a backbone -> how errors call it, and the prefix of the config's fields about it.
BACKBONES = {"language_model": ("language model", "text"), "vision_model": ("ViT", "vision")}


def resolve_form(model: PreTrainedModel, form: str | None, changed: list[str] | None = None) -> str:
    """The form that `model` is saved in where `form` is asked for, or nothing is; asked before it trains as well.

    Args:
        changed: see [`changed_backbone_weights`], which is called where this is left out.

    By default it is `thin` where every backbone is a Hub id with a commit, and `full` otherwise. A merged model has
    all its weights and no LoRA, unless it got another one since: whatever is asked for but `thin`, it is saved as
    `merged`.

    Raises:
        ValueError: no such form; one that this model cannot have, with the reason; no form can hold all of it.
    """
    if form is not None and form not in FORMS:
        raise ValueError(f"form is {form!r}; a model is saved as {', '.join(FORMS)}")
    lost = sorted(set(getattr(getattr(model, "language_model", None), "peft_config", ())) - {ADAPTER})
    if lost:
        raise ValueError(f"Adapters {lost} of the language model are not in lora_config, and would be lost")
    refuse_offloaded(model)
    obstacle = why_not_thin(model, changed_backbone_weights(model, None) if changed is None else changed)
    if form == "thin" and obstacle:
        raise ValueError(f"This model cannot be saved thin: {obstacle}")
    if form == "thin" or (form is None and not obstacle):
        return "thin"
    if quantizer_of(model) is not None:
        raise ValueError(
            f"The language model is quantised ({quantizer_of(model).quantization_config.quant_method}): only the thin "
            "form can be saved"
            + (f", and {obstacle}. Give from_backbones a Hub id, or no quantization_config" if obstacle else "")
        )
    if model.config.saved_form == "merged" and model.config.lora_config is None:
        return "merged"
    if form == "merged" and getattr(model.config, "lora_config", None) is None:
        raise ValueError("This model has no LoRA to merge: save it full")
    if form is None:
        logger.warning_once(f"Models are saved in full, with all weights of their backbones: {obstacle}")
    return form or "full"


def refuse_offloaded(model: PreTrainedModel) -> None:
    """Raises a ValueError where weights lie elsewhere than in the model, between two uses of them."""
    offloaded = [key for key, value in model.named_parameters() if value.is_meta]
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} weights are offloaded ({offloaded[0]}, …), and such a model is neither trained nor "
            "saved, nor given another LoRA: load it without device_map, or with one that offloads nothing"
        )


def why_not_thin(model: PreTrainedModel, changed: list[str]) -> str | None:
    """What keeps a model from being saved without its backbones, or None; see [`resolve_form`]."""
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
    if trained:
        return f"{len(trained)} weights of its backbones train ({trained[0]}, …)"
    if changed:
        return f"{len(changed)} weights of its backbones are no longer those that were loaded ({changed[0]}, …)"
    return None


def trained_backbone_weights(model: PreTrainedModel) -> list[str]:
    """The weights of backbones that have a gradient, and so are not, or will not be, what the Hub holds."""
    return [key for key, value in model.named_parameters() if value.requires_grad and is_backbone_key(model, key)]


def backbone_checksums(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """A checksum of each backbone weight among the whole model's `weights`, by its name without LoRA.

    Weights that are offloaded, in parts on several devices or packed by a quantizer are left out: they cannot train.
    """
    plain = {
        without_lora(key): value.data
        for key, value in weights.items()
        if is_backbone_key(model, key) and type(value) in (torch.Tensor, nn.Parameter)
        if value.is_floating_point() and not value.is_meta
    }
    with ThreadPoolExecutor(8) as threads:
        return dict(zip(plain, threads.map(_checksum, plain.values()), strict=True))


def _checksum(tensor: torch.Tensor) -> int:
    # CRC-32 depends on the order of the numbers, as a sum does not, and is the same wherever they lie
    return zlib.crc32(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())


def changed_backbone_weights(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor] | None) -> list[str]:
    """The weights of backbones that are not those that were loaded, whatever changed them, or that are gone.

    Args:
        state_dict: the whole model's, where it has been gathered from several devices.
    """
    loaded = model._backbone_checksums
    now = backbone_checksums(model, model.state_dict() if state_dict is None else state_dict) if loaded else {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    there = {without_lora(key) for key in (*now, *(state_dict or ()), *(key for key, _ in named))}
    gone = [key for key in loaded or () if key not in there]
    return [key for key, checksum in now.items() if loaded.get(key) != checksum] + gone


def keeping_checksums(model: PreTrainedModel, fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    """`fn` of an `nn.Module._apply` that takes new checksums of float32 weights which it casts to a narrower dtype.

    A reload in that dtype has the same weights. A reload in a wider one has others, and the checksum tells.
    """
    checksums, keys = model._backbone_checksums, {}
    if checksums:
        keys = {id(value): without_lora(key) for key, value in model.named_parameters()}
        keys |= {id(value): without_lora(key) for key, value in model.named_buffers()}

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        result, key = fn(tensor), keys.get(id(tensor))
        narrowed = key in checksums and tensor.dtype == torch.float32 != result.dtype and not tensor.is_meta
        if narrowed and checksums[key] == _checksum(tensor.data):
            checksums[key] = _checksum(result.data)
        return result

    return apply if checksums else fn


def strayed_backbones(model: PreTrainedModel, form: str, changed: list[str]) -> set[str]:
    """The backbones that are no longer what the config names, and whose save in `form` would not tell."""
    if not model.has_loaded_backbones:
        return set(model.backbones)
    strayed = {key.split(".", 1)[0] for key in (*trained_backbone_weights(model), *changed)}
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
    if why_not_thin(model, []):
        return keys_never_saved(model)
    return keys_never_saved(model) | {key for key in model.state_dict() if is_backbone_key(model, key)}


@contextmanager
def in_form(
    model: PreTrainedModel, form: str, changed: list[str], state_dict: dict[str, torch.Tensor] | None
) -> Iterator[dict]:
    """Within the block `model.config` and `_keys_to_ignore_on_save` are those of the save; its weights never change.

    Args:
        changed: see [`changed_backbone_weights`].
        state_dict: what Trainer has gathered from several devices, or None.

    Yields:
        what `PreTrainedModel.save_pretrained` is to be called with.
    """
    config, not_to_miss = model.config, model._keys_to_ignore_on_save
    strayed = strayed_backbones(model, form, changed)
    model.config, model._keys_to_ignore_on_save = copy.deepcopy(config), keys_never_saved(model)
    model.config.saved_form = form
    for part, (_, prefix) in ((part, BACKBONES[part]) for part in model.backbones):
        if part in strayed:
            setattr(model.config, f"{prefix}_backbone", None)
            setattr(model.config, f"{prefix}_backbone_revision", None)
        # a path of this machine is nobody else's business
        getattr(model.config, f"{prefix}_config").name_or_path = getattr(model.config, f"{prefix}_backbone") or ""
    # a copy: transformers takes out what it has written, and a push writes twice
    arguments: dict = {"state_dict": None if state_dict is None else dict(state_dict)}
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
        elif getattr(config, "lora_config", None) is not None:
            arguments["save_original_format"] = False  # which knows no LoRA: its names would not be found again
        yield arguments
    finally:
        model.config, model._keys_to_ignore_on_save = config, not_to_miss


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
            f"and rounding explains {allowed}. Save it with form='full'"
        )


def quantizer_of(model: PreTrainedModel):
    """transformers' quantizer of the language model, where it was loaded with one."""
    return getattr(getattr(model, "language_model", None), "hf_quantizer", None)


__all__ = [
    "BACKBONES",
    "backbone_checksums",
    "changed_backbone_weights",
    "in_form",
    "is_backbone_key",
    "keeping_checksums",
    "keys_never_saved",
    "keys_not_to_miss",
    "merge_lora",
    "quantizer_of",
    "refuse_offloaded",
    "resolve_form",
]
