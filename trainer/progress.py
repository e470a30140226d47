"""What a run reports: its figures in short lines, losses of stage 1 apart, sample answers, a summary at the end."""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..assembly.conversations import messages_of
from ..modeling.modeling_loss import in_process_group
from ..processing.prompt_encoding import images_in
from .collator import LorgnetteCollator
from .decoding import decoding_of
from .generation import generate_texts, references_of
from .trackers import send_table


logger = logging.getLogger(__name__)

SAMPLES, THUMBNAILS = "samples.md", "samples"
_SPEEDS = {"texts_per_second": "texts/s", "eval_samples_per_second": "rows/s", "train_samples_per_second": "rows/s"}
_LONGER_SIDE = 160  # pixels, of a thumbnail
_PLAIN: dict[str, Any] = {"box": None, "title_justify": "left", "padding": (0, 3, 0, 0)}  # a log is read as text


class StepFiguresCallback(TrainerCallback):
    """Adds to the logged training loss, over the same steps, what Trainer does not know.

    `loss_itc`, `loss_itm` and `loss_itg` of stage 1 are means. `texts_per_second`, of all processes, counts the texts
    that were learned, of which a row may have several; the time is without evaluations and saves.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0
        self.texts: torch.Tensor | int = 0
        self.seconds, self.start = 0.0, None  # of the steps; None after an evaluation or a save

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: torch.nn.Module, **_: Any
    ) -> None:
        self.handle = model.register_forward_hook(self._add, with_kwargs=True)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter() if self.start is None else self.start

    @torch.compiler.disable  # keeps the hook out of the compiled graph
    def _add(self, model: torch.nn.Module, _: tuple, inputs: dict[str, Any], outputs: Any) -> None:
        if model.training:
            self.texts = self.texts + count_texts(inputs)
            parts = {name: value for name, value in outputs.items() if name.startswith("loss_")}
            self.sums = {name: self.sums.get(name, 0) + value.detach().float() for name, value in parts.items()}
            self.count += 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        if "loss" not in logs or not self.count:
            return
        parts = {}
        for name, total in self.sums.items():
            mean = total / self.count
            if in_process_group():
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            parts[name] = round(mean.item(), 4)
        texts = torch.as_tensor(self.texts, dtype=torch.float32, device=args.device)
        if in_process_group():
            dist.all_reduce(texts)
        parts["texts_per_second"] = round(texts.item() / self.seconds, 2)
        self.sums, self.count, self.texts, self.seconds = {}, 0, 0, 0.0
        logs.update(parts)
        state.log_history[-1].update(parts)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds, self.start = self.seconds + now - self.start, now

    def _pause(self, *_: Any, **__: Any) -> None:
        self.start = None

    on_evaluate = on_save = _pause

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.handle.remove()


def count_texts(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | int:
    """The texts of a training batch, as a tensor where its values have to tell: reading them would wait for a GPU."""
    if (texts := batch.get("text_ids")) is not None:  # a text begins where the number changes, and with each sequence
        ids = torch.stack([batch["sequence_ids"], texts])
        starts = (ids != ids.roll(1, dims=2)).any(dim=0)
        starts[:, 0] = True
        return (starts & (texts > 0)).sum()
    if (sequences := batch.get("sequence_ids")) is not None:
        return sequences.max() + 1
    return len(batch["input_ids"])


class LastLogCallback(TrainerCallback):
    """Logs the last step too: a run of fewer than `logging_steps` would log no loss."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps


class FiguresCallback(TrainerCallback):
    """Prints what Trainer logs as a line of aligned figures. Trackers and `trainer_state.json` get all of them."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        if state.is_world_process_zero:
            tqdm.write(figures_line(logs, state.global_step, state.max_steps), file=sys.stderr)


class FiguresBesideBar(FiguresCallback, ProgressCallback):
    """The same above Trainer's bar."""


def figures_line(logs: Mapping[str, Any], step: int, steps: int) -> str:
    """A line of Trainer's log: losses and metrics by their names, in an order that stays."""
    figures = [f"step {step:>{len(str(steps))}}/{steps}"]
    if "epoch" in logs:
        figures.append(f"epoch {logs['epoch']:.2f}")
    hidden = ("epoch", "grad_norm", "learning_rate", "total_flos")
    for name, value in logs.items():
        if name not in hidden and not name.endswith(("_runtime", "_per_second")):
            number = f"{value:.4g}" if isinstance(value, float | int) else str(value)
            figures.append(f"{name.removeprefix('loss_')} {number:<6}")
    if "learning_rate" in logs:
        figures.append(f"lr {logs['learning_rate']:.2e}")
    if "train_runtime" in logs:
        figures.append(f"{logs['train_runtime']:.0f} s")
    for name, unit in _SPEEDS.items():
        if name in logs:
            figures.append(f"{logs[name]:.4g} {unit}")
    return "  ".join(figures).rstrip()


