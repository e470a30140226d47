"""Refuse Trainer settings that would have no effect, or a wrong one."""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import TensorInformation
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as transformers_trainer

from ..modeling.modeling_retrieval import LorgnetteForImageTextRetrieval
from ..processing.processing_lorgnette import LorgnetteProcessor


class RefuseUnsupportedArguments(TrainerCallback):
    """A default callback of every Trainer created after [`refuse_unsupported_arguments`]."""

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Raise ValueError for label smoothing in stage 1."""
        if args.label_smoothing_factor and isinstance(model, LorgnetteForImageTextRetrieval):
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}, and has to stay 0 in stage 1: it has no "
                "labels that Trainer could smooth, and its losses ITC and ITG smooth theirs by 0.1, as BLIP-2's do"
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Raise ValueError for a processor that does not fit the model, for example after its tokenizer grew."""
        if hasattr(model, "check_processor") and isinstance(processing_class, LorgnetteProcessor):
            model.check_processor(processing_class)


def refuse_unsupported_arguments() -> None:
    """Add [`RefuseUnsupportedArguments`] to Trainer's default callbacks; it ignores other models."""
    if RefuseUnsupportedArguments not in transformers_trainer.DEFAULT_CALLBACKS:
        transformers_trainer.DEFAULT_CALLBACKS.append(RefuseUnsupportedArguments)


class Batch(dict):
    """Tensors of a batch with different lengths, for example `input_ids` and `pixel_values`.

    accelerate's dispatcher, which reads an IterableDataset unless `dispatch_batches` is False, cuts all tensors to the
    length of the first. Here the first is the longest, so that one process loses nothing. With several processes the
    dispatcher reads the batch's structure, joins batches and splits them.

    Raises:
        ValueError: the dispatcher builds such a structure with several processes.
    """

    def __init__(self, *values: Any):
        super().__init__(*values)
        processes = PartialState._shared_state.get("num_processes", 1)
        if processes > 1 and any(isinstance(value, TensorInformation) for value in self.values()):
            raise ValueError(
                f"accelerate reads batches on one process, and would cut each tensor into shares for {processes}: a "
                "batch of pictures and texts cannot be cut so, for rows may have several pictures, or share one. Give "
                'TrainingArguments accelerator_config={"dispatch_batches": False}: each process then reads its own rows'
            )

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> "Batch":
        """The tensors of a batch, the longest first."""
        return cls(sorted(tensors.items(), key=lambda named: -len(named[1])))
