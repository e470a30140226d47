"""Conversations to prompts, and prompts to token ids.

A chat template writes users' words and its own markup into one string. [`escape_special_tokens`] puts a user's control
tokens between two Unicode noncharacters, and [`encode`] tokenizes what stands there as plain text.
"""

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from ..configuration.configuration_lorgnette import from_package


IMAGE_TOKEN = "<image>"
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_ESCAPES = {_OPEN: "\ufdd2", _CLOSE: "\ufdd3"}  # for the two themselves, where a user's text has them
_UNESCAPED = {escape: mark for mark, escape in _ESCAPES.items()}
_ANSWER = "THE-ANSWER"
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
        if len(cache) >= 1024:
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
        templates, tokens = chat_templates(tokenizer), tokenizer.added_tokens_decoder.values()
        added = [t.content for t in tokens if t.special or (t.content in templates and not t.content.isspace())]
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
    """Token ids of a text with escaped words, without BOS; one that `continues` another has no space in front of it."""
    check_unicode(text)
    _, escaped = _patterns(control_tokens(tokenizer))
    ids: list[int] = []
    for position, piece in enumerate(escaped.split(text)):  # markup, escaped, markup, …; None for a mark left alone
        is_markup, follows = position % 2 == 0, continues or bool(ids)
        if not piece:
            continue
        piece = piece if is_markup else _UNESCAPED.get(piece, piece)
        found = _in_context(tokenizer, piece, is_markup, follows)
        if not is_markup and len(piece) > 1 and tokenizer.convert_tokens_to_ids(piece) in found:
            found = _in_context(tokenizer, piece[:1], False, follows)  # the vocabulary has the token, and no half of it
            found += _in_context(tokenizer, piece[1:], False, True)
        ids += found
    return ids


def replacement_offsets(tokenizer: PreTrainedTokenizerBase, text: str, replacement: str) -> list[dict[str, Any]]:
    """Where each `<image>` that is markup stands in a text, before and after it is expanded: characters."""
    _, escaped = _patterns(control_tokens(tokenizer))
    markup, offsets = escaped.sub(lambda match: " " * len(match[0]), text), []
    for number, match in enumerate(re.finditer(IMAGE_TOKEN, markup)):
        start = match.start() + number * (len(replacement) - len(IMAGE_TOKEN))
        spans = {"span": match.span(), "new_span": (start, start + len(replacement))}
        offsets.append({"type": "image", "text": IMAGE_TOKEN, "replacement": replacement, **spans})
    return offsets


def check_unicode(text: str) -> None:
    """Raises a ValueError for half of a character, as JSON's `"\\ud83d"` brings it in."""
    if half := re.search("[\ud800-\udfff]", text):
        code = f"U+{ord(half[0]):04X}, a lone surrogate"
        raise ValueError(f"the text has half of a character at position {half.start()}: {code}")


def with_start(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Prepend what the tokenizer adds to every text (BOS, mostly), unless the template has written it."""

    def compute() -> list[int]:
        bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        return next((full[:n] for n in range(len(full)) if full[n : n + len(bare)] == bare), [])

    start = cached_per_tokenizer(tokenizer, with_start, compute)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    first = next((n for n, token in enumerate(ids) if token != image_token_id), len(ids))  # BLIP-2 puts images first
    return ids if ids[first : first + len(start)] == start else start + ids


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], template: Any = None, **kwargs: Any) -> str:
    """Write messages, their control tokens escaped, in the LM's chat template, or one a line where it has none."""
    flat = []
    for message in messages:
        rest = {key: value for key, value in message.items() if key != "content" and value is not None}
        texts = [part.get("text") for part in parts_of(message)]
        lines = [IMAGE_TOKEN if text is None else escape_special_tokens(tokenizer, text) for text in texts]
        flat.append({**escape_special_tokens(tokenizer, rest), "content": "\n".join(lines)})
    if template is None and tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in flat if message["content"])
    try:
        return tokenizer.apply_chat_template(flat, chat_template=template, tokenize=False, **kwargs)
    except Exception as error:  # a template raises what it likes
        roles = f"the roles {', '.join(str(message.get('role')) for message in messages)[:200]}: {str(error)[:500]}"
        raise ValueError(f"the LM's chat template cannot write messages of {roles}") from error


