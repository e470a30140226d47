"""Conversations to prompts, and prompts to token ids.

A chat template writes users' words and its own markup into one string. [`escape_special_tokens`] puts a user's control
tokens between two Unicode noncharacters, and [`encode`] tokenizes what stands there as plain text.
"""

import base64
import json
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import groupby
from typing import Any
from urllib.parse import unquote
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from ..configuration.configuration_lorgnette import from_package


IMAGE_TOKEN = "<image>"
_OF_URLS = str.maketrans("-_", "+/", "\r\n\t")

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_ESCAPES = {_OPEN: "\ufdd2", _CLOSE: "\ufdd3"}  # for the two themselves, where a user's text has them
_ANSWER = "THE-ANSWER"
_CACHE_SIZE = 1024  # values per tokenizer
_caches: WeakKeyDictionary[PreTrainedTokenizerBase, Any] = WeakKeyDictionary()


@contextmanager
def error_context(where: str) -> Iterator[None]:
    """Put the item's name in front of the message of an error about it."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        kinds = (FileNotFoundError, OSError, TypeError, ValueError)
        raise next(kind for kind in kinds if isinstance(error, kind))(f"{where}: {error}") from error


def cached_per_tokenizer(tokenizer: PreTrainedTokenizerBase, key: Hashable, compute: Callable[[], Any]) -> Any:
    """The value of `compute` for this key, while the tokenizer and its chat template stay the same."""
    settings = (getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token"))
    key = (key, len(tokenizer), chat_templates(tokenizer), *settings, *tokenizer.all_special_tokens)
    cache = _caches.setdefault(tokenizer, {})
    if key not in cache:
        value = compute()
        if len(cache) >= _CACHE_SIZE:
            cache.clear()
        cache[key] = value
    return cache[key]


def chat_templates(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of all chat templates of the tokenizer."""
    template = tokenizer.chat_template or ""
    return "\0".join(template.values()) if isinstance(template, dict) else template


def is_prepared(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has `<image>` as a special token, a pad token, and pads on the left."""
    has_image = any(token.content == IMAGE_TOKEN and token.special for token in tokenizer.added_tokens_decoder.values())
    return has_image and tokenizer.pad_token is not None and tokenizer.padding_side == "left"


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """`<image>`, the special tokens, and other added tokens that the chat template writes (some LMs' role markers)."""

    def compute() -> tuple[str, ...]:  # of Gemma's 6,000 added tokens it takes 20 ms
        templates = chat_templates(tokenizer)
        added = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special or (token.content in templates and not token.content.isspace())
        ]
        return tuple(dict.fromkeys((*added, *tokenizer.all_special_tokens, IMAGE_TOKEN)))

    return cached_per_tokenizer(tokenizer, control_tokens, compute)


def escape_special_tokens(tokenizer: PreTrainedTokenizerBase, value: Any) -> Any:
    """Mark control tokens as plain text in a string, or in all strings of a list or dict, its keys too."""
    escape = partial(escape_special_tokens, tokenizer)
    if isinstance(value, str):
        to_escape, _ = _patterns(control_tokens(tokenizer))
        return to_escape.sub(lambda match: f"{_OPEN}{_ESCAPES.get(match[0], match[0])}{_CLOSE}", value)
    if isinstance(value, dict):
        return {escape(key): escape(item) for key, item in value.items()}
    return [escape(item) for item in value] if isinstance(value, (list, tuple)) else value


@lru_cache(maxsize=8)
def _patterns(tokens: tuple[str, ...]) -> tuple[re.Pattern, re.Pattern]:
    """What to escape in a user's words; and what is escaped: a token between two marks, or a mark left alone."""
    # a template that takes words apart may leave marks alone; what it writes between two of them is markup
    longest_first = sorted(tokens, key=len, reverse=True)
    to_escape, escaped = ("|".join(map(re.escape, [*longest_first, *ends])) for ends in (_ESCAPES, _ESCAPES.values()))
    return re.compile(to_escape), re.compile(f"{_OPEN}({escaped}){_CLOSE}|[{_OPEN}{_CLOSE}]")


def encode(tokenizer: PreTrainedTokenizerBase, text: str, continues: bool = False) -> list[int]:
    """Token ids of a text, without those that the tokenizer adds around it; an `<image>` is one id.

    Args:
        text: may hold what [`escape_special_tokens`] has marked; raises what [`check_unicode`] does.
        continues: other text precedes it, so SentencePiece puts no space in front of the first word.
    """
    check_unicode(text)
    _, escaped = _patterns(control_tokens(tokenizer))
    ids: list[int] = []
    for position, piece in enumerate(escaped.split(text)):  # markup, escaped, markup, …; None for a mark left alone
        is_markup, follows = position % 2 == 0, continues or bool(ids)
        if not piece:
            continue
        piece = piece if is_markup else next((mark for mark, escape in _ESCAPES.items() if escape == piece), piece)
        found = _in_context(tokenizer, piece, is_markup, follows)
        if not is_markup and len(piece) > 1 and tokenizer.convert_tokens_to_ids(piece) in found:
            found = _in_context(tokenizer, piece[:1], False, follows)  # the vocabulary has the token, and no half of it
            found += _in_context(tokenizer, piece[1:], False, True)
        ids += found
    return ids


def image_positions(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Where each `<image>` that is markup begins in a text."""
    escaped = [match.span() for match in _patterns(control_tokens(tokenizer))[1].finditer(text)]
    starts = [match.start() for match in re.finditer(re.escape(IMAGE_TOKEN), text)]
    return [start for start in starts if not any(first <= start < end for first, end in escaped)]


def check_unicode(text: str) -> None:
    """Raises a ValueError with code point and position for half of a character, as JSON's `"\\ud83d"` brings it in."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}, a lone surrogate"
        raise ValueError(f"the text has half of a character at position {error.start}: {half}") from None


def with_start(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Prepend what the tokenizer adds to every text (BOS, mostly), unless the template has written it.

    Placeholders may stand before it, as in BLIP-2's prompts.
    """

    def compute() -> list[int]:
        bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        return next((full[:n] for n in range(len(full)) if full[n : n + len(bare)] == bare), [])

    start = cached_per_tokenizer(tokenizer, with_start, compute)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    first = next((n for n, token in enumerate(ids) if token != image_token_id), len(ids))
    return ids if ids[first : first + len(start)] == start else start + ids


def truncate(tokenizer: PreTrainedTokenizerBase, ids: list[int], length: int) -> list[int]:
    """Shorten a prompt: drop words from the ends of the longest runs, then markup from the left.

    Raises a ValueError where the images, which stay, take more than `length`.
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


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], chat_template: str | None = None, **kwargs: Any
) -> str:
    """Write messages whose contents are strings in the LM's chat template, or one a line where it has none.

    Raises a ValueError where the template refuses the conversation (a system message, where it knows no such role).
    """
    if chat_template is None and tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in messages if message["content"])
    try:
        return tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False, **kwargs)
    except Exception as error:  # a template raises what it likes
        roles = f"the roles {', '.join(str(message.get('role')) for message in messages)[:200]}: {str(error)[:500]}"
        raise ValueError(f"the LM's chat template cannot write messages of {roles}") from error


