"""A training step reads no value of a tensor but one for its checks: at each that is read, Python waits for a GPU."""

import pytest
import torch
from devices import HostReads
from saved import processor
from tiny import picture
from tiny_models import inputs, model
from tiny_packs import documents, side_by_side
from tiny_retrieval import batch, retriever

from lorgnette import LorgnetteCollator


CHECK = {"modeling_checks.checked_placeholders: __bool__": 1}
CHECKS = {"modeling_contrastive.checked_texts: __bool__": 1, "modeling_contrastive.checked_candidates: __bool__": 1}
ITG = {"modeling_loss.supervised: nonzero": 1}  # of a batch, how many tokens there are to be written


def labelled(built) -> dict[str, torch.Tensor]:
    made = inputs()
    labels = made["input_ids"].masked_fill(made["input_ids"] == built.config.image_token_id, -100)
    return made | {"labels": labels, "supervised_positions": (labels.flatten() != -100).nonzero().squeeze(1)}


def step(built, given: dict[str, torch.Tensor], monkeypatch) -> dict[str, int]:
    with HostReads(monkeypatch) as places:
        built(**given).loss.backward()
    return dict(places)


@pytest.mark.parametrize("shared", [False, True])
def test_a_step_of_stage_2_reads_one_value(shared, monkeypatch):
    built = model().train()
    made = labelled(built)
    if shared:
        made["input_ids"][:, :4] = made["input_ids"][0, :4]
        made["labels"][:, :11] = -100
        made["supervised_positions"] = (made["labels"].flatten() != -100).nonzero().squeeze(1)
        made["shared_input_ids"] = made["input_ids"][:, :4]
    found = step(built, made, monkeypatch)
    assert found == CHECK | ({"shared_prefix.checked_shared: __bool__": 1} if shared else {})


def test_the_collator_says_where_the_labels_are():
    made = LorgnetteCollator(processor())(
        [{"image": picture(0), "text": "a cat"}, {"image": picture(1), "text": "two"}]
    )
    labelled = (made["labels"].flatten() != -100).nonzero().squeeze(1).tolist()
    assert [place for place in made["supervised_positions"].tolist() if place] == labelled


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("matching", [0.0, 1.0])
def test_a_step_of_stage_1_reads_one_value_a_check(matching, several, monkeypatch):
    built = retriever(itm_weight=matching).train()
    made = batch(["the cat", "a dog", "the picture of a cat", "a dog and a cat"])
    found_before = {}
    if several:
        made = made | {"image_rows": torch.tensor([0, 0, 1, 2]), "pixel_values": made["pixel_values"][:3]}
        found_before = {"modeling_contrastive.group_texts: tolist": 1}  # how many texts a picture has decides shapes
    assert step(built, made, monkeypatch) == CHECKS | ITG | found_before


def test_packed_rows_are_checked_by_one_value(monkeypatch):
    built = model(text="mistral").train()
    made = side_by_side(documents())
    made["labels"] = made["input_ids"].masked_fill(made["input_ids"] == built.config.image_token_id, -100)
    found = step(built, made, monkeypatch)
    assert {place: count for place, count in found.items() if "modeling_checks" in place} == CHECK
