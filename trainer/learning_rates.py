"""A separate learning rate for the Q-Former, in the stock Trainer.

Stage 1 has trained the Q-Former already, while LoRA and projector start untrained. One rate for all is too high for the
Q-Former or too low for the others.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments


@dataclass
class QFormerLearningRate:
    """Builds the optimizer of `TrainingArguments`, with another learning rate for the Q-Former's parameters.

    For `Trainer(optimizer_cls_and_kwargs=(lambda: QFormerLearningRate(…), {}))`: Trainer calls a factory
    with the wrapped model (`transformers/trainer_optimizer.py`, `is_optimizer_factory`).

    Raises:
        ValueError: when called, for an optimizer that makes groups of parameters by itself.
    """

    args: TrainingArguments
    learning_rate: float

    def __call__(self, model: nn.Module, **_: Any) -> torch.optim.Optimizer:
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(self.args, model)
        if {"params", "model", "optimizer_dict"} & kwargs.keys():  # GaLore, Apollo, LOMO
            raise ValueError(
                f"optim {self.args.optim.value} divides the parameters by itself: leave out qformer_learning_rate"
            )
        decayed = set(Trainer.get_decay_parameter_names(None, model))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(("qformer" in name.split("."), name in decayed), []).append(parameter)
        return optimizer(
            [
                {"params": groups[in_qformer, decays], "weight_decay": self.args.weight_decay if decays else 0.0}
                | ({"lr": self.learning_rate} if in_qformer else {})
                for in_qformer, decays in sorted(groups)  # Trainer logs the first group's rate as `learning_rate`
            ],
            **kwargs,
        )
