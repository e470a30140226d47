"""Is the output learned and nothing else, and are pictures and their placeholders in step?"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..modeling.modeling_checks import IGNORED
from ..modeling.modeling_lora import lora_layers
from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..trainer.collator import LorgnetteCollator
from .checks import Check, some, undisturbed


# A model that was trained on its prompt says it by heart. One that was not finds it about as likely as the original LM.
BY_HEART = 0.25
EASY = 0.1  # nats a token, below which the original LM knows the prompt by heart itself
SAME = 0.01  # batches of one and of many round differently

PICTURE_KEYS = ("pixel_values", "vision_features", "pixel_attention_mask", "spatial_shapes")  # one a picture


def check_labels(collator: LorgnetteCollator, rows: Sequence[dict[str, Any]]) -> Check:
    """In each row labels begin where the prompt ends, are the tokens themselves, and end with what ends an answer.

    Args:
        collator: the one of training; what it gives `generate` says where a prompt ends.
        rows: as it takes them.
    """
    name, title = "labels", "What is learned is the output, and its end"
    if not rows:
        return Check(name, title, None, "There are no rows to learn from", "Give --dataset")
    batch, prompts = collator(list(rows)), collator.prompts(list(rows))
    lengths, stops = prompts["attention_mask"].sum(dim=1).tolist(), set(collator.processor.stop_token_ids)
    on_prompt, on_picture, other, unended, example = 0, 0, 0, 0, []
    for ids, labels, mask, length in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], lengths, strict=True
    ):
        ids, labels = ids[mask.bool()], labels[mask.bool()]
        learned = labels != IGNORED
        pictures = ids == collator.processor.image_token_id
        on_prompt += int((learned[:length] & ~pictures[:length]).sum())
        on_picture += int((learned & pictures).sum())
        other += int((learned & (labels != ids)).sum()) + int((~learned[length:]).sum())
        unended += int(ids[-1]) not in stops or not bool(learned[-1])
        example = example or _coloured(collator.processor.tokenizer, ids.tolist(), learned.tolist(), pictures.tolist())
    wrong = {
        f"{on_prompt} labels are on words of the prompt": on_prompt,
        f"{on_picture} are on placeholders": on_picture,
        f"{other} tokens of outputs have no label, or another one": other,
        f"{unended} outputs do not end with what ends an answer": unended,
    }
    finding = f"{len(rows)} rows, {int((batch['labels'] != IGNORED).sum())} labels"
    finding += "".join(f"; {text}" for text, count in wrong.items() if count)
    passed = not any(wrong.values())
    advice = "Labels have to be -100 on prompt, placeholders and padding: LorgnetteCollator makes them so"
    figures = {
        "on_prompt": on_prompt, "on_placeholders": on_picture, "other": other, "unended": unended, "example": example
    }  # fmt: skip
    return Check(name, title, passed, finding, "" if passed else advice, figures)


def check_prompt(model: LorgnetteForConditionalGeneration, batches: Sequence[Mapping[str, torch.Tensor]]) -> Check:
    """The model has not learned its prompt by heart, as one does that had labels on it.

    Compares the loss on words of the prompt, with LoRA and without: those that another word precedes, since what is
    said of soft tokens is another matter.

    Args:
        batches: with `labels` on the outputs alone, on the model's device.
    """
    name, title = "prompt", "The prompt was not learned by heart"
    if not lora_layers(model.language_model):
        return Check(name, title, None, "Without LoRA the language model cannot have learned anything", "")
    if not batches:
        return Check(name, title, None, "There are no rows with prompts", "Give --dataset")
    ours, theirs, words = 0.0, 0.0, 0
    with undisturbed(model), torch.no_grad():
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            ids, pictures = batch["input_ids"], batch["input_ids"] == model.config.image_token_id
            asked = (batch["labels"] == IGNORED) & batch["attention_mask"].bool() & ~pictures
            asked = asked[:, 1:] & ~pictures[:, :-1]
            losses = _losses(model(**inputs).logits, ids)
            with model.disable_adapter():
                plain = _losses(model(**inputs).logits, ids)
            ours, theirs = ours + losses[asked].sum().item(), theirs + plain[asked].sum().item()
            words += int(asked.sum())
    ours, theirs = ours / max(words, 1), theirs / max(words, 1)
    finding = f"Loss on {words} words of prompts: {ours:.3g} nats a token, {theirs:.3g} without LoRA"
    if theirs < EASY:
        return Check(name, title, None, f"{finding}: too little to tell", "Ask something that is less expected")
    passed = ours > BY_HEART * theirs
    advice = "Look at the labels that it was trained on: they have to be -100 on the prompt"
    return Check(name, title, passed, finding, "" if passed else advice, {"with_lora": ours, "without_lora": theirs})


def check_in_step(
    model: LorgnetteForConditionalGeneration, collator: LorgnetteCollator, rows: Sequence[dict[str, Any]]
) -> Check:
    """Model and processor agree on placeholders, and the language model reads each row's own pictures in their place.

    What it is given for a batch is caught at its door, and compared with the soft tokens of each row by itself.

    Args:
        collator: the one of training.
        rows: as it takes them, of one batch.
    """
    name, title = "in_step", "Each picture's soft tokens stand where its placeholders were"
    processor = collator.processor
    ours = (model.config.num_query_tokens, model.config.image_token_id)
    theirs = (processor.num_query_tokens, processor.image_token_id)
    if ours != theirs:
        finding = f"num_query_tokens and image_token_id are {ours} in the model and {theirs} in the processor"
        advice = "Load the processor that was saved with the model, or give processor= to from_backbones"
        return Check(name, title, False, finding, advice, {"model": ours, "processor": theirs})
    if not rows:
        finding = f"Model and processor agree on {ours[0]} placeholders of id {ours[1]}; there are no rows to try"
        return Check(name, title, None, finding, "Give --dataset")
    with undisturbed(model), torch.no_grad():
        together = _read(model, collator(list(rows)))
        alone = [_read(model, collator([row])) for row in rows]
    apart = [_apart(own[0], found) for (own, found) in zip(alone, together, strict=True)]
    wrong = [row.get("index", place) for place, row in enumerate(rows) if not apart[place] < SAME]
    finding = f"{len(rows)} rows, {ours[0]} soft tokens a picture; largest difference {max(apart):.2g} of their norm"
    finding += f"; rows {some(list(map(str, wrong)))} read other pictures than their own" if wrong else ""
    advice = "Pictures have to come in the order of their placeholders: look at what the collator makes of a batch"
    figures = {"rows": len(rows), "wrong": wrong, "largest_difference": max(apart)}
    return Check(name, title, not wrong, finding, advice if wrong else "", figures)


def _read(model: LorgnetteForConditionalGeneration, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """For each row `(N Q, M)`, what the language model is given in the places of its N pictures."""
    batch = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    caught: list[torch.Tensor] = []
    hook = model.language_model.register_forward_pre_hook(
        lambda module, args, keywords: caught.append(keywords["inputs_embeds"]), with_kwargs=True
    )
    try:
        model(**batch)
    finally:
        hook.remove()
    masks = batch["input_ids"] == model.config.image_token_id
    return [embedded[mask].float() for embedded, mask in zip(caught[0], masks, strict=True)]


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference, as a share of the norm; nothing where there is nothing."""
    return (ours - theirs).norm().item() / max(ours.norm().item(), 1e-12) if ours.shape == theirs.shape else 1.0


def _losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`(B, S - 1)` nats of each token but the first; a placeholder's is that of token 0, and not to be used."""
    targets = ids[:, 1:].clamp(max=logits.shape[-1] - 1)
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")


def _coloured(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], learned: list[bool], pictures: list[bool]
) -> list[list[str]]:
    """A row as runs of `[text, kind]`, the kinds being `prompt`, `picture` and `learned`."""
    runs: list[tuple[str, list[int]]] = []
    for token, is_learned, is_picture in zip(ids, learned, pictures, strict=True):
        kind = "learned" if is_learned else "picture" if is_picture else "prompt"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(token)
    return [
        [f"<image> x {len(tokens)}" if kind == "picture" else tokenizer.decode(tokens), kind] for kind, tokens in runs
    ]
