"""Elastic queries: learned with the first m of them, m drawn; used with any number up to the learned ones."""

import json

import pytest
import torch
from datasets import Dataset
from saved import build
from tiny import picture
from tiny_models import NUM_QUERY_TOKENS, QFORMER, inputs, language_model, vision_model
from tiny_training import write_backbones, write_pairs
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from lorgnette import LorgnetteCollator, LorgnetteConfig, LorgnetteForConditionalGeneration, cli
from lorgnette.processing.pipeline_lorgnette import LorgnetteImageToTextPipeline
from lorgnette.serving.loading import load as serving_load
from lorgnette.trainer.__main__ import main
from lorgnette.trainer.row_seeds import NUM_QUERIES, RowSeeds


FEWER = NUM_QUERY_TOKENS - 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    model, made = build()
    model.config.elastic_queries = True
    model.save_pretrained(place)
    made.save_pretrained(place)
    return place


def load(folder, **kwargs):
    kwargs |= {"trust_remote_code": True}
    return (kind.from_pretrained(folder, **kwargs) for kind in (AutoModelForImageTextToText, AutoProcessor))


def test_a_load_with_fewer_queries_equals_a_model_of_these_alone(folder):
    model, made = load(folder, num_query_tokens=FEWER)
    whole, _ = load(folder)
    expected = LorgnetteForConditionalGeneration.from_backbones(
        vision_model(), language_model("llama", vocab_size=model.config.text_config.vocab_size),
        num_query_tokens=FEWER, qformer_config=QFORMER, lora={"r": 2},
    ).eval()  # fmt: skip
    weights = whole.state_dict()
    weights["qformer.query_tokens.weight"] = weights["qformer.query_tokens.weight"][:FEWER]
    expected.load_state_dict(weights)
    batch = made(images=picture(), text=made.build_prompt(), return_tensors="pt")
    assert (batch["input_ids"] == made.image_token_id).sum() == FEWER
    with torch.no_grad():
        logits = expected(**batch).logits
        assert torch.equal(model(**batch).logits, logits)
        assert torch.equal(whole(**batch, num_query_tokens=FEWER).logits, logits)
        found, alone = (each.generate(**batch, max_new_tokens=3) for each in (model, expected))
        assert torch.equal(found, alone)
        assert torch.equal(whole.generate(**batch, num_query_tokens=FEWER, max_new_tokens=3), alone)
        features = whole.get_image_features(batch["pixel_values"], num_query_tokens=FEWER).pooler_output
    assert features.shape[1] == FEWER


def test_fewer_queries_survive_a_save_and_can_be_more_again(folder, tmp_path):
    model, made = load(folder, num_query_tokens=FEWER)
    model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    again, its = load(tmp_path)
    assert (again.config.num_query_tokens, its.num_query_tokens) == (FEWER, FEWER)
    more, its = load(tmp_path, num_query_tokens=NUM_QUERY_TOKENS)
    whole, made = load(folder)
    batch = its(images=picture(), text=its.build_prompt(), return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(more(**batch).logits, whole(**batch).logits)


def test_pipelines_take_fewer_queries(folder):
    settings = {"trust_remote_code": True, "max_new_tokens": 4}
    model, made = load(folder, num_query_tokens=FEWER)
    made.num_query_tokens = NUM_QUERY_TOKENS
    own = LorgnetteImageToTextPipeline(model=model, processor=made)
    assert (own.processor.num_query_tokens, made.num_query_tokens) == (FEWER, NUM_QUERY_TOKENS)  # it is the caller's
    pipe = pipeline("image-to-text", str(folder), model_kwargs={"num_query_tokens": FEWER}, **settings)
    assert pipe.processor.num_query_tokens == FEWER
    model, made = load(folder, num_query_tokens=FEWER)
    ids = model.generate(**made(images=picture(), text=made.build_prompt(), return_tensors="pt"), max_new_tokens=4)
    assert made.batch_decode(ids, skip_special_tokens=True)[0].endswith(pipe(picture())[0]["generated_text"])


def test_more_than_were_learned_is_an_error(folder):
    with pytest.raises(
        ValueError, match=f"num_query_tokens is {NUM_QUERY_TOKENS + 1}: the Q-Former has learned {NUM_QUERY_TOKENS}"
    ):
        LorgnetteConfig(num_query_tokens=NUM_QUERY_TOKENS + 1, qformer_config={"num_query_tokens": NUM_QUERY_TOKENS})
    model, made = build()
    for wrong in (9, 0, -1):
        for kind in (LorgnetteForConditionalGeneration, AutoModelForImageTextToText):
            with pytest.raises(ValueError, match=f"num_query_tokens is {wrong}: .* {NUM_QUERY_TOKENS}, and takes from"):
                kind.from_pretrained(folder, num_query_tokens=wrong, trust_remote_code=True)
        with pytest.raises(ValueError, match=f"num_query_tokens is {wrong}: .* no other number"):
            model.get_image_features(inputs()["pixel_values"], num_query_tokens=wrong)
    model.config.elastic_queries = True
    with pytest.raises(ValueError, match=rf"has {NUM_QUERY_TOKENS} image placeholders .* each image takes {FEWER}"):
        model(**inputs(image_token_id=model.config.image_token_id), num_query_tokens=FEWER)
    made.num_query_tokens = 9
    with pytest.raises(ValueError, match=f"num_query_tokens is {NUM_QUERY_TOKENS}, the processor's 9"):
        model.check_processor(made)


def test_a_model_that_has_not_learned_it_is_refused(tmp_path):
    build()[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"num_query_tokens is {NUM_QUERY_TOKENS} in its config, .* {FEWER} was"):
        LorgnetteForConditionalGeneration.from_pretrained(tmp_path, num_query_tokens=FEWER)
    config = LorgnetteConfig.from_pretrained(tmp_path)
    config.num_query_tokens = (
        FEWER  # as transformers sets what a load overrides; without the package nothing else checks
    )
    with pytest.raises(ValueError, match=r"no other number \(elastic_queries is False\)"):
        LorgnetteForConditionalGeneration(config)


def test_a_batch_has_as_many_placeholders_as_its_first_row_says():
    model, made = build()
    rows = [{"image": picture(n), "text": text, "index": n} for n, text in enumerate(["a cat", "the dog"])]
    collator = LorgnetteCollator(made)
    model.config.elastic_queries = True
    batch = collator([row | {NUM_QUERIES: count} for row, count in zip(rows, (FEWER, 1), strict=True)])
    assert batch["num_query_tokens"] == FEWER
    assert made.num_query_tokens == NUM_QUERY_TOKENS
    placeholders = (batch["input_ids"] == made.image_token_id).sum(dim=1)
    assert placeholders.tolist() == [FEWER, FEWER]
    model.train()(**batch).loss.backward()
    gradient = model.qformer.query_tokens.weight.grad
    assert gradient[:FEWER].any(dim=1).all()
    assert not gradient[FEWER:].any()
    own = collator([row | {"num_query_tokens": 1} for row in rows])  # a column of the data set's own is none of ours
    assert "num_query_tokens" not in own
    assert (own["input_ids"] == made.image_token_id).sum() == 2 * NUM_QUERY_TOKENS


def test_numbers_are_drawn_anew_in_each_epoch_and_the_same_where_a_run_resumes():
    rows = Dataset.from_dict({"index": list(range(200)), "text": ["a cat"] * 200})[:]

    def drawn(epoch: int, queries: int | None = NUM_QUERY_TOKENS) -> list[int] | None:
        seeds = RowSeeds(3, augment=False, texts=None, columns=["text"], queries=queries)
        seeds.epoch.fill_(epoch)
        return seeds.mark(rows, dict).get(NUM_QUERIES)

    assert set(drawn(0)) == set(range(1, NUM_QUERY_TOKENS + 1))
    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0, queries=None) is None


