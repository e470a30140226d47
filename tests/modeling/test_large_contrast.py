"""Stage 1 with a contrast over more pictures than its other losses learn from, computed in parts; pooling of texts."""

import json

import pytest
import torch
from tiny import bert_tokenizer, picture
from tiny_models import QFORMER, bert, vision_model
from tiny_retrieval import WORDS, batch, processor, retriever
from tiny_training import write_pairs

from lorgnette import LorgnetteForImageTextRetrieval
from lorgnette.assembly.backbones import pooling_of
from lorgnette.modeling import modeling_retrieval
from lorgnette.modeling.modeling_contrastive import sigmoid_loss
from lorgnette.trainer.__main__ import main


SEVEN = ["the cat", "a dog", "the picture of a cat", "a bird", "a car", "the road", "a red dog"]
ROWS = [0, 0, 1, 2, 3, 3, 3, 4]  # of eight texts
EIGHT = [*SEVEN, "the tree"]
STEADY = {"qformer_config": QFORMER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}


def several() -> dict[str, torch.Tensor]:
    images = [picture(n) for n in range(5)]
    made = dict(processor()(images=images, text=EIGHT, padding=True, return_tensors="pt"))
    return made | {"image_rows": torch.tensor(ROWS)}


def step(model, inputs) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    out = model.train()(**inputs)
    out.loss.backward()
    names = ("loss", "loss_itc", "loss_itm", "loss_itg")
    losses = {name: out[name].detach() for name in names if getattr(out, name) is not None}
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inputs", [lambda: batch(SEVEN), several], ids=["pairs", "several texts"])
@pytest.mark.parametrize("pooled", [False, True])
def test_the_contrast_in_parts_is_that_of_all_at_once(inputs, pooled):
    fields = {"qformer_config": STEADY["qformer_config"] | {"use_pooled_features": pooled}}
    model = retriever(**fields, itm_weight=0.0, itg_weight=0.0)
    expected = step(model, inputs())
    model.config.matching_batch = 2
    sizes = []
    model.qformer.register_forward_hook(lambda module, args, kwargs, out: sizes.append(len(out[0])), with_kwargs=True)
    found = step(model, inputs())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert max(sizes) == 2
    assert len(sizes) > 4  # forward, and again in the backward pass


