"""Which text fits which picture: retrieval with a stage-1 model, by ITC, re-ranked by ITM (BLIP-2, section 4.4)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .modeling_checks import check_finite
from .modeling_contrastive import similarities


RERANKED = 128  # candidates that ITM looks at, as in BLIP-2's evaluation


@torch.no_grad()
def retrieve(
    model: PreTrainedModel,
    images: Iterable[Any] | torch.Tensor,
    texts: Iterable[str],
    *,
    rerank: bool | int = False,
    processor: Any = None,
    batch_size: int = 32,
) -> torch.Tensor:
    """How well each text fits each picture. Sort along either axis.

    Args:
        model: a [`LorgnetteForImageTextRetrieval`].
        images: M pictures, of any kind that [`LorgnetteProcessor`] takes; or the ViT's features of them, `(M, L, E)`.
            An iterator is read to its end.
        texts: N strings; or an iterator over them.
        rerank: let ITM score the best pairs: of each picture its nearest texts and of each text its nearest pictures,
            128 each as in BLIP-2 (appendix), or this number. They come before all other pairs.
        processor: by default the one that the model was joined with or loaded beside.
        batch_size: pictures, texts or pairs at a time.

    Returns:
        `(M, N)` float32 on the CPU: cosines, from -1 to 1; where re-ranked, 2 + the cosine + ITM's probability.

    Raises:
        TypeError: one string, picture or dict in place of a list of them.
        ValueError: nothing to compare; a model without ITC, or, to re-rank, without ITM; no processor known, or one
            that does not fit.
    """
    images, texts = _listed("images", images), _listed("texts", texts)
    if rerank:
        model.require_loss("itm_weight", "nothing can re-rank")
    if len(images) == 0 or len(texts) == 0:
        raise ValueError(f"{len(images)} images and {len(texts)} texts: there is nothing to compare")
    processor = model._known_processor() if processor is None else processor
    model.check_processor(processor)
    count, was_training = (RERANKED if rerank is True else int(rerank)), model.training
    model.eval()  # in the middle of training, too
    try:
        return _score(model, images, texts, count, processor, batch_size)
    finally:
        model.train(was_training)


def _score(
    model: PreTrainedModel,
    images: Sequence[Any] | torch.Tensor,
    texts: Sequence[str],
    rerank: int,
    processor: Any,
    batch_size: int,
) -> torch.Tensor:
    encoded = processor(text=list(texts), padding=True, return_tensors="pt").to(model.device)
    text_embeds = torch.cat(
        [model.embed_texts(**take_rows(encoded, rows)) for rows in _batches(len(texts), batch_size, "texts")]
    )
    scores, kept = [], []
    for rows in _batches(len(images), batch_size, "images"):
        if isinstance(images, torch.Tensor):
            inputs = {"vision_features": images[rows].to(model.device)}
        else:
            inputs = processor(images=[images[row] for row in rows], return_tensors="pt").to(model.device)
        names = ("pixel_values", "vision_features", "pixel_attention_mask", "spatial_shapes")
        pixel_values, vision_features, mask, spatial_shapes = (inputs.get(name) for name in names)
        check_finite(pixel_values if vision_features is None else vision_features, None, None)
        features = model.vision_features_of(pixel_values, vision_features, mask, spatial_shapes)
        image = {"encoder_hidden_states": features, "encoder_attention_mask": mask}
        scores.append(similarities(model.embed_images(image), text_embeds))
        if rerank:
            # off the device, for they may be many
            kept.append({name: None if tensor is None else tensor.cpu() for name, tensor in image.items()})
    scores = torch.cat(scores)
    if rerank:
        pairs = _best_pairs(scores, rerank)  # (R, 2)
        stored = {name: None if kept[0][name] is None else torch.cat([part[name] for part in kept]) for name in kept[0]}
        for rows in _batches(len(pairs), batch_size, "pairs"):
            at = pairs[rows].T
            image = {
                name: None if tensor is None else tensor.to(model.device)
                for name, tensor in take_rows(stored, at[0].cpu()).items()
            }
            logits = model.match_logits(image, take_rows(encoded, at[1]))
            scores[at[0], at[1]] += 2 + logits.float().softmax(dim=-1)[:, 1]
    return scores.cpu()


def _listed(name: str, given: Any) -> Any:
    """What has a length and is looked up by position; iterators are read into a list."""
    if isinstance(given, str):
        raise TypeError(f"{name} is one string ({given[:100]!r}); a list is needed")
    if isinstance(given, (bytes, bytearray, Mapping)) or not (isinstance(given, Iterable) or hasattr(given, "__len__")):
        raise TypeError(f"{name} is a {type(given).__name__}; a list is needed")
    if hasattr(given, "iloc"):  # pandas looks up by label
        return given.tolist()
    return given if hasattr(given, "__len__") and hasattr(given, "__getitem__") else list(given)


def take_rows(tensors: Mapping[str, torch.Tensor | None], rows: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """The same rows of every tensor; None stays None."""
    return {name: None if tensor is None else tensor[rows] for name, tensor in tensors.items()}


def _batches(count: int, size: int, unit: str) -> Iterator[torch.Tensor]:
    rows = torch.arange(count).split(size)
    return iter(logging.tqdm(rows, desc=f"reading {unit}", disable=None if len(rows) > 1 else True))


def _best_pairs(scores: torch.Tensor, count: int) -> torch.Tensor:
    """`(R, 2)`: rows and columns of the `count` highest scores in each row and in each column."""
    best = torch.zeros_like(scores, dtype=torch.bool)
    best.scatter_(1, scores.topk(min(count, scores.shape[1]), dim=1).indices, True)
    best.scatter_(0, scores.topk(min(count, scores.shape[0]), dim=0).indices, True)
    return best.nonzero()


__all__ = ["retrieve", "take_rows"]
