"""Chat messages whose contents are lists of text and image parts, as strings: all a text-only LM's template knows."""

import base64
import binascii
from typing import Any

from transformers import PreTrainedTokenizerBase

from .prompt_encoding import IMAGE_TOKEN, mark_as_words


def is_batch(conversation: Any) -> bool:
    """Whether these are several conversations rather than one list of messages."""
    return bool(conversation) and not isinstance(conversation[0], dict)


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message: `{"type": "text", "text": …}` and `{"type": "image"}`, with its picture under `"image"`.

    A picture may also stand under `url`, `path`, `base64`, or as OpenAI's `image_url`. Keys with None count as absent,
    for a dataset fills up its rows with them.

    Raises:
        ValueError: a part of another type, a text part without text.
        TypeError: the message is no dict.
    """
    if not isinstance(message, dict):
        raise TypeError(f'a message is {{"role": …, "content": …}}, not {str(message)[:100]!r}')
    content = message.get("content")
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [_part(part) for part in content]


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if part.get("type") == "image_url":
        url = part.get("image_url")
        return {"type": "image", "image": url.get("url") if isinstance(url, dict) else url}
    if part.get("type") != "image":
        raise ValueError(f'a part is {{"type": "text", "text": …}} or {{"type": "image", …}}, not {str(part)[:100]}')
    if "base64" in part:
        try:
            return {"type": "image", "image": base64.b64decode(part["base64"], validate=True)}
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
