"""Checks of pretrained parts in `from_backbones`, so that the trained model can be saved and reloaded.

The checks test signatures and outputs instead of listing model names, since each release of transformers has new
models.
"""

import inspect
from collections.abc import Collection
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ..configuration.configuration_lorgnette import SIZES
from ..modeling.modeling_base import KV_CACHE


def refuse_own_code(what: str, source: Any, auto_class: str, known_types: Collection[str], **keywords: Any) -> None:
    """Refuse a part with remote code: a saved model would not carry that code.

    A `model_type` that transformers knows loads with transformers' own code.

    Args:
        source: a Hub id or a folder, with `keywords` to find it; or a loaded model.
        auto_class: the Auto class that reads it, and `known_types`, its model types.

    Raises:
        ValueError: names the class, or the `model_type`.
    """
    if isinstance(source, PreTrainedModel):
        kinds = [
            kind for kind in (type(source), type(source.config)) if kind.__module__.split(".")[0] != "transformers"
        ]
        found = [f"{kind.__name__} is defined in {kind.__module__}" for kind in kinds]
        source = type(source).__name__
    else:
        fields = {} if "gguf_file" in keywords else PreTrainedConfig.get_config_dict(source, **keywords)[0]
        model_type, brought = str(fields.get("model_type")), fields.get("auto_map") or {}
        foreign = model_type not in CONFIG_MAPPING_NAMES or (auto_class in brought and model_type not in known_types)
        # a whole model of this package in a part's place is another error, which comes later
        foreign = foreign and brought and not model_type.startswith("lorgnette")
        found = [f'transformers has no {auto_class} for its model_type "{model_type}"'] if foreign else []
    if found:
        raise ValueError(
            f"The {what} {source} has code of its own ({found[0]}). A saved model would not bring that code along, and "
            "could not be loaded. Give a model whose classes are transformers' own; trust_remote_code does not help"
        )


