"""A tiny model that has learned to name colours, and the same with one thing wrong."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tiny_models import NUM_QUERY_TOKENS, QFORMER
from transformers import set_seed

from lorgnette import LorgnetteCollator, LorgnetteForConditionalGeneration, LorgnetteProcessor


COLOURS = {
    "a red car": (220, 30, 30),
    "the tree": (30, 200, 40),
    "what sky": (40, 60, 230),
    "a white cat": (240, 240, 240),
}
STEPS, ROWS = 60, 16


def rows(count: int = ROWS) -> list[dict]:
    """Pictures of one colour and a little noise, with the colour's words."""
    random, names = np.random.default_rng(0), list(COLOURS)
    made = []
    for number in range(count):
        name = names[number % len(names)]
        pixels = (np.array(COLOURS[name]) + random.normal(0, 20, (30, 40, 3))).clip(0, 255).astype(np.uint8)
        made.append({"index": number, "image": Image.fromarray(pixels), "text": name})
    return made


@dataclass
class LabelsOnPrompt(LorgnetteCollator):
    """The prompt's words are learned as well."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        words = (batch["input_ids"] != self.processor.image_token_id) & batch["attention_mask"].bool()
        batch.pop("shared_input_ids", None)  # the model would refuse to share what is to be learned
        return batch | {"labels": batch["input_ids"].masked_fill(~words, -100)}


@dataclass
class PicturesShuffled(LorgnetteCollator):
    """Each text is shown with the picture of another row, anew in each batch."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        return batch | {"pixel_values": batch["pixel_values"][torch.randperm(len(batch["pixel_values"]))]}


def untrained(backbones: tuple[str, str]):
    """Model and processor before the first step."""
    set_seed(0)
    processor = LorgnetteProcessor.from_backbones(*backbones, num_query_tokens=NUM_QUERY_TOKENS)
    model = LorgnetteForConditionalGeneration.from_backbones(
        *backbones,
        processor=processor,
        num_query_tokens=NUM_QUERY_TOKENS,
        qformer_config=QFORMER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        lora={"r": 8, "target_modules": "all-linear"},
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)  # so that it can be sure of a word
    return model, processor


def train(model, collator, steps: int = STEPS, learning_rate: float = 5e-3):
    """A plain loop on one batch: no Trainer, so that it takes a second or two."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    model.train()
    learned = rows()
    plain = collator(learned)
    for _ in range(steps):
        batch = collator(learned) if isinstance(collator, PicturesShuffled) else plain
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        model.zero_grad()
    return model.eval()
