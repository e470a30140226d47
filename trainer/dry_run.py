"""A run that trains nothing: it reads all rows, shows a batch, times two steps, and tells what training will need."""

import copy
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..modeling.modeling_saving import FINGERPRINT, keys_to_ignore_on_save
from ..processing.processing_lorgnette import LorgnetteProcessor
from .arguments import DataArguments
from .checkpoints import checkpoint_to_resume
from .collator import LengthError, LorgnetteCollator
from .labelled_text import labelled_text, rows_of
from .local_backbones import local_sources, named_in_checkpoints
from .nan_guard import nan_guard
from .progress import FiguresCallback
from .run import Parts, load_parts, make_collator, make_trainer
from .unreadable import CHECK_REPORT, read_all, why_empty, without


KINDS = {
    "picture": "a picture that cannot be read",
    "text": "a text or a chat that cannot be used",
    "length": "more tokens than fit",
}
_SHOWN_ROWS, _SHOWN_TEXTS = 5, 3
_TIMED, _MOST_BATCHES = 2, 4  # steps; batches of a step, above which the time of a step is scaled


def dry_run(
    build: Callable[[], tuple[PreTrainedModel, LorgnetteProcessor]],
    data_args: DataArguments,
    training_args: TrainingArguments,
    prepare: Callable[[Trainer], None] | None = None,
) -> None:
    """Check what [`~lorgnette.trainer.run.train`] would do with the same arguments; write `output_dir/check.json`.

    Raises:
        SystemExit: with status 1 if training would stop at a row.
        ValueError: several processes; or what `train` raises before its first step.
    """
    if training_args.world_size > 1:
        raise ValueError(f"a dry run is for one process, and these are {training_args.world_size}: start it by itself")
    checkpoint_to_resume(training_args)  # an earlier run in output_dir is an error, as in training
    console = Console(soft_wrap=True, highlight=False)
    parts = load_parts(build, data_args, training_args)
    workers = training_args.dataloader_num_workers
    bad = find_bad_rows(parts.splits, make_collator(parts, data_args), data_args.text_name, workers)
    stops = [row for row in bad if not (data_args.skip_unreadable and row.skippable)]
    counts = {name: len(rows) for name, rows in parts.splits.items()}
    report = {"rows": counts, "bad": [asdict(row) for row in bad], "left_out": len(bad) - len(stops)}
    _write(report, training_args.output_dir)
    _show_bad_rows(bad, console)
    for name, rows in parts.splits.items():
        parts.splits[name] = without(rows, [row.position for row in bad if row.split == name])
    if all(len(rows) for rows in parts.splits.values()):
        report |= _measure(parts, data_args, training_args, prepare, console)
        _write(report, training_args.output_dir)
    path = Path(training_args.output_dir, CHECK_REPORT)
    total = sum(counts.values())
    if stops:
        leaves = any(row.skippable for row in stops) and not data_args.skip_unreadable
        advice = "; skip_unreadable: true leaves out unreadable pictures and empty texts" if leaves else ""
        console.print(f"check failed: training would stop at {len(stops)} of {total} rows{advice}. See {path}")
        raise SystemExit(1)
    left_out = f"; {len(bad)} are left out by skip_unreadable" if bad else ""
    console.print(f"check passed: {total - len(bad)} of {total} rows can be used{left_out}. See {path}")


@dataclass
class BadRow:
    """A row that training would stop at.

    Attributes:
        split: `train` or `eval`.
        index: its number in the data set, as errors of training name it.
        position: its number in the split.
        kind: one of [`KINDS`].
        reason: the message of the error.
        skippable: `skip_unreadable` leaves it out.
    """

    split: str
    index: int
    position: int
    kind: str
    reason: str
    skippable: bool


def find_bad_rows(
    splits: dict[str, Dataset], collator: LorgnetteCollator, text_column: str, num_workers: int = 0
) -> list[BadRow]:
    """Read all rows as the collator does, each once; what it would raise is collected."""
    bad = []
    for name, rows in splits.items():
        numbers = rows.with_format(None)["index"][:]
        found = read_all(rows, _Problem(collator, text_column), f"reading the rows of {name}", num_workers)
        bad += [BadRow(name, numbers[position], position, *problem) for position, problem in found.items()]
    return bad


class _Problem:
    """The kind of error that a row raises, its message, and whether `skip_unreadable` leaves it out; or None."""

    def __init__(self, collator: LorgnetteCollator, text_column: str):
        self.collator, self.text_column = collator, text_column

    def __call__(self, read: Callable[[], dict[str, Any]]) -> tuple[str, str, bool] | None:
        try:
            row = read()
        except OSError as error:  # a picture of a remote data set, which is read with the row
            return "picture", str(error), True
        except (ValueError, TypeError) as error:
            return "text", str(error), isinstance(error, ValueError)
        self.collator.forget_images()
        try:
            if reason := why_empty(row.get(self.text_column)):
                return "text", reason, True
            images = self.collator.encode(row)[0].images  # those of all its questions
        except LengthError as error:
            return "length", str(error), False
        except (ValueError, TypeError) as error:
            return "text", str(error), False
        try:
            for load in images:
                load()
        except (OSError, ValueError) as error:
            return "picture", str(error), True
        except TypeError as error:
            return "picture", str(error), False
        return None


