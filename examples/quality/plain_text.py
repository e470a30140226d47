"""Measure the language model's perplexity on plain text, with the trained adapters."""

import platform
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorgnette import LorgnetteForConditionalGeneration


WINDOWS, LENGTH = 8, 256  # tokens of a window


@torch.inference_mode()
def compare(model_folder: Path, text_model: str) -> dict[str, Any]:
    """Perplexities of a trained model and of its original language model, without a picture.

    The text is Python's reference as `help()` shows it: its topics in alphabetical order, the first 8 x 256 tokens.
    `identical_without_adapters`: whether the logits of both are equal, bit for bit.
    """
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=WINDOWS * LENGTH).input_ids
    model = LorgnetteForConditionalGeneration.from_pretrained(model_folder).eval()
    original = AutoModelForCausalLM.from_pretrained(text_model, dtype=model.dtype).eval()
    losses, identical = {"trained": [], "original": []}, True
    for window in tqdm(ids.view(WINDOWS, 1, LENGTH), desc="reading plain text", unit="window"):
        trained, plain = model(input_ids=window).logits, original(input_ids=window).logits  # (1, LENGTH, vocabulary)
        if model.config.lora_config is None:
            bare = trained
        else:
            with model.disable_adapter():
                bare = model(input_ids=window).logits
        identical = identical and torch.equal(bare, plain)
        for name, logits in (("trained", trained), ("original", plain)):
            losses[name].append(torch.nn.functional.cross_entropy(logits[0, :-1].float(), window[0, 1:]))
    return {
        "text": f"Python {platform.python_version()}'s reference, as help() shows it (pydoc_data.topics)",
        "tokens": ids.numel(),
        **{f"perplexity_{name}": torch.stack(values).mean().exp().item() for name, values in losses.items()},
        "identical_without_adapters": identical,
    }
