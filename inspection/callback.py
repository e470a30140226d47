"""Inspections during training: figures and pictures go to the tracker, a report to `output_dir`."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..trainer.collator import LorgnetteCollator
from ..trainer.trackers import send_pictures
from .check_weights import Original
from .drawing import overlay, sheet
from .inspector import Inspection, inspect_model
from .maps import Attribution
from .report import write_html


class InspectionCallback(TrainerCallback):
    """Inspects the model every so many steps, and after the last.

        trainer.add_callback(InspectionCallback(trainer, every=200))

    The frozen parts are compared with their state at the start of training. `inspection_queries`, `inspection_sees` …
    are 1 if the check is green and 0 if it is red; `trainer.log` writes them and their figures to every tracker and to
    `log_history`. TensorBoard, trackio and Weights & Biases also get the attention maps;
    `output_dir/inspection/step-N.html` has everything. Weights and random states stay unchanged, so training continues
    as without the callback. The first process runs the inspection and the others wait; it needs the whole model, so
    FSDP does not work. If another callback ends training early, the last step may not be inspected.

    Args:
        trainer: the inspection checks its `data_collator` and uses its `processing_class`.
        rows: rows to inspect; by default the first 16 of the evaluation data, or of the training data if there is none.
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
        # at the end of training a tracker may have closed the run already
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
        should_log = control.should_log
        self.trainer.log(scalars(self.last))
        control.should_log = should_log  # trainer.log resets it, and the loss is not logged yet
        pictures = {
            f"inspection/{number}": attribution_sheet(attribution)
            for number, attribution in enumerate(self.last.attributions)
        }
        for callback in self.trainer.callback_handler.callbacks:
            send_pictures(callback, pictures, step)


def attribution_sheet(attribution: Attribution) -> Image.Image:
    """A contact sheet: the map of each word, and of the queries in the last layer with cross-attention."""
    maps = {f"word {number}: {word.text.strip()}": word.patches for number, word in enumerate(attribution.words)}
    maps |= {f"query {number}": values for number, values in enumerate(attribution.queries[-1])}
    return sheet([(title, overlay(attribution.picture, values)) for title, values in maps.items()])


def scalars(inspection: Inspection) -> dict[str, float]:
    """The scalar figures of an inspection, by their names in trackers.

    For each check its result (1 green, 0 red; left out if not run) and its numbers, one level deep: `inspection_sees`,
    `inspection_sees_gap`, `inspection_sees_losses_shuffled` …; for a list of numbers the mean.
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


# the figures that trackers get
SCALARS = {
    "lora_size": ("by_kind",),
    "gradients": ("norms",),
    "prompt": ("with_lora", "without_lora"),
    "aligned": ("largest_difference",),
    "visual_norm": ("ratio",),
    "queries": ("mean_cosine", "effective_rank", "between_pictures"),
    "sees": ("losses", "gap", "p_value"),
}
