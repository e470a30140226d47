"""Checks of a batch: placeholders, labels, pictures, the length of rows, and how a prompt may be continued.

Those that a compiled model runs are operators of torch: a branch on a tensor's values would end the compiled graph. An
operator is called from within it, and not traced. It returns a copy of what it has checked, so that it cannot be left
out. An exported program has no checks, for it is loaded where these operators are not.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from ..configuration.configuration_lorgnette import from_package


# keywords and fields of a generation config with which token ids alone are read, or the prompt is rewritten
_READS_IDS_ALONE = (
    *("assistant_early_exit", "assistant_model", "prefill_chunk_size", "prompt_lookup_num_tokens"),
    *("speculation_type", "token_healing", "use_mtp"),
)

IGNORED = -100  # the label of what is not to be learned, as in transformers' losses
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # added in torch 2.7


def value_check(check: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Register a function that returns a tensor of its first argument's shape and dtype as an operator."""
    namespace = re.sub(r"\W", "_", check.__module__)  # of its own in each copy that is loaded as remote code
    operator = torch.library.custom_op(f"{namespace}::{check.__name__}", check, mutates_args=())
    operator.register_fake(lambda checked, *_: torch.empty_like(checked))

    @functools.wraps(check)
    def checked_unless_exporting(checked: torch.Tensor, *others: Any) -> torch.Tensor:
        return checked if _is_exporting() else operator(checked, *others)

    return checked_unless_exporting


@value_check
def checked_placeholders(
    mask: torch.Tensor,
    pictures: torch.Tensor | None,
    image_rows: torch.Tensor | None,
    row_index: torch.Tensor | None,
    labels: torch.Tensor | None,
    supervised_positions: torch.Tensor | None,
    sequence_ids: torch.Tensor | None,
    text_ids: torch.Tensor | None,
    shared_input_ids: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    num_query_tokens: int,
    image_token_id: int,
    context: int,
) -> torch.Tensor:
    """The mask `(B, S)`; raises what [`check_placeholders`], [`check_finite`] and `batch_checks.Collated.check` do."""
    shown = pictures if image_rows is None else image_rows
    num_images = None if shown is None else len(shown)
    sound = [is_sound(mask, pictures, labels, sequence_ids, num_query_tokens, num_images or 0)]
    collated, has_positions = None, supervised_positions is not None and labels is not None
    if has_positions or sequence_ids is not None or shared_input_ids is not None:
        learned = (labels, supervised_positions, sequence_ids, text_ids, shared_input_ids, input_ids, attention_mask)
        package = from_package("assembly.batch_checks", "A batch of LorgnetteCollator")
        collated = package.Collated(*learned, image_token_id, context)
        sound += collated.sound()
    if mask.numel() and torch.stack(sound).all():  # one value: for each that is read Python waits for a GPU
        return mask.clone()
    numbers = (num_query_tokens, image_token_id, num_images, row_index)
    images_per_row = check_placeholders(mask, *numbers, labels, sequence_ids)
    if pictures is not None:
        check_finite(pictures, images_per_row, row_index, image_rows)
    if collated is not None:
        collated.check(row_index)
    return mask.clone()


def is_sound(
    mask: torch.Tensor,
    pictures: torch.Tensor | None,
    labels: torch.Tensor | None,
    sequence_ids: torch.Tensor | None,
    per_image: int,
    num_images: int,
) -> torch.Tensor:
    """Whether placeholders and pictures are sound: a bool scalar."""
    counts = count_in_rows(mask, sequence_ids)
    sound = (counts.sum() == num_images * per_image) & (counts % per_image == 0).all()
    if pictures is not None:
        sound &= pictures.isfinite().all()
    if labels is not None and labels.shape == mask.shape:
        sound &= ~(mask & (labels != IGNORED)).any()
    return sound