def print_figures(trainer: Trainer) -> None:
    """Replace what prints Trainer's log as dictionaries; a notebook's table stays."""
    if trainer.pop_callback(PrinterCallback) is not None:
        trainer.add_callback(FiguresCallback())
    elif trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(FiguresBesideBar())


class SamplesCallback(TrainerCallback):
    """Shows, at each evaluation, what the model answers to some held-out pictures.

    A terminal and trackers get a table; `samples.md` keeps the answers of all evaluations.

    Args:
        trainer: for its processor and its trackers.
        rows: as [`LorgnetteCollator`] takes them.
        columns: `image_column`, `text_column` and `query_column`, as the collator has them.
    """

    def __init__(self, trainer: Trainer, rows: Sequence[Mapping[str, Any]], columns: dict[str, Any]):
        self.collator, self.rows, self.columns = LorgnetteCollator(trainer.processing_class, **columns), rows, columns
        self.trackers = trainer.callback_handler.callbacks
        self.truths = [references_of(row, columns["text_column"])[0] for row in rows]

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **_: Any,
    ) -> None:
        # in all processes: a sharded model computes in all or none
        decoding = decoding_of("greedy")
        answers = [text for _, text in generate_texts(
            model, self.collator, self.rows, decoding=decoding, batch_size=len(self.rows))]  # fmt: skip
        if not state.is_world_process_zero:
            return
        numbers = [row.get("index", position) for position, row in enumerate(self.rows)]
        lines = list(zip(numbers, self.truths, answers, strict=True))
        table = Table("row", "text", "answer", title=f"held-out pictures at step {state.global_step}", **_PLAIN)
        for number, truth, answer in lines:
            table.add_row(str(number), truth, answer)
        Console(stderr=True).print(table)
        for tracker in self.trackers:
            send_table(tracker, "samples", ("row", "text", "answer"), lines, state.global_step)
        self._write(Path(args.output_dir), state.global_step, lines)

    def _write(self, folder: Path, step: int, lines: list[tuple[int, str, str]]) -> None:
        """Append the answers of an evaluation to `samples.md`; its thumbnails are written once."""
        page = folder / SAMPLES
        thumbnails = [
            self._thumbnail(folder, number, row) for (number, _, _), row in zip(lines, self.rows, strict=True)
        ]
        text = page.read_text(encoding="utf-8") if page.is_file() else "# Answers to held-out pictures\n"
        text += f"\n## Step {step}\n\n| picture | row | text | answer |\n|---|---|---|---|\n"
        for thumbnail, (number, truth, answer) in zip(thumbnails, lines, strict=True):
            cells = [" ".join(each.split()).replace("|", "\\|") for each in (truth, answer)]
            text += f"| {thumbnail} | {number} | {cells[0]} | {cells[1]} |\n"
        page.write_text(text, encoding="utf-8")

    def _thumbnail(self, folder: Path, number: int, row: Mapping[str, Any]) -> str:
        """A picture of the row, small, as Markdown; empty where the row has features in place of pictures."""
        chat = messages_of(row["messages"]) if row.get("messages") else []
        source = row.get(self.columns["image_column"]) or next(iter(images_in(chat)), None)
        source = source[0] if isinstance(source, list) else source
        if source is None:
            return ""
        path = folder / THUMBNAILS / f"{number}.jpg"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            picture = self.collator.processor.load_image(source)
            picture.thumbnail((_LONGER_SIDE, _LONGER_SIDE))
            picture.save(path)
        return f"![]({path.relative_to(folder).as_posix()})"


def summarise(trainer: Trainer) -> None:
    """Log the validation figures of a run, its best checkpoint, where the model is, and the next command."""
    state, folder = trainer.state, trainer.args.output_dir
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    names = [name for name in dict.fromkeys(name for entry in evaluations for name in entry)
             if name.startswith("eval_") and not name.endswith(("runtime", "_per_second"))]  # fmt: skip
    if evaluations and state.is_world_process_zero:
        table = Table("step", *(name.removeprefix("eval_") for name in names), title="evaluations", **_PLAIN)
        for entry in evaluations:
            values = [entry.get(name) for name in names]
            table.add_row(str(entry["step"]), *("" if value is None else f"{value:.4g}" for value in values))
        Console(stderr=True).print(table)
    if state.best_model_checkpoint is not None:
        best = (
            f"{state.best_model_checkpoint} has the best {trainer.args.metric_for_best_model}: {state.best_metric:.4g}"
        )
        loaded = "; the model is that one" if trainer.args.load_best_model_at_end else "; the model is of the last step"
        logger.info("%s%s", best, loaded)
    logger.info("%s holds the model and its processor, after step %d", folder, state.global_step)
    if trainer.model.can_generate():
        logger.info("next: lorgnette caption %s PICTURE", folder)
    else:
        logger.info("next: lorgnette train stage2 --config … --qformer %s", folder)
