"""Texts that a model generates for rows of a data set, asked as in training; and what they are measured by."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from ..assembly.conversations import messages_of
from ..assembly.stop_tokens import missing_tokens
from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..processing.prompt_encoding import error_context, parts_of
from .collator import LorgnetteCollator


BATCHES_READ = 16  # rows that are sorted by length at a time, in batches


def generate_texts(
    model: LorgnetteForConditionalGeneration,
    collator: LorgnetteCollator,
    rows: Iterable[dict[str, Any]],
    *,
    decoding: Mapping[str, Any],
    batch_size: int,
) -> Iterator[tuple[dict[str, Any], str]]:
    """Each row and the model's answer to it, without special tokens and white space at the ends.

    Answers come in the order of the rows, which are read some batches at a time: of these, prompts of like length are
    put into one batch. The model is in eval mode meanwhile, and in the mode it was in afterwards.

    Args:
        collator: makes the prompts; its rows may have `vision_features` in place of pictures.
        rows: as the collator takes them; a text column is not needed.
        decoding: for `generate`, see [`~lorgnette.trainer.decoding.DECODING`].

    Raises:
        ValueError, OSError, TypeError: a row of which no prompt can be made, named; see the collator.
    """
    keywords = {**missing_tokens(model.generation_config, collator.processor), "return_dict_in_generate": False}
    keywords |= decoding
    remaining, was_training = iter(rows), model.training
    model.eval()
    try:
        while read := list(islice(remaining, batch_size * BATCHES_READ)):
            lengths = collator.prompt_lengths(read)
            order = sorted(
                range(len(read)), key=lengths.__getitem__, reverse=True
            )  # what takes most memory comes first
            answers = [""] * len(read)
            for start in range(0, len(read), batch_size):
                places = order[start : start + batch_size]
                prompts = collator.prompts([read[place] for place in places])
                inputs = {name: tensor.to(model.device) for name, tensor in prompts.items()}
                ids = model.generate(**inputs, **keywords)  # (B, S + new)
                new = ids[:, inputs["input_ids"].shape[1] :]
                for place, answer in zip(
                    places, collator.processor.batch_decode(new, skip_special_tokens=True), strict=True
                ):
                    answers[place] = answer.strip()
            yield from zip(read, answers, strict=True)
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
    if column == "messages" and row[column] is not None:
        with error_context(where):
            answers = [parts_of(message) for message in messages_of(row[column])[-1:]]
        texts = ["\n".join(part["text"] for part in parts if part["type"] == "text") for parts in answers]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{where}: column '{column}' holds {texts!r:.100}; a string or a list of strings is needed")
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(f"{where}: column '{column}' has {len(texts)} texts, of which one or all are empty")
    return texts
