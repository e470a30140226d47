"""The losses of stage 1 against plain loops, and what pairs with one caption do to them."""

import math

import pytest
import torch

from lorgnette.modeling.modeling_contrastive import (
    contrastive_loss,
    draw_negatives,
    gather,
    generation_loss,
    group_texts,
    matching_loss,
    pairs_of,
    same_caption,
    similarities,
)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


def test_similarities_are_those_of_the_nearest_query():
    images, texts = unit(3, 4, 5), unit(6, 5, seed=1)
    actual = similarities(images, texts)
    for i in range(3):
        for j in range(6):
            expected = max(float(images[i, q] @ texts[j]) for q in range(4))
            assert float(actual[i, j]) == pytest.approx(expected, abs=1e-6)
    assert similarities(images.bfloat16(), texts.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as Trainer's bf16 has it
        assert torch.equal(similarities(images, texts), actual)


def test_contrastive_loss_is_that_of_a_plain_loop():
    similarity = torch.rand(3, 5, generator=torch.Generator().manual_seed(2)) * 2 - 1
    positives = torch.tensor([[0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    candidates = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]).bool()
    scale, smoothing = 1 / 0.07, 0.1
    losses = []
    for row in range(3):
        right = positives[row].nonzero().flatten().tolist()
        columns = sorted({*right, *candidates[row].nonzero().flatten().tolist()})
        exponentials = {c: math.exp(float(similarity[row, c]) * scale) for c in columns}
        logs = {c: math.log(exponentials[c] / sum(exponentials.values())) for c in columns}
        even, nearest = (sum(logs[c] for c in of) / len(of) for of in (columns, right))
        losses.append(-(1 - smoothing) * nearest - smoothing * even)
    actual = contrastive_loss(similarity, positives, candidates, torch.tensor(scale))
    assert float(actual) == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert losses[1] == 0


def test_contrastive_loss_is_cross_entropy_where_all_captions_differ():
    similarity = (torch.rand(4, 4, generator=torch.Generator().manual_seed(3)) - 0.5).requires_grad_()
    own, scale = torch.eye(4, dtype=torch.bool), torch.tensor(3.0)
    expected = torch.nn.functional.cross_entropy(similarity * scale, torch.arange(4), label_smoothing=0.1)
    actual = contrastive_loss(similarity, own, ~own, scale)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(loss, similarity, retain_graph=True)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_contrastive_loss_with_several_positives_is_cross_entropy_with_soft_labels():
    """As in LAVIS' fine-tuning on COCO: even over the picture's texts, 0.1 of it over all."""
    similarity, scale = torch.rand(4, 4, generator=torch.Generator().manual_seed(3)) - 0.5, torch.tensor(3.0)
    pictures = torch.tensor([0, 1, 0, 2])
    positives = pictures[:, None] == pictures
    labels = 0.9 * positives / positives.sum(1, keepdim=True) + 0.1 / 4
    expected = torch.nn.functional.cross_entropy(similarity * scale, labels)
    torch.testing.assert_close(contrastive_loss(similarity, positives, ~positives, scale), expected)


def test_what_is_no_candidate_has_no_influence():
    similarity, own = torch.zeros(2, 3), torch.eye(2, 3, dtype=torch.bool)
    candidates = torch.tensor([[0, 1, 0], [1, 0, 0]]).bool()
    similarity.requires_grad_()
    contrastive_loss(similarity, own, candidates, torch.tensor(1.0)).backward()
    assert similarity.grad[:, 2].abs().max() == 0
    assert torch.isfinite(similarity.grad).all()
    assert similarity.grad[0, 1] > 0


def test_pairs_of_one_picture_are_positives_and_those_of_one_caption_are_neither():
    captions = torch.tensor([[1], [2], [3], [2], [4]])  # the second and the fourth are the same
    pairs = pairs_of(captions, torch.tensor([0, 0, 1, 2, 3]), 4, torch.tensor([7, 8, 9, 8]), 0)
    same = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 1], [0, 0, 0, 1, 0], [0, 0, 1, 0, 1]]).bool()
    assert torch.equal(pairs.positives, same)  # the second and the fourth picture have one number
    neither = torch.zeros(5, 5).bool()
    neither[0, 3] = neither[1, 3] = True  # a caption of the first picture
    neither[3, 1] = True  # and of the third: its other caption is a negative
    assert torch.equal(pairs.candidates, ~(same | neither))
    alone = pairs_of(captions, torch.arange(5), 5, None, 0)
    assert torch.equal(alone.positives, torch.eye(5).bool())
    assert torch.equal(alone.candidates, ~same_caption(captions))


