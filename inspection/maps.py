"""Attribution maps over a picture: by query and layer, and by word of the answer.

*Queries.* The weights of the Q-Former's cross-attention, mean over heads.

*Words.* Attention rollout (Abnar & Zuidema 2020, equation 1) with heads weighted by their gradients as in Chefer et al.
2021 ("Generic Attention-model Explainability", equation 5): a layer mixes positions by `I + mean over heads of
(gradient ⊙ attention)⁺`, the gradient being that of the word's logits. The product over the language model's
layers attributes a word to visual tokens; the product over the Q-Former's layers, with its cross-attention added,
attributes visual tokens to patches. The product of both is the word's map.

The maps do not trace through the ViT, whose layers mix patches: a map shows which features were read, and not which
pixels the features depend on.

This file imports nothing of lorgnette: uploads also hold it for models that load with remote code.

Shapes: Q queries, L image tokens, h x w patches, S tokens, T of them the answer's.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class WordMap:
    """The attribution of one word of the answer.

    Args:
        text: the word, with the white space before it.
        probability: product over its tokens.
        visual_tokens: `(Q,)` shares of the visual tokens; they add up to 1.
        patches: `(h, w)` shares of the patches; with the shares of CLS and registers they add up to 1.
    """

    text: str
    probability: float
    visual_tokens: np.ndarray
    patches: np.ndarray


@dataclass(frozen=True)
class Attribution:
    """The attribution of the model's answer for one picture.

    Args:
        name: of the file or the row.
        picture: the ViT's input: resized, cropped, and denormalised.
        layers: numbers of the Q-Former's layers with cross-attention.
        queries: `(layers, Q, h, w)` attention, mean over heads.
        elsewhere: `(layers, Q)` attention to tokens that are not patches.
        answer: the greedily decoded answer.
        words: of the answer, in order; empty if the language model returns no attention maps.
    """

    name: str
    picture: Image.Image
    layers: tuple[int, ...]
    queries: np.ndarray
    elsewhere: np.ndarray
    answer: str
    words: tuple[WordMap, ...]


def maps_of(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompt: Mapping[str, torch.Tensor],
    answer: str,
    max_words: int = 8,
    name: str = "a picture",
) -> Attribution:
    """Attribute the model's own answer to its picture; of several pictures, to the first.

    Switches to `attn_implementation="eager"` meanwhile.

    Args:
        model: a `LorgnetteForConditionalGeneration` in eval mode.
        processor: its `LorgnetteProcessor`.
        prompt: one row with a picture, on the model's device: the inputs of `generate`.
        answer: the generated text.
        max_words: attribute at most so many words.
        name: of the picture.
    """
    answer_ids = processor.encode_answer(answer) if answer else []
    with eager_attention(model), torch.enable_grad(), query_gradients(model):
        return _attribute(model, processor, name, prompt, answer, answer_ids, max_words)


def _attribute(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    name: str,
    prompt: Mapping[str, torch.Tensor],
    answer: str,
    answer_ids: list[int],
    max_words: int,
) -> Attribution:
    queries = model.config.num_query_tokens
    image = {k: v for k, v in prompt.items() if k not in ("input_ids", "attention_mask", "qformer_input_ids",
                                                           "qformer_attention_mask")}  # fmt: skip
    instruction = {k: v for k, v in prompt.items() if k.startswith("qformer_")}
    features = model.get_vision_features(
        **{key: value for key, value in image.items() if key != "image_rows"}
    ).last_hidden_state  # (N, L, E)
    first, (height, width) = _patches(model, image, features.shape[1])
    vision = model.get_image_features(
        vision_features=features,
        pixel_attention_mask=image.get("pixel_attention_mask"),
        image_rows=image.get("image_rows"),
        output_attentions=True,
        **instruction,
    )
    cross = list(vision.qformer_outputs.cross_attentions)  # (N, heads, Q, L) each
    own = list(vision.qformer_outputs.attentions)  # (N, heads, Q + T, Q + T) each
    query_maps = torch.stack([layer[0].detach().float().mean(0) for layer in cross])  # (layers, Q, L)
    patches = query_maps[..., first : first + height * width].unflatten(-1, (height, width))

    ids = torch.cat([prompt["input_ids"], torch.tensor([answer_ids], device=model.device, dtype=torch.long)], dim=1)
    placeholders = ids == model.config.image_token_id
    embedded = model.get_input_embeddings()(ids.masked_fill(placeholders, 0))
    embedded = embedded.masked_scatter(placeholders.unsqueeze(-1), vision.pooler_output.to(embedded))
    outputs = model.language_model(
        inputs_embeds=embedded, attention_mask=torch.ones_like(ids), use_cache=False, output_attentions=True
    )
    words = []
    self_attention = [layer for layer in outputs.attentions or () if layer is not None]  # (1, heads, S, S) each
    cross_layers = [number for number, layer in enumerate(model.qformer.encoder.layer) if layer.has_cross_attention]
    start, positions = prompt["input_ids"].shape[1], placeholders[0].nonzero()[:queries, 0]
    for text, tokens in _words(processor, answer_ids)[:max_words] if self_attention else []:
        before = torch.arange(start - 1 + tokens.start, start - 1 + tokens.stop, device=model.device)
        word_ids = ids[0, before + 1]
        logits = outputs.logits[0, before]  # (T', vocabulary)
        chosen = logits.gather(1, word_ids[:, None]).sum()
        gradients = torch.autograd.grad(chosen, [*self_attention, *own, *cross], retain_graph=True)
        mixes = [
            (gradient.float() * weights.detach().float()).clamp(min=0)[0].mean(0)
            for gradient, weights in zip(gradients, [*self_attention, *own, *cross], strict=True)
        ]
        visual = rollout(mixes[: len(self_attention)])[before][:, positions].sum(0)  # (Q,)
        of_qformer = mixes[len(self_attention) : len(self_attention) + len(own)]
        read = rollout_to_image(of_qformer, mixes[-len(cross) :], cross_layers, queries)
        visual, read = _shares(visual), _shares(visual @ read)
        words.append(
            WordMap(
                text,
                logits.float().log_softmax(-1).gather(1, word_ids[:, None]).sum().exp().item(),
                visual.cpu().numpy(),
                read[first : first + height * width].unflatten(0, (height, width)).cpu().numpy(),
            )
        )
    return Attribution(
        name,
        denormalized_picture(processor, image, (height, width), _patch_size(model)),
        tuple(cross_layers),
        patches.cpu().numpy(),
        (1 - patches.sum((-1, -2))).clamp(min=0).cpu().numpy(),
        answer,
        tuple(words),
    )


def rollout(mixes: Sequence[torch.Tensor]) -> torch.Tensor:
    """`(S, S)` attention rollout: the product of `I + A` over all layers.

    Args:
        mixes: `(S, S)` for each layer in order; rows attend to columns.
    """
    relevance = torch.eye(len(mixes[0]), device=mixes[0].device)
    for mix in mixes:
        relevance = relevance + mix @ relevance
    return relevance


def rollout_to_image(
    own: Sequence[torch.Tensor], cross: Sequence[torch.Tensor], cross_layers: Sequence[int], queries: int
) -> torch.Tensor:
    """`(Q, L)` rollout of each query to the image tokens.

    Args:
        own: `(Q + T, Q + T)` self-attention of each layer; queries first, then T tokens of an instruction.
        cross: `(Q, L)` cross-attention of each layer that has any.
        cross_layers: the numbers of those layers.
        queries: Q.
    """
    read = torch.zeros(own[0].shape[0], cross[0].shape[1], device=own[0].device)
    cross_of = dict(zip(cross_layers, cross, strict=True))
    for number, mix in enumerate(own):
        read = read + mix @ read
        if number in cross_of:
            read = torch.cat([read[:queries] + cross_of[number][:queries], read[queries:]])
    return read[:queries]


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch language model and Q-Former to eager attention, which returns its weights; restore at the end."""
    parts: list[Any] = [model.language_model, model.qformer]
    before = [part.config._attn_implementation for part in parts]
    try:
        for part in parts:
            part.set_attn_implementation("eager")
        yield
    finally:
        for part, attention in zip(parts, before, strict=True):
            part.set_attn_implementation(attention)


