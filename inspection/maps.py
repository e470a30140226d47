"""Where in a picture the model looks: by query and layer, and for a word of its answer.

*Queries.* The weights of the Q-Former's cross-attention, mean over heads.

*Words.* Attention rollout (Abnar & Zuidema 2020, equation 1) with each head weighed by its gradient as Chefer et al.
2021 ("Generic Attention-model Explainability", equation 5) do: a layer mixes positions by `I + mean over heads of
(gradient ⊙ attention)⁺`, the gradient being that of the word's logits. The layers of the language model, multiplied,
say from which soft tokens a word was read; those of the Q-Former, with its cross-attention adding what is read from the
picture, from which patches each soft token was. One product of both is the word's map.

A patch's feature has seen the whole picture, since the ViT's own layers mix patches and are not followed: a map says
where features were read, and not where in the picture all that is in them came from.

Nothing of lorgnette is imported here: this file also goes to where a model's code is remote code.

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
    """Where a word of the answer was read from.

    Args:
        text: the word, with the white space before it.
        probability: of its tokens, one after the other.
        soft: `(Q,)` shares of the soft tokens; they add up to 1.
        patches: `(h, w)` shares of the patches; they and what was read elsewhere (CLS, registers) add up to 1.
    """

    text: str
    probability: float
    soft: np.ndarray
    patches: np.ndarray


@dataclass(frozen=True)
class Look:
    """How the model looks at one picture.

    Args:
        name: of the file that was given, or of the row.
        picture: as the ViT sees it: resized, cropped, and back from its normalisation.
        layers: numbers of the Q-Former's layers that look at the picture.
        queries: `(layers, Q, h, w)` attention, mean over heads.
        elsewhere: `(layers, Q)` attention to tokens that are no patches.
        answer: what the model says, decoded greedily.
        words: of the answer, in their order; none where the language model has no attention maps.
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
) -> Look:
    """See where the model looked for an answer of its own; of several pictures, at the first.

    Attention is computed plainly (`attn_implementation="eager"`) meanwhile, whatever the model has otherwise.

    Args:
        model: a `LorgnetteForConditionalGeneration` in eval mode.
        processor: its `LorgnetteProcessor`.
        prompt: one row with a picture, on the model's device: what `generate` was given.
        answer: what it said.
        max_words: of the answer that are followed back.
        name: of the picture.
    """
    answer_ids = processor.encode_answer(answer) if answer else []
    with plain_attention(model), torch.enable_grad(), followed(model):
        return _look(model, processor, name, prompt, answer, answer_ids, max_words)


def _look(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    name: str,
    prompt: Mapping[str, torch.Tensor],
    answer: str,
    answer_ids: list[int],
    max_words: int,
) -> Look:
    queries = model.config.num_query_tokens
    image = {k: v for k, v in prompt.items() if k not in ("input_ids", "attention_mask", "qformer_input_ids",
                                                           "qformer_attention_mask")}  # fmt: skip
    told = {k: v for k, v in prompt.items() if k.startswith("qformer_")}
    features = model.get_vision_features(
        **{key: value for key, value in image.items() if key != "image_rows"}
    ).last_hidden_state  # (N, L, E)
    first, (height, width) = _patches(model, image, features.shape[1])
    seen = model.get_image_features(
        vision_features=features,
        pixel_attention_mask=image.get("pixel_attention_mask"),
        image_rows=image.get("image_rows"),
        output_attentions=True,
        **told,
    )
    cross = list(seen.qformer_outputs.cross_attentions)  # (N, heads, Q, L) each
    own = list(seen.qformer_outputs.attentions)  # (N, heads, Q + T, Q + T) each
    looks = torch.stack([layer[0].detach().float().mean(0) for layer in cross])  # (layers, Q, L)
    patches = looks[..., first : first + height * width].unflatten(-1, (height, width))

    ids = torch.cat([prompt["input_ids"], torch.tensor([answer_ids], device=model.device, dtype=torch.long)], dim=1)
    placeholders = ids == model.config.image_token_id
    embedded = model.get_input_embeddings()(ids.masked_fill(placeholders, 0))
    embedded = embedded.masked_scatter(placeholders.unsqueeze(-1), seen.pooler_output.to(embedded))
    outputs = model.language_model(
        inputs_embeds=embedded, attention_mask=torch.ones_like(ids), use_cache=False, output_attentions=True
    )
    words = []
    spoken = [layer for layer in outputs.attentions or () if layer is not None]  # (1, heads, S, S) each
    with_image = [number for number, layer in enumerate(model.qformer.encoder.layer) if layer.has_cross_attention]
    start, places = prompt["input_ids"].shape[1], placeholders[0].nonzero()[:queries, 0]
    for text, tokens in _words(processor, answer_ids)[:max_words] if spoken else []:
        before = torch.arange(start - 1 + tokens.start, start - 1 + tokens.stop, device=model.device)
        said = ids[0, before + 1]
        logits = outputs.logits[0, before]  # (T', vocabulary), what these tokens were chosen from
        chosen = logits.gather(1, said[:, None]).sum()
        gradients = torch.autograd.grad(chosen, [*spoken, *own, *cross], retain_graph=True)
        mixes = [
            (gradient.float() * weights.detach().float()).clamp(min=0)[0].mean(0)
            for gradient, weights in zip(gradients, [*spoken, *own, *cross], strict=True)
        ]
        soft = rollout(mixes[: len(spoken)])[before][:, places].sum(0)  # (Q,)
        read = read_from_picture(mixes[len(spoken) : len(spoken) + len(own)], mixes[-len(cross) :], with_image, queries)
        soft, read = _shares(soft), _shares(soft @ read)
        words.append(
            WordMap(
                text,
                logits.float().log_softmax(-1).gather(1, said[:, None]).sum().exp().item(),
                soft.cpu().numpy(),
                read[first : first + height * width].unflatten(0, (height, width)).cpu().numpy(),
            )
        )
    return Look(
        name,
        picture_seen(processor, image, (height, width), _patch_size(model)),
        tuple(with_image),
        patches.cpu().numpy(),
        (1 - patches.sum((-1, -2))).clamp(min=0).cpu().numpy(),
        answer,
        tuple(words),
    )


