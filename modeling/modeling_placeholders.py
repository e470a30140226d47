"""What a batch says of itself, is it so? And `<image>` placeholders are kept out of what is generated."""

import torch
from transformers import LogitsProcessorList, PreTrainedConfig


def count_in_rows(mask: torch.Tensor, document_ids: torch.Tensor | None) -> torch.Tensor:
    """How often a mask `(B, S)` is True in each row of the data set: `(B,)`, or `(D,)` of documents that share rows."""
    if document_ids is None:
        return mask.sum(dim=1)
    tokens = document_ids >= 0
    return torch.bincount(document_ids[tokens], weights=mask[tokens]).long()


def check_placeholders(
    mask: torch.Tensor,
    num_query_tokens: int,
    image_token_id: int,
    num_images: int | None,
    row_index: torch.Tensor | None,
    labels: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """See to it that each image has its `num_query_tokens` placeholders.

    Args:
        mask: `(B, S)`, True at placeholders.
        num_query_tokens, image_token_id: the config's.
        num_images: images of the whole batch, or None where there are none.
        row_index: `(B,)` names of the rows in messages; their positions in the batch by default. `(D,)` of documents.
        labels: `(B, S)`; a label on a placeholder is an error.
        document_ids: `(B, S)` of documents that share rows.

    Returns:
        the images of each row, `(B,)` or `(D,)`.

    Raises:
        ValueError: names the row and both counts.
    """
    in_rows = count_in_rows(mask, document_ids)
    per_image, counts = num_query_tokens, in_rows.tolist()
    wanted = (num_images or 0) * per_image
    if sum(counts) != wanted or any(count % per_image for count in counts):
        one_each = num_images == len(counts)
        wrong = [row for row, count in enumerate(counts) if count % per_image or (one_each and count != per_image)]
        row = wrong[0] if wrong else max(range(len(counts)), key=counts.__getitem__)
        raise ValueError(
            f"{row_name(row, row_index)} has {counts[row]} image placeholders (id {image_token_id}); the batch "
            f"has {sum(counts)} for {num_images or 0} image(s), and each image takes {per_image}"
        )
    if labels is not None and labels.shape == mask.shape:
        labelled = count_in_rows(mask & (labels != -100), document_ids)
        if labelled.any():
            row = int(labelled.nonzero()[0])
            raise ValueError(f"{row_name(row, row_index)} has labels on image placeholders: they have to be -100 there")
    return in_rows // per_image


def check_finite(
    pictures: torch.Tensor,
    images_per_row: torch.Tensor | None,
    row_index: torch.Tensor | None,
    image_rows: torch.Tensor | None = None,
) -> None:
    """Refuse pictures (or features) `(N, …)` with NaN or inf in them.

    Args:
        pictures: of all rows, in their order.
        images_per_row: `(B,)`; None for one each.
        row_index: as in [`check_placeholders`].
        image_rows: `(N,)`, which of the pictures each image is; each its own by default.

    Raises:
        ValueError: names the image and its row.
    """
    broken = ~torch.isfinite(pictures.flatten(1)).all(dim=1)
    if image_rows is not None:
        broken = broken[image_rows]
    if broken.any():
        image = int(broken.nonzero()[0])
        row = image if images_per_row is None else int((images_per_row.cumsum(0) <= image).sum())
        raise ValueError(
            f"{row_name(row, row_index)}: image {image} of the batch has values that are not finite (NaN or inf)"
        )


def check_context(
    width: int,
    attention_mask: torch.Tensor | None,
    config: PreTrainedConfig,
    row_index: torch.Tensor | None,
    document_ids: torch.Tensor | None = None,
) -> None:
    """Refuse a row that is longer than the language model's context.

    Args:
        width: tokens of the longest row.
        attention_mask: `(B, width)`.
        config: for the language model's `max_position_embeddings`, where it has any.
        row_index, document_ids: as in [`check_placeholders`].

    Raises:
        ValueError: names the row and both numbers.
    """
    context = getattr(config.text_config, "max_position_embeddings", None)
    if context is None or width <= context:
        return
    row = 0 if attention_mask is None else int(attention_mask.sum(dim=1).argmax())
    if document_ids is not None:
        lengths = count_in_rows(document_ids >= 0, document_ids)
        row, width = int(lengths.argmax()), int(lengths.max())
    if width > context:
        raise ValueError(f"{row_name(row, row_index)} has {width} tokens; the language model's context is {context}")


def row_name(row: int, row_index: torch.Tensor | None) -> str:
    """How a message calls a row: by its index in the data set where that is known."""
    return f"Row {row} of the batch" if row_index is None else f"Row {int(row_index[row])} of the data set"


class PlaceholderBlind(LogitsProcessorList):
    """Logits processors that see no placeholders: their id cannot be generated, nor be looked up in the scores.

    The id may lie past the vocabulary, where a repetition penalty's look-up would fail. In its place the processors see
    a token that the row holds anyway, so that what they count as "already there" stays the same.
    """

    def __init__(self, processors: LogitsProcessorList, image_token_id: int):
        super().__init__(processors)
        self.image_token_id = image_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """`input_ids` `(B, S)`, `scores` `(B, vocabulary)`; returns scores."""
        placeholders = input_ids == self.image_token_id
        if input_ids.shape[1] > 0:
            present = input_ids.masked_fill(placeholders, 0).amax(dim=1, keepdim=True)
            input_ids = torch.where(placeholders, present, input_ids)
        if self.image_token_id < scores.shape[-1]:
            scores = scores.index_fill(1, torch.tensor(self.image_token_id, device=scores.device), -torch.inf)
        return super().__call__(input_ids, scores, **kwargs)


__all__ = ["PlaceholderBlind", "check_context", "check_finite", "check_placeholders", "row_name"]
