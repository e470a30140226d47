"""A model's components, their sources, and the shapes of the tensors between them."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..processing.processing_lorgnette import LorgnetteProcessor
from .checks import PARTS, part_of, preserved_state


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Args:
        name: `ViT`, `queries`, `Q-Former`, `projector`, `language model` or `LoRA`.
        kind: its class.
        parameters, trainable: number of all and of trainable parameters.
        bytes: size of its parameters.
        dtypes, devices: of its parameters.
        source: the origin of its weights.
    """

    name: str
    kind: str
    parameters: int
    trainable: int
    bytes: int
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class FlowTensor:
    """A tensor between picture and text, and the part that outputs it.

    Args:
        what: `pixel values`, `features` …
        shape: for one picture in one prompt, without the batch dimension.
        part: the part that outputs it; None for the processor's outputs.
    """

    what: str
    shape: tuple[int, ...]
    part: str | None = None


def parts(model: LorgnetteForConditionalGeneration) -> list[Part]:
    """The model's parts in the order of the data flow. A tensor that two parts share counts once."""
    found = defaultdict(list)
    for name, parameter in model.named_parameters():
        found[part_of(name)].append(parameter)
    kinds = {name: type(model.get_submodule(top)).__name__ for top, name in PARTS.items()}
    lora = model.config.lora_config or {}
    kinds |= {"queries": "Embedding", "LoRA": f"r = {lora.get('r', 8)}, {_targets(lora.get('target_modules'))}"}
    order = ["ViT", "queries", "Q-Former", "projector", "language model", "LoRA"]
    return [
        Part(
            name,
            kinds.get(name, ""),
            sum(parameter.numel() for parameter in found[name]),
            sum(parameter.numel() for parameter in found[name] if parameter.requires_grad),
            sum(parameter.numel() * parameter.element_size() for parameter in found[name]),
            tuple(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in found[name]})),
            tuple(sorted({str(parameter.device) for parameter in found[name]})),
            _source(model, name),
        )
        for name in order
        if found[name]
    ]


def flow(model: LorgnetteForConditionalGeneration, processor: LorgnetteProcessor) -> list[FlowTensor]:
    """The tensors between picture and text, measured on a grey square and the processor's default prompt."""
    grey = Image.fromarray(np.full((64, 64, 3), 128, dtype=np.uint8))
    inputs = {name: value.to(model.device) for name, value in processor(images=grey, return_tensors="pt").items()}
    with preserved_state(model), torch.no_grad():
        pictures = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        vision = model.get_image_features(**pictures)
        logits = model(**inputs).logits
    queries = vision.qformer_outputs.last_hidden_state[:, : model.config.num_query_tokens]
    return [
        FlowTensor("pixel values", tuple(inputs["pixel_values"].shape[1:])),
        FlowTensor("features", tuple(vision.last_hidden_state.shape[1:]), "ViT"),
        FlowTensor("query outputs", tuple(queries.shape[1:]), "Q-Former"),
        FlowTensor("visual tokens", tuple(vision.pooler_output.shape[1:]), "projector"),
        FlowTensor("embeddings of the prompt", (logits.shape[1], model.get_input_embeddings().embedding_dim)),
        FlowTensor("logits", tuple(logits.shape[1:]), "language model"),
    ]


def _source(model: LorgnetteForConditionalGeneration, part: str) -> str:
    field = {"ViT": "vision_backbone", "language model": "text_backbone", "Q-Former": "qformer_backbone"}.get(part)
    name = getattr(model.config, field) if field else None
    revision = getattr(model.config, f"{field}_revision") if field else None
    if part == "Q-Former" and name:
        return f"initialised from {name}" + (f" @ {revision[:8]}" if revision else "")
    if name:
        return name + (f" @ {revision[:8]}" if revision else "")
    folder = model.name_or_path or "made in memory"
    return f"{folder} (no Hub id is recorded)" if part in ("ViT", "language model") else folder


def _targets(targets: Any) -> str:
    return ", ".join(targets) if isinstance(targets, (list, tuple, set)) else str(targets)
