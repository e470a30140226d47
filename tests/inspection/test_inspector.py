"""The inspector tells a healthy model from spoilt ones, and every check can fail."""

import copy
import dataclasses
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from tiny_inspection import LabelsOnPrompt, PicturesShuffled, rows, train, untrained
from tiny_training import write_backbones

from lorgnette import LorgnetteCollator, LorgnettePreTrainedModel
from lorgnette.inspection import check_gradients, check_text, check_vision, check_weights
from lorgnette.inspection.check_weights import Original
from lorgnette.inspection.components import flow, parts
from lorgnette.inspection.inspector import inspect_model
from lorgnette.inspection.report import write_html, write_json


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return write_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def trained(backbones):
    """A model that names colours, its processor, and what its frozen parts were before."""
    model, processor = untrained(backbones)
    original = Original.from_model(model, processor)
    return train(model, LorgnetteCollator(processor)), processor, original


@pytest.fixture
def spoilt(trained):
    """The same, as a copy."""
    model, processor, original = trained
    return copy.deepcopy(model), processor, original


def red(model, processor, original, collator=None):
    """Names of the checks that fail, and of those that were not run."""
    found = inspect_model(model, processor, rows(), collator=collator, original=original, pictures=[], quiet=True)
    return {check.name for check in found.failed}, {check.name for check in found.checks if check.passed is None}


def batches(processor, count=1):
    return [LorgnetteCollator(processor)(rows(8))] * count


# ---------------------------------------------------------------------------------- healthy, and five ways of not being


def test_a_healthy_model_is_green_all_over(trained):
    assert red(*trained) == (set(), set())


def test_of_several_texts_the_first_is_inspected(trained):
    model, processor, original = trained
    settings = {"original": original, "pictures": [], "quiet": True}
    one = inspect_model(model, processor, rows(8), **settings)
    lists = [row | {"text": [row["text"], "another text"]} for row in rows(8)]
    several = inspect_model(model, processor, lists, **settings)
    assert [check.finding for check in one.checks] == [check.finding for check in several.checks]


def test_a_vit_that_was_trained_is_found(spoilt, monkeypatch):
    model, processor, original = spoilt
    monkeypatch.setattr(
        LorgnettePreTrainedModel, "get_vision_features", LorgnettePreTrainedModel.get_vision_features.__wrapped__
    )
    model.vision_model.requires_grad_(True)
    train(model, LorgnetteCollator(processor), steps=1)
    assert {"frozen", "trainable", "gradients"} <= red(model, processor, original)[0]
    model.freeze()  # as a reload does
    assert "frozen" in red(model, processor, original)[0]


def test_labels_on_the_prompt_are_found_in_the_collator_and_in_what_they_made(backbones):
    model, processor = untrained(backbones)
    original = Original.from_model(model, processor)
    assert "labels" in red(model, processor, original, LabelsOnPrompt(processor))[0]
    train(model, LabelsOnPrompt(processor))
    assert red(model, processor, original)[0] == {"prompt"}


def test_collapsed_queries_are_found(spoilt):
    model, processor, original = spoilt
    with torch.no_grad():
        model.qformer.query_tokens.weight.copy_(model.qformer.query_tokens.weight[:1].expand(4, -1).clone())
    found = red(model, processor, original)[0]
    assert "queries" in found
    assert found <= {"queries", "sees", "gradients"}  # between equals no query or key of self-attention gets a gradient


def test_lora_on_the_wrong_tower_is_found(spoilt):
    model, processor, original = spoilt
    names = {
        name.rsplit(".", 1)[-1] for name, layer in model.vision_model.named_modules() if type(layer) is torch.nn.Linear
    }
    inject_adapter_in_model(LoraConfig(r=2, target_modules=sorted(names)), model.vision_model)
    assert red(model, processor, original)[0] == {"lora_place", "trainable", "gradients"}


def test_pictures_that_were_shuffled_in_training_are_found(backbones):
    model, processor = untrained(backbones)
    original = Original.from_model(model, processor)
    torch.manual_seed(0)
    train(model, PicturesShuffled(processor))
    found = red(model, processor, original)[0]
    assert "sees" in found
    assert found <= {"sees", "queries"}  # who has nothing to look for asks one question


# ---------------------------------------------------------------------------------- every check can fail


def test_parts_that_are_to_train_and_do_not_are_found(spoilt):
    model = spoilt[0]
    model.projector.requires_grad_(False)
    found = check_weights.check_trainable(model)
    assert not found.passed
    assert found.figures["lacking"] == ["projector.bias", "projector.weight"]


def test_a_frozen_weight_that_moved_by_one_bit_is_found(spoilt):
    model, processor, original = spoilt
    weight = model.language_model.get_input_embeddings().weight.data
    weight.view(torch.int32)[7, 3] ^= 1
    found = check_weights.check_frozen(model, original)
    assert found.figures["first"] == ["language_model.model.embed_tokens.weight"]
    assert not found.passed
    assert check_weights.check_text_only(model, processor, original).passed  # not a token of the question
    weight.mul_(1.01)
    assert not check_weights.check_text_only(model, processor, original).passed


