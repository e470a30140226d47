"""From a rendered prompt to token ids: control tokens such as `<image>` are markup where a template writes them, words
where a user does.

A user's text goes through the LM's chat template as a string, like all of a prompt. To tell the two apart afterwards,
control tokens in it are put between two Unicode noncharacters ([`mark_as_words`]), and [`encode`] tokenizes what is
between them without looking for control tokens. Text without any takes the tokenizer's usual way.
"""

import re
from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase


IMAGE_TOKEN = "<image>"

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_ESCAPES = {_OPEN: "\ufdd2", _CLOSE: "\ufdd3"}  # the two themselves, where a user's text has them
_ANSWER = "THE-ANSWER"
_REMEMBERED = 1024  # answers, a tokenizer
_memories: WeakKeyDictionary[PreTrainedTokenizerBase, Any] = WeakKeyDictionary()


def remembered(tokenizer: PreTrainedTokenizerBase, question: Hashable, answer: Callable[[], Any]) -> Any:
    """What `answer` gave for this question, as long as the tokenizer and its chat template are what they were."""
    state = (
        len(tokenizer),
        _templates(tokenizer),
        getattr(tokenizer, "add_bos_token", None),
        getattr(tokenizer, "add_eos_token", None),
        *tokenizer.all_special_tokens,
    )
    known, memory = _memories.get(tokenizer, (None, {}))
    if state != known:
        memory = {}
        _memories[tokenizer] = state, memory
    if question not in memory:
        if len(memory) >= _REMEMBERED:
            memory.clear()
        memory[question] = answer()
    return memory[question]


