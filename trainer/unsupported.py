"""Settings of the stock Trainer that a model would never hear of, and that would do nothing, or harm."""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import TensorInformation
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as transformers_trainer

from ..modeling.modeling_retrieval import LorgnetteForImageTextRetrieval
from ..processing.processing_lorgnette import LorgnetteProcessor


class RefuseUnsupportedArguments(TrainerCallback):
    """Every Trainer that is made after [`refuse_unsupported_arguments`] has it."""

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Raises ValueError for label smoothing in stage 1."""
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
        """Raises ValueError for a processor that does not fit the model, or no longer: its tokenizer may have grown."""
        if hasattr(model, "check_processor") and isinstance(processing_class, LorgnetteProcessor):
            model.check_processor(processing_class)


def refuse_unsupported_arguments() -> None:
    """Make [`RefuseUnsupportedArguments`] one of Trainer's default callbacks; for other models it does nothing."""
    if RefuseUnsupportedArguments not in transformers_trainer.DEFAULT_CALLBACKS:
        transformers_trainer.DEFAULT_CALLBACKS.append(RefuseUnsupportedArguments)


class Batch(dict):
    """Tensors of a batch; they need not have as many rows as each other, as `input_ids` and `pixel_values` have not.

    accelerate's dispatcher, which reads an IterableDataset unless `dispatch_batches` is False, cuts all tensors to the
    length of the first. The first is the longest here, so that on one process nothing is cut off. For several processes
    it joins batches and cuts them into shares, after it has asked for their structure.

    Raises:
        ValueError: it is such a structure, and there are several processes.
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
