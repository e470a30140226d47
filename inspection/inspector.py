"""Runs all checks and maps on a model."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..processing.processing_lorgnette import LorgnetteProcessor
from ..trainer.collator import LorgnetteCollator
from ..trainer.texts import first_pair
from .attribution import explain_row
from .check_gradients import check_gradients
from .check_text import check_aligned, check_labels, check_prompt
from .check_vision import check_queries, check_sees, check_visual_norm, visual_tokens
from .check_weights import (
    Original,
    check_frozen,
    check_lora_place,
    check_lora_size,
    check_text_only,
    check_trainable,
)
from .checks import Check, preserved_state
from .components import FlowTensor, Part, flow, parts
from .maps import Attribution


@dataclass(frozen=True)
class Inspection:
    """The result of an inspection.

    Args:
        model: its name.
        parts, flow: see [`~lorgnette.inspection.components`].
        checks: in order.
        attributions: of some pictures.
    """

    model: str
    parts: Sequence[Part]
    flow: Sequence[FlowTensor]
    checks: Sequence[Check]
    attributions: Sequence[Attribution]

    @property
    def failed(self) -> list[Check]:
        """The checks that are red."""
        return [check for check in self.checks if check.passed is False]

    def as_json(self) -> dict[str, Any]:
        """Everything except the pictures, JSON-serialisable."""
        return {
            "model": self.model,
            "passed": not self.failed,
            "parts": [asdict(part) for part in self.parts],
            "flow": [asdict(tensor) for tensor in self.flow],
            "checks": [asdict(check) for check in self.checks],
            "looks": [
                {
                    "picture": attribution.name,
                    "answer": attribution.answer,
                    "layers": attribution.layers,
                    "queries": attribution.queries.round(5).tolist(),
                    "elsewhere": attribution.elsewhere.round(5).tolist(),
                    "words": [
                        {
                            "text": word.text,
                            "probability": word.probability,
                            "visual_tokens": word.visual_tokens.round(5).tolist(),
                            "patches": word.patches.round(5).tolist(),
                        }
                        for word in attribution.words
                    ],
                }
                for attribution in self.attributions
            ],
        }


def inspect_model(
    model: LorgnetteForConditionalGeneration,
    processor: LorgnetteProcessor,
    rows: Sequence[Mapping[str, Any]] = (),
    *,
    collator: LorgnetteCollator | None = None,
    pictures: Sequence[Mapping[str, Any]] | None = None,
    original: Original | None = None,
    name: str | None = None,
    batch_size: int = 8,
    gradient_steps: int = 3,
    quiet: bool = False,
) -> Inspection:
    """Run all checks on a model. It stays unchanged, except that its gradients are cleared.

    Args:
        model: on any device; in train or eval mode, which it keeps.
        processor: the model's.
        rows: data in the collator's format, with texts, of which the first of each picture is used; preferably rows
            that the model was not trained on. Without rows, some checks are not run.
        collator: the one of training, so that its labels are checked; by default a new one with the processor.
        pictures: rows whose pictures are explained; they need no texts. The first two of `rows` by default.
        original: the frozen parts before training; by default loaded from the sources in the config.
        name: the model's name in reports.
        batch_size: rows in a batch.
        gradient_steps: batches for the gradient check.
        quiet: show no progress bar.

    Raises:
        ValueError, OSError, TypeError: a row that cannot be used, named.
    """
    with preserved_state(model):
        collator = copy.copy(collator or LorgnetteCollator(processor))
        collator.pack_to = None  # the checks need one row per example
        rows = [first_pair(row, collator.text_column, collator.query_column) for row in rows]
        batches = [
            {key: value.to(model.device) for key, value in collator(rows[first : first + batch_size]).items()}
            for first in range(0, len(rows), batch_size)
        ]
        pictures = rows[:2] if pictures is None else pictures
        shown = batches or [
            {key: value.to(model.device) for key, value in collator.prompts([dict(row)]).items()} for row in pictures
        ]
        visual = visual_tokens(model, shown)

        def reference() -> Original:
            nonlocal original
            original = original or Original.from_sources(model, processor)
            return original

        steps: dict[str, Callable[[], Any]] = {
            "parts": lambda: parts(model),
            "flow": lambda: flow(model, processor),
            "frozen weights": lambda: check_frozen(model, reference()),
            "what trains": lambda: check_trainable(model),
            "LoRA's place": lambda: check_lora_place(model),
            "LoRA's size": lambda: check_lora_size(model),
            "gradients": lambda: check_gradients(model, batches[:gradient_steps]),
            "labels": lambda: check_labels(collator, rows[:batch_size]),
            "prompt": lambda: check_prompt(model, batches[:gradient_steps]),
            "placeholders": lambda: check_aligned(model, collator, rows[:batch_size]),
            "visual tokens": lambda: check_visual_norm(model, visual),
            "queries": lambda: check_queries(visual),
            "right and wrong pictures": lambda: check_sees(model, batches),
            "text alone": lambda: check_text_only(model, processor, reference()),
            "maps": lambda: [item for row in pictures if (item := explain_row(model, collator, row)) is not None],
        }
        results = []
        columns = (SpinnerColumn(), TextColumn("inspecting {task.completed}/{task.total}: {task.description}"))
        console = Console(stderr=True)
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=quiet) as bar:
            task = bar.add_task("", total=len(steps))
            for what, step in steps.items():
                bar.update(task, description=what)
                results.append(step())
                bar.advance(task)
        components, tensors, *checks, attributions = results
        return Inspection(name or model.name_or_path or type(model).__name__, components, tensors, checks, attributions)
