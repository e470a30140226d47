"""Trainer's label smoothing, which computes a loss outside of the model."""

from typing import Any

import torch


def check_label_smoother(reader: dict[str, Any], vocab_size: int) -> None:
    """Raise a ValueError where Trainer's `LabelSmoother` reads the logits, with labels that it would get wrong.

    Args:
        reader: the local variables of the function that reads the logits.
    """
    smoother, labels = reader.get("self"), reader.get("labels")
    if type(smoother).__name__ != "LabelSmoother":
        return
    if isinstance(labels, torch.Tensor) and (labels >= vocab_size).any():
        raise ValueError(
            f"label_smoothing_factor is {smoother.epsilon}, and labels of the batch are on image placeholders (id "
            f"{labels.max()}, past the vocabulary of {vocab_size}), where TRL puts them in rows of messages: give rows "
            "of prompt and completion, LorgnetteCollator as data_collator, or no label smoothing"
        )
    if reader.get("shift_labels") is False:  # Trainer shifts them for models whose class it knows by name
        raise ValueError(
            f"label_smoothing_factor is {smoother.epsilon}, and Trainer would not shift the labels, so that each token "
            "would learn to predict itself. torch_compile and other wrappers hide the model's class from it, and "
            "Seq2SeqTrainer's predict_with_generate never does: leave them out, or set label_smoothing_factor to 0"
        )


__all__ = ["check_label_smoother"]
