"""A batch is judged by one value, and only a wrong one is looked at row by row: both find the same."""

import pytest
import torch

from lorgnette.assembly.batch_checks import Collated
from lorgnette.assembly.packing import PADDING, check_numbers, in_order
from lorgnette.modeling.modeling_checks import IGNORED, checked_placeholders, is_sound


IMAGE = 99
PICTURES = torch.zeros(2, 3, 4, 4)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two rows of two placeholders and three more tokens, the last two of them labels: mask, labels, positions."""
    mask = torch.tensor([[True, True, False, False, False]] * 2)
    labels = torch.tensor([[IGNORED, IGNORED, IGNORED, 5, 6]] * 2)
    return mask, labels, (labels.flatten() != IGNORED).nonzero().squeeze(1)


def check(mask, labels, positions, pictures=PICTURES, sequence_ids=None, row_index=None) -> torch.Tensor:
    others = (None, None, None, None, 2, IMAGE, 0)
    return checked_placeholders(mask, pictures, None, row_index, labels, positions, sequence_ids, *others)


def test_a_sound_batch_is_returned():
    mask, labels, positions = batch()
    assert torch.equal(check(mask, labels, positions), mask)
    padded = torch.nn.functional.pad(positions, (0, 3))
    assert torch.equal(check(mask, labels, padded.int()), mask)


@pytest.mark.parametrize("wrong", [[3, 4, 8, 100], [3, 4, 8], [3, 4, 9, 8], [3, 4, 8, 9, 9], [2, 3, 4, 8]])
def test_positions_that_are_not_where_the_labels_are(wrong):
    mask, labels, _ = batch()
    with pytest.raises(ValueError, match=f"supervised_positions names {len(wrong)} positions, and labels has 4"):
        check(mask, labels, torch.tensor(wrong))


def test_the_packed_sequence_without_its_picture_is_named():
    sequence_ids = torch.tensor([[0, 0, 0, 1, 1, 1, -1]])
    mask = torch.tensor([[True, True, False, False, False, False, False]])
    labels = torch.full_like(sequence_ids, IGNORED)
    with pytest.raises(ValueError, match="Row 71 of the data set has 0 image placeholders"):
        check(mask, labels, None, sequence_ids=sequence_ids, row_index=torch.tensor([70, 71]))
    whole = torch.tensor([[True, True, False, True, True, False, False]])
    assert torch.equal(check(whole, labels, None, sequence_ids=sequence_ids), whole)


def test_a_label_on_a_placeholder_and_a_broken_picture_are_named():
    mask, labels, _ = batch()
    labels[1, 0] = 5
    with pytest.raises(ValueError, match="Row 1 of the batch has labels on image placeholders"):
        check(mask, labels, None)
    broken = PICTURES.clone()
    broken[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="Row 1 of the batch: image 1 of the batch has values that are not finite"):
        check(mask, batch()[1], None, pictures=broken)


def test_no_rows_are_sound():
    mask, labels, positions = (tensor[:0] for tensor in batch())
    assert check(mask, labels, positions, pictures=None).shape == (0, 5)


def test_the_value_is_on_the_batchs_device():
    mask, labels, positions = (tensor.to("meta") for tensor in batch())
    assert is_sound(mask, PICTURES.to("meta"), labels, None, 2, 2).is_meta
    sequences = torch.zeros_like(labels)
    shared, ids = (torch.zeros(2, width, dtype=torch.long, device="meta") for width in (2, 5))
    made = Collated(labels, positions, sequences, sequences, shared, ids, torch.ones_like(ids), IMAGE, 4)
    found = made.sound()
    assert len(found) == 5
    assert all(value.is_meta and value.ndim == 0 for value in found)


@pytest.mark.parametrize("context", [0, 3])
def test_the_value_of_packed_rows_is_whether_none_is_refused(context):
    """On random numbers of sequences and texts, most of them wrong."""
    generator, verdicts = torch.Generator().manual_seed(context), set()
    for case in range(400):
        steps = torch.randint(0, 2 + case % 2, (1, 8), generator=generator)
        sequence_ids = (steps.cumsum(1) - steps[:, :1]).masked_fill(torch.arange(8) > 5 + case % 3, PADDING).view(2, 4)
        text_ids = torch.randint(0, 2, (2, 4), generator=generator).cumsum(1) if case % 4 > 1 else None
        try:
            check_numbers(sequence_ids, text_ids, context, None)
            raised = False
        except ValueError:
            raised = True
        assert bool(in_order(sequence_ids, text_ids, context)) is not raised, (sequence_ids, text_ids)
        verdicts.add((raised, text_ids is None))
    assert len(verdicts) == 4
