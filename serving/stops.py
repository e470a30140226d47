"""Strings that end an answer, and are no part of it."""

from collections.abc import Sequence


def cut(text: str, stops: Sequence[str]) -> str:
    """A text up to where the first stop string in it begins."""
    return text[: min((start for stop in stops if (start := text.find(stop)) >= 0), default=len(text))]


def sendable(text: str, stops: Sequence[str]) -> str:
    """What may be sent of a text that goes on: [`cut`], and without an end that a stop string may begin with."""
    kept = cut(text, stops)
    if kept != text:
        return kept
    held = (size for stop in stops for size in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:size]))
    return text[: len(text) - max(held, default=0)]
