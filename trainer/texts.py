"""The texts of a row: one, or several of one picture, and the questions that they answer."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..processing.prompt_encoding import error_context


def check_text(value: Any, what: str) -> str:
    """A text that is not empty; a TypeError or ValueError that says `what` it is otherwise."""
    if value is None:
        raise ValueError(f"{what} is None")
    if not isinstance(value, str):
        raise TypeError(f"{what} holds a {type(value).__name__}, {value!r:.80}; a string is needed")
    if not value.strip():
        raise ValueError(f"{what} is empty")
    return value


def texts_of(value: Any, column: str) -> list[str]:
    """The texts in a row's column, which holds one or a list.

    Raises:
        ValueError: an empty list, a text that is None or empty, with its place. TypeError: no text.
    """
    if not isinstance(value, (list, tuple)):
        return [check_text(value, f"column '{column}'")]
    if not value:
        raise ValueError(f"column '{column}' is an empty list: the picture has no text")
    return [check_text(text, f"column '{column}', text {n} of {len(value)},") for n, text in enumerate(value)]


def check_lists(lists: Mapping[str, list[Any]]) -> int:
    """The length of a row's lists of texts, or of questions and answers, which all are as long.

    Raises:
        ValueError: they are not; an empty list, or an empty text in it. TypeError: no text.
    """
    if len({len(values) for values in lists.values()}) > 1:
        counts = ", ".join(f"column '{column}' has {len(values)}" for column, values in lists.items())
        raise ValueError(f"{counts} texts: each question needs one answer")
    lengths = [len(texts_of(values, column)) for column, values in lists.items()]
    return lengths[0]


def pairs_of(row: dict[str, Any], text_column: str, query_column: str | None) -> Iterator[dict[str, Any]]:
    """The row; or, where it has a list of questions, a row for each with the answer at its place.

    Raises:
        ValueError, TypeError: what [`check_lists`] raises; one answer to several questions.
    """
    queries = None if query_column is None or row.get("messages") is not None else row.get(query_column)
    if not isinstance(queries, (list, tuple)):
        yield row
        return
    answers = row.get(text_column)
    answers = answers if isinstance(answers, (list, tuple)) else [answers]
    check_lists({query_column: queries, text_column: answers})
    for query, answer in zip(queries, answers, strict=True):
        yield row | {query_column: query, text_column: answer}


def pairs_of_rows(
    rows: Iterable[dict[str, Any]], text_column: str, query_column: str | None
) -> Iterator[dict[str, Any]]:
    """[`pairs_of`] all rows; errors name the row."""
    for position, row in enumerate(rows):
        with error_context(f"row {row.get('index', position)}"):
            found = list(pairs_of(row, text_column, query_column))
        yield from found


def first_pair(row: Mapping[str, Any], text_column: str, query_column: str | None) -> dict[str, Any]:
    """The row with the first of its texts, and of its questions, where it has lists of them."""
    columns = () if row.get("messages") is not None else (text_column, query_column)
    lists = [name for name in columns if isinstance(row.get(name), (list, tuple)) and row[name]]
    return dict(row) | {name: row[name][0] for name in lists}


def picture_number(value: int | str) -> int:
    """A picture's number: an integer is its own; of a string, such as a path, it is a hash of 63 bits.

    Raises:
        TypeError: neither. ValueError: an integer of more than 64 bits.
    """
    if isinstance(value, str):
        return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest()) >> 1
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"image_id is {value!r:.80}; rows of one picture need the same integer or string")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"image_id is {value}, which has more than 64 bits")
    return int(value)
