"""The losses that align pictures and texts in stage 1 (BLIP-2, Li et al. 2023, section 3.1), as pure functions.

A text and its picture are a pair. All texts of a picture are its positives, as in LAVIS' fine-tuning on COCO. A text
with another picture and the caption of one of them is neither a positive nor a negative. Everything is in float32.

Shapes: T texts (and so pairs) and M pictures of this process, N texts of all processes, S text tokens, Q queries, E the
width of the space they are compared in.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..configuration.configuration_lorgnette import from_package
from .modeling_checks import IGNORED, value_check
from .modeling_loss import POSITIONS_MULTIPLE, in_process_group


@value_check
def checked_pairs(
    attention_mask: torch.Tensor,
    pictures: torch.Tensor,
    image_rows: torch.Tensor | None,
    candidates: torch.Tensor | None,
    process: torch.Tensor | None,
    matched: torch.Tensor | None,
    row_index: torch.Tensor | None,
) -> torch.Tensor:
    """The mask `(T, S)` of texts; raises what [`~lorgnette.assembly.batch_checks.check_pairs`] does."""
    given = (attention_mask, pictures, image_rows, candidates, process, matched, row_index)
    if not are_sound(*given):
        _refuse(*given)
    return attention_mask.clone()


def checked_batch(
    attention_mask: torch.Tensor, rows: torch.Tensor, size: int | None, *others: torch.Tensor | None
) -> tuple[torch.Tensor, list[int] | None]:
    """The mask of [`checked_pairs`], and numbers of the texts, `(T,)` `rows`, of the first `size` pictures.

    They are how many there are, the fewest and the most of a picture, and their tokens past the first. None without a
    size, and while compiling, where values decide no shape. All is read at once: Python waits for a GPU each time.
    """
    if torch.compiler.is_compiling() or size is None:
        return checked_pairs(attention_mask, *others), None
    kept = rows < size
    texts_of = torch.zeros(size, dtype=torch.long, device=rows.device)
    texts_of = texts_of.index_add(0, rows.clamp(max=size - 1), kept.long())
    tokens = ((attention_mask[:, 1:] != 0) & kept[:, None]).sum()
    numbers = (are_sound(attention_mask, *others).long(), kept.sum(), *texts_of.aminmax(), tokens)
    sound, *counts = torch.stack(numbers).tolist()
    if not sound:
        _refuse(attention_mask, *others)
    return attention_mask, counts


def are_sound(*given: torch.Tensor | None) -> torch.Tensor:
    """Whether [`~lorgnette.assembly.batch_checks.check_pairs`] will not raise: a bool scalar."""
    attention_mask, pictures, image_rows, candidates, process, matched, _ = given
    sound = pictures.isfinite().all() & (attention_mask[:, 0] != 0).all()
    if image_rows is not None:
        shown = torch.zeros(len(pictures), dtype=torch.bool, device=image_rows.device)
        sound &= shown.index_fill(0, image_rows.long().clamp(0, len(pictures) - 1), True).all()
        sound &= ((image_rows >= 0) & (image_rows < len(pictures))).all()
    if candidates is not None:
        together = process[:, None] == process
        has = (candidates & together).any(dim=1)
        sound &= (has & together).any(dim=1).all()
        if matched is not None:
            sound &= (candidates & matched[:, None] & matched).any()
    return sound


def _refuse(*given: torch.Tensor | None) -> None:
    what = "This batch has pictures or texts that nothing can be learned from; naming the row"
    try:
        from_package("assembly.batch_checks", what).check_pairs(*given)
    except ImportError as error:
        raise ValueError(str(error)) from error


@dataclass
class TextGroups:
    """Which texts of a batch share a picture.

    Args:
        pictures: M.
        image_rows, rank: `(T,)` int64, each text's picture, and which of the picture's texts it is.
        order: `(T,)` int64, the texts: the `fewest` first ones of each picture, picture by picture, then the rest.
        fewest, most: texts that a picture has; while compiling, where values decide no shape, 1 and 0 (unknown).
        in_order: text n is picture n's.
    """

    pictures: int
    image_rows: torch.Tensor
    rank: torch.Tensor
    order: torch.Tensor
    fewest: int
    most: int
    in_order: bool

    @property
    def first(self) -> torch.Tensor:
        """`(M,)` int64, the first text of each picture."""
        return self.order[: self.pictures * self.fewest : self.fewest]


def group_texts(image_rows: torch.Tensor, pictures: int, in_order: bool, counts: list[int] | None) -> TextGroups:
    """Of `(T,)` `image_rows`; `counts`: the fewest and the most texts of a picture; None while compiling."""
    rank = (image_rows[:, None] == image_rows).tril(-1).sum(dim=1)
    fewest, most = counts or (1, 0)
    order = torch.where(rank < fewest, image_rows, pictures).argsort(stable=True)
    return TextGroups(pictures, image_rows, rank, order, fewest, most, in_order)


def labels_of(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, count: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of texts `(T, S)` the labels of ITG, and the `(K,)` places of these `count`, filled up with 0; None for None."""
    is_label = nn.functional.pad(attention_mask[:, 1:] != 0, (1, 0))
    places = None
    if count is not None:
        places = (~is_label).flatten().long().argsort(stable=True)[:count]
        places = nn.functional.pad(places, (0, -count % POSITIONS_MULTIPLE))
    return input_ids.masked_fill(~is_label, IGNORED), places


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


