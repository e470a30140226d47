"""Learning rates by part of the model, in the stock Trainer.

Stage 1 has trained the Q-Former already, while LoRA and projector start untrained; a BERT has trained the text half of
stage 1. One rate for all is too high for some, or too low for the others.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments


# option of a recipe -> the names of its parameters; the text half has embeddings and feed-forwards of its own
PARTS = {
    "qformer_learning_rate": r"(^|\.)qformer\.",
    "projector_learning_rate": r"(^|\.)projector\.",
    "text_learning_rate": r"(^|\.)(qformer\.(embeddings|encoder\.layer\.\d+\.(intermediate|output))|text_head)\.",
}


@dataclass
class LearningRates:
    """Builds the optimizer of `TrainingArguments`, with learning rates of their own for some [`PARTS`].

    For `Trainer(optimizer_cls_and_kwargs=(lambda: LearningRates(…), {}))`: Trainer calls a factory
    with the wrapped model (`transformers/trainer_optimizer.py`, `is_optimizer_factory`).

    Args:
        rates: by the names in [`PARTS`]; all other parameters have `args.learning_rate`. None are left out.

    Raises:
        ValueError: when called, for an optimizer that makes groups of parameters by itself.
    """

    args: TrainingArguments
    rates: Mapping[str, float | None]

    @classmethod
    def use(cls, trainer: Trainer, **rates: float | None) -> None:
        """Have a Trainer build its optimizer so, where any rate is given."""
        given = {name: rate for name, rate in rates.items() if rate is not None}
        if given:
            trainer.optimizer_cls_and_kwargs = (partial(cls, trainer.args, given), {})

    def __call__(self, model: nn.Module, **_: Any) -> torch.optim.Optimizer:
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(self.args, model)
        if {"params", "model", "optimizer_dict"} & kwargs.keys():  # GaLore, Apollo, LOMO
            raise ValueError(
                f"optim {self.args.optim.value} divides the parameters by itself: leave out {', '.join(self.rates)}"
            )
        decayed = set(Trainer.get_decay_parameter_names(None, model))
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                part = next((part for part in self.rates if re.search(PARTS[part], name)), "")
                groups.setdefault((part, name in decayed), []).append(parameter)
        return optimizer(
            [
                {"params": groups[part, decays], "weight_decay": self.args.weight_decay if decays else 0.0}
                | ({"lr": self.rates[part]} if part else {})
                for part, decays in sorted(groups)  # Trainer logs the first group's rate as `learning_rate`
            ],
            **kwargs,
        )
