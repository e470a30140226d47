"""Every tensor that a model makes is on its device: on `meta`, torch's device of shapes, none may be elsewhere."""

import pytest
import tiny
import torch
from devices import OneDevice, answer_on_meta
from tiny_models import QFORMER, inputs, model
from tiny_packs import documents, side_by_side
from tiny_retrieval import batch, retriever


@pytest.fixture(autouse=True)
def meta(monkeypatch):
    answer_on_meta(monkeypatch)
    with OneDevice():
        yield


def moved(made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to("meta") for name, tensor in made.items()}


def labelled(built, made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return made | {"labels": made["input_ids"].masked_fill(made["input_ids"] == built.config.image_token_id, -100)}


def features_in_place_of_pictures(built, made):
    features = built.get_vision_features(made.pop("pixel_values")).last_hidden_state
    return made | {"vision_features": features}


def with_positions(built, made):
    positions = (labelled(built, made)["labels"].flatten() != -100).nonzero().squeeze(1)
    return made | {"supervised_positions": positions}


def with_a_shared_prefix(built, made):
    made["input_ids"][:, :4] = made["input_ids"][0, :4]
    return made | {"shared_input_ids": made["input_ids"][:, :4]}


CHANGES = {
    "pictures": lambda built, made: made,
    "features": features_in_place_of_pictures,
    "positions": with_positions,
    "a shared prefix": with_a_shared_prefix,
    "packed": lambda built, made: side_by_side(documents()),
}


@pytest.mark.parametrize("name", ["input_ids", "pixel_values"])
def test_a_tensor_of_the_cpu_is_refused(name):
    built, made = model().to("meta").eval(), moved(inputs())
    with pytest.raises(RuntimeError, match="tensors on cpu, meta"):
        built(**made | {name: inputs()[name]})


def after(steps: int):
    """In place of `GenerationMixin._has_unfinished_sequences`, which reads a value."""
    left = iter(range(steps))
    return lambda *_, **__: next(left, None) is not None


@pytest.mark.parametrize("fields", [{}, {"use_pooled_features": True}], ids=["queries", "pooled"])
@pytest.mark.parametrize("change", CHANGES)
def test_stage_2_trains(change, fields):
    built = model(text="mistral", qformer_config=QFORMER | fields).train()
    made = CHANGES[change](built, labelled(built, inputs()))
    loss = built.to("meta")(**moved(labelled(built, made))).loss
    loss.backward()
    assert loss.is_meta
    assert all(value.grad.is_meta for value in built.projector.parameters())


@pytest.mark.parametrize("fields", [{}, {"use_pooled_features": True}])
@pytest.mark.parametrize("change", ["pictures", "features"])
def test_generate(change, fields):
    built = model(qformer_config=QFORMER | fields).eval()
    made = moved(CHANGES[change](built, inputs()))
    built._has_unfinished_sequences = after(3)
    ids = built.to("meta").generate(**made, max_new_tokens=3, do_sample=False)
    assert ids.is_meta
    assert ids.shape == (len(made["input_ids"]), made["input_ids"].shape[1] + 3)


def test_visual_tokens_and_logits():
    built, made = model().to("meta").eval(), moved(inputs())
    assert built.get_image_features(made["pixel_values"]).pooler_output.is_meta
    with torch.no_grad():
        assert built(**made).logits.is_meta
        assert built.base_model(**made).last_hidden_state.is_meta


STAGE_1 = {
    "three losses": ({}, {}),
    "sigmoid": ({"itc_loss": "sigmoid"}, {}),
    "in chunks": ({"matching_batch": 2}, {}),
    "mean": ({"text_pooling": "mean"}, {}),
    "several texts": ({}, {"image_rows": torch.tensor([0, 0, 1, 2])}),
    "numbered": ({}, {"image_ids": torch.tensor([3, 4, 5, 6])}),
}


@pytest.mark.parametrize("case", STAGE_1)
def test_stage_1_trains(case):
    fields, more = STAGE_1[case]
    built = retriever()
    for name, value in fields.items():
        setattr(built.config, name, value)
    if case == "sigmoid":
        built.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    made = batch(["the cat", "a dog", "the picture of a cat", "a dog and a cat"]) | more
    if "image_rows" in more:
        made["pixel_values"] = made["pixel_values"][:3]
    output = built.train().to("meta")(**moved(made))
    output.loss.backward()
    assert output.loss.is_meta
    assert output.logits_per_image.is_meta


def test_retrieve_takes_pictures_and_words():
    """Without re-ranking: which pairs are the best is a value."""
    built = retriever().to("meta").eval()
    scores = built.retrieve([tiny.picture(n) for n in range(3)], ["a cat", "the dog"], rerank=False)
    assert scores.shape == (3, 2)
