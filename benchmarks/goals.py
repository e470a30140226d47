"""The goals for the figures, by preset and device, and by the table's paths."""

_BOTH = {
    "captions/s, static cache and compiled, batch 8": 1.5,
    "captions/s, static cache and compiled, batch 64": 1.5,
    "data loader, pairs/s": 0.8,
}
_ONE_CAPTION = {  # what was reached before: BLIP-2 does little that is not needed for one caption a picture
    "stage 2, uncached, pairs/s": 1.07,
    "stage 2, cached, pairs/s": 1.76,
    "stage 2, uncached, memory of a step, MiB": 0.73,
    "stage 2, chat prompts, uncached, pairs/s": 1.39,
    "stage 2, chat prompts, cached, pairs/s": 1.83,
    "stage 2, mixed lengths, packed, uncached, pairs/s": 1.02,
    "stage 2, mixed lengths, packed, cached, pairs/s": 1.53,
    "stage 1 against plain, pairs/s": 1.07,
    "stage 1 against separate, pairs/s": 1.75,
}
_SEVERAL_CAPTIONS = {
    "stage 2, 5 captions a picture, uncached, pairs/s": 3,
    "stage 2, 5 captions a picture, cached, pairs/s": 4.5,
    "stage 2, 5 captions a picture, chat prompts, uncached, pairs/s": 3,
    "stage 2, 5 captions a picture, chat prompts, cached, pairs/s": 4.5,
    "stage 2, 5 captions a picture, uncached, memory of a step, MiB": 0.5,
}
_USE = {f"captions/s, batch {size}": 0.98 for size in (1, 8, 64)}
_USE |= {f"first token, batch {size}, s": round(1 / 0.98, 2) for size in (1, 8, 64)}
_USE |= {f"first token, chat prompts, batch {size}, s": 0.75 for size in (8, 64)}
_USE |= {f"from_pretrained to first caption, {form}, ms": most for form, most in
         {"thin": 1.2, "full": 1.05, "merged": 1.0}.items()}  # fmt: skip
_GPU = {
    "stage 2, uncached, pairs/s": 1.2,
    "stage 2, cached, pairs/s": 2,
    "stage 2, 5 captions a picture, uncached, pairs/s": 3,
    "stage 2, 5 captions a picture, cached, pairs/s": 4.5,
    "stage 2, 5 captions a picture, uncached, memory of a step, MiB": 0.5,
    "captions/s, batch 1": 1.2,
    "first token, batch 1, s": 0.8,
    "stage 1 against plain, pairs/s": 1.3,
    "stage 1 against separate, pairs/s": 2,
    "checkpoint weights, MB": 0.035,
    "stage 2, uncached, MFU": 0.4,
}
GOALS = {
    ("smollm2", "cpu"): _BOTH | _ONE_CAPTION | _SEVERAL_CAPTIONS | _USE | {"checkpoint weights, MB": 0.35},
    ("blip2-opt-2.7b", "cuda"): _BOTH | _GPU,
}
# of the bound by operations
SHARES = {
    ("smollm2", "cpu"): {
        f"stage 1, 5 captions a picture, against {way}, pairs/s": 0.9 for way in ("plain", "separate")
    },
}