def rollout(mixes: Sequence[torch.Tensor]) -> torch.Tensor:
    """`(S, S)` what each position of the last layer holds of each of the first: the product of `I + A` of all layers.

    Args:
        mixes: `(S, S)` for each layer, from the first on, rows reading from columns.
    """
    relevance = torch.eye(len(mixes[0]), device=mixes[0].device)
    for mix in mixes:
        relevance = relevance + mix @ relevance
    return relevance


def read_from_picture(
    own: Sequence[torch.Tensor], cross: Sequence[torch.Tensor], with_image: Sequence[int], queries: int
) -> torch.Tensor:
    """`(Q, L)` what each query holds of each image token after the last layer.

    Args:
        own: `(Q + T, Q + T)` self-attention of each layer; queries come first, and T tokens of an instruction after.
        cross: `(Q, L)` cross-attention of each layer that has any.
        with_image: the numbers of those layers.
        queries: Q.
    """
    read = torch.zeros(own[0].shape[0], cross[0].shape[1], device=own[0].device)
    looks = dict(zip(with_image, cross, strict=True))
    for number, mix in enumerate(own):
        read = read + mix @ read
        if number in looks:
            read = torch.cat([read[:queries] + looks[number][:queries], read[queries:]])
    return read[:queries]


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Language model and Q-Former compute attention so that its weights can be had; afterwards as before."""
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
def followed(model: PreTrainedModel) -> Iterator[None]:
    """Gradients come as far as the queries, from which all attention maps are made, whether or not these train."""
    queries = model.qformer.query_tokens.weight
    trains = queries.requires_grad
    try:
        queries.requires_grad_(True)
        yield
    finally:
        queries.requires_grad_(trains)


def picture_seen(
    processor: ProcessorMixin, image: Mapping[str, torch.Tensor], grid: tuple[int, int], patch: tuple[int, int]
) -> Image.Image:
    """The first picture of a batch as the ViT sees it: what was normalised is brought back to colours.

    Args:
        image: `pixel_values` `(N, 3, H, W)`, or `(N, patches, values)` for SigLIP2's variable resolution.
        grid: patches high and wide.
        patch: pixels of a patch, high and wide.
    """
    pixels = image["pixel_values"][0].float().cpu()
    if pixels.ndim == 2:
        pixels = pixels[: grid[0] * grid[1]].unflatten(0, grid).unflatten(-1, (*patch, -1))  # (h, w, p, p, 3)
        pixels = pixels.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)  # (3, H, W)
    settings = processor.image_processor
    rescaled = getattr(settings, "do_rescale", True)
    if getattr(settings, "do_normalize", False):
        rescaled = rescaled or max(settings.image_mean) <= 1  # floats from 0 to 1 were given
        mean, std = (torch.tensor(list(value)).view(-1, 1, 1) for value in (settings.image_mean, settings.image_std))
        pixels = pixels * std + mean
    levels = 255 if rescaled else 1
    pixels = (pixels * levels).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _patches(model: PreTrainedModel, image: Mapping[str, torch.Tensor], tokens: int) -> tuple[int, tuple[int, int]]:
    """Which of the image tokens is the first patch, and how many there are, high and wide."""
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
    """The words of an answer and the tokens that each is made of; what ends the answer is none."""
    words: list[tuple[str, range]] = []
    special = set(processor.tokenizer.all_special_ids) | set(processor.stop_token_ids)
    said, first = "", 0
    for place, token in enumerate(answer_ids):
        if token in special:
            break
        longer = processor.tokenizer.decode(answer_ids[: place + 1])
        if longer.endswith("\ufffd"):  # half a character
            continue
        piece, said = longer[len(said) :], longer
        if words and not piece[:1].isspace():
            text, tokens = words[-1]
            words[-1] = (text + piece, range(tokens.start, place + 1))
        else:
            words.append((piece, range(first, place + 1)))
        first = place + 1
    return words


def _shares(values: torch.Tensor) -> torch.Tensor:
    total = values.sum()
    return values / total if total > 0 else values


__all__ = ["Look", "WordMap", "maps_of", "picture_seen", "plain_attention", "read_from_picture", "rollout"]