def test_sources_are_loaded_again_and_others_are_told_apart(backbones, tmp_path):
    model, processor = untrained(backbones)
    model.get_output_embeddings().weight.data.div_(4)  # the fixture's doing
    assert check_weights.check_frozen(model, Original.from_sources(model, processor)).passed is None
    sources = Original.from_sources(model, processor, *backbones)
    assert check_weights.check_frozen(model, sources).passed
    assert check_weights.check_text_only(model, processor, sources).passed
    train(model, LorgnetteCollator(processor), steps=1)
    assert check_weights.check_text_only(model, processor, sources).passed
    others = write_backbones(tmp_path)
    saved = model.vision_model.base_model
    saved.layernorm.weight.data.add_(1)
    saved.save_pretrained(others[0])
    saved.layernorm.weight.data.sub_(1)
    found = check_weights.check_frozen(model, Original.from_sources(model, processor, *others))
    assert found.figures["first"] == ["vision_model.layernorm.weight"]


def test_sources_that_would_not_help_are_not_asked_for(backbones):
    model, processor = untrained(backbones)
    nothing = Original.from_sources(model, processor)
    assert check_weights.check_frozen(model, nothing).advice.startswith("Give --vision and --text: ")
    vision_alone = Original.from_sources(model, processor, backbones[0])
    assert check_weights.check_frozen(model, vision_alone).advice.startswith("Give --text: ")
    model.config.saved_form = "merged"
    merged = Original.from_sources(model, processor, *backbones)
    for check in (check_weights.check_frozen(model, merged), check_weights.check_text_only(model, processor, merged)):
        assert check.finding.endswith(": LoRA is merged into it")
        assert check.advice == ""
    assert check_weights.check_frozen(model, nothing).advice.startswith("Give --vision: ")


def test_lora_that_has_not_moved_or_has_run_away_is_found(spoilt, backbones):
    assert len(check_weights.check_lora_size(untrained(backbones)[0]).figures["idle"]) == 14
    model = spoilt[0]
    assert check_weights.check_lora_size(model).passed
    next(p for name, p in model.named_parameters() if "lora_B" in name).data.mul_(1000)
    assert len(check_weights.check_lora_size(model).figures["wild"]) == 1


def test_the_size_and_rank_of_lora_are_those_of_the_whole_update(trained):
    model, _, _ = trained
    figures = check_weights.check_lora_size(model).figures
    name = "model.layers.0.self_attn.q_proj"
    layer = model.language_model.get_submodule(name)
    update = layer.get_delta_weight("default").detach()
    assert figures["sizes"][name] == pytest.approx((update.norm() / layer.base_layer.weight.norm()).item(), rel=1e-4)
    shares = torch.linalg.svdvals(update)[:8] / torch.linalg.svdvals(update)[:8].sum()
    assert figures["effective_ranks"][name] == pytest.approx((-shares * shares.log()).sum().exp().item(), rel=1e-3)


def test_gradients_that_are_missing_or_not_finite_are_found(spoilt, backbones):
    model, processor, _ = spoilt
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert check_gradients.check_gradients(model, batches(processor, 2)).passed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert check_gradients.check_gradients(untrained(backbones)[0], batches(processor)).passed  # lora_B is at zero
    hook = model.projector.register_forward_hook(lambda module, args, output: output.detach())
    found = check_gradients.check_gradients(model, batches(processor))
    assert not found.passed
    assert "projector.weight" in found.figures["unreached"]
    hook.remove()
    model.projector.weight.data.fill_(float("inf"))
    assert check_gradients.check_gradients(model, batches(processor)).figures["not_finite"]


def test_a_batch_that_the_model_refuses_is_a_red_check_with_its_reason(trained):
    (batch,) = batches(trained[1])
    batch["labels"] = batch["input_ids"]  # placeholders and all
    found = check_gradients.check_gradients(trained[0], [batch])
    assert found.passed is False
    assert "labels on image placeholders" in found.finding


