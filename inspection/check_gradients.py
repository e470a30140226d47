"""Check that gradients reach exactly the trainable tensors, and measure their norms."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from .checks import Check, first_few, part_of, preserved_state, should_train


NAME, TITLE = "gradients", "Gradients reach every tensor that trains, and no other"


def check_gradients(model: LorgnetteForConditionalGeneration, batches: Sequence[Mapping[str, torch.Tensor]]) -> Check:
    """Run backward in train mode, once per batch; weights stay unchanged, and gradients are cleared.

    A tensor counts as reached if its gradient is not all zeros in some batch. The gradient of `lora_A` is all zeros as
    long as `lora_B` is zero.

    Args:
        batches: with `labels`, on the model's device.
    """
    if not batches:
        return Check(NAME, TITLE, None, "There are no rows to learn from", "Give --dataset")
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    reached, missed, broken, norms = set(), set(), set(), []
    with preserved_state(model):
        model.train()
        for batch in batches:
            model.zero_grad(set_to_none=True)
            try:
                loss = model(**batch).loss
            except ValueError as error:  # the message says what does not fit: placeholders, labels or pictures
                advice = "Training stops at this batch too: check the collator's output for that row"
                return Check(NAME, TITLE, False, f"The model refuses a batch: {error}", advice)
            loss.backward()
            missed |= {
                name for name, parameter in model.named_parameters() if name in trains and parameter.grad is None
            }
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            broken |= {name for name, gradient in gradients.items() if not gradient.isfinite().all()}
            reached |= {name for name, gradient in gradients.items() if gradient.any()}
            norms.append(gradient_norms(model))
    at_zero = _first_steps_of_lora(model)
    unreached = sorted(missed | (trains - reached - at_zero))
    strays = sorted(name for name in reached if not should_train(name))
    parts = {part: [step.get(part, 0.0) for step in norms] for part in dict.fromkeys(key for n in norms for key in n)}
    mean_norms = ", ".join(f"{part} {sum(values) / len(values):.2g}" for part, values in parts.items())
    finding = f"{len(trains)} tensors, {len(batches)} batch{'es' * (len(batches) > 1)}; mean norm: " + (
        mean_norms or "none"
    )
    advice = ""
    if unreached:
        finding += f"; {len(unreached)} get none ({first_few(unreached)})"
        advice = (
            "These tensors are not connected to the loss: freeze them, or remove what detaches them "
            "(torch.no_grad, .detach(), .data)"
        )
    if strays:
        finding += f"; {len(strays)} get one but should be frozen ({first_few(strays)})"
        advice = "Call model.freeze() before you create the optimizer"
    if broken:
        finding += f"; those of {len(broken)} are not finite ({first_few(sorted(broken))})"
        advice = "Train in bfloat16 or float32 rather than float16, and check the rows of the batch"
    figures = {"norms": parts, "unreached": unreached, "strays": strays, "not_finite": sorted(broken)}
    return Check(NAME, TITLE, not (unreached or strays or broken), finding, advice, figures)


def gradient_norms(model: LorgnetteForConditionalGeneration) -> dict[str, float]:
    """The norm of the current gradients, by part: `queries`, `Q-Former`, `projector`, `LoRA` …"""
    squares: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            squares[part_of(name)].append(parameter.grad.detach().float().square().sum())
    return {part: torch.stack(values).sum().sqrt().item() for part, values in squares.items()}


def _first_steps_of_lora(model: LorgnetteForConditionalGeneration) -> set[str]:
    """Names of the `lora_A` whose `lora_B` is zero, which blocks their gradient."""
    parameters = dict(model.named_parameters())
    return {
        name
        for name in parameters
        if ".lora_A." in name and not parameters[name.replace(".lora_A.", ".lora_B.")].detach().any()
    }
