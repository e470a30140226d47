"""Batches of embeddings in place of ids, without pictures: sequences and shared tokens are checked there, too."""

import pytest
import torch
from tiny_models import VOCAB_SIZE, inputs, model


IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])


def packed(sequence_ids: list[int], built) -> dict[str, torch.Tensor]:
    embeds = built.get_input_embeddings()(IDS).detach()
    return {"inputs_embeds": embeds, "labels": IDS, "sequence_ids": torch.tensor([sequence_ids])}


def test_packed_embeddings_give_the_loss_of_their_ids():
    built = model(text="mistral").eval()
    made = packed([0, 0, 0, 0, 1, 1, 1, 1], built)
    assert built.config.image_token_id >= VOCAB_SIZE  # no embedding says where placeholders are
    of_ids = {"input_ids": IDS, "labels": IDS, "sequence_ids": made["sequence_ids"]}
    torch.testing.assert_close(built(**made).loss, built(**of_ids).loss)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_packed_embeddings_out_of_order_are_refused(training, compiled):
    built = model(text="mistral").train(training)
    run = torch.compile(built, backend="aot_eager") if compiled else built
    with pytest.raises(ValueError, match=r"numbered in their order, from 0; these are \[0, 2\]"):
        run(**packed([0, 0, 0, 0, 2, 2, 2, 2], built))


def shared(built) -> dict[str, torch.Tensor]:
    """Rows whose first tokens differ, and the first ones of row 0."""
    made = inputs()
    ids = made["input_ids"].masked_fill(made["input_ids"] == built.config.image_token_id, 3)
    ids[1, :4] += 1
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 11, -100)
    embeds = built.get_input_embeddings()(ids).detach()
    return {"input_ids": ids, "inputs_embeds": embeds, "labels": labels, "shared_input_ids": ids[:1, :4].repeat(2, 1)}


def test_embeddings_that_do_not_begin_with_the_shared_tokens_are_refused():
    built = model().train()
    with pytest.raises(ValueError, match="Row 1 of the batch: its first 4 tokens are not those of the batch's shared"):
        built(**shared(built))


def test_without_ids_nothing_is_shared():
    built = model().train()
    made = shared(built)
    del made["input_ids"]
    plain = {name: tensor for name, tensor in made.items() if name != "shared_input_ids"}
    torch.testing.assert_close(built(**made).loss, built(**plain).loss)