def writes_time(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template may write the same conversation in another way later (Llama 3's has the date)."""
    return "strftime_now" in _templates(tokenizer)


def is_in_template(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Whether a chat template of the tokenizer writes this token."""
    return token in _templates(tokenizer)


def _templates(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template or ""
    return "\0".join(template.values()) if isinstance(template, dict) else template


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """`<image>`, the special tokens, and other added tokens that the chat template writes (some LMs' role markers)."""
    # Gemma has 6,000 added tokens, which take 20 ms to list
    return remembered(tokenizer, control_tokens, partial(_control_tokens, tokenizer))


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    templates = _templates(tokenizer)
    added = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content in templates and not token.content.isspace())
    ]
    return tuple(dict.fromkeys((*added, *tokenizer.all_special_tokens, IMAGE_TOKEN)))


def mark_as_words(tokenizer: PreTrainedTokenizerBase, value: Any) -> Any:
    """Mark control tokens in a string, or in all strings of a list or dict, its keys too, as plain text."""
    if isinstance(value, str):
        to_mark, _ = _patterns(control_tokens(tokenizer))
        return to_mark.sub(lambda match: f"{_OPEN}{_ESCAPES.get(match[0], match[0])}{_CLOSE}", value)
    if isinstance(value, dict):
        return {mark_as_words(tokenizer, key): mark_as_words(tokenizer, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mark_as_words(tokenizer, item) for item in value]
    return value


def encode(tokenizer: PreTrainedTokenizerBase, text: str, continues: bool = False) -> list[int]:
    """Token ids of a text, without the ones that the tokenizer adds around it; an `<image>` is one id.

    Args:
        text: may hold parts marked by [`mark_as_words`].
        continues: whether other text comes before it, so that a tokenizer that puts a space in front of the first word
            (SentencePiece) does not.

    Raises:
        ValueError: the text is no Unicode, see [`check_unicode`].
    """
    check_unicode(text)
    _, marked = _patterns(control_tokens(tokenizer))
    pieces, ids = marked.split(text), []  # text, marked, text, marked, … text; marked is None for a lone mark
    for position, piece in enumerate(pieces):
        if piece:
            ids += _encode_piece(tokenizer, piece, words=position % 2 == 1, continues=continues or bool(ids))
    return ids


def image_positions(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Where in a text each `<image>` that is markup begins."""
    _, marked = _patterns(control_tokens(tokenizer))
    words = [match.span() for match in marked.finditer(text)]
    return [
        match.start()
        for match in re.finditer(re.escape(IMAGE_TOKEN), text)
        if not any(start <= match.start() < end for start, end in words)
    ]


def check_unicode(text: str) -> None:
    """Refuse what no tokenizer takes: half of a character, as JSON's `"\\ud83d"` can bring it in.

    Raises:
        ValueError: names the code point and its position.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise ValueError(
            f"the text has half of a character at position {error.start}: {half}, a lone surrogate"
        ) from None


def with_start(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Put in front what the tokenizer adds to every text (BOS, mostly), unless the template has written it already.

    It may have written pictures before it, as BLIP-2 does.
    """
    start = remembered(tokenizer, with_start, partial(_start, tokenizer))
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    first = next((n for n, token in enumerate(ids) if token != image_token_id), len(ids))
    return ids if ids[first : first + len(start)] == start else start + ids


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return next((full[:n] for n in range(len(full)) if full[n : n + len(bare)] == bare), [])


def truncate(tokenizer: PreTrainedTokenizerBase, ids: list[int], length: int, fixed_id: int) -> list[int]:
    """Shorten a prompt to `length` ids: first its longest runs of words, from their ends, then markup from the left.

    So roles, images and the call for an answer stay as long as they can; all of `fixed_id` stay, come what may.

    Raises:
        ValueError: those alone are more than `length`.
    """
    if ids.count(fixed_id) > length:
        raise ValueError(f"max_length is {length}, but the images alone take {ids.count(fixed_id)} tokens")
    markup = {fixed_id, *tokenizer.convert_tokens_to_ids(list(control_tokens(tokenizer)))}
    runs: list[range] = []
    for position, token in enumerate(ids):
        if token in markup:
            continue
        if runs and runs[-1].stop == position:
            runs[-1] = range(runs[-1].start, position + 1)
        else:
            runs.append(range(position, position + 1))
    expendable = [position for run in sorted(runs, key=len, reverse=True) for position in reversed(run)]
    expendable += [position for position, token in enumerate(ids) if token in markup and token != fixed_id]
    dropped = set(expendable[: max(0, len(ids) - length)])
    return [token for position, token in enumerate(ids) if position not in dropped]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    chat_template: str | None = None,
    **template_kwargs: Any,
) -> str:
    """Write a conversation whose contents are strings in the LM's chat template, or one message a line without any.

    Raises:
        ValueError: the template refuses the conversation (a system message, where it knows no such role).
    """
    if chat_template is None and tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in messages if message["content"])
    try:
        return tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False, **template_kwargs)
    except Exception as error:  # a template is code of its own
        roles = ", ".join(str(message.get("role")) for message in messages)[:200]
        raise ValueError(
            f"the LM's chat template cannot write messages of the roles {roles}: {str(error)[:500]}"
        ) from error


def answer_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """What comes between a prompt and its answer (nothing or white space), and the ids that end an answer.

    Read off the chat template. A thought that a template puts in front of finished answers (Qwen3) is left out, since
    the prompt does not hold it. The ids run up to the first special token, so that what follows it is not learnt.

    Raises:
        ValueError: the template does not write out the assistant's message, or nothing ends an answer.
    """
    return remembered(tokenizer, answer_frame, partial(_answer_frame, tokenizer))


def _answer_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    if tokenizer.chat_template is None:
        lead, end = "\n", []
    else:
        asked = [{"role": "user", "content": "question"}]
        prompt = render(tokenizer, asked, add_generation_prompt=True)
        whole = render(tokenizer, [*asked, {"role": "assistant", "content": _ANSWER}])
        before, _, after = whole.partition(_ANSWER)
        if whole.count(_ANSWER) != 1:
            raise ValueError(f"the LM's chat template writes an answer {whole.count(_ANSWER)} times, not once")
        lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        lead = "" if lead.strip() else lead
        end = encode(tokenizer, after, continues=True)
    stops = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(control_tokens(tokenizer)))}
    stop = next((position for position, token in enumerate(end) if token in stops), None)
    if stop is not None:
        return lead, end[: stop + 1]
    if tokenizer.eos_token_id is None:
        raise ValueError("neither the chat template nor the tokenizer (eos_token) has a token that ends an answer")
    return lead, [tokenizer.eos_token_id]


def _encode_piece(tokenizer: PreTrainedTokenizerBase, text: str, words: bool, continues: bool) -> list[int]:
    if not words:
        return _in_context(_encode_markup, tokenizer, text, continues)
    text = next((mark for mark, escape in _ESCAPES.items() if escape == text), text)
    plainly = partial(_in_context, _encode_words, tokenizer)
    ids = plainly(text, continues)
    if len(text) > 1 and tokenizer.convert_tokens_to_ids(text) in ids:  # the vocabulary has it too; not its halves
        return plainly(text[:1], continues) + plainly(text[1:], continues=True)
    return ids


def _in_context(
    tokenize: Callable[[PreTrainedTokenizerBase, str], list[int]],
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    continues: bool,
) -> list[int]:
    """Behind a line break no space is put in front of a word: tokenize it there, and take the break off again."""
    if continues:
        line = remembered(tokenizer, tokenize, partial(tokenize, tokenizer, "\n"))
        ids = tokenize(tokenizer, "\n" + text)
        if ids[: len(line)] == line:
            return ids[len(line) :]
    return tokenize(tokenizer, text)


def _encode_markup(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text in which control tokens are what they say."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _encode_words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text in which no added token is looked for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # `split_special_tokens` still finds the added tokens that are not special
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in backend.model.tokenize(word)]


@lru_cache(maxsize=8)
def _patterns(tokens: tuple[str, ...]) -> tuple[re.Pattern, re.Pattern]:
    """What is to be marked in a user's words; and what was: a whole token between two marks, or a mark left alone.

    A template that takes words apart may leave marks alone; what it writes between two of them is no user's.
    """
    longest_first = sorted(tokens, key=len, reverse=True)
    to_mark, whole = ("|".join(map(re.escape, [*longest_first, *marks])) for marks in (_ESCAPES, _ESCAPES.values()))
    return re.compile(to_mark), re.compile(f"{_OPEN}({whole}){_CLOSE}|[{_OPEN}{_CLOSE}]")
