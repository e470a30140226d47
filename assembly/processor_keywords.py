"""Keywords of `LorgnetteProcessor` that nothing reads: an error, in place of a keyword without effect."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any


# refused rather than left unread: other modalities, and what only a tokenizer by itself can answer
_REFUSED = {
    *("videos", "audio", "audios", "videos_kwargs", "audio_kwargs", "text_pair", "text_target", "text_pair_target"),
    *("return_token_type_ids", "return_overflowing_tokens", "return_special_tokens_mask", "return_offsets_mapping"),
    "return_length",
}
_GROUPS = ("text_kwargs", "images_kwargs", "common_kwargs")
_MEANT = dict.fromkeys(("query", "prompt", "question"), "queries") | {"video": "videos", "image": "images"}


def check_keywords(processor: Any, keywords: Mapping[str, Any], known: Collection[str]) -> None:
    """Check the keywords of a call, and those in its groups (`text_kwargs` …), against the `known` ones.

    Raises:
        TypeError: a keyword that nothing reads; names the one that was probably meant.
    """
    known = {*known, *_REFUSED, *processor.image_processor.valid_kwargs.__annotations__}
    for name, value in keywords.items():
        if name not in known or (name in _REFUSED and not _is_empty(value)):
            raise TypeError(f"{type(processor).__name__} does not read {name}{_nearest(name, known)}")
        if name in _GROUPS:
            check_keywords(processor, value or {}, known)


def _nearest(name: str, known: Collection[str]) -> str:
    """The end of a message that says what was meant by a keyword that is not known; empty where none is near."""
    if name in known:
        return ""
    near = get_close_matches(name, {*known, "queries", "images", "text", "timeout"}, n=1)
    meant = _MEANT.get(name, near[0] if near else None)
    return f": was {meant} meant?" if meant else ""


def _is_empty(value: Any) -> bool:
    """Whether there is nothing in it: None, False, or lists and dicts of nothing."""
    return all(map(_is_empty, value)) if isinstance(value, (list, tuple, dict)) else value is None or value is False


__all__ = ["check_keywords"]
