"""Texts that a model generates for rows of a data set, asked as in training; and what they are measured by."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..processing.conversations import parts_of
from ..processing.pipeline_lorgnette import missing_tokens
from .collator import LorgnetteCollator


def generate_texts(
    model: LorgnetteForConditionalGeneration,
    collator: LorgnetteCollator,
    rows: Iterable[dict[str, Any]],
    *,
    decoding: Mapping[str, Any],
    batch_size: int,
) -> Iterator[tuple[dict[str, Any], str]]:
    """Each row and the model's answer to it, without special tokens and white space at the ends.

    Rows are read a batch at a time. The model is in eval mode meanwhile, and in the mode it was in afterwards.

    Args:
        collator: makes the prompts; its rows may have `vision_features` in place of pictures.
        rows: as the collator takes them; a text column is not needed.
        decoding: for `generate`, see [`~lorgnette.trainer.decoding.DECODING`].

    Raises:
        ValueError, OSError, TypeError: a row of which no prompt can be made, named; see the collator.
    """
    keywords = {**missing_tokens(model.generation_config, collator.processor), **decoding}
    remaining, was_training = iter(rows), model.training
    model.eval()
    try:
        while batch := list(islice(remaining, batch_size)):
            inputs = {name: tensor.to(model.device) for name, tensor in collator.prompts(batch).items()}
            ids = model.generate(**inputs, **keywords)  # (B, S + new)
            answers = collator.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            yield from zip(batch, (answer.strip() for answer in answers), strict=True)
    finally:
        model.train(was_training)


def references_of(row: Mapping[str, Any], column: str) -> list[str]:
    """The text or texts in a row's column; of a chat in `messages` the last message's.

    Raises:
        ValueError: there is no such column, no text in it or an empty one. TypeError: something else than texts.
    """
    where = f"row {row['index']}" if "index" in row else "a row"
    if column not in row:
        raise ValueError(f"{where}: there is no column '{column}', only {sorted(row)}")
    texts = [row[column]] if isinstance(row[column], str) else row[column]
    if column == "messages" and texts:
        texts = ["\n".join(part["text"] for part in parts_of(texts[-1]) if part["type"] == "text")]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{where}: column '{column}' holds {texts!r:.100}; a string or a list of strings is needed")
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(f"{where}: column '{column}' has {len(texts)} texts, of which one or all are empty")
    return texts