def check_placeholders(
    mask: torch.Tensor,
    num_query_tokens: int,
    image_token_id: int,
    num_images: int | None,
    row_index: torch.Tensor | None,
    labels: torch.Tensor | None = None,
    sequence_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The number of images of each row, `(B,)`, or of each packed sequence; a ValueError for other placeholders.

    `mask` `(B, S)` is True at placeholders, which are `num_query_tokens` an image and have no labels; `num_images` are
    those of the batch, and `row_index` names the rows in messages.
    """
    in_rows = count_in_rows(mask, sequence_ids)[: None if sequence_ids is None else int(sequence_ids.max()) + 1]
    per_image, counts = num_query_tokens, in_rows.tolist()
    if sum(counts) != (num_images or 0) * per_image or any(count % per_image for count in counts):
        one_each = num_images == len(counts)
        wrong = [row for row, count in enumerate(counts) if count % per_image or (one_each and count != per_image)]
        row = wrong[0] if wrong else counts.index(max(counts))
        raise ValueError(
            f"{row_name(row, row_index)} has {counts[row]} image placeholders (id {image_token_id}); the batch "
            f"has {sum(counts)} for {num_images or 0} image(s), and each image takes {per_image}"
        )
    if labels is not None and labels.shape == mask.shape:
        labelled = count_in_rows(mask & (labels != IGNORED), sequence_ids).nonzero()
        if len(labelled):
            row = row_name(int(labelled[0]), row_index)
            raise ValueError(f"{row} has labels on image placeholders: they have to be -100 there")
    return in_rows // per_image


def count_in_rows(mask: torch.Tensor, sequence_ids: torch.Tensor | None) -> torch.Tensor:
    """How often a mask `(B, S)` is True in each row of the data set, `(B,)`, or packed sequence, `(B * S,)`."""
    rows, size = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask), len(mask)
    if sequence_ids is not None:
        rows, size = sequence_ids, mask.numel()  # how many there are is not read
    rows = (rows.flatten() + 1).clamp(0, size)  # 0 is padding
    return torch.zeros(size + 1, dtype=torch.long, device=mask.device).index_add(0, rows, mask.flatten().long())[1:]


def check_finite(
    pictures: torch.Tensor,
    images_per_row: torch.Tensor | None,
    row_index: torch.Tensor | None,
    image_rows: torch.Tensor | None = None,
) -> None:
    """Raise a ValueError, with image and row, for pictures (or features) `(N, …)` with NaN or inf in them."""
    broken = ~torch.isfinite(pictures.flatten(1)).all(dim=1)
    broken = (broken if image_rows is None else broken[image_rows]).nonzero()
    if len(broken):
        image = int(broken[0])
        row = image if images_per_row is None else int((images_per_row.cumsum(0) <= image).sum())
        row = row_name(row, row_index)
        raise ValueError(f"{row}: image {image} of the batch has values that are not finite (NaN or inf)")


def check_context(
    width: int, attention_mask: torch.Tensor | None, config: PreTrainedConfig, row_index: torch.Tensor | None
) -> None:
    """Raise a ValueError, with row and numbers, where one of `width` tokens exceeds `max_position_embeddings`."""
    context = getattr(config.text_config, "max_position_embeddings", None)
    if context is None or width <= context:
        return
    row = 0 if attention_mask is None else int(attention_mask.sum(dim=1).argmax())
    raise ValueError(f"{row_name(row, row_index)} has {width} tokens; the language model's context is {context}")


def row_name(row: int, row_index: torch.Tensor | None) -> str:
    """A row's name in messages: its index in the data set where that is known."""
    return f"Row {row} of the batch" if row_index is None else f"Row {int(row_index[row])} of the data set"


def setting_of(name: str, kwargs: dict[str, Any], *configs: GenerationConfig | None) -> Any:
    """A setting of `generate`: a keyword, else that of the first config that has it, else None."""
    if name in kwargs:
        return kwargs[name]
    found = (getattr(config, name, None) for config in configs)
    return next((value for value in found if value is not None), None)


def check_decoding(embedded: bool, kwargs: dict[str, Any], *configs: GenerationConfig | None) -> None:
    """Raise a ValueError for ways of decoding that do not read embeddings, where a prompt is `embedded`."""
    used = [name for name in _READS_IDS_ALONE if setting_of(name, kwargs, *configs) not in (None, False)]
    if setting_of("cache_implementation", kwargs, *configs) == "paged":
        used.append('cache_implementation="paged"')
    if embedded and used:
        raise ValueError(f"{', '.join(used)}: this way of decoding sees token ids alone, not the images")
    if "assistant_early_exit" in used:
        raise ValueError("assistant_early_exit needs a bare language model: call model.language_model.generate(…)")


def check_prompts(kwargs: dict[str, Any]) -> None:
    """Raise a ValueError for packed rows, for prompts padded on the right, and for keywords of training."""
    if names := [name for name in ("shared_input_ids", "supervised_positions") if kwargs.get(name) is not None]:
        raise ValueError(f"{', '.join(names)} without labels: nothing says where the prompts of this batch end")
    if kwargs.get("sequence_ids") is not None:
        raise ValueError("sequence_ids: the rows of this batch are packed; generate takes one prompt a row")
    mask = kwargs.get("attention_mask")
    padded = mask[:, -1] == 0 if mask is not None and mask.ndim == 2 else torch.zeros(0)
    if padded.any():
        raise ValueError(
            f"{row_name(int(padded.nonzero()[0]), kwargs.get('row_index'))} is padded on the right: generate goes on "
            "behind the last column, so prompts are padded on the left (padding_side='left')"
        )