@torch.no_grad()
def check_language_model(model: PreTrainedModel) -> None:
    """Check that a causal LM supports training and generation, by its signature and with eight tokens.

    Raises:
        ValueError: its forward does not take what it is given; it reads embeddings otherwise than their ids; later
            words change what it says after earlier ones, or the cache does; its loss is not of the next token; or a
            loaded model is of another class than a save of it.
    """
    name = type(model).__name__
    loaded_as = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    if loaded_as is None:
        raise ValueError(
            f"{name} cannot be joined: AutoModelForCausalLM, which loads the LM of a saved model, knows none of the "
            f'type "{model.config.model_type}"'
        )
    if type(model) is not loaded_as:
        raise ValueError(
            f"{name} would come back as {loaded_as.__name__} when the saved model is loaded: give a model that "
            "AutoModelForCausalLM has loaded"
        )
    if not hasattr(model.config, "vocab_size"):
        raise ValueError(f"{name} is no text-only LM: its config has no vocab_size. Give the language model in it")
    try:
        [getattr(model.config, field, None) for field in SIZES]
    except Exception as error:  # sizes that differ from layer to layer
        raise ValueError(f"{name} cannot be joined: its config has no one size for all layers: {error}") from error
    keywords = inspect.signature(type(model).forward).parameters
    lacking = [key for key in ("inputs_embeds", "attention_mask", "labels", KV_CACHE) if key not in keywords]
    if lacking:
        raise ValueError(
            f"{name} cannot be joined: its forward takes no {', '.join(lacking)}. Visual tokens go in as "
            f"inputs_embeds, and answers are generated with {KV_CACHE}"
        )
    table, was_training = model.get_input_embeddings(), model.training
    # in eval mode bitsandbytes repacks weights on a CPU, which changes the loaded ones
    if table.weight.is_meta or getattr(model, "hf_quantizer", None) is not None:
        return
    ids = torch.arange(8, device=table.weight.device)[None] + model.config.vocab_size // 2
    embeds, mask, labels = table(ids), torch.ones_like(ids), ids.clone()
    # no token's embedding, like visual tokens; passed as copies, since CTRL scales in place
    mixed = torch.cat([embeds[:, :1], (embeds[:, :6] + embeds[:, 1:7]) / 2, embeds[:, 7:]], dim=1)
    labels[:, :-1] = -100
    try:
        model.eval()
        by_ids = model(input_ids=ids, attention_mask=mask, return_dict=True).logits
        of_embeds = model(inputs_embeds=embeds.clone(), attention_mask=mask, return_dict=True).logits
        whole = model(
            inputs_embeds=mixed.clone(), attention_mask=mask, labels=labels, return_dict=True, use_cache=False
        )
        prefix = model(
            inputs_embeds=mixed[:, :-1].clone(), attention_mask=mask[:, :-1], return_dict=True, use_cache=True
        )
        if (cache := getattr(prefix, KV_CACHE, None)) is None:
            raise ValueError(f"it returns no {KV_CACHE}")
        cached = {KV_CACHE: cache, "use_cache": True, "return_dict": True}
        if "position_ids" in keywords:  # as `generate` passes them
            cached["position_ids"] = torch.full_like(ids[:, :1], ids.shape[1] - 1)
        rest = model(input_ids=ids[:, -1:], attention_mask=mask, **cached).logits
    except Exception as error:  # architectures raise different exceptions
        raise ValueError(
            f"{name} cannot be joined: it does not continue from embeddings with a mask and a cache: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        model.train(was_training)
    if whole.logits.dtype != torch.float32:
        return  # rounding is coarser, and may change a mixture of experts' choices
    next_token = torch.nn.functional.cross_entropy(whole.logits[:, -2], ids[:, -1])
    pairs = {
        "its logits of embeddings are not those of their ids": (of_embeds, by_ids),
        "later words change its logits after earlier ones, as in an encoder": (
            prefix.logits[:, -1],
            whole.logits[:, -2],
        ),
        "its logits with a cache are not those without": (rest[:, -1], whole.logits[:, -1]),
        "its loss is not the cross entropy of the next token": (whole.loss, next_token),
    }
    if getattr(model.config, "output_router_logits", False):  # the loss then includes the router's
        pairs.popitem()
    for what, (found, expected) in pairs.items():
        if (apart := (found - expected).abs().max() / expected.abs().max()) > 1e-3:
            raise ValueError(f"{name} cannot be joined: {what} (they differ by {apart:.1%})")


@torch.no_grad()
def check_vision_model(model: PreTrainedModel, layer: int | None = None) -> None:
    """Check a ViT with one picture, and with a batch of two.

    Args:
        layer: the `vision_feature_layer`.

    Raises:
        ValueError: the ViT cannot encode it, does not output a sequence of vectors with its config's width, or
            outputs another one the second time.
    """
    if model.device.type == "meta":
        return
    config, was_training = model.config, model.training
    patch = _sides(config.patch_size)
    height, width = _sides(getattr(config, "image_size", None) or [4 * side for side in patch])
    picture = torch.linspace(-1, 1, 3 * height * width).reshape(1, 3, height, width)
    inputs = {"pixel_values": picture.to(model.device, model.dtype)}
    if "spatial_shapes" in inspect.signature(model.forward).parameters:  # of variable resolution: 4 x 4 patches
        inputs["pixel_values"] = picture.flatten()[: 16 * 3 * patch[0] * patch[1]].reshape(1, 16, -1)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.device, model.dtype)
        inputs["pixel_attention_mask"] = torch.ones(1, 16, dtype=torch.long, device=model.device)
        inputs["spatial_shapes"] = torch.tensor([[4, 4]], device=model.device)
    shapes = {key: tuple(value.shape) for key, value in inputs.items()}
    # what it may draw is none of the caller's random numbers
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        try:
            model.eval()
            outputs = model(**inputs, output_hidden_states=layer is not None, return_dict=True)
            first, states = outputs.last_hidden_state, getattr(outputs, "hidden_states", None) or ()
            twice = {key: torch.cat([value, value]) for key, value in inputs.items()}
            second = model(**twice, return_dict=True).last_hidden_state
        except Exception as error:  # each architecture has its own way to say that it wants something else
            raise ValueError(
                f"{type(model).__name__} cannot look at a picture of {shapes}: {error or type(error).__name__}"
            ) from error
        finally:
            model.train(was_training)
    if first.ndim != 3 or first.shape[-1] != config.hidden_size:
        raise ValueError(
            f"{type(model).__name__} makes {tuple(first.shape)} of a picture; the Q-Former reads a sequence of vectors "
            f"of its hidden_size, (1, L, {config.hidden_size})"
        )
    if layer is not None and -len(states) <= layer < len(states):
        shape = tuple(states[layer].shape)
        if len(shape) != 3 or shape[-1] != config.hidden_size:
            raise ValueError(
                f"vision_feature_layer {layer} of {type(model).__name__} is {shape} of a picture; the Q-Former reads a "
                f"sequence of vectors of its hidden_size, (1, L, {config.hidden_size}): name another layer, or none"
            )
    if second.shape != (2, *first.shape[1:]):
        raise ValueError(
            f"{type(model).__name__} makes {tuple(first.shape)} of a picture, and {tuple(second.shape)} of two: the "
            "Q-Former reads a row a picture"
        )
    apart, largest = (first - second).abs().max(), first.abs().max()
    if apart > (1e-3 if first.dtype == torch.float32 else 5e-2) * largest:
        raise ValueError(
            f"{type(model).__name__} sees one picture differently each time (its features differ by {apart:.2g}, the "
            f"largest is {largest:.2g}): it draws random numbers, as masked autoencoders do. Give a model that does "
            "not: of a ViT-MAE, ViTModel.from_pretrained(…) is the encoder without the mask"
        )


def _sides(size: Any) -> list[int]:
    return list(size)[-2:] if isinstance(size, (list, tuple)) else [size, size]


__all__ = ["check_language_model", "check_vision_model", "refuse_own_code"]