def answer_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """The white space between a prompt and its answer, and the ids that end an answer, up to the first special token.

    The chat template shows both; a thought that it puts in front of finished answers (Qwen3) is left out. Raises a
    ValueError where it does not write the assistant's message once, or nothing ends an answer.
    """

    def compute() -> tuple[str, list[int]]:
        lead, end = "\n", []
        if tokenizer.chat_template is not None:
            question = [{"role": "user", "content": "question"}]
            prompt = render(tokenizer, question, add_generation_prompt=True)
            conversation = render(tokenizer, [*question, {"role": "assistant", "content": _ANSWER}])
            if (count := conversation.count(_ANSWER)) != 1:
                raise ValueError(f"the LM's chat template writes an answer {count} times, not once")
            before, _, after = conversation.partition(_ANSWER)
            lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
            lead, end = "" if lead.strip() else lead, encode(tokenizer, after, continues=True)
        stops = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(control_tokens(tokenizer)))}
        stop = next((position for position, token in enumerate(end) if token in stops), None)
        if stop is None and tokenizer.eos_token_id is None:
            raise ValueError("neither the chat template nor the tokenizer (eos_token) has a token that ends an answer")
        return lead, [tokenizer.eos_token_id] if stop is None else end[: stop + 1]

    return cached_per_tokenizer(tokenizer, answer_frame, compute)


