"""The losses of stage 1 against plain loops, and what pairs with one caption do to them."""

import math

import pytest
import torch

from lorgnette.modeling.modeling_contrastive import (
    contrastive_loss,
    draw_negatives,
    gather,
    generation_loss,
    matching_loss,
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
    targets = torch.tensor([1, 0, 4])
    candidates = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]).bool()
    scale, smoothing = 1 / 0.07, 0.1
    losses = []
    for row in range(3):
        columns = sorted({int(targets[row]), *candidates[row].nonzero().flatten().tolist()})
        exponentials = {c: math.exp(float(similarity[row, c]) * scale) for c in columns}
        logs = {c: math.log(exponentials[c] / sum(exponentials.values())) for c in columns}
        even = sum(logs.values()) / len(columns)
        losses.append(-(1 - smoothing) * logs[int(targets[row])] - smoothing * even)
    actual = contrastive_loss(similarity, targets, candidates, torch.tensor(scale))
    assert float(actual) == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert losses[1] == 0


def test_contrastive_loss_is_cross_entropy_where_all_captions_differ():
    similarity = (torch.rand(4, 4, generator=torch.Generator().manual_seed(3)) - 0.5).requires_grad_()
    targets, scale = torch.arange(4), torch.tensor(3.0)
    expected = torch.nn.functional.cross_entropy(similarity * scale, targets, label_smoothing=0.1)
    actual = contrastive_loss(similarity, targets, ~torch.eye(4, dtype=torch.bool), scale)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(loss, similarity, retain_graph=True)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_what_is_no_candidate_has_no_influence():
    similarity, targets = torch.zeros(2, 3), torch.tensor([0, 1])
    candidates = torch.tensor([[0, 1, 0], [1, 0, 0]]).bool()
    similarity.requires_grad_()
    contrastive_loss(similarity, targets, candidates, torch.tensor(1.0)).backward()
    assert similarity.grad[:, 2].abs().max() == 0
    assert torch.isfinite(similarity.grad).all()
    assert similarity.grad[0, 1] > 0


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
    assert gather(tensor) is tensor
