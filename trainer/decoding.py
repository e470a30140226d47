"""Decoding presets: keywords of `generate`, all deterministic."""

from typing import Any


DECODING: dict[str, dict[str, Any]] = {
    # BLIP-2's (Li et al. 2023, appendix) without its minimum of 8 tokens, which lengthens short captions
    "caption": {"do_sample": False, "num_beams": 5, "length_penalty": 1.0, "max_new_tokens": 30},
    # BLIP-2's for VQA: the negative penalty favours short answers
    "short_answer": {"do_sample": False, "num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 10},
    "greedy": {"do_sample": False, "num_beams": 1, "max_new_tokens": 30},
}


def decoding_of(name: str, max_new_tokens: int | None = None) -> dict[str, Any]:
    """A preset, optionally with another limit of new tokens.

    Raises:
        ValueError: no such preset, or a limit below 1.
    """
    if name not in DECODING:
        raise ValueError(f"there is no decoding {name!r}; there are {', '.join(DECODING)}")
    if max_new_tokens is None:
        return dict(DECODING[name])
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it has to be at least 1")
    return {**DECODING[name], "max_new_tokens": max_new_tokens}
