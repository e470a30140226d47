"""Checks that look at values, as operators of torch: `torch.compile` breaks no graph at them, and they raise as ever.

A branch on a tensor's values would end the compiled graph. An operator is called from within it, at each step, before
what comes after it; its Python is not traced. Each returns a copy of what it has checked: nothing that is used in place
of the original can be left out of the graph.

An exported program has no checks: it is loaded where these operators are not, and ONNX has none such.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch

from .modeling_placeholders import check_finite, check_placeholders, row_name


IGNORED = -100  # the label of what is not to be learned, as transformers' losses have it
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # added in torch 2.7
_NAMESPACE = re.sub(r"\W", "_", __name__)  # of its own in each copy of this file that is loaded as remote code


def _operator(check: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Register a function that returns a tensor of its first argument's shape and dtype."""
    operator = torch.library.custom_op(f"{_NAMESPACE}::{check.__name__}", check, mutates_args=())
    operator.register_fake(lambda checked, *_: torch.empty_like(checked))

    @functools.wraps(check)
    def checked_unless_exporting(checked: torch.Tensor, *others: Any) -> torch.Tensor:
        return checked if _is_exporting() else operator(checked, *others)

    return checked_unless_exporting


@_operator
def checked_placeholders(
    mask: torch.Tensor,
    pictures: torch.Tensor | None,
    image_rows: torch.Tensor | None,
    row_index: torch.Tensor | None,
    labels: torch.Tensor | None,
    supervised_positions: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    num_query_tokens: int,
    image_token_id: int,
) -> torch.Tensor:
    """The mask `(B, S)` of placeholders, that go with the pictures `(N, …)`.

    Args:
        supervised_positions: `(K,)`, where in `labels` `(B, S)`, flat, the labels are; 0 for padding.

    Raises:
        ValueError: see [`check_placeholders`] and [`check_finite`]; `supervised_positions` that are others.
    """
    shown = pictures if image_rows is None else image_rows
    num_images = None if shown is None else len(shown)
    images_per_row = check_placeholders(
        mask, num_query_tokens, image_token_id, num_images, row_index, labels, document_ids
    )
    if pictures is not None:
        check_finite(pictures, images_per_row, row_index, image_rows)
    if supervised_positions is not None and labels is not None:  # which Trainer may have kept for a loss of its own
        there = (labels.flatten() != IGNORED).nonzero().squeeze(1)
        told, there = supervised_positions[supervised_positions > 0], there[there > 0]
        if not torch.equal(told, there):
            raise ValueError(
                f"supervised_positions names {len(told)} places, and labels has {len(there)} labels, or others: it "
                "lists all that are not -100, in order"
            )
    return mask.clone()


@_operator
def checked_shared(
    labels: torch.Tensor,
    shared_input_ids: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_index: torch.Tensor | None,
    image_token_id: int,
) -> torch.Tensor:
    """The labels `(B, S)` of rows that all begin with `shared_input_ids` `(B, P)`.

    Raises:
        ValueError: names the row that does not, or has padding, a placeholder or a label among them or next.
    """
    num_shared = shared_input_ids.shape[1]
    first = input_ids[:, :num_shared]
    taken = (first == image_token_id).any(dim=1) | (labels[:, : num_shared + 1] != IGNORED).any(dim=1)
    if attention_mask is not None:
        taken = taken | ~attention_mask[:, :num_shared].bool().all(dim=1)
    for wrong, why in (
        ((first != shared_input_ids[:1]).any(dim=1), "are not those of the batch's shared_input_ids"),
        (taken, "cannot be shared: padding, a picture or what is to be learned is among them or next"),
    ):
        if wrong.any():
            raise ValueError(f"{row_name(int(wrong.nonzero()[0]), row_index)}: its first {num_shared} tokens {why}")
    return labels.clone()


@_operator
def checked_texts(
    attention_mask: torch.Tensor,
    pictures: torch.Tensor,
    image_rows: torch.Tensor | None,
    row_index: torch.Tensor | None,
) -> torch.Tensor:
    """The mask `(B, T)` of texts that are padded on the right alone, beside pictures `(N, …)` that are finite.

    Raises:
        ValueError: names the row.
    """
    check_finite(pictures, None, row_index, image_rows)
    left = attention_mask[:, 0] == 0
    if left.any():
        raise ValueError(
            f"{row_name(int(left.nonzero()[0]), row_index)} is padded on the left: a text begins with its [CLS]"
        )
    return attention_mask.clone()


@_operator
def checked_candidates(candidates: torch.Tensor, row_index: torch.Tensor | None) -> torch.Tensor:
    """`(N, N)` bool, which texts are negatives of which pairs: some are.

    Raises:
        ValueError: none is.
    """
    if len(candidates) == 1:
        raise ValueError(
            f"{row_name(0, row_index)} is alone in its batch: there are no negatives to tell it from. "
            "dataloader_drop_last leaves out such a last batch"
        )
    if not candidates.any():
        raise ValueError(
            f"{row_name(0, row_index)} and the {len(candidates) - 1} others of its batch have the same "
            "caption: there are no negatives to tell them from. Larger batches may help"
        )
    return candidates.clone()


@_operator
def checked_documents(document_ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """`(B, S)` int64 numbers of documents, which begin where `starts` `(B, S)` is True; below 0 is padding.

    Raises:
        ValueError: they are not in order.
    """
    numbers = document_ids[starts & (document_ids >= 0)]
    if not torch.equal(numbers, torch.arange(len(numbers), device=numbers.device)):
        raise ValueError(f"the documents of a batch are numbered in their order, from 0; these are {numbers.tolist()}")
    return document_ids.clone()


__all__ = [
    "IGNORED",
    "checked_candidates",
    "checked_documents",
    "checked_placeholders",
    "checked_shared",
    "checked_texts",
]
