"""The two sides: `transformers.Blip2ForConditionalGeneration` with peft's LoRA, and ours, with equal weights.

Theirs is a usual setup: frozen ViT and LM, LoRA in the LM's attention, `Blip2Processor`, a padding collator. It gets
    the fast settings: sdpa, no KV cache in training, frozen weights in bf16 if the machine has fast bf16.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch import nn
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from benchmarks import rows as data
from benchmarks.shapes import Preset
from lorgnette import LorgnetteCollator, LorgnetteForConditionalGeneration, LorgnetteProcessor


TOLERANCE = 1e-4  # of a logit, in float32
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
Batch = dict[str, torch.Tensor]


@dataclass
class Side:
    """A model and its collator."""

    model: nn.Module
    collator: Callable[[list[dict[str, Any]]], Batch]


@dataclass
class PlainCollator:
    """Collates rows for BLIP-2, right-padded; labels cover the caption and EOS.

    Args:
        pad_to_multiple_of: as in ours and in transformers' collators.
    """

    processor: Blip2Processor
    pad_to_multiple_of: int = 1

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        tokenizer = self.processor.tokenizer
        images = [Image.open(BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
        texts = [f" {row['text']}{tokenizer.eos_token}" for row in rows]
        batch = dict(self.processor(images=images, text=texts, padding=True, return_tensors="pt"))
        missing = -batch["input_ids"].shape[1] % self.pad_to_multiple_of  # it counts only text tokens
        for name, padding in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0)):
            batch[name] = nn.functional.pad(batch[name], (0, missing), value=padding)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : self.processor.num_query_tokens + 1] = -100  # pictures and BOS
        return batch | {"labels": labels}


@dataclass
class RowByRow:
    """Batches in which each row has its own picture and its own prefix, of a collator that shares both."""

    collator: LorgnetteCollator

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        batch = self.collator(rows)
        batch.pop("shared_input_ids", None)  # a batch of one row has none
        shown = batch.pop("image_rows", None)  # where a picture occurs several times
        if shown is not None:
            for name in {"pixel_values", "vision_features", "image_ids"} & batch.keys():
                batch[name] = batch[name][shown]
        return batch


def build(preset: Preset, seed: int, device: str = "cpu") -> tuple[Side, Side]:
    """Theirs and ours, in float32; weights are drawn on the device, where that is quick."""
    torch.manual_seed(seed)
    processor = data.processor(preset)
    ids = {name: getattr(processor.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.device(device):
        theirs = Blip2ForConditionalGeneration(preset.config(image_token_index=processor.image_token_id, **ids)).eval()
    nn.init.normal_(theirs.query_tokens, std=0.02)  # zeros would make all queries equal
    lora = LORA | {"target_modules": list(preset.lora_targets)}
    ours = LorgnetteForConditionalGeneration.from_blip2(copy.deepcopy(theirs).cpu(), processor=processor, lora=lora)

    theirs.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(**lora, task_type="CAUSAL_LM"), theirs.language_model)
    for part in (theirs.qformer, theirs.language_projection):
        part.requires_grad_(True)
    theirs.query_tokens.requires_grad_(True)
    theirs.language_model.config.use_cache = False  # for training; `generate` uses generation_config
    own = dict(ours.language_model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.language_model.named_parameters():
            if "lora_" in name:  # B starts at zero, which makes LoRA a no-op
                own[name].copy_(parameter.normal_(std=0.02))
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.padding_side = "right"  # ours is in eval mode
    plain = Blip2Processor(processor.image_processor, tokenizer, processor.num_query_tokens)
    return Side(theirs, PlainCollator(plain)), Side(ours, LorgnetteCollator(processor))


def check_equal(theirs: Side, ours: Side, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Check that both give equal batches and logits.

    Returns:
        the largest difference of logits, from pictures and from cached features.

    Raises:
        ValueError: batches differ, logits differ by more than `TOLERANCE`, or the numbers of trained weights differ.
    """
    device = next(theirs.model.parameters()).device
    batch, own = theirs.collator(list(rows)), ours.collator(list(rows))
    unequal = [name for name in ("input_ids", "labels", "pixel_values") if not torch.equal(batch[name], own[name])]
    if unequal:
        raise ValueError(f"the two make other batches of the same rows: {', '.join(unequal)} differ")
    trained = [trained_parameters(side.model) for side in (theirs, ours)]
    if trained[0] != trained[1]:
        raise ValueError(f"the two do not train as many parameters: theirs {trained[0]:,}, ours {trained[1]:,}")
    batch = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    for side in (theirs, ours):
        side.model.eval()
    with torch.no_grad():
        cached = {"vision_features": ours.model.get_vision_features(batch["pixel_values"]).last_hidden_state}
        expected = theirs.model(**batch).logits
        words = {name: tensor for name, tensor in batch.items() if name != "pixel_values"}
        found = {"pictures": ours.model(**batch).logits, "features": ours.model(**words, **cached).logits}
    real = batch["attention_mask"].bool()  # padding positions do not matter
    apart = {name: (logits - expected)[real].abs().max().item() for name, logits in found.items()}
    if not max(apart.values()) <= TOLERANCE:
        raise ValueError(f"logits are apart by {apart}; allowed is {TOLERANCE}: a speed of a wrong result is no speed")
    return apart


def trained_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def to_bf16(model: nn.Module, trained: bool) -> None:
    """Cast the frozen parameters, and with `trained` all; buffers keep their dtype, as in `from_pretrained`."""
    for parameter in model.parameters():
        if trained or not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def prompts(processor: LorgnetteProcessor, rows: Sequence[dict[str, Any]], device: torch.device) -> Batch:
    """The inputs of both models' `generate`: pictures and BOS."""
    return {name: tensor.to(device) for name, tensor in LorgnetteCollator(processor).prompts(list(rows)).items()}