def _show_bad_rows(bad: list[BadRow], console: Console) -> None:
    for kind, count in Counter(row.kind for row in bad).items():
        console.print(f"{kind} ({KINDS[kind]}): {count} {'row' if count == 1 else 'rows'}")
        for row in [row for row in bad if row.kind == kind][:_SHOWN_ROWS]:
            console.print(f"  {row.split}, row {row.index}: {row.reason}", markup=False)
        if count > _SHOWN_ROWS:
            console.print(f"  … and {count - _SHOWN_ROWS} more")


def _measure(
    parts: Parts,
    data_args: DataArguments,
    training_args: TrainingArguments,
    prepare: Callable[[Trainer], None] | None,
    console: Console,
) -> dict[str, Any]:
    """Show a batch, run three steps without changing a weight, and print the figures; returns them."""
    trainer = make_trainer(parts, data_args, _settings(training_args), prepare)
    loader = trainer.get_train_dataloader()
    _show_batch(next(iter(loader)), parts.processor, console)
    steps = max(math.ceil(len(loader) / training_args.gradient_accumulation_steps), 1)
    every = training_args.max_steps
    every = every if every > 0 else math.ceil(training_args.num_train_epochs * steps)
    stopwatch = _Stopwatch(training_args.device)
    trainer.add_callback(stopwatch)
    trainer.remove_callback(FiguresCallback)
    trainer.optimizer_cls_and_kwargs = (_NoStep, {})
    with nan_guard(trainer):
        trainer.train()
    scale = training_args.gradient_accumulation_steps / trainer.args.gradient_accumulation_steps
    seconds = (stopwatch.times[-1] - stopwatch.times[0]) / _TIMED * scale
    sources = local_sources(parts.model, lambda folder: FINGERPRINT)  # nothing is saved: no file is read
    with named_in_checkpoints(parts.model, sources, training_args):
        weights, states = checkpoint_bytes(parts.model)
    peak = peak_memory(training_args.device)
    figures = {
        "steps_per_epoch": steps,
        "steps": every,
        "seconds_per_step": round(seconds, 3),
        "seconds": round(seconds * every, 1),
        "checkpoint_bytes": weights + states,
        "peak_memory_bytes": peak,
        "optimizer_bytes": states,
        "device": str(training_args.device),
    }
    size = training_args.train_batch_size * training_args.gradient_accumulation_steps
    device = "GPU memory" if training_args.device.type == "cuda" else "memory of this process"
    console.print(
        f"{len(parts.splits['train'])} rows in batches of {size}: {steps} steps an epoch, {every} steps in all\n"
        f"{seconds:.2f} s a step, about {duration(seconds * every)} in all, without evaluations and saves\n"
        f"{megabytes(weights + states)} a checkpoint: {megabytes(weights)} of weights, {megabytes(states)} of AdamW's "
        f"states\n{megabytes(peak)} of {device} at the peak; AdamW's states come on top, {megabytes(states)}"
    )
    return figures


def _settings(args: TrainingArguments) -> TrainingArguments:
    """The run's arguments for three steps of which nothing is written, logged or sent."""
    settings = copy.copy(args)
    changes = {
        "max_steps": 1 + _TIMED,
        "gradient_accumulation_steps": min(args.gradient_accumulation_steps, _MOST_BATCHES),
        "eval_strategy": type(args.eval_strategy)("no"),
        "save_strategy": type(args.save_strategy)("no"),
        "logging_strategy": type(args.logging_strategy)("no"),
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "report_to": [],
        "resume_from_checkpoint": None,
        "enable_jit_checkpoint": False,
        "disable_tqdm": True,
    }
    for name, value in changes.items():
        setattr(settings, name, value)
    return settings


class _NoStep(torch.optim.SGD):
    """An optimizer that leaves all weights as they are, and has no states."""

    def step(self, closure: Callable | None = None) -> None:
        return None


class _Stopwatch(TrainerCallback):
    """Times at which steps ended. The first step is not timed: it waits for workers, memory and kernels."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())


def _show_batch(batch: dict[str, torch.Tensor], processor: LorgnetteProcessor, console: Console) -> None:
    rows, shape = rows_of(batch, processor), tuple(batch["input_ids"].shape)
    pictures = len(batch["pixel_values"] if "pixel_values" in batch else batch.get("vision_features", ()))
    shown = f", the first {_SHOWN_TEXTS}" if len(rows) > _SHOWN_TEXTS else ""
    console.print(
        f"A batch of {shape[0]} rows of {shape[1]} tokens and {pictures} pictures{shown}; "
        "[[ ]] has labels, and the loss is on it alone:",
        markup=False,
    )
    for runs in rows[:_SHOWN_TEXTS]:
        text = labelled_text(runs, ("[[", "]]"))
        console.print("  ", text.plain.replace("\n", "⏎ "), style=None, markup=False, sep="")


def checkpoint_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes of the weights that a checkpoint holds, and of AdamW's states, two numbers of each trained weight."""
    left_out = keys_to_ignore_on_save(model)
    tensors = {value.data_ptr(): value for key, value in model.state_dict().items() if key not in left_out}
    weights = sum(value.numel() * value.element_size() for value in tensors.values())
    return weights, sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e8 else f"{count / 1e9:,.2f} GB"


def duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _write(report: dict[str, Any], folder: str) -> None:
    path = Path(folder, CHECK_REPORT)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
