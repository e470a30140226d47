"""The texts of a row: one, or several of one picture, and the questions that they answer."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any


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


def pairs_of(row: dict[str, Any], text_column: str, query_column: str | None) -> Iterator[dict[str, Any]]:
    """The row; or, where it has a list of questions, a row for each with the answer at its place.

    Raises:
        ValueError: no questions, or more or fewer answers.
    """
    queries = None if query_column is None or row.get("messages") is not None else row.get(query_column)
    if not isinstance(queries, (list, tuple)):
        yield row
        return
    answers = row.get(text_column)
    if not queries or not isinstance(answers, (list, tuple)) or len(answers) != len(queries):
        count = len(answers) if isinstance(answers, (list, tuple)) else 1
        raise ValueError(
            f"column '{query_column}' has {len(queries)} questions, and column '{text_column}' {count} answers: each "
            "question needs one"
        )
    for query, answer in zip(queries, answers, strict=True):
        yield row | {query_column: query, text_column: answer}


def first_pair(row: Mapping[str, Any], text_column: str, query_column: str | None) -> dict[str, Any]:
    """The row with the first of its texts, and of its questions, where it has lists of them."""
    columns = () if row.get("messages") is not None else (text_column, query_column)
    lists = [name for name in columns if isinstance(row.get(name), (list, tuple)) and row[name]]
    return dict(row) | {name: row[name][0] for name in lists}


def picture_number(value: int | str) -> int:
    """A picture's number: an integer is its own; of a string, such as a path, it is a hash of 63 bits."""
    if isinstance(value, str):
        return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest()) >> 1
    return int(value)