def answer_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """The white space between a prompt and its answer, and the ids that end an answer: to the first control token."""

    def compute() -> tuple[str, list[int]]:
        space, end = "\n", []
        if tokenizer.chat_template is not None:
            question = [{"role": "user", "content": "question"}]
            prompt = render(tokenizer, question, add_generation_prompt=True)
            before, *after = render(tokenizer, [*question, {"role": "assistant", "content": _ANSWER}]).split(_ANSWER)
            if len(after) != 1:
                raise ValueError(f"the LM's chat template writes an answer {len(after)} times, not once")
            space = before.removeprefix(prompt)  # Qwen3 puts an empty thought here, which is left out
            space, end = space if space.isspace() else "", encode(tokenizer, after[0], continues=True)
        stops = tokenizer.convert_tokens_to_ids(list(control_tokens(tokenizer)))
        stop = next((position for position, token in enumerate(end) if token in stops), None)
        if stop is None and tokenizer.eos_token_id is None:
            raise ValueError("neither the chat template nor the tokenizer (eos_token) has a token that ends an answer")
        return space, [tokenizer.eos_token_id] if stop is None else end[: stop + 1]

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
    if all(isinstance(messages, (list, tuple)) and all(map(_is_message, messages)) for messages in batch):
        return [list(messages) for messages in batch], several
    what = 'a conversation that is no list of {"role": …, "content": text or a list of parts}'
    return from_package("assembly.conversations", what).conversations_of(value)


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, str):
        return not re.match(r'\s*\[\s*{\s*"(type|text|image|url|path|base64)', content)  # which is JSON of parts
    return content is None or (isinstance(content, (list, tuple)) and all(isinstance(p, (str, dict)) for p in content))


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message: `{"type": "text", "text": …}` and `{"type": "image"}`, with its picture under `"image"`.

    A picture may also stand under `url`, `path` or `base64`, or as OpenAI's `image_url`; None counts as absent. Raises
    a ValueError for a part of another type or without text, a TypeError for another content or part.
    """
    content = message.get("content")
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if not isinstance(content, (list, tuple)):
        raise TypeError(f"the content of a message is a string or a list of parts, not a {type(content).__name__}")
    return [_part(part, position) for position, part in enumerate(content)]


def _part(part: Any, position: int) -> dict[str, Any]:
    part = {"type": "text", "text": part} if isinstance(part, str) else part
    if not isinstance(part, dict):
        raise TypeError(f'part {position} is a {type(part).__name__}; {{"type": …}} or a string is needed')
    part = {key: value for key, value in part.items() if value is not None}
    kind, url = part.get("type"), part.get("image_url")
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        return {"type": "image", "image": url.get("url") if isinstance(url, dict) else url}
    if kind != "image":
        raise ValueError(f'a part is {{"type": "text", "text": …}} or {{"type": "image", …}}, not {str(part)[:100]}')
    if "base64" in part:
        return {"type": "image", "image": f"data:;base64,{part['base64']}"}
    sources = [part[key] for key in ("image", "url", "path") if key in part]
    return {"type": "image", "image": sources[0]} if sources else {"type": "image"}


def texts_of(texts: str | Sequence[str], name: str) -> list[str]:
    """A string, or a list of them, as a list."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} is {str(texts)[:100]!r}; a string or a list of strings is needed")
    if not texts:
        raise ValueError(f"{name} is an empty list")
    return list(texts)


def images_in(messages: list[dict[str, Any]]) -> list[Any]:
    """The pictures that the messages bring along, in order."""
    return [part["image"] for message in messages for part in parts_of(message) if "image" in part]


def query_in(messages: list[dict[str, Any]]) -> str:
    """The words of the last user message."""
    content = next((parts_of(message) for message in reversed(messages) if message.get("role") == "user"), [])
    return "\n".join(part["text"] for part in content if part["type"] == "text")
