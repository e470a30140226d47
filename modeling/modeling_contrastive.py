"""The losses that align pictures and texts in stage 1 (BLIP-2, Li et al. 2023, section 3.1), as pure functions.

Pairs that share a caption are no negatives of each other. Pairs that share a picture are, as in BLIP-2's pretraining as
first released: no two processes, and no feature cache, know of pictures that they are one. Everything is in float32.

Shapes: B pairs of this process, N pairs of all processes, Q queries, E width of the space they are compared in.
"""

from typing import Any

import torch
from torch import nn

from .modeling_loss import in_process_group


def similarities(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """Cosines `(M, N)` of pictures `(M, Q, E)` and texts `(N, E)`, normalised: the nearest of the queries counts.

    They are float32, as `logits_per_image` of `transformers.Blip2ForImageTextRetrieval`.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):  # it would have the products in half precision
        return torch.einsum("mqe,ne->mqn", image_embeds.float(), text_embeds.float()).amax(dim=1)


def same_caption(input_ids: torch.Tensor) -> torch.Tensor:
    """`(N, N)` bool: whether two of N texts, `(N, T)` ids whose padding is one value, are the same."""
    ids = input_ids.float()  # whole numbers, exact below 2**24
    return torch.cdist(ids, ids, p=0) == 0  # how many places differ


def contrastive_loss(
    similarity: torch.Tensor,
    targets: torch.Tensor,
    candidates: torch.Tensor,
    logit_scale: torch.Tensor,
    label_smoothing: float = 0.1,
) -> torch.Tensor:
    """ITC in one direction: the mean over rows, where a row without candidates counts 0.

    Args:
        similarity: `(B, N)` cosines.
        targets: `(B,)` int64, the column of each row's own partner.
        candidates: `(B, N)` bool, the columns that are its negatives.
        logit_scale: scalar, one over the temperature.
        label_smoothing: the share of the label that is spread evenly over the row's own column and its candidates.
    """
    counted = candidates | nn.functional.one_hot(targets, similarity.shape[1]).bool()  # each row's own, too
    logits = (similarity.float() * logit_scale.float()).masked_fill(~counted, -torch.inf)
    log_probabilities = logits.log_softmax(dim=-1).masked_fill(~counted, 0.0)
    smooth = log_probabilities.sum(-1) / counted.sum(-1)
    nearest = log_probabilities.gather(1, targets[:, None]).squeeze(1)
    return -((1 - label_smoothing) * nearest + label_smoothing * smooth).mean()


def draw_negatives(
    logits: torch.Tensor, candidates: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a hard negative for each row, the likelier the more similar (ALBEF, section 3.2).

    Args:
        logits, candidates: `(B, N)` similarities over the temperature, and bool.

    Returns:
        `(B,)` bool, whether a row has a candidate, and `(B,)` int64, the column drawn for it (0 without one). Where
        `logits` are NaN any column is drawn: the loss, NaN as well, is what tells of it.
    """
    weights = logits.float().masked_fill(~candidates, -torch.inf).softmax(dim=1)
    # the floor, also BLIP-2's, keeps every candidate possible: a softmax may round all but one to 0
    weights = (weights + 1e-4).masked_fill(~candidates, 0.0)
    # as torch.multinomial draws, but for its check, which would stop one process and leave the others waiting for it
    negatives = (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(dim=1)
    return candidates.any(dim=1), negatives


def matching_loss(logits: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
    """ITM: cross-entropy of `(R, 2)` logits (no match, match) and `(R,)` 0 or 1, a scalar; -100 is left out."""
    return nn.functional.cross_entropy(logits.float(), matches)


def generation_loss(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.1) -> torch.Tensor:
    """ITG: cross-entropy of `(R, vocabulary)` logits and the `(R,)` tokens they predict (-100: none), a scalar."""
    return nn.functional.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def processes() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if in_process_group() else 1


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, `(B, …)` to `(N, …)` in their order, with gradients; of one, the tensor itself."""
    return tensor if processes() == 1 else _AllGather.apply(tensor.contiguous())


class _AllGather(torch.autograd.Function):
    """`all_gather` whose backward adds up what every process' loss asks of this process' rows."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
