"""Do gradients reach all that trains and nothing else, and how large are they in each part?"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from .checks import Check, belongs_to_training, part_of, some, undisturbed


NAME, TITLE = "gradients", "Gradients reach every tensor that trains, and no other"


def check_gradients(model: LorgnetteForConditionalGeneration, batches: Sequence[Mapping[str, torch.Tensor]]) -> Check:
    """Backward passes in train mode, one a batch; no weight moves, and gradients are cleared.

    A tensor counts as reached where its gradient is not all zeros in one of the batches. That of `lora_A` is, as long
    as `lora_B` is still at zero.

    Args:
        batches: with `labels`, on the model's device.
    """
    if not batches:
        return Check(NAME, TITLE, None, "There are no rows to learn from", "Give --dataset")
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    reached, missed, broken, norms = set(), set(), set(), []
    with undisturbed(model):
        model.train()
        for batch in batches:
            model.zero_grad(set_to_none=True)
            try:
                loss = model(**batch).loss
            except ValueError as error:  # placeholders, labels or pictures that do not fit: it says which
                advice = "Training stops there as well: look at what the collator makes of that row"
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
    strays = sorted(name for name in reached if not belongs_to_training(name))
    parts = {part: [step.get(part, 0.0) for step in norms] for part in dict.fromkeys(key for n in norms for key in n)}
    spoken = ", ".join(f"{part} {sum(values) / len(values):.2g}" for part, values in parts.items())
    finding = f"{len(trains)} tensors, {len(batches)} batch{'es' * (len(batches) > 1)}; mean norm: {spoken or 'none'}"
    advice = ""
    if unreached:
        finding += f"; {len(unreached)} get none ({some(unreached)})"
        advice = (
            "What gets no gradient is not on the way from the loss: it should be frozen, or something on the way "
            "detaches it (torch.no_grad, .detach(), .data)"
        )
    if strays:
        finding += f"; {len(strays)} get one that should not ({some(strays)})"
        advice = "Call model.freeze() before the optimizer is made"
    if broken:
        finding += f"; those of {len(broken)} are not finite ({some(sorted(broken))})"
        advice = "Train in bfloat16 or float32 rather than float16, and look at the rows of the batch"
    figures = {"norms": parts, "unreached": unreached, "strays": strays, "not_finite": sorted(broken)}
    return Check(NAME, TITLE, not (unreached or strays or broken), finding, advice, figures)


def gradient_norms(model: LorgnetteForConditionalGeneration) -> dict[str, float]:
    """The norm of the gradients that lie there now, by part: `queries`, `Q-Former`, `projector`, `LoRA` …"""
    squares: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            squares[part_of(name)].append(parameter.grad.detach().float().square().sum())
    return {part: torch.stack(values).sum().sqrt().item() for part, values in squares.items()}


def _first_steps_of_lora(model: LorgnetteForConditionalGeneration) -> set[str]:
    """Names of those `lora_A` whose `lora_B` is zero, so that no gradient can come through."""
    parameters = dict(model.named_parameters())
    return {
        name
        for name in parameters
        if ".lora_A." in name and not parameters[name.replace(".lora_A.", ".lora_B.")].detach().any()
    }
