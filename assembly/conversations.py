"""Normalise conversations of data sets and clients to lists of messages with lists of parts."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from ..processing.prompt_encoding import parts_of


def conversations_of(value: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """Conversations, each as [`messages_of`] gives it, and whether there are several; raises what it does."""
    items = _plain(value)
    try:
        first = _plain(items[0]) if isinstance(items, list) and items else None
    except (TypeError, ValueError):  # `messages_of` raises it with the message's position
        first = None
    if isinstance(first, list):
        return [_nth(position, item) for position, item in enumerate(items)], True
    return [messages_of(items)], False


def _nth(position: int, conversation: Any) -> list[dict[str, Any]]:
    try:
        return messages_of(conversation)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{error} (conversation {position})") from error


def messages_of(conversation: Any) -> list[dict[str, Any]]:
    """A conversation as a list of messages, from any format of data sets.

    Args:
        conversation: messages in a list, a tuple, an array or a column or table of pandas; a dict of lists, as
            `datasets` has it for a sequence of structs; JSON of any of these. A message may be JSON as well.

    Raises:
        ValueError: a message without a role, lists of different lengths, a string that is no JSON.
        TypeError: something else, or a message that is something else; says which, and its type.
    """
    items, messages = _plain(conversation), []
    if not isinstance(items, list):
        kind = "one message" if isinstance(items, dict) and "role" in items else f"a {type(conversation).__name__}"
        raise TypeError(f"the messages are {kind}; a list of messages is needed")
    for position, message in enumerate(items):
        try:
            message = _plain(message)
            if not isinstance(message, dict):
                kind = f"{str(message)[:100]!r} (a {type(message).__name__})"
                raise TypeError(f'a message is {{"role": …, "content": …}}, not {kind}')
            messages.append(message | {"content": _content(message.get("content"))})
            _refuse_json_of_parts(messages[-1]["content"])
            parts_of(messages[-1])
            if not isinstance(message.get("role"), str):
                has = {key: type(value).__name__ for key, value in message.items()}
                raise ValueError(f"a message has no role, but {has!s:.200}")
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{error} (message {position})") from error
    return messages


def _plain(value: Any) -> Any:
    """Convert other containers to lists and dicts; anything else is unchanged."""
    if isinstance(value, (str, bytes)):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            begins = f"{value[:1]!r}, with which a {type(value).__name__} begins that is no JSON of messages"
            why = f"{value[:100]!r} ({str(error)[:100]})"
            raise TypeError(f'a message is {{"role": …, "content": …}}, not {begins}: {why}') from None
    if hasattr(value, "iloc"):  # pandas
        value = value.to_dict("records") if hasattr(value, "columns") else value.tolist()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    value = _fields(value)
    if isinstance(value, Mapping):
        value = dict(value)
        return value if isinstance(value.get("role"), str) else _records(value)
    return list(value) if isinstance(value, tuple) else value


def _content(content: Any) -> Any:
    """A string, or a list of parts that are strings or dicts; anything else is unchanged."""
    if isinstance(content, Mapping):
        content = _records(dict(content))
        content = [content] if isinstance(content, dict) else content
    if not isinstance(content, (list, tuple, np.ndarray)):
        return content
    parts = map(_fields, content)
    return [dict(part) if isinstance(part, Mapping) else part for part in parts]


def _refuse_json_of_parts(content: Any) -> None:
    """Raises a TypeError for a list of parts that was written as a string, which would be read as words."""
    try:
        parts = json.loads(content) if isinstance(content, str) and content.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return
    kinds = ("text", "image", "image_url")
    if parts and all(isinstance(part, dict) and part.get("type") in kinds for part in parts):
        raise TypeError(
            f"the content of a message is JSON of parts, as a string: {content[:100]!r}. Give the parts themselves, "
            "json.loads(content), or where it is what is said, a part of text with it"
        )


def _fields(value: Any) -> Any:
    """The fields of a dataclass, or of a pydantic model as OpenAI's are, as a dict; anything else as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return value.model_dump() if callable(getattr(value, "model_dump", None)) else value


def _records(columns: dict[str, Any]) -> Any:
    """A dict of lists as a list of dicts; as it is, where not all of its values are lists."""
    if not columns or not all(isinstance(column, (list, tuple, np.ndarray)) for column in columns.values()):
        return columns
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"a dict of lists of different lengths: {lengths!s:.200}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
