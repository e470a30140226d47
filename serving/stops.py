"""Stop strings: they end an answer and are not part of it."""

from collections.abc import Sequence


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before its first stop string."""
    return text[: min((start for stop in stops if (start := text.find(stop)) >= 0), default=len(text))]


def sendable(text: str, stops: Sequence[str]) -> str:
    """The part of an unfinished text to send: [`cut`], without an end that may be the start of a stop string."""
    kept = cut(text, stops)
    if kept != text:
        return kept
    held = (size for stop in stops for size in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:size]))
    return text[: len(text) - max(held, default=0)]
