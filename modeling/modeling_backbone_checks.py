"""What is asked of a pretrained part at the join, so that what is trained later can be saved, and loaded the same.

Signatures and one picture are asked, not lists of names: transformers has other models in each release.
"""

import inspect
from collections.abc import Collection
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .modeling_outputs_lorgnette import KV_CACHE


def refuse_own_code(what: str, source: Any, auto_class: str, known: Collection[str], **keywords: Any) -> None:
    """Refuse a part whose code is not a part of transformers: it would not be there where the saved model is loaded.

    A repository whose `model_type` transformers knows is read by transformers' own code, whatever else lies there.

    Args:
        source: a Hub id or a folder, with `keywords` to find it; or a loaded model.
        auto_class: the Auto class that reads it, and `known`, the model types that this class knows.

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
        foreign = model_type not in CONFIG_MAPPING_NAMES or (auto_class in brought and model_type not in known)
        # a whole model of this package in a part's place is another error, which comes later
        foreign = foreign and brought and not model_type.startswith("lorgnette")
        found = [f'transformers has no {auto_class} for its model_type "{model_type}"'] if foreign else []
    if found:
        raise ValueError(
            f"The {what} {source} has code of its own ({found[0]}). A saved model would not bring that code along, and "
            "could not be loaded. Give a model whose classes are transformers' own; trust_remote_code does not help"
        )


def check_language_model(model: PreTrainedModel) -> None:
    """Ask a causal LM whether it takes embeddings, a mask and a cache, as training and generation give them.

    Raises:
        ValueError: names what its forward does not take; or a loaded model is of another class than a save of it.
    """
    loaded_as = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    if type(model) is not loaded_as:
        raise ValueError(
            f"{type(model).__name__} would come back as {loaded_as and loaded_as.__name__} when the saved model is "
            "loaded: give a model that AutoModelForCausalLM has loaded"
        )
    keywords = inspect.signature(type(model).forward).parameters
    lacking = [name for name in ("inputs_embeds", "attention_mask", "labels", KV_CACHE) if name not in keywords]
    if lacking:
        raise ValueError(
            f"{type(model).__name__} cannot be joined: its forward takes no {', '.join(lacking)}. Visual tokens go in "
            f"as inputs_embeds, and answers are generated with {KV_CACHE}"
        )


@torch.no_grad()
def check_vision_model(model: PreTrainedModel) -> None:
    """Look at one picture twice.

    Raises:
        ValueError: the ViT cannot look at it, gives no sequence of vectors as wide as its config says, or gives another
            one the second time.
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
            first, second = (model.eval()(**inputs, return_dict=True).last_hidden_state for _ in range(2))
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
    apart = (first - second).abs().max() if first.shape == second.shape else torch.inf
    if apart > 1e-3 * first.abs().max():
        raise ValueError(
            f"{type(model).__name__} sees one picture differently each time (its features differ by {apart:.2g}, the "
            f"largest is {first.abs().max():.2g}): it draws random numbers, as masked autoencoders do. Give a model "
            "that does not: of a ViT-MAE, ViTModel.from_pretrained(…) is the encoder without the mask"
        )


def _sides(size: Any) -> list[int]:
    return list(size)[-2:] if isinstance(size, (list, tuple)) else [size, size]


__all__ = ["check_language_model", "check_vision_model", "refuse_own_code"]
