"""All that is asked of a model, in order, and the answers."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..processing.processing_lorgnette import LorgnetteProcessor
from ..trainer.collator import LorgnetteCollator
from .anatomy import Part, Station, flow, parts
from .check_gradients import check_gradients
from .check_sight import check_queries, check_sees, check_soft_norm, soft_tokens
from .check_weights import (
    Original,
    check_frozen,
    check_lora_place,
    check_lora_size,
    check_text_only,
    check_trainable,
)
from .check_words import check_in_step, check_labels, check_prompt
from .checks import Check, undisturbed
from .looking import look
from .maps import Look


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Args:
        model: what it is called.
        parts, flow: see [`~lorgnette.inspection.anatomy`].
        checks: in order.
        looks: at some pictures.
    """

    model: str
    parts: Sequence[Part]
    flow: Sequence[Station]
    checks: Sequence[Check]
    looks: Sequence[Look]

    @property
    def failed(self) -> list[Check]:
        """The checks that are red."""
        return [check for check in self.checks if check.passed is False]

    def as_json(self) -> dict[str, Any]:
        """All of it but the pictures, as JSON can hold it."""
        return {
            "model": self.model,
            "passed": not self.failed,
            "parts": [asdict(part) for part in self.parts],
            "flow": [asdict(station) for station in self.flow],
            "checks": [asdict(check) for check in self.checks],
            "looks": [
                {
                    "picture": seen.name,
                    "answer": seen.answer,
                    "layers": seen.layers,
                    "queries": seen.queries.round(5).tolist(),
                    "elsewhere": seen.elsewhere.round(5).tolist(),
                    "words": [
                        {
                            "text": word.text,
                            "probability": word.probability,
                            "soft": word.soft.round(5).tolist(),
                            "patches": word.patches.round(5).tolist(),
                        }
                        for word in seen.words
                    ],
                }
                for seen in self.looks
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
    """Look at a model from all sides. Nothing of it changes but its gradients, which are cleared.

    Args:
        model: in memory, on any device; in train or eval mode, which it keeps.
        processor: the one that belongs to it.
        rows: of data that the model should know about, as the collator takes them, with texts; better ones that it was
            not trained on. Without any, some checks are not run.
        collator: the one of training, so that its labels are looked at; by default one of the processor.
        pictures: rows whose pictures are mapped; they need no texts. The first two of `rows` by default.
        original: what the frozen parts were before; by default the sources that the config records are loaded again.
        name: what the model is called in reports.
        batch_size: rows that go through the model at once.
        gradient_steps: batches that gradients are looked at on.
        quiet: shows no progress bar.

    Raises:
        ValueError, OSError, TypeError: a row that cannot be used, named.
    """
    with undisturbed(model):
        collator = copy.copy(collator or LorgnetteCollator(processor))
        collator.pack_to = None  # a row each, so that it can be told which is which
        rows = [dict(row) for row in rows]
        batches = [
            {key: value.to(model.device) for key, value in collator(rows[first : first + batch_size]).items()}
            for first in range(0, len(rows), batch_size)
        ]
        pictures = rows[:2] if pictures is None else pictures
        shown = batches or [
            {key: value.to(model.device) for key, value in collator.prompts([dict(row)]).items()} for row in pictures
        ]
        soft = soft_tokens(model, shown)

        def known() -> Original:
            nonlocal original
            original = original or Original.from_sources(model, processor)
            return original

        steps: dict[str, Callable[[], Any]] = {
            "parts": lambda: parts(model),
            "flow": lambda: flow(model, processor),
            "frozen weights": lambda: check_frozen(model, known()),
            "what trains": lambda: check_trainable(model),
            "LoRA's place": lambda: check_lora_place(model),
            "LoRA's size": lambda: check_lora_size(model),
            "gradients": lambda: check_gradients(model, batches[:gradient_steps]),
            "labels": lambda: check_labels(collator, rows[:batch_size]),
            "prompt": lambda: check_prompt(model, batches[:gradient_steps]),
            "placeholders": lambda: check_in_step(model, collator, rows[:batch_size]),
            "soft tokens": lambda: check_soft_norm(model, soft),
            "queries": lambda: check_queries(soft),
            "right and wrong pictures": lambda: check_sees(model, batches),
            "text alone": lambda: check_text_only(model, processor, known()),
            "maps": lambda: [seen for row in pictures if (seen := look(model, collator, row)) is not None],
        }
        found = []
        columns = (SpinnerColumn(), TextColumn("inspecting {task.completed}/{task.total}: {task.description}"))
        console = Console(stderr=True)
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=quiet) as bar:
            task = bar.add_task("", total=len(steps))
            for what, step in steps.items():
                bar.update(task, description=what)
                found.append(step())
                bar.advance(task)
        made_of, way, *checks, looks = found
        return Inspection(name or model.name_or_path or type(model).__name__, made_of, way, checks, looks)
