"""Answer one row of data, and compute the attribution of the answer."""

from collections.abc import Mapping
from typing import Any

from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..trainer.collator import LorgnetteCollator
from ..trainer.generation import generate_texts
from .checks import preserved_state
from .maps import Attribution, maps_of


def explain_row(
    model: LorgnetteForConditionalGeneration,
    collator: LorgnetteCollator,
    row: Mapping[str, Any],
    *,
    max_words: int = 8,
    max_new_tokens: int = 24,
) -> Attribution | None:
    """Generate a row's answer greedily, and attribute it with [`~lorgnette.inspection.maps.maps_of`].

    Args:
        row: as the collator takes it; it needs no text.
        max_words: attribute at most so many words of the answer.
        max_new_tokens: limit for the answer.

    Returns:
        None for a row of cached features, which has no picture, and for a bridge without layers, which attends to none.

    Raises:
        ValueError, OSError, TypeError: the row has no picture that can be read.
    """
    prompt = {name: value.to(model.device) for name, value in collator.prompts([dict(row)]).items()}
    if "pixel_values" not in prompt or not len(model.qformer.encoder.layer):
        return None
    prompt.pop("row_index", None)
    with preserved_state(model):
        decoding = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
        ((_, answer),) = generate_texts(model, collator, [dict(row)], decoding=decoding, batch_size=1)
        return maps_of(model, collator.processor, prompt, answer, max_words, _row_name(row, collator))


def _row_name(row: Mapping[str, Any], collator: LorgnetteCollator) -> str:
    image = row.get(collator.image_column)
    if isinstance(image, str):
        return image[:200]
    return f"row {row['index']}" if "index" in row else "a picture"