def test_a_recipe_with_elastic_queries(tmp_path, capsys, monkeypatch):
    vision, text = write_backbones(tmp_path / "backbones")
    write_pairs(tmp_path / "data")
    options = ["stage2", "--vision", vision, "--text", text, "--dataset", str(tmp_path / "data"), "--use_cpu"]
    options += [
        "--output_dir",
        str(tmp_path / "out"),
        "--max_steps",
        "4",
        "--num_query_tokens",
        "4",
        "--lora",
        '{"r": 2}',
    ]
    options += ["--qformer_config", json.dumps(QFORMER)]
    options += ["--elastic_queries", "true", "--per_device_train_batch_size", "2", "--report_to", "none"]
    used, forward = [], LorgnetteForConditionalGeneration.forward

    def recorded(self, *args, **kwargs):
        used.append(kwargs["num_query_tokens"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LorgnetteForConditionalGeneration, "forward", recorded)
    main(options)
    assert len(used) == 4
    assert set(used) <= {1, 2, 3, 4}
    assert len(set(used)) > 1
    model = LorgnetteForConditionalGeneration.from_pretrained(tmp_path / "out", num_query_tokens=2)
    assert model.config.num_query_tokens == 2
    assert model.qformer.query_tokens.num_embeddings == 4
    refused = {
        "elastic_queries and torch_compile exclude each other": [*options, "--torch_compile", "true"],
        "elastic_queries is for stage 2": ["stage1", "--vision", vision, "--qformer", "b", *options[5:]],
    }
    for message, arguments in refused.items():
        with pytest.raises(SystemExit):
            main([a for a in arguments if a not in ("--lora", '{"r": 2}')] if arguments[0] == "stage1" else arguments)
        assert message in capsys.readouterr().err


def test_commands_take_fewer_queries(folder, tmp_path, monkeypatch, capsys):
    picture().save(tmp_path / "a.png")
    shown = []
    generate = LorgnetteForConditionalGeneration.generate

    def recorded(self, *args, **kwargs):
        shown.append(self.config.num_query_tokens)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(LorgnetteForConditionalGeneration, "generate", recorded)
    few = ["--num-query-tokens", str(FEWER)]
    monkeypatch.setattr("sys.argv", ["lorgnette", "caption", str(folder), str(tmp_path / "a.png"), *few])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    data = write_pairs(tmp_path / "data")
    options = ["evaluate", "--model", str(folder), "--dataset", str(data), "--split", "train[:2]", "--metrics", "bleu"]
    main([*options, "--num_query_tokens", str(FEWER), "--output_dir", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/metrics.json").read_text())["num_query_tokens"] == FEWER
    assert set(shown) == {FEWER}
    assert len(shown) >= 2
    model, processors = serving_load(folder, {}, num_query_tokens=FEWER)
    assert (model.config.num_query_tokens, processors["default"].num_query_tokens) == (FEWER, FEWER)
