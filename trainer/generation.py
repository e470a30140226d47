"""Generate texts for rows of a data set with the prompts of training, and read their references."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from ..assembly.conversations import messages_of
from ..assembly.prompt_cache import kept_prompts
from ..assembly.stop_tokens import missing_tokens
from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..processing.prompt_encoding import error_context, parts_of
from .collator import LorgnetteCollator


BATCHES_READ = 16  # batches that are sorted by length together


def generate_texts(
    model: LorgnetteForConditionalGeneration,
    collator: LorgnetteCollator,
    rows: Iterable[dict[str, Any]],
    *,
    decoding: Mapping[str, Any],
    batch_size: int,
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each row and the model's answer, without special tokens and surrounding white space.

    Answers come in the order of the rows. Rows are read some batches at a time, and batches hold prompts of similar
    length. The model is in eval mode meanwhile; its mode is restored.

    Args:
        collator: makes the prompts; its rows may have `vision_features` in place of pictures.
        rows: in the collator's format; they need no text column.
        decoding: for `generate`, see [`~lorgnette.trainer.decoding.DECODING`].

    Raises:
        ValueError, OSError, TypeError: an invalid row, with its number; see the collator.
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
            )  # longest first, so that a lack of memory shows at once
            answers = [""] * len(read)
            with kept_prompts(model):  # not while answers are yielded: the caller may train meanwhile
                for start in range(0, len(read), batch_size):
                    rows_of_batch = order[start : start + batch_size]
                    prompts = collator.prompts([read[row] for row in rows_of_batch])
                    inputs = {name: tensor.to(model.device) for name, tensor in prompts.items()}
                    ids = model.generate(**inputs, **keywords)  # (B, S + new)
                    new = ids[:, inputs["input_ids"].shape[1] :]
                    decoded = collator.processor.batch_decode(new, skip_special_tokens=True)
                    for place, answer in zip(rows_of_batch, decoded, strict=True):
                        answers[place] = answer.strip()
            yield from zip(read, answers, strict=True)
    finally:
        model.train(was_training)


def references_of(row: Mapping[str, Any], column: str) -> list[str]:
    """The text or texts in a row's column; for a chat in `messages` the last message's text.

    Raises:
        ValueError: a missing column, no text, or an empty one. TypeError: not texts.
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
