"""Check labels, the loss on prompts, and that pictures are aligned with their placeholders."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..modeling.modeling_checks import IGNORED
from ..modeling.modeling_lora import lora_layers
from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..trainer.collator import LorgnetteCollator
from ..trainer.labelled_text import text_runs
from .checks import Check, first_few, preserved_state


# The lowest ratio of the loss on the prompt, with LoRA over without: training on the prompt lowers it far below 1.
PROMPT_LOSS_RATIO = 0.25
MIN_PROMPT_LOSS = 0.1  # nats a token; the original LM's loss below this leaves nothing to compare
ALIGNED_TOLERANCE = 0.01  # rounding differs between batch sizes

PICTURE_KEYS = ("pixel_values", "vision_features", "pixel_attention_mask", "spatial_shapes")  # one entry per picture


def check_labels(collator: LorgnetteCollator, rows: Sequence[dict[str, Any]]) -> Check:
    """In each row the labels start at the end of the prompt, equal the tokens, and end with a stop token.

    Args:
        collator: the one of training; its prompts for `generate` give the prompt lengths.
        rows: as the collator takes them.
    """
    name, title = "labels", "Labels cover the output and its stop token, and nothing else"
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
        example = example or text_runs(collator.processor.tokenizer, ids.tolist(), learned.tolist(), pictures.tolist())
    wrong = {
        f"{on_prompt} labels are on tokens of the prompt": on_prompt,
        f"{on_picture} are on placeholders": on_picture,
        f"{other} tokens of outputs have no label, or another one": other,
        f"{unended} outputs do not end with a stop token": unended,
    }
    finding = f"{len(rows)} rows, {int((batch['labels'] != IGNORED).sum())} labels"
    finding += "".join(f"; {text}" for text, count in wrong.items() if count)
    passed = not any(wrong.values())
    advice = "Labels have to be -100 on prompt, placeholders and padding, as LorgnetteCollator sets them"
    figures = {
        "on_prompt": on_prompt, "on_placeholders": on_picture, "other": other, "unended": unended, "example": example
    }  # fmt: skip
    return Check(name, title, passed, finding, "" if passed else advice, figures)


def check_prompt(model: LorgnetteForConditionalGeneration, batches: Sequence[Mapping[str, torch.Tensor]]) -> Check:
    """The model has not memorised its prompt, as training with labels on the prompt would do.

    Compares the loss on prompt tokens with and without LoRA; tokens right after a picture are left out.

    Args:
        batches: with `labels` on the outputs alone, on the model's device.
    """
    name, title = "prompt", "The prompt was not memorised"
    if not lora_layers(model.language_model):
        return Check(name, title, None, "The model has no LoRA, so the language model is unchanged", "")
    if not batches:
        return Check(name, title, None, "There are no rows with prompts", "Give --dataset")
    ours, theirs, tokens = 0.0, 0.0, 0
    with preserved_state(model), torch.no_grad():
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            ids, pictures = batch["input_ids"], batch["input_ids"] == model.config.image_token_id
            asked = (batch["labels"] == IGNORED) & batch["attention_mask"].bool() & ~pictures
            asked = asked[:, 1:] & ~pictures[:, :-1]
            losses = _losses(model(**inputs).logits, ids)
            with model.disable_adapter():
                plain = _losses(model(**inputs).logits, ids)
            ours, theirs = ours + losses[asked].sum().item(), theirs + plain[asked].sum().item()
            tokens += int(asked.sum())
    ours, theirs = ours / max(tokens, 1), theirs / max(tokens, 1)
    finding = f"Loss on {tokens} tokens of prompts: {ours:.3g} nats a token, {theirs:.3g} without LoRA"
    if theirs < MIN_PROMPT_LOSS:
        return Check(name, title, None, f"{finding}: too small to compare", "Use a prompt that is less predictable")
    passed = ours > PROMPT_LOSS_RATIO * theirs
    advice = "Check the training labels: they have to be -100 on the prompt"
    return Check(name, title, passed, finding, "" if passed else advice, {"with_lora": ours, "without_lora": theirs})


def check_aligned(
    model: LorgnetteForConditionalGeneration, collator: LorgnetteCollator, rows: Sequence[dict[str, Any]]
) -> Check:
    """Model and processor agree on placeholders, and the visual tokens are at their own row's placeholders.

    A hook reads the language model's inputs for a batch; they are compared with each row run alone.

    Args:
        collator: the one of training.
        rows: one batch, as the collator takes them.
    """
    name, title = "aligned", "Each picture's visual tokens are at its placeholders"
    processor = collator.processor
    ours = (model.config.num_query_tokens, model.config.image_token_id)
    theirs = (processor.num_query_tokens, processor.image_token_id)
    if ours != theirs:
        finding = f"num_query_tokens and image_token_id are {ours} in the model and {theirs} in the processor"
        advice = "Load the processor that was saved with the model, or pass processor= to from_backbones"
        return Check(name, title, False, finding, advice, {"model": ours, "processor": theirs})
    if not rows:
        finding = f"Model and processor agree on {ours[0]} placeholders of id {ours[1]}; there are no rows to test"
        return Check(name, title, None, finding, "Give --dataset")
    with preserved_state(model), torch.no_grad():
        together = _visual_inputs(model, collator(list(rows)))
        alone = [_visual_inputs(model, collator([row])) for row in rows]
    apart = [_relative_difference(own[0], found) for (own, found) in zip(alone, together, strict=True)]
    wrong = [row.get("index", number) for number, row in enumerate(rows) if not apart[number] < ALIGNED_TOLERANCE]
    finding = f"{len(rows)} rows, {ours[0]} visual tokens a picture; largest difference {max(apart):.2g} of their norm"
    finding += f"; rows {first_few(list(map(str, wrong)))} have other pictures' visual tokens" if wrong else ""
    advice = "Pictures have to be in the order of their placeholders: check the collator's output for a batch"
    figures = {"rows": len(rows), "wrong": wrong, "largest_difference": max(apart)}
    return Check(name, title, not wrong, finding, advice if wrong else "", figures)


def _visual_inputs(model: LorgnetteForConditionalGeneration, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """For each row `(N Q, M)`, the language model's inputs at the placeholders of its N pictures."""
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


def _relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm; 1 for different shapes."""
    return (ours - theirs).norm().item() / max(ours.norm().item(), 1e-12) if ours.shape == theirs.shape else 1.0


def _losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`(B, S - 1)` nats of each token but the first; the values at placeholders are meaningless."""
    targets = ids[:, 1:].clamp(max=logits.shape[-1] - 1)
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
