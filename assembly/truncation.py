"""Prompts that are too long: words go, placeholders stay."""

from itertools import groupby

from transformers import PreTrainedTokenizerBase

from ..processing.prompt_encoding import IMAGE_TOKEN, control_tokens, error_context


def truncated(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], length: int) -> list[list[int]]:
    """Prompts of at most `length` tokens; raises a ValueError with the row where its images alone take more."""
    short = []
    for row, ids in enumerate(rows):
        with error_context(f"row {row}"):
            short.append(truncate(tokenizer, ids, length))
    return short


def truncate(tokenizer: PreTrainedTokenizerBase, ids: list[int], length: int) -> list[int]:
    """Shorten a prompt: drop words from the ends of the longest runs, then markup from the left.

    Raises:
        ValueError: the images, which stay, take more than `length`.
    """
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if ids.count(image_token_id) > length:
        raise ValueError(f"max_length is {length}, but the images alone take {ids.count(image_token_id)} tokens")
    markup = {image_token_id, *tokenizer.convert_tokens_to_ids(list(control_tokens(tokenizer)))}
    runs = [list(run) for is_word, run in groupby(range(len(ids)), lambda n: ids[n] not in markup) if is_word]
    order = [position for run in sorted(runs, key=len, reverse=True) for position in reversed(run)]
    order += [position for position, token in enumerate(ids) if token in markup and token != image_token_id]
    dropped = set(order[: max(0, len(ids) - length)])
    return [token for position, token in enumerate(ids) if position not in dropped]