@dataclass
class Pairs:
    """Which texts and pictures belong together, and which are negatives of each other, over all processes.

    Args:
        texts, pictures: how many of them each process has; `process`: `(N,)` int64, whose each text is.
        own: `(T,)` int64, which of all texts are this process' own.
        image_rows: `(N,)` int64, which of all pictures each text has.
        positives, candidates: `(N, N)` bool, whether a text (column) is a positive, or a negative, of a pair's picture.
    """

    texts: list[int]
    pictures: list[int]
    process: torch.Tensor
    own: torch.Tensor
    image_rows: torch.Tensor
    positives: torch.Tensor
    candidates: torch.Tensor


def pairs_of(
    input_ids: torch.Tensor, image_rows: torch.Tensor, count: int, image_ids: torch.Tensor | None, padding: int
) -> Pairs:
    """The pairs of all processes.

    Args:
        input_ids: `(T, S)`, where `padding` is the id at padding.
        image_rows: `(T,)` int64, which of `count` pictures each text has.
        image_ids: `(M,)` int64, equal for equal pictures; without them no two pictures are equal.

    Raises:
        ValueError: some processes have `image_ids`, and others have none.
    """
    device, length = input_ids.device, input_ids.shape[1]
    texts, pictures, lengths, numbered = [len(input_ids)], [count], [length], [int(image_ids is not None)]
    rank = 0
    if processes() > 1:
        numbers = torch.tensor([texts + pictures + lengths + numbered], device=device)
        texts, pictures, lengths, numbered = gather(numbers, [1] * processes()).T.tolist()
        rank = torch.distributed.get_rank()
    if len(set(numbered)) > 1:
        given = [process for process, has in enumerate(numbered) if has]
        raise ValueError(
            f"image_ids are given in the processes {given} of {len(numbered)}: give them in all, or in none"
        )
    input_ids = gather(nn.functional.pad(input_ids, (0, max(lengths) - length), value=padding), texts)
    image_rows = gather(image_rows + sum(pictures[:rank]), texts)
    image_ids = torch.arange(sum(pictures), device=device) if image_ids is None else gather(image_ids, pictures)
    of_text = image_ids[image_rows]
    positives = of_text[:, None] == of_text
    alike = positives.float() @ same_caption(input_ids).float()  # how many of the picture's texts have the caption
    own = torch.arange(texts[rank], device=device) + sum(texts[:rank])
    process = torch.cat([torch.full((size,), number, device=device) for number, size in enumerate(texts)])
    return Pairs(texts, pictures, process, own, image_rows, positives, alike == 0)


def contrastive_loss(
    similarity: torch.Tensor,
    positives: torch.Tensor,
    candidates: torch.Tensor,
    logit_scale: torch.Tensor,
    label_smoothing: float = 0.1,
) -> torch.Tensor:
    """ITC in one direction: the mean over pairs, where a row without candidates and with one positive counts 0.

    Args:
        similarity: `(T, N)` cosines.
        positives: `(T, N)` bool, the columns that share the row's picture; one at least.
        candidates: `(T, N)` bool, the columns that are its negatives.
        logit_scale: scalar, one over the temperature.
        label_smoothing: the share of the label that is spread evenly over positives and candidates; the rest is spread
            evenly over the positives.
    """
    counted = candidates | positives
    logits = (similarity.float() * logit_scale.float()).masked_fill(~counted, -torch.inf)
    log_probabilities = logits.log_softmax(dim=-1).masked_fill(~counted, 0.0)
    smooth = log_probabilities.sum(-1) / counted.sum(-1)
    nearest = (log_probabilities * positives).sum(-1) / positives.sum(-1)
    return -((1 - label_smoothing) * nearest + label_smoothing * smooth).mean()


def sigmoid_loss(
    similarity: torch.Tensor,
    positives: torch.Tensor,
    candidates: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
) -> torch.Tensor:
    """ITC as SigLIP has it (Zhai et al. 2023, algorithm 1): each pair is a decision. As [`contrastive_loss`]."""
    logits = similarity.float() * logit_scale.float() + logit_bias.float()
    decisions = nn.functional.logsigmoid(torch.where(positives, logits, -logits))
    return -decisions.masked_fill(~(candidates | positives), 0.0).sum(-1).mean()


def draw_negatives(
    logits: torch.Tensor, candidates: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a hard negative for each row, the likelier the more similar (ALBEF, section 3.2).

    Args:
        logits, candidates: `(T, N)` similarities over the temperature, and bool.

    Returns:
        `(T,)` bool, whether a row has a candidate, and `(T,)` int64, the column drawn for it (0 without one). Where
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


def gather(tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Rows of all processes in their order, with gradients; `sizes` are their numbers. Of one, the tensor itself."""
    return tensor if processes() == 1 else _AllGather.apply(tensor, sizes)


def means_over_all(losses: dict[str, torch.Tensor], counts: dict[str, torch.Tensor | int]) -> dict[str, torch.Tensor]:
    """Losses whose mean over the processes is the mean over all terms, of means over `counts` terms of this process."""
    if processes() == 1:
        return losses
    own = torch.stack([torch.as_tensor(counts[name], device=loss.device) for name, loss in losses.items()]).float()
    torch.distributed.all_reduce(total := own.clone())
    return dict(zip(losses, torch.stack(list(losses.values())) * own * processes() / total, strict=True))


class _AllGather(torch.autograd.Function):
    """`all_gather` whose backward adds up what every process' loss asks of this process' rows."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        ctx.sizes = sizes
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])  # all_gather wants equal shapes
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient.split(ctx.sizes)[torch.distributed.get_rank()], None
