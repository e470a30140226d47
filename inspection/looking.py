"""A look at a row of data: the model answers, and where it looked is mapped."""

from collections.abc import Mapping
from typing import Any

from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..trainer.collator import LorgnetteCollator
from ..trainer.generation import generate_texts
from .checks import undisturbed
from .maps import Look, maps_of


def look(
    model: LorgnetteForConditionalGeneration,
    collator: LorgnetteCollator,
    row: Mapping[str, Any],
    *,
    max_words: int = 8,
    max_new_tokens: int = 24,
) -> Look | None:
    """Let the model answer for a row, greedily, and see where it looked: [`~lorgnette.inspection.maps.maps_of`].

    Args:
        row: as the collator takes it; no text is needed.
        max_words: of the answer that are followed back.
        max_new_tokens: of the answer.

    Returns:
        None for a row of features, which has no picture to draw on.

    Raises:
        ValueError, OSError, TypeError: the row has no picture that can be read.
    """
    prompt = {name: value.to(model.device) for name, value in collator.prompts([dict(row)]).items()}
    if "pixel_values" not in prompt:
        return None
    prompt.pop("row_index", None)
    with undisturbed(model):
        decoding = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
        ((_, answer),) = generate_texts(model, collator, [dict(row)], decoding=decoding, batch_size=1)
        return maps_of(model, collator.processor, prompt, answer, max_words, _called(row, collator))


def _called(row: Mapping[str, Any], collator: LorgnetteCollator) -> str:
    image = row.get(collator.image_column)
    if isinstance(image, str):
        return image[:200]
    return f"row {row['index']}" if "index" in row else "a picture"
