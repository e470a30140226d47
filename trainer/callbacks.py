"""A Trainer callback that measures generated texts at each evaluation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..processing.processing_lorgnette import LorgnetteProcessor
from .collator import LorgnetteCollator
from .decoding import decoding_of
from .generation import generate_texts, references_of
from .metrics import figures_of, text_metrics


class GenerateMetricsCallback(TrainerCallback):
    """Generates texts for some rows at each evaluation, and adds their metrics to the evaluation's.

    `eval_cider`, `eval_bleu_4` … are then in `state.log_history` and can be `metric_for_best_model`. Add
    callbacks that read them, such as `EarlyStoppingCallback`, after this one. With several processes each generates for
    its share of the rows. The random state stays unchanged, so training continues as without the callback.

    Args:
        processor: the model's.
        rows: as [`LorgnetteCollator`] takes them, with one text or a list of texts in the text column.
        metrics: short names, see [`~lorgnette.trainer.metrics.METRICS`].
        decoding: name of a preset, see [`~lorgnette.trainer.decoding.DECODING`].
        batch_size: rows in a batch of each process.
        image_column, text_column, query_column: as the collator has them.
        report: called with `(args, state, control, figures)`. Trainer logs the evaluation before it calls callbacks;
            `trainer.callback_handler.on_log` logs these figures too.

    Raises:
        ValueError, TypeError: no rows, references that are missing or that a metric cannot use, an unknown metric or
            decoding.
    """

    def __init__(
        self,
        processor: LorgnetteProcessor,
        rows: Sequence[Mapping[str, Any]],
        *,
        metrics: Sequence[str] = ("cider",),
        decoding: str = "greedy",
        batch_size: int = 8,
        image_column: str = "image",
        text_column: str = "text",
        query_column: str | None = None,
        report: Callable[..., Any] | None = None,
    ):
        if not rows:
            raise ValueError("no rows to generate for")
        self.collator = LorgnetteCollator(
            processor, image_column=image_column, text_column=text_column, query_column=query_column
        )
        self.rows, self.batch_size, self.report = rows, batch_size, report
        self.metrics, self.decoding = text_metrics(metrics), decoding_of(decoding)
        self.references = [references_of(row, text_column) for row in rows]
        for metric in self.metrics.values():
            metric.check_references(self.references)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        model: LorgnetteForConditionalGeneration,
        **kwargs: Any,
    ) -> None:
        process = PartialState()
        share = range(process.process_index, len(self.rows), process.num_processes)
        rows = tqdm(
            [self.rows[position] for position in share],
            desc="generating",
            disable=args.disable_tqdm or not state.is_world_process_zero,
        )
        answers = generate_texts(model, self.collator, rows, decoding=self.decoding, batch_size=self.batch_size)
        texts = [(position, text) for position, (_, text) in zip(share, answers, strict=True)]
        predictions = [text for _, text in sorted(gather_object(texts))]
        prefix = next(name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime"))  # usually eval
        figures = {}
        for metric in self.metrics.values():
            found = figures_of(metric.compute(predictions=predictions, references=self.references))
            figures.update({f"{prefix}_{name}": value for name, value in found.items()})
        metrics.update(figures)  # Trainer reads metric_for_best_model here
        state.log_history[-1].update(figures)  # Trainer's entry for this evaluation
        if self.report is not None:
            self.report(args, state, control, figures)