@pytest.mark.parametrize("image_rows", [[0, 1, 0, 2, 2, 0, 1], [1, 0], [0, 0, 0]])
def test_groups_of_texts(image_rows):
    rows = torch.tensor(image_rows)
    counts = rows.bincount().tolist()
    groups = group_texts(rows, len(set(image_rows)), False, [min(counts), max(counts)])
    assert sorted(groups.order.tolist()) == list(range(len(rows)))
    first = groups.order[: groups.fewest * groups.pictures].view(groups.pictures, -1)
    assert rows[first].eq(torch.arange(groups.pictures)[:, None]).all()
    assert groups.first.tolist() == [image_rows.index(picture) for picture in range(groups.pictures)]
    assert groups.rank.tolist() == [image_rows[:n].count(picture) for n, picture in enumerate(image_rows)]


def test_same_caption():
    ids = torch.tensor([[1, 2, 0], [1, 2, 3], [1, 2, 0], [2, 1, 0]])
    expected = torch.eye(4).bool()
    expected[0, 2] = expected[2, 0] = True
    assert torch.equal(same_caption(ids), expected)


def test_negatives_are_candidates_drawn_by_similarity_and_repeat_with_the_generator():
    logits = torch.tensor([[9.0, 0.0, math.log(3.0)], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    candidates = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0]]).bool()
    drawn = []
    for seed in range(2000):
        has, negatives = draw_negatives(logits, candidates, torch.Generator().manual_seed(seed))
        assert has.tolist() == [True, False, True]  # the second row has nothing to choose from
        assert negatives[2] == 0
        drawn.append(int(negatives[0]))
    assert set(drawn) == {1, 2}
    assert sum(column == 2 for column in drawn) / 2000 == pytest.approx(0.75, abs=0.04)
    again = draw_negatives(logits, candidates, torch.Generator().manual_seed(7))
    assert torch.equal(again[1], draw_negatives(logits, candidates, torch.Generator().manual_seed(7))[1])


def test_no_candidate_anywhere_draws_nothing():
    has, negatives = draw_negatives(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool))
    assert not has.any()
    assert negatives.tolist() == [0, 0]


def test_similarities_that_are_not_finite_stop_no_draw():
    """The loss of the same batch is NaN, and Trainer's guard says so in all processes."""
    candidates = ~torch.eye(3, dtype=torch.bool)
    has, negatives = draw_negatives(torch.full((3, 3), torch.nan), candidates)
    assert has.all()
    assert negatives.max() < 3


def test_matching_and_generation_are_cross_entropies_in_float32():
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.5]])
    expected = (math.log(1 + math.exp(-3.0)) + math.log(2)) / 2
    assert float(matching_loss(logits, torch.tensor([0, 1]))) == pytest.approx(expected, rel=1e-5)
    left_out = matching_loss(torch.cat([logits, logits]), torch.tensor([0, 1, -100, -100]))
    assert float(left_out) == pytest.approx(expected, rel=1e-5)

    logits = torch.tensor([[1.0, 2.0, 3.0]])
    logs = [value - math.log(sum(math.exp(v) for v in (1, 2, 3))) for value in (1, 2, 3)]
    expected = -0.9 * logs[0] - 0.1 * sum(logs) / 3
    assert float(generation_loss(logits, torch.tensor([0]))) == pytest.approx(expected, rel=1e-5)
    assert generation_loss(logits.bfloat16(), torch.tensor([0])).dtype == torch.float32


def test_gather_without_a_process_group_is_the_tensor_itself():
    tensor = torch.zeros(2, 3)
    assert gather(tensor, [2]) is tensor
