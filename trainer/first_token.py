"""The loss on the first token of each text: it tells whether a model names the picture, where the rest is grammar."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling.modeling_checks import IGNORED
from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration


class FirstTokenCallback(TrainerCallback):
    """Adds `eval_first_token_loss` to the log of each evaluation: the mean over all its texts, in nats.

    A forward hook reads the logits that evaluation computes anyway, since Trainer shows them to no callback. Trainer
    logs an evaluation before it calls `on_evaluate`: the figure is added in `on_log`, ahead of callbacks that print.

    Args:
        model: that is evaluated.
    """

    def __init__(self, model: LorgnetteForConditionalGeneration):
        self.sums = torch.zeros(2)  # losses, texts
        model.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, model: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any], outputs: Any) -> None:
        labels, logits = kwargs.get("labels"), None if model.training else getattr(outputs, "logits", None)
        if labels is None or logits is None or logits.shape[:2] != labels.shape:
            return
        first = (labels[:, 1:] != IGNORED) & (labels[:, :-1] == IGNORED)  # (B, S - 1)
        losses = cross_entropy(logits[:, :-1][first].float(), labels[:, 1:][first], reduction="sum")
        self.sums += torch.stack([losses.detach(), first.sum()]).cpu()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        if "eval_loss" not in logs:
            return
        total, texts = reduce(self.sums.to(PartialState().device), reduction="sum").tolist()
        self.sums.zero_()
        if texts:
            logs["eval_first_token_loss"] = total / texts  # Trainer reads metric_for_best_model here
            state.log_history[-1]["eval_first_token_loss"] = total / texts


__all__ = ["FirstTokenCallback"]
