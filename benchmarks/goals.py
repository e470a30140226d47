"""The goals for the figures, by preset and device, and by the table's paths."""

_BOTH = {
    "stage 2, uncached, pairs/s": 1.5,
    "stage 2, cached, pairs/s": 3,
    "stage 2, uncached, memory of a step, MiB": 0.5,
    "captions/s, batch 8": 1.2,
    "captions/s, batch 64": 1.2,
    "first token, batch 1, s": 0.8,
    "captions/s, static cache and compiled, batch 8": 1.5,
    "captions/s, static cache and compiled, batch 64": 1.5,
    "data loader, pairs/s": 0.8,
    "stage 1 against plain, pairs/s": 1.3,
    "stage 1 against separate, pairs/s": 2,
}
GOALS = {
    ("smollm2", "cpu"): _BOTH | {"checkpoint weights, MB": 0.35},
    ("blip2-opt-2.7b", "cuda"): _BOTH | {"checkpoint weights, MB": 0.035, "stage 2, uncached, MFU": 0.4},
}
