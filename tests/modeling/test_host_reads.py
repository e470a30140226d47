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


STAGE_2 = {"modeling_checks.checked_placeholders: __bool__": 1}
STAGE_1 = {"modeling_contrastive.checked_batch: tolist": 1}  # of how many texts and tokens there are, too


READING = {
    "item": lambda mask: mask.sum().item(),
    "tolist": lambda mask: mask.tolist(),
    "to": lambda mask: mask.to("cpu"),
    "cpu": lambda mask: mask.cpu(),
    "nonzero": lambda mask: torch.nonzero(mask),
    "where": lambda mask: torch.where(mask),
    "a boolean index": lambda mask: mask[mask],
    "__bool__": lambda mask: bool(mask.any()),
}


@pytest.mark.parametrize("name", READING)
def test_what_waits_is_counted(name, monkeypatch):
    mask = torch.tensor([True, False])
    with HostReads(monkeypatch) as places:
        READING[name](mask)
        torch.where(mask, mask, ~mask).to(torch.float32).to(mask.device)  # these wait for nothing
    assert places == {f"test_host_reads.<lambda>: {name}": 1}


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
    assert step(built, made, monkeypatch) == STAGE_2


def test_the_collator_says_where_the_labels_are():
    made = LorgnetteCollator(processor())(
        [{"image": picture(0), "text": "a cat"}, {"image": picture(1), "text": "two"}]
    )
    labelled = (made["labels"].flatten() != -100).nonzero().squeeze(1).tolist()
    assert [place for place in made["supervised_positions"].tolist() if place] == labelled


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("fields", [{}, {"itm_weight": 0.0}, {"itg_weight": 0.0}, {"matching_batch": 2}], ids=str)
def test_a_step_of_stage_1_reads_once(fields, several, monkeypatch):
    fields = dict(fields)
    matching_batch = fields.pop("matching_batch", None)
    built = retriever(**fields).train()
    built.config.matching_batch = matching_batch
    made = batch(["the cat", "a dog", "the picture of a cat", "a dog and a cat"])
    if several:
        made |= {"image_rows": torch.tensor([0, 0, 1, 2]), "pixel_values": made["pixel_values"][:3]}
    assert step(built, made | {"image_ids": torch.arange(len(made["pixel_values"]))}, monkeypatch) == STAGE_1


def test_a_comparison_without_losses_reads_once(monkeypatch):
    built = retriever().eval()
    with HostReads(monkeypatch) as places:
        built(**batch(), return_loss=False)
    assert places == {"modeling_contrastive.checked_pairs: __bool__": 1}


@pytest.mark.parametrize("several", [False, True])
def test_packed_rows_are_read_once(several, monkeypatch):
    built = model(text="mistral").train()
    docs = documents()
    made = side_by_side(docs) | {"row_index": torch.arange(len(docs))}
    made["supervised_positions"] = (made["labels"].flatten() != -100).nonzero().squeeze(1)
    if several:  # a text begins with the last token of its prompt
        labelled = made["labels"] != -100
        made["text_ids"] = (labelled | torch.nn.functional.pad(labelled[:, 1:], (0, 1))).long()
    assert step(built, made, monkeypatch) == STAGE_2


@pytest.mark.parametrize("stage", [1, 2])
def test_a_compiled_step_reads_no_more(stage, monkeypatch):
    """The operator of the check reads one; the graph has no breaks, at which more would be read."""
    if stage == 1:
        built, made = retriever().train(), batch(["the cat", "a dog", "the picture of a cat", "a dog and a cat"])
        check = {"modeling_contrastive.checked_pairs: __bool__": 1}
    else:
        built, check = model().train(), STAGE_2
        made = labelled(built)
    compiled = torch.compile(built, backend="aot_eager", fullgraph=True)
    compiled(**made).loss.backward()
    assert step(compiled, made, monkeypatch) == check
