"""Cut a training batch to prompts: `Seq2SeqTrainer(predict_with_generate=True)` passes answers to `generate` too."""

from typing import Any

import torch

from ..modeling.modeling_checks import IGNORED, row_name


_OF_TRAINING = ("labels", "shared_input_ids", "supervised_positions")


def prompts_of(
    input_ids: torch.Tensor | None, kwargs: dict[str, Any], pad_token_id: int | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Cut a batch before its answers, and pad it on the left.

    Args:
        input_ids: `(B, S)`, prompts with answers.
        kwargs: of `generate`: `labels` `(B, S)`, and `attention_mask` `(B, S)`.
        pad_token_id: for rows of unequal length; 0 by default.

    Returns:
        `input_ids` `(B, P)`, and the keywords with an `attention_mask` `(B, P)` without the keys of training.

    Raises:
        ValueError: labels without `input_ids`; a row whose labels are not one answer at its end, or leave no prompt;
            packed rows.
    """
    labels, mask, rows = (kwargs.get(name) for name in ("labels", "attention_mask", "row_index"))
    if kwargs.get("sequence_ids") is not None:
        raise ValueError(
            "sequence_ids: the rows of this batch are packed or hold several texts; generate takes one prompt a row"
        )
    kwargs = {name: value for name, value in kwargs.items() if name not in (*_OF_TRAINING, "sequence_ids")}
    if input_ids is None or input_ids.shape != labels.shape:
        raise ValueError("labels say where prompts end in input_ids of the same shape, which are not given")
    is_token = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    prompts = []
    for row in range(len(input_ids)):
        answer = (labels[row] != IGNORED)[is_token[row]]
        length = len(answer) - int(answer.sum())
        if length == 0 or bool(answer[:length].any()):
            raise ValueError(
                f"{row_name(row, rows)} has {int(answer.sum())} labels among {len(answer)} tokens, which are not one "
                "answer behind a prompt: give generate the prompt alone, without labels"
            )
        prompts.append(input_ids[row][is_token[row]][:length])
    width = max(map(len, prompts))
    ids = input_ids.new_full((len(prompts), width), pad_token_id or 0)
    kwargs["attention_mask"] = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        kwargs["attention_mask"][row, width - len(prompt) :] = 1
    for name in ("position_ids", "token_type_ids", "mm_token_type_ids"):  # of the batch as it was
        kwargs.pop(name, None)
    return ids, kwargs


__all__ = ["prompts_of"]