def test_outputs_without_their_end_are_found(trained):
    class Endless(LorgnetteCollator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            labels = batch["labels"].clone()
            labels[torch.arange(len(labels)), batch["attention_mask"].sum(1) - 1] = -100
            return batch | {"labels": labels}

    found = check_text.check_labels(Endless(trained[1]), rows(4))
    assert not found.passed
    assert found.figures["unended"] == 4
    good = check_text.check_labels(LorgnetteCollator(trained[1]), rows(4))
    assert [kind for _, kind in good.figures["example"]] == ["prompt", "picture", "prompt", "learned"]
    assert good.figures["example"][-1][0].startswith("a red car")


def test_another_models_processor_and_pictures_in_another_order_are_found(trained):
    model, processor, _ = trained
    other = copy.copy(processor)
    other.num_query_tokens = 5
    assert not check_text.check_aligned(model, LorgnetteCollator(other), rows(4)).passed
    assert check_text.check_aligned(model, LorgnetteCollator(processor), rows(4)).passed
    torch.manual_seed(0)
    assert not check_text.check_aligned(model, PicturesShuffled(processor), rows(8)).passed


@pytest.mark.parametrize("factor", [1e-5, 1e5])
def test_visual_tokens_of_another_norm_are_found(spoilt, factor):
    model, processor, _ = spoilt
    assert check_vision.check_visual_norm(model, check_vision.visual_tokens(model, batches(processor))).passed
    for parameter in model.projector.parameters():
        parameter.data.mul_(factor)
    assert not check_vision.check_visual_norm(model, check_vision.visual_tokens(model, batches(processor))).passed


def test_what_cannot_be_said_is_not_said(trained):
    model, processor, original = trained
    found = inspect_model(model, processor, original=original, pictures=rows(1), quiet=True)
    assert found.failed == []
    assert {check.name for check in found.checks if check.passed is None} == {
        "gradients", "labels", "prompt", "aligned", "sees"
    }  # fmt: skip
    same = [{**row, "text": "a cat"} for row in rows()]
    assert check_vision.check_sees(model, [LorgnetteCollator(processor)(same)]).passed is None


def test_outputs_that_are_certain_beside_any_picture_do_not_depend_on_it(backbones, monkeypatch):
    model, processor = untrained(backbones)
    monkeypatch.setattr(check_vision, "_row_losses", lambda *_: np.zeros(8))
    found = check_vision.check_sees(model, batches(processor))
    assert found.passed is False
    assert found.figures["gap"] == 0


def test_each_row_gets_another_ones_picture():
    outputs = list("aaaabbbccd")
    partners = check_vision.other_rows(outputs, seed=0)
    assert sorted(partners) == list(range(10))
    assert all(outputs[row] != outputs[partner] for row, partner in enumerate(partners))


def test_the_p_value_of_a_sign_flip_test():
    assert check_vision.sign_flip(np.ones(4)) == pytest.approx(1 / 16, abs=0.01)  # one of 16 ways is as large
    assert check_vision.sign_flip(np.array([1.0, -1.0, 1.0, -1.0])) > 0.5


# ---------------------------------------------------------------------------------- anatomy and reports


def test_anatomy_counts_every_parameter_once_and_shapes_are_the_models_own(trained):
    model, processor, _ = trained
    found = {part.name: part for part in parts(model)}
    assert sum(part.parameters for part in found.values()) == sum(p.numel() for p in model.parameters())
    assert {name for name, part in found.items() if part.trainable} == {"queries", "Q-Former", "projector", "LoRA"}
    assert found["ViT"].bytes == 4 * found["ViT"].parameters
    shapes = {tensor.what: tensor.shape for tensor in flow(model, processor)}
    assert shapes["pixel values"] == (3, 32, 32)
    assert shapes["features"] == (17, 24)
    assert shapes["query outputs"] == (4, 16)
    assert shapes["visual tokens"] == (4, 32)


class Outside(HTMLParser):
    """What a page would fetch."""

    def __init__(self):
        super().__init__()
        self.fetched, self.pictures, self.open = [], 0, []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data"):
                self.pictures += value.startswith("data:image/")
                self.fetched += [] if value.startswith("data:image/") else [value]
        if tag in ("script", "link", "iframe"):
            self.fetched.append(tag)


def test_the_report_is_one_file_and_says_what_was_found(spoilt, tmp_path):
    model, processor, original = spoilt
    model.qformer.requires_grad_(False)
    found = inspect_model(model, processor, rows(), original=original, name="<b>mine</b>", quiet=True)
    found = dataclasses.replace(found, attributions=found.attributions[:1])
    write_html(found, tmp_path / "deep" / "report.html")
    write_json(found, tmp_path / "report.json")
    text = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    page = Outside()
    page.feed(text)
    assert page.fetched == []
    assert page.pictures == 1 + len(found.attributions[0].words) + 4 + 1  # the picture, words, queries, cosines
    assert "url(" not in text
    assert "<b>mine</b>" not in text
    assert "model.freeze()" in text
    result = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert result["passed"] is False
    assert {check["name"]: check["passed"] for check in result["checks"]}["trainable"] is False
    assert len(result["looks"][0]["queries"][0]) == 4


def test_a_model_with_a_nan_in_it_is_reported_on(spoilt, tmp_path):
    model, processor, original = spoilt
    model.projector.weight.data[3, 5] = float("nan")
    next(p for name, p in model.named_parameters() if "lora_A" in name).data[0, 0] = float("inf")
    found = inspect_model(model, processor, rows(), original=original, quiet=True)
    assert {"gradients", "lora_size", "queries", "visual_norm", "sees"} <= {check.name for check in found.failed}
    write_html(found, tmp_path / "report.html")
    write_json(found, tmp_path / "report.json")
    json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=lambda name: 1 / 0)


def test_overlays_are_brightest_where_the_map_is():
    from lorgnette.inspection.drawing import overlay

    values = np.zeros((4, 4))
    values[1, 2] = 1
    drawn = np.asarray(overlay(Image.new("RGB", (32, 32), "grey"), values, 64)).sum(-1)
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    assert (row // 16, column // 16) == (1, 2)
