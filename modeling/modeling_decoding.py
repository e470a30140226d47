"""What `generate` is asked for, before anything is computed: are these prompts, and can they be decoded in that way?"""

from typing import Any

import torch
from transformers import GenerationConfig

from .modeling_checks import IGNORED
from .modeling_placeholders import row_name


# keywords and fields of a generation config with which token ids alone are read, or the prompt is rewritten
_READS_IDS_ALONE = (
    "assistant_early_exit",
    "assistant_model",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "speculation_type",
    "token_healing",
    "use_mtp",
)
_OF_TRAINING = ("labels", "shared_input_ids", "supervised_positions")


def asked_for(name: str, kwargs: dict[str, Any], *configs: GenerationConfig | None) -> Any:
    """A setting of `generate`, as transformers resolves it: a keyword, else the first config that has it, else None."""
    if name in kwargs:
        return kwargs[name]
    found = (getattr(config, name, None) for config in configs)
    return next((value for value in found if value is not None), None)


def check_decoding(embedded: bool, kwargs: dict[str, Any], *configs: GenerationConfig | None) -> None:
    """Refuse, for a prompt with images, ways of decoding that do not read its embeddings.

    Args:
        embedded: whether the prompt has images, or is given as embeddings.
        kwargs: of `generate`.
        configs: the caller's generation config, and the model's.

    Raises:
        ValueError: names the settings.
    """
    if not embedded:
        if asked_for("assistant_early_exit", kwargs, *configs) is not None:
            raise ValueError(
                "assistant_early_exit ends in the midst of a language model, which is a part of this model: call "
                "model.language_model.generate(…), which reads the same words"
            )
        return
    blind = [name for name in _READS_IDS_ALONE if asked_for(name, kwargs, *configs) not in (None, False)]
    if asked_for("cache_implementation", kwargs, *configs) == "paged":
        blind.append('cache_implementation="paged"')
    if blind:
        raise ValueError(f"{', '.join(blind)}: this way of decoding sees token ids alone, not the images")


def prompts_of(
    input_ids: torch.Tensor | None, kwargs: dict[str, Any], pad_token_id: int | None
) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """The prompts of what `generate` is given; a batch of training is cut before its answers, and padded on the left.

    Args:
        input_ids: `(B, S)`, prompts; or prompts with answers, where `kwargs` has `labels`.
        kwargs: of `generate`, `attention_mask` `(B, S)` and `labels` `(B, S)` among them.
        pad_token_id: for rows of unequal length; 0 by default.

    Returns:
        `input_ids` `(B, P)`, and the keywords with an `attention_mask` `(B, P)` and nothing that training alone reads.

    Raises:
        ValueError: labels without `input_ids`; a row whose labels are not one answer at its end, or leave no prompt;
            rows of several documents; what training alone reads, without labels; prompts padded on the right.
    """
    labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
    rows = kwargs.get("row_index")
    if labels is None and (names := [name for name in _OF_TRAINING if kwargs.get(name) is not None]):
        raise ValueError(f"{', '.join(names)} without labels: nothing says where the prompts of this batch end")
    if kwargs.get("document_ids") is not None:
        raise ValueError("document_ids: the rows of this batch are packed; generate takes one prompt a row")
    kwargs = {name: value for name, value in kwargs.items() if name not in (*_OF_TRAINING, "document_ids")}
    if labels is None:
        padded = mask[:, -1] == 0 if mask is not None and mask.ndim == 2 else torch.zeros(0)
        if padded.any():
            raise ValueError(
                f"{row_name(int(padded.nonzero()[0]), rows)} is padded on the right: generate goes on behind the last "
                "column, so prompts are padded on the left (padding_side='left')"
            )
        return input_ids, kwargs
    if input_ids is None or input_ids.shape != labels.shape:
        raise ValueError("labels say where prompts end in input_ids of the same shape, which are not given")
    there = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    prompts = []
    for row in range(len(input_ids)):
        answer = (labels[row] != IGNORED)[there[row]]
        length = len(answer) - int(answer.sum())
        if length == 0 or bool(answer[:length].any()):
            raise ValueError(
                f"{row_name(row, rows)} has {int(answer.sum())} labels among {len(answer)} tokens, which are not one "
                "answer behind a prompt: give generate the prompt alone, without labels"
            )
        prompts.append(input_ids[row][there[row]][:length])
    width = max(map(len, prompts))
    ids = input_ids.new_full((len(prompts), width), pad_token_id or 0)
    kwargs["attention_mask"] = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        kwargs["attention_mask"][row, width - len(prompt) :] = 1
    for name in ("position_ids", "token_type_ids", "mm_token_type_ids"):  # of the batch as it was
        kwargs.pop(name, None)
    return ids, kwargs


__all__ = ["asked_for", "check_decoding", "prompts_of"]
