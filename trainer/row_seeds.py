"""Random choices for a training row: its crop, and which of its texts are used. They are new in each epoch.

A resumed data loader would draw other numbers from the global generators, since it fetches batches ahead. So each row
gets its own generator, seeded with the run's seed, the epoch and the row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..processing.prompt_encoding import error_context
from .texts import check_lists


NUM_QUERIES = "_num_query_tokens"  # a column that a batch of the collator reads; not one of the data set


class RowSeeds(TrainerCallback):
    """Makes the random choices of each training row, anew in each epoch.

    Args:
        seed: of the run.
        augment: rows get an `augmentation_seed`, with which the collator crops and mirrors their pictures.
        texts: how many texts of a picture a row keeps; None keeps all.
        columns: those with lists of texts; of several the same places are kept.
        queries: rows get a number of queries, from 1 to so many, of which a batch takes its first row's (Hu et al.
            2024, Matryoshka Query Transformer, section 3); None for all of them always.
    """

    def __init__(
        self, seed: int, *, augment: bool, texts: int | None, columns: Sequence[str], queries: int | None = None
    ):
        self.seed, self.augment, self.texts, self.columns = seed, augment, texts, columns
        self.queries = queries
        self.draws = True  # False while rows are read to be checked: all their texts count
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # data loader workers may outlive an epoch

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.epoch.fill_(int(state.epoch or 0))

    def mark(self, batch: dict[str, list], open_batch: Callable[[dict], dict]) -> dict[str, list]:
        """Open the rows, and make their choices.

        A stream has one endless epoch; `visit`, the position in it, distinguishes its repetitions.
        """
        visits = batch.get("visit", [0] * len(batch["index"]))
        seeds = [[self.seed, self.epoch.item(), *row] for row in zip(batch["index"], visits, strict=True)]
        opened = open_batch(batch)
        if self.texts is not None and self.draws:
            for row, number in enumerate(batch["index"]):
                with error_context(f"row {number}"):
                    self._keep(opened, row, lambda given, seed=seeds[row]: _drawn(seed, given, self.texts))
        if self.augment:
            opened = opened | {"augmentation_seed": seeds}
        if self.queries is not None and self.draws:
            counts = [int(np.random.default_rng([*seed, 2]).integers(1, self.queries + 1)) for seed in seeds]
            opened = opened | {NUM_QUERIES: counts}
        return opened

    def keep_first(self, batch: dict[str, list], open_batch: Callable[[dict], dict]) -> dict[str, list]:
        """Open rows of evaluation, which keep the first `texts` of each picture."""
        opened = open_batch(batch)
        if self.texts is not None and self.draws:
            for row, number in enumerate(batch["index"]):
                with error_context(f"row {number}"):
                    self._keep(opened, row, lambda given: range(min(self.texts, given)))
        return opened

    def _keep(self, batch: dict[str, list], row: int, places: Callable[[int], Sequence[int]]) -> None:
        """Of a row's lists keep the values at `places(how many there are)`, after all of them were checked."""
        lists = {column: batch[column][row] for column in self.columns if isinstance(batch[column][row], list)}
        if lists:
            given = check_lists(lists)
            for column, values in lists.items():
                batch[column] = [*batch[column][:row], [values[n] for n in places(given)], *batch[column][row + 1 :]]


def _drawn(seed: list[int], given: int, count: int) -> list[int]:
    """Which `count` of `given` texts are used, in order. Crops are drawn from the same seed without the last number."""
    generator = np.random.default_rng([*seed, 1])
    return sorted(generator.choice(given, size=min(count, given), replace=False).tolist())