@contextmanager
def query_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Enable gradients of the queries, which all attention maps depend on; restore at the end."""
    queries = model.qformer.query_tokens.weight
    trains = queries.requires_grad
    try:
        queries.requires_grad_(True)
        yield
    finally:
        queries.requires_grad_(trains)


def denormalized_picture(
    processor: ProcessorMixin, image: Mapping[str, torch.Tensor], grid: tuple[int, int], patch: tuple[int, int]
) -> Image.Image:
    """The first picture of a batch, denormalised.

    Args:
        image: `pixel_values` `(N, 3, H, W)`, or `(N, patches, values)` for SigLIP2's variable resolution.
        grid: number of patches (height, width).
        patch: pixels of a patch (height, width).
    """
    pixels = image["pixel_values"][0].float().cpu()
    if pixels.ndim == 2:
        pixels = pixels[: grid[0] * grid[1]].unflatten(0, grid).unflatten(-1, (*patch, -1))  # (h, w, p, p, 3)
        pixels = pixels.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)  # (3, H, W)
    settings = processor.image_processor
    rescaled = getattr(settings, "do_rescale", True)
    if getattr(settings, "do_normalize", False):
        rescaled = rescaled or max(settings.image_mean) <= 1  # the inputs were floats from 0 to 1
        mean, std = (torch.tensor(list(value)).view(-1, 1, 1) for value in (settings.image_mean, settings.image_std))
        pixels = pixels * std + mean
    levels = 255 if rescaled else 1
    pixels = (pixels * levels).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _patches(model: PreTrainedModel, image: Mapping[str, torch.Tensor], tokens: int) -> tuple[int, tuple[int, int]]:
    """The index of the first patch among the image tokens, and the grid (height, width)."""
    if "spatial_shapes" in image:
        height, width = image["spatial_shapes"][0].tolist()
        return 0, (height, width)
    high, wide = _patch_size(model)
    height, width = image["pixel_values"].shape[-2] // high, image["pixel_values"].shape[-1] // wide
    return tokens - height * width, (height, width)  # CLS and registers come first


def _patch_size(model: PreTrainedModel) -> tuple[int, int]:
    size = model.config.vision_config.patch_size
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


def _words(processor: ProcessorMixin, answer_ids: list[int]) -> list[tuple[str, range]]:
    """The words of an answer and their token ranges, up to the first special token."""
    words: list[tuple[str, range]] = []
    special = set(processor.tokenizer.all_special_ids) | set(processor.stop_token_ids)
    decoded, first = "", 0
    for position, token in enumerate(answer_ids):
        if token in special:
            break
        longer = processor.tokenizer.decode(answer_ids[: position + 1])
        if longer.endswith("\ufffd"):  # half a character
            continue
        piece, decoded = longer[len(decoded) :], longer
        if words and not piece[:1].isspace():
            text, tokens = words[-1]
            words[-1] = (text + piece, range(tokens.start, position + 1))
        else:
            words.append((piece, range(first, position + 1)))
        first = position + 1
    return words


def _shares(values: torch.Tensor) -> torch.Tensor:
    total = values.sum()
    return values / total if total > 0 else values


__all__ = [
    "Attribution",
    "WordMap",
    "denormalized_picture",
    "eager_attention",
    "maps_of",
    "rollout",
    "rollout_to_image",
]