def test_dropout_is_the_same_in_the_backward_pass(monkeypatch):
    model = retriever(itm_weight=0.0, itg_weight=0.0)
    model.config.matching_batch = 3
    _, gradients = step(model, batch(SEVEN))
    monkeypatch.setattr(modeling_retrieval, "checkpoint", lambda embed, chunk, use_reentrant: embed(chunk))
    _, kept = step(model, batch(SEVEN))
    for name, tensor in kept.items():
        torch.testing.assert_close(gradients[name], tensor, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("inputs", [lambda: batch(SEVEN), several], ids=["pairs", "several texts"])
def test_the_other_losses_learn_from_the_first_pictures(inputs, monkeypatch):
    model, given = retriever(**STEADY), inputs()
    first = 3
    texts = torch.tensor([n for n in range(len(given["input_ids"])) if given.get("image_rows", range(9))[n] < first])
    alone = {name: given[name][texts] for name in ("input_ids", "attention_mask")}
    alone |= {"pixel_values": given["pixel_values"][:first]}
    if "image_rows" in given:
        alone["image_rows"] = given["image_rows"][texts]
    drawn = []
    draw = modeling_retrieval.draw_negatives

    def recorded(logits, candidates, generator):
        drawn.append((tuple(logits.shape), candidates.clone()))
        return draw(torch.zeros_like(logits), candidates, generator)

    monkeypatch.setattr(modeling_retrieval, "draw_negatives", recorded)
    expected, _ = step(model, alone)
    own = drawn[:]
    drawn.clear()
    whole, _ = step(model, given)
    drawn.clear()
    model.config.matching_batch = first
    found, gradients = step(model, given)
    torch.testing.assert_close(found["loss_itg"], expected["loss_itg"])
    torch.testing.assert_close(found["loss_itc"], whole["loss_itc"], atol=1e-5, rtol=1e-5)
    for (shape, candidates), (same_shape, same) in zip(drawn, own, strict=True):
        assert shape == same_shape
        assert torch.equal(candidates, same)
    assert gradients["itm_head.weight"].any()
    alike = dict(given) | {"input_ids": given["input_ids"].clone(), "attention_mask": given["attention_mask"].clone()}
    for name in ("input_ids", "attention_mask"):
        alike[name][texts] = given[name][0]
    with pytest.raises(ValueError, match="have the same caption or picture"):
        model(**alike)
    assert found.keys() == expected.keys()


def test_evaluation_and_small_batches_are_as_without():
    model, inputs = retriever(**STEADY), batch(SEVEN)
    expected = model.eval()(**inputs), step(model, inputs)
    model.config.matching_batch = 7
    assert step(model, inputs)[0] == expected[1][0]
    model.config.matching_batch = 2
    assert model.eval()(**inputs).loss == expected[0].loss


class TestPoolingOfTexts:
    def test_mean_against_a_plain_computation(self):
        model, inputs = retriever(text_pooling="mean"), batch(SEVEN)
        states = model.qformer(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        means = torch.stack(
            [row[: mask.sum()].mean(0) for row, mask in zip(states, inputs["attention_mask"], strict=True)]
        )
        expected = torch.nn.functional.normalize(model.text_projection(means), dim=-1)
        torch.testing.assert_close(model.embed_texts(inputs["input_ids"], inputs["attention_mask"]), expected)
        assert retriever().config.text_pooling == "cls"
        with pytest.raises(ValueError, match=r"text_pooling is 'max'; it takes \"cls\" or \"mean\""):
            retriever(text_pooling="max")

    def test_it_is_read_beside_the_bert(self, tmp_path):
        bert(vocab_size=WORDS).save_pretrained(tmp_path)
        bert_tokenizer().save_pretrained(tmp_path)
        assert pooling_of(tmp_path, None) == "cls"
        (tmp_path / "1_Pooling").mkdir()
        modes = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
        (tmp_path / "1_Pooling/config.json").write_text(json.dumps(modes))
        kwargs = {"qformer": tmp_path, "processor": processor(), "image_text_hidden_size": 8}
        model = LorgnetteForImageTextRetrieval.from_backbones(vision_model(), **kwargs)
        assert model.config.text_pooling == "mean"
        modes |= {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}
        (tmp_path / "1_Pooling/config.json").write_text(json.dumps(modes))
        with pytest.raises(ValueError, match="pools its tokens by max, and stage 1 has cls and mean"):
            LorgnetteForImageTextRetrieval.from_backbones(vision_model(), **kwargs)
        for given, found in (("mean", "mean"), (["cls"], "cls")):  # as sentence-transformers writes it now
            (tmp_path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": given, "include_prompt": True}))
            assert pooling_of(tmp_path, None) == found
        (tmp_path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": ["cls", "mean"]}))
        with pytest.raises(ValueError, match="pools its tokens by cls, mean"):
            pooling_of(tmp_path, None)
        model = LorgnetteForImageTextRetrieval.from_backbones(vision_model(), **kwargs, text_pooling="cls")
        assert model.config.text_pooling == "cls"


def test_a_recipe_with_a_large_contrast(tmp_path, capsys, caplog):
    for part in (vision_model(), processor().image_processor):
        part.save_pretrained(tmp_path / "vit")
    for part in (bert(vocab_size=WORDS), bert_tokenizer()):
        part.save_pretrained(tmp_path / "bert")
    data = write_pairs(tmp_path / "data")
    options = ["stage1", "--vision", str(tmp_path / "vit"), "--qformer", str(tmp_path / "bert"), "--dataset", str(data)]
    options += ["--use_cpu", "--report_to", "none", "--num_query_tokens", "4", "--dataloader_drop_last", "true"]
    options += ["--per_device_train_batch_size", "3", "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    main([*options, "--itc_batch", "6", "--text_pooling", "mean", "--logging_steps", "1"])
    assert "the contrast compares all of them; matching and generation learn from the first 3" in caplog.text
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert state["train_batch_size"] == 6
    config = LorgnetteForImageTextRetrieval.from_pretrained(tmp_path / "out").config
    assert (config.matching_batch, config.text_pooling) == (3, "mean")
    with pytest.raises(SystemExit):
        main([*options, "--itc_batch", "2"])
    assert "itc_batch is 2, and per_device_train_batch_size 3" in capsys.readouterr().err
    for wrong, message in (
        ("--itc_weight 0", "itc_weight is 0"),
        ("--per_device_train_batch_size 1", "matching finds no negatives in one picture"),
        ("--text_pooling max", "text_pooling is 'max'"),
    ):
        with pytest.raises(SystemExit):
            main([*options, "--itc_batch", "6", *wrong.split()])
        assert message in capsys.readouterr().err


class TestSigmoidContrast:
    def test_against_siglips_own(self):
        """transformers' `SiglipModel.forward`, whose pairs are each other's negatives."""
        torch.manual_seed(0)
        similarity, scale, bias = torch.randn(4, 4), torch.tensor(7.0), torch.tensor(-3.0)
        logits_per_text = similarity * scale + bias
        eye = torch.eye(4)
        expected = -torch.nn.functional.logsigmoid((2 * eye - 1) * logits_per_text).sum(dim=-1).mean()
        own, others = eye.bool(), ~eye.bool()
        torch.testing.assert_close(sigmoid_loss(similarity, own, others, scale, bias), expected)
        one_left_out = others.clone()
        one_left_out[0, 2] = False
        part = torch.nn.functional.logsigmoid(-logits_per_text[0, 2]) / 4
        torch.testing.assert_close(sigmoid_loss(similarity, own, one_left_out, scale, bias), expected + part)

    def test_it_trains_from_siglips_start_and_reloads(self, tmp_path):
        model = retriever(itc_loss="sigmoid")
        torch.testing.assert_close(model.logit_scale.exp(), torch.tensor(10.0))
        assert model.logit_bias == -10
        _, gradients = step(model, batch(SEVEN))
        assert gradients["logit_bias"] != 0
        model.save_pretrained(tmp_path)
        again = LorgnetteForImageTextRetrieval.from_pretrained(tmp_path)
        assert again.config.itc_loss == "sigmoid"
        assert again.eval()(**batch(SEVEN)).loss == model.eval()(**batch(SEVEN)).loss
        assert not hasattr(retriever(), "logit_bias")

    def test_smoothing_and_the_least_temperature_are_fields(self):
        inputs = batch(SEVEN)
        plain, smooth = (retriever(itc_label_smoothing=share).eval()(**inputs) for share in (0.1, 0.0))
        assert plain.loss_itc == retriever().eval()(**inputs).loss_itc != smooth.loss_itc
        warm = retriever(max_logit_scale=2.0).eval()(**inputs)
        assert warm.loss_itc != plain.loss_itc
        for wrong in ({"itc_label_smoothing": 1.0}, {"max_logit_scale": 0.5}):
            with pytest.raises(ValueError, match=r"itc_label_smoothing is .* max_logit_scale"):
                retriever(**wrong)
        with pytest.raises(ValueError, match="itc_loss is 'hinge'"):
            retriever(itc_loss="hinge")


def test_rows_of_pictures_may_be_int32():
    model, inputs = retriever(**STEADY), several()
    expected, _ = step(model, inputs)
    found, _ = step(model, inputs | {"image_rows": inputs["image_rows"].int()})
    torch.testing.assert_close(found, expected)


def test_the_first_of_the_texts_that_are_matched_is_named():
    model, inputs = retriever(itc_weight=0.0).train(), several()
    model.config.matching_batch = 1
    inputs |= {"image_rows": torch.tensor([4, 1, 0, 2, 3, 1, 2, 3]), "row_index": torch.arange(100, 108)}
    with pytest.raises(ValueError, match="Row 102 of the data set is alone in its batch"):
        model(**inputs)


def test_no_texts_are_refused():
    model = retriever().train()
    model.config.matching_batch = 1
    inputs = {name: tensor if name == "pixel_values" else tensor[:0] for name, tensor in several().items()}
    with pytest.raises(ValueError, match="5 of the 5 pictures of the batch have no text"):
        model(**inputs)
