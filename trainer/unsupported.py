"""Arguments of the stock Trainer that a model would never hear of, and that would do nothing."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as transformers_trainer

from ..modeling.modeling_retrieval import LorgnetteForImageTextRetrieval


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


def refuse_unsupported_arguments() -> None:
    """Make [`RefuseUnsupportedArguments`] one of Trainer's default callbacks; for other models it does nothing."""
    if RefuseUnsupportedArguments not in transformers_trainer.DEFAULT_CALLBACKS:
        transformers_trainer.DEFAULT_CALLBACKS.append(RefuseUnsupportedArguments)