def _in_context(tokenizer: PreTrainedTokenizerBase, text: str, is_markup: bool, continues: bool) -> list[int]:
    """Token ids of a text; one that continues is tokenized behind a line break, where no space precedes a word."""
    if continues:
        line = cached_per_tokenizer(tokenizer, is_markup, partial(_tokenize, tokenizer, "\n", is_markup))
        ids = _tokenize(tokenizer, "\n" + text, is_markup)
        if ids[: len(line)] == line:
            return ids[len(line) :]
    return _tokenize(tokenizer, text, is_markup)


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, is_markup: bool) -> list[int]:
    """Token ids of a text; added tokens, the ones that are not special too, count as such in markup alone."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if is_markup or backend is None:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=not is_markup)["input_ids"]
    text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    pre = backend.pre_tokenizer
    words = [text] if pre is None else [word for word, _ in pre.pre_tokenize_str(text)]
    return [token.id for word in words for token in backend.model.tokenize(word)]


def conversations_of(value: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """Conversations as lists of messages, and whether there are several; the package reads more than lists of dicts."""
    several = isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (list, tuple))
    batch = list(value) if several else [value]
    if all(map(_is_plain, batch)):
        return [list(messages) for messages in batch], several
    what = 'a conversation that is no list of {"role": …, "content": text or a list of parts}'
    return from_package("assembly.conversations", what).conversations_of(value)


def _is_plain(messages: Any) -> bool:
    def is_message(message: Any) -> bool:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return False
        content = () if message.get("content") is None else message["content"]
        return isinstance(content, (str, list, tuple)) and all(isinstance(part, (str, dict)) for part in content)

    return isinstance(messages, (list, tuple)) and all(map(is_message, messages))


def parts_of(message: dict[str, Any], decode: bool = True) -> list[dict[str, Any]]:
    """The parts of a message: `{"type": "text", "text": …}` and `{"type": "image"}`, with its picture under `"image"`.

    A picture may also stand under `url`, `path`, `base64` (which `decode` decodes), or as OpenAI's `image_url`. Keys
    with None count as absent. Raises a ValueError for a part of another type or without text, or invalid base64; a
    TypeError for another content or part.
    """
    content = message.get("content")
    if isinstance(content, str) and _is_json_of_parts(content):
        raise TypeError(
            f"the content of a message is JSON of parts, as a string: {content[:100]!r}. Give the parts themselves, "
            "json.loads(content), or where it is what is said, a part of text with it"
        )
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if not isinstance(content, (list, tuple)):
        raise TypeError(f"the content of a message is a string or a list of parts, not a {type(content).__name__}")
    return [_part(part, position, decode) for position, part in enumerate(content)]


def _is_json_of_parts(content: str) -> bool:
    """Whether a list of parts was written as a string, which would be read as words."""
    if not content.lstrip().startswith("["):
        return False
    try:
        parts = json.loads(content)
    except (ValueError, RecursionError):
        return False
    kinds = ("text", "image", "image_url")
    return bool(parts) and all(isinstance(part, dict) and part.get("type") in kinds for part in parts)


def decode_base64(text: str) -> bytes:
    """Base64 as programs write it: in lines, percent-encoded, without padding, in either alphabet."""
    digits = unquote(text).strip().translate(_OF_URLS).rstrip("=")
    return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)


def _part(part: Any, position: int, decode: bool) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise TypeError(f'part {position} is a {type(part).__name__}; {{"type": …}} or a string is needed')
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        url = part.get("image_url")
        return {"type": "image", "image": url.get("url") if isinstance(url, dict) else url}
    if kind != "image":
        raise ValueError(f'a part is {{"type": "text", "text": …}} or {{"type": "image", …}}, not {str(part)[:100]}')
    if "base64" in part and decode:
        with error_context("an image part's base64 is not valid"):
            return {"type": "image", "image": decode_base64(part["base64"])}
    source = next((part[key] for key in ("base64", "image", "url", "path") if key in part), None)
    return {"type": "image"} if source is None else {"type": "image", "image": source}


def flatten(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with string contents: one part a line, an image as `<image>`, control tokens in words escaped."""
    flat = []
    for message in messages:
        rest = {key: value for key, value in message.items() if key != "content" and value is not None}
        texts = [part.get("text") for part in parts_of(message)]
        lines = [IMAGE_TOKEN if text is None else escape_special_tokens(tokenizer, text) for text in texts]
        flat.append({**escape_special_tokens(tokenizer, rest), "content": "\n".join(lines)})
    return flat


def texts_of(texts: str | Sequence[str], name: str) -> list[str]:
    """A string, or a list of them, as a list; raises a ValueError for an empty list, a TypeError for another item."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, Sequence):
        raise TypeError(f"{name} is a {type(texts).__name__}; a string or a list of strings is needed")
    if not texts:
        raise ValueError(f"{name} is an empty list")
    for position, item in enumerate(texts):
        if not isinstance(item, str):
            raise TypeError(f"{name} {position} is a {type(item).__name__}; a string is needed")
    return list(texts)


def images_in(messages: list[dict[str, Any]]) -> list[Any]:
    """The pictures that the messages bring along, in order."""
    return [part["image"] for message in messages for part in parts_of(message) if "image" in part]


def query_in(messages: list[dict[str, Any]]) -> str:
    """The words of the last user message."""
    content = next((parts_of(message) for message in reversed(messages) if message.get("role") == "user"), [])
    return "\n".join(part["text"] for part in content if part["type"] == "text")
