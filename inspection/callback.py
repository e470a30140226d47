"""Inspections while the stock Trainer trains: figures and pictures to the tracker, a report into `output_dir`."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..trainer.collator import LorgnetteCollator
from .check_weights import Original
from .drawing import overlay, sheet
from .inspector import Inspection, inspect_model
from .maps import Look
from .report import write_html
from .trackers import send_pictures


class InspectionCallback(TrainerCallback):
    """Inspects the model every so many steps, and after the last.

        trainer.add_callback(InspectionCallback(trainer, every=200))

    The frozen parts are compared with what they were when training began. `inspection_queries`, `inspection_sees` … are
    1 where the check is green and 0 where it is red; they and the figures behind them go through `trainer.log`, so that
    every tracker has them, and `log_history`. TensorBoard, trackio and Weights & Biases are shown where the model
    looks, too; `output_dir/inspection/step-N.html` holds it all in any case. No weight moves, and no random number is
    drawn, so that training goes on as it would without. The first process does it, and the others wait; it has to have
    the whole model, which it has not under FSDP. Where another callback ends training early, its last step may not be
    one that is looked at.

    Args:
        trainer: its `data_collator` is the one whose labels are looked at, its `processing_class` the processor.
        rows: what is asked about; by default the first 16 of the evaluation data, or without any of the training data.
        every: steps between inspections.

    Raises:
        ValueError: `every` is below 1.
        TypeError: the Trainer has another collator.
    """

    def __init__(self, trainer: Trainer, rows: Sequence[Mapping[str, Any]] | None = None, every: int = 200):
        if every < 1:
            raise ValueError(f"every is {every}; it has to be at least 1")
        if not isinstance(trainer.data_collator, LorgnetteCollator):
            kind = type(trainer.data_collator).__name__
            raise TypeError(f"the Trainer's data_collator is a {kind}; a LorgnetteCollator is needed")
        self.trainer, self.every = trainer, every
        if rows is None:
            dataset = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
            rows = list(islice(dataset, 16))
        self.rows = rows
        self.last: Inspection | None = None
        self._original: Original | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: LorgnetteForConditionalGeneration,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            self._original = Original.from_model(model, self.trainer.processing_class)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: LorgnetteForConditionalGeneration,
        **kwargs: Any,
    ) -> None:
        # at the end of training a tracker may have closed the run
        if state.global_step % self.every == 0 or control.should_training_stop:
            self._inspect(args, state, control, model)

    def _inspect(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: LorgnetteForConditionalGeneration,
    ) -> None:
        step = state.global_step
        if not state.is_world_process_zero:
            return
        self.last = inspect_model(
            model,
            self.trainer.processing_class,
            self.rows,
            collator=self.trainer.data_collator,
            original=self._original,
            name=f"{args.output_dir}, step {step}",
            batch_size=args.per_device_eval_batch_size,
            quiet=True,
        )
        write_html(self.last, Path(args.output_dir, "inspection", f"step-{step}.html"))
        due = control.should_log
        self.trainer.log(scalars(self.last))
        control.should_log = due  # logging has ticked it off, and the loss is still to be logged
        pictures = {f"inspection/{number}": drawn(seen) for number, seen in enumerate(self.last.looks)}
        for callback in self.trainer.callback_handler.callbacks:
            send_pictures(callback, pictures, step)


def drawn(seen: Look) -> Image.Image:
    """What each word was read from, and the queries of the last layer that looks."""
    maps = {f"word {place}: {word.text.strip()}": word.patches for place, word in enumerate(seen.words)}
    maps |= {f"query {place}": values for place, values in enumerate(seen.queries[-1])}
    return sheet([(title, overlay(seen.picture, values)) for title, values in maps.items()])


def scalars(inspection: Inspection) -> dict[str, float]:
    """The figures of an inspection that are single numbers, by the names that trackers get.

    Of a check its verdict (1 green, 0 red; none where it was not run) and its numbers, one level deep:
    `inspection_sees`, `inspection_sees_gap`, `inspection_sees_losses_shuffled` …; of a list of numbers the mean.
    """
    found: dict[str, float] = {}
    for check in inspection.checks:
        if check.passed is None:
            continue
        found[f"inspection_{check.name}"] = float(check.passed)
        for name in SCALARS.get(check.name, ()):
            value = check.figures.get(name)
            values = value if isinstance(value, Mapping) else {"": value}
            for key, number in values.items():
                number = float(np.mean(number)) if isinstance(number, list) else number
                if number is not None:
                    title = "_".join(filter(None, ("inspection", check.name, name, key.replace(" ", "_"))))
                    found[title] = float(number)
    return found


# of which figures trackers are told
SCALARS = {
    "lora_size": ("by_kind",),
    "gradients": ("norms",),
    "prompt": ("with_lora", "without_lora"),
    "in_step": ("largest_difference",),
    "soft_norm": ("ratio",),
    "queries": ("mean_cosine", "effective_rank", "between_pictures"),
    "sees": ("losses", "gap", "p_value"),
}
