"""Checks of what `LorgnetteCollator` puts into a batch: where labels are, packed sequences, shared tokens, pairs.

Python waits for a GPU to read a value, so the model reads one for all of its checks. Where it is False the rows are
looked at here, and the wrong one is named.
"""

from dataclasses import dataclass

import torch

from ..modeling.modeling_checks import IGNORED, check_finite, row_name
from .packing import check_numbers, in_order
from .shared_prefix import check_shared, unlike_shared


@dataclass
class Collated:
    """Of a batch of stage 2 what has to fit its labels `(B, S)`; see `LorgnetteForConditionalGeneration.forward`."""

    labels: torch.Tensor | None
    supervised_positions: torch.Tensor | None
    sequence_ids: torch.Tensor | None
    text_ids: torch.Tensor | None
    shared_input_ids: torch.Tensor | None
    input_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    image_token_id: int
    context: int

    def sound(self) -> list[torch.Tensor]:
        """Bool scalars on the batch's device: [`check`] will not raise where all are True."""
        sound, labels, positions = [], self.labels, self.supervised_positions
        if positions is not None and labels is not None:
            expected = labels.flatten() != IGNORED  # place 0 is padding's: no label is learned there
            given = positions.long().clamp(0, len(expected) - 1)
            named = torch.zeros_like(expected).index_fill(0, given, True)
            ascending = (given == given.cummax(0).values) | (positions <= 0)
            sound += [(named == expected)[1:].all(), (positions > 0).sum() == expected[1:].sum()]
            sound += [(ascending & (positions < len(expected))).all()]
        if self.sequence_ids is not None:
            sound.append(in_order(self.sequence_ids, self.text_ids, self.context))
        if self.shared_input_ids is not None:
            sound.append(~torch.stack(unlike_shared(*self._shared())).any())
        return sound

    def check(self, row_index: torch.Tensor | None) -> None:
        """Raise a ValueError, with the row, for what does not fit.

        That is `supervised_positions` `(K,)` of other places, packed sequences out of order or longer than `context`,
        and rows that do not begin with the shared tokens `(B, P)`.
        """
        labels, positions = self.labels, self.supervised_positions
        if positions is not None and labels is not None:  # Trainer removes labels where it computes the loss
            expected = (labels.flatten() != IGNORED).nonzero().squeeze(1)
            given, expected = positions[positions > 0], expected[expected > 0]
            if not torch.equal(given, expected):
                numbers = f"names {len(given)} positions, and labels has {len(expected)} labels, or others"
                raise ValueError(f"supervised_positions {numbers}: it lists all that are not -100, in order")
        if self.sequence_ids is not None:
            check_numbers(self.sequence_ids, self.text_ids, self.context, row_index)
        if self.shared_input_ids is not None:
            check_shared(*self._shared(), row_index)

    def _shared(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, int]:
        return self.labels, self.shared_input_ids, self.input_ids, self.attention_mask, self.image_token_id


def check_pairs(
    attention_mask: torch.Tensor,
    pictures: torch.Tensor,
    image_rows: torch.Tensor | None,
    candidates: torch.Tensor | None,
    process: torch.Tensor | None,
    matched: torch.Tensor | None,
    row_index: torch.Tensor | None,
) -> None:
    """Raise a ValueError, with the row, for texts and pictures that nothing can be learned from.

    Args:
        attention_mask: `(T, S)`; texts are padded on the right alone.
        pictures: `(M, …)`, or features; they are finite, and each has a text.
        candidates: `(N, N)` bool, which texts are negatives of which pairs: some are, and with `process` `(N,)` some
            in each.
        matched: `(N,)` bool, those texts that ITM compares, where they are fewer.
    """
    if image_rows is not None:
        outside = ((image_rows < 0) | (image_rows >= len(pictures))).nonzero()
        if len(outside):
            row, number = int(outside[0]), int(image_rows[outside[0]])
            raise ValueError(
                f"{row_name(row, row_index)}: image_rows is {number}, and the batch has {len(pictures)} pictures"
            )
        without = (torch.bincount(image_rows, minlength=len(pictures)) == 0).nonzero().flatten().tolist()
        if without:
            raise ValueError(
                f"{len(without)} of the {len(pictures)} pictures of the batch have no text, the first of them picture "
                f"{without[0]}: image_rows names each picture once or more"
            )
    check_finite(pictures, None, row_index, image_rows)
    left = attention_mask[:, 0] == 0
    if left.any():
        row = row_name(int(left.nonzero()[0]), row_index)
        raise ValueError(f"{row} is padded on the left: a text begins with its [CLS]")
    if candidates is None:
        return
    everyone = torch.arange(len(candidates), device=candidates.device)
    _check_negatives(candidates, everyone, 0, row_index)
    if process is not None:
        has = (candidates & (process[:, None] == process)).any(dim=1)
        for number, count in enumerate(torch.bincount(process).tolist()):
            if not has[process == number].any():
                raise ValueError(
                    f"Process {number} has a batch of {count} texts with one picture or caption, and matching (ITM) "
                    "finds no negatives in it: make the batches of a process larger, or itm_weight 0"
                )
    if matched is not None:
        before = 0 if process is None else int((process < process[matched].min()).sum())  # texts of other processes
        _check_negatives(candidates, everyone[matched], before, row_index)


def _check_negatives(
    candidates: torch.Tensor, texts: torch.Tensor, before: int, row_index: torch.Tensor | None
) -> None:
    """Raise a ValueError where none of these `texts` is a negative of another; `before` are of other processes."""
    if candidates[texts][:, texts].any():
        return
    alike = f"and the {len(texts) - 1} others of its batch have the same caption or picture"
    alone = "is alone in its batch (dataloader_drop_last leaves such a last one out)"
    what = alone if len(texts) == 1 else f"{alike} (larger batches may help)"
    row = row_name(int(texts[0]) - before, row_index)
    raise ValueError(f"{row} {what}: there are no negatives to tell it from")


__all__ = ["Collated", "check_pairs"]
