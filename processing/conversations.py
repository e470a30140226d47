"""Chat messages whose contents are lists of text and image parts, as strings: all a text-only LM's template knows."""

import binascii
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .image_loading import decode_base64
from .prompt_encoding import IMAGE_TOKEN, mark_as_words


def conversations_of(given: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """Conversations, each as [`messages_of`] gives it, and whether there are several; raises what it does."""
    items = _plain(given)
    try:
        first = _plain(items[0]) if isinstance(items, list) and items else None
    except (TypeError, ValueError):  # below it is said which message that is
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
    """A conversation as a list of messages, from what data sets hold it in.

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
            messages.append(_plain(message))
            parts_of(messages[-1], decode=False)
            if not isinstance(messages[-1].get("role"), str):
                has = {key: type(value).__name__ for key, value in messages[-1].items()}
                raise ValueError(f"a message has no role, but {has!s:.200}")
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{error} (message {position})") from error
    return messages


def _plain(value: Any) -> Any:
    """Lists and dicts for what holds the same in another way; anything else as it is."""
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


def parts_of(message: dict[str, Any], decode: bool = True) -> list[dict[str, Any]]:
    """The parts of a message: `{"type": "text", "text": …}` and `{"type": "image"}`, with its picture under `"image"`.

    A picture may also stand under `url`, `path`, `base64`, or as OpenAI's `image_url`. Keys with None count as absent,
    for a dataset fills up its rows with them. The content may be one part, or a dict of lists.

    Args:
        decode: base64; without it, a part's picture is its base64.

    Raises:
        ValueError: a part of another type, a text part without text.
        TypeError: the message is no dict, its content or a part of it is something else.
    """
    if not isinstance(message, dict):
        kind = type(message).__name__
        raise TypeError(f'a message is {{"role": …, "content": …}}, not {str(message)[:100]!r} (a {kind})')
    content = message.get("content")
    if isinstance(content, str) and _is_json_of_parts(content):
        raise TypeError(
            f"the content of a message is JSON of parts, as a string: {content[:100]!r}. Give the parts themselves, "
            "json.loads(content), or where it is what is said, a part of text with it"
        )
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if isinstance(content, Mapping):
        content = _records(dict(content))
        content = [content] if isinstance(content, dict) else content
    if not isinstance(content, (list, tuple, np.ndarray)):
        raise TypeError(f"the content of a message is a string or a list of parts, not a {type(content).__name__}")
    return [_part(part, position, decode) for position, part in enumerate(content)]


def _is_json_of_parts(content: str) -> bool:
    """Whether somebody has written a list of parts as a string, which would be read as words."""
    if not content.lstrip().startswith("["):
        return False
    try:
        parts = json.loads(content)
    except (ValueError, RecursionError):
        return False
    kinds = ("text", "image", "image_url")
    return bool(parts) and all(isinstance(part, dict) and part.get("type") in kinds for part in parts)


def _part(part: Any, position: int, decode: bool) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    part = _fields(part)
    if not isinstance(part, Mapping):
        raise TypeError(f'part {position} is a {type(part).__name__}; {{"type": …}} or a string is needed')
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if part.get("type") == "image_url":
        url = part.get("image_url")
        return {"type": "image", "image": url.get("url") if isinstance(url, dict) else url}
    if part.get("type") != "image":
        raise ValueError(f'a part is {{"type": "text", "text": …}} or {{"type": "image", …}}, not {str(part)[:100]}')
    if "base64" in part:
        if not decode:
            return {"type": "image", "image": part["base64"]}
        try:
            return {"type": "image", "image": decode_base64(part["base64"])}
        except binascii.Error as error:
            raise ValueError(f"an image part's base64 is not valid: {error}") from error
    found = [part[key] for key in ("image", "url", "path") if key in part]
    return {"type": "image", "image": found[0]} if found else {"type": "image"}


def flatten(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with string contents: one part a line, an image as `<image>`, the users' words marked as such."""
    flat = []
    for message in messages:
        lines = [
            IMAGE_TOKEN if part["type"] == "image" else mark_as_words(tokenizer, part["text"])
            for part in parts_of(message)
        ]
        rest = {key: value for key, value in message.items() if key != "content" and value is not None}
        flat.append({**mark_as_words(tokenizer, rest), "content": "\n".join(lines)})
    return flat


def count_images(messages: list[dict[str, Any]]) -> int:
    return sum(part["type"] == "image" for message in messages for part in parts_of(message))


def images_in(messages: list[dict[str, Any]]) -> list[Any]:
    """The pictures that the messages bring along, in order."""
    return [part["image"] for message in messages for part in parts_of(message) if "image" in part]


def query_in(messages: list[dict[str, Any]]) -> str:
    """The words of the last user message: what is asked about the images."""
    asked = [message for message in messages if message.get("role") == "user"]
    return "\n".join(part["text"] for part in parts_of(asked[-1]) if part["type"] == "text") if asked else ""
