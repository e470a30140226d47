"""What `generate` is given: batches of training, ways of decoding that read token ids alone, pictures alone."""

import pytest
import tiny
import tiny_models
import torch
from tiny_models import inputs, model
from tiny_training import joined, pairs, write_backbones
from transformers import AutoModel, GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments

from lorgnette import LorgnetteCollator, LorgnetteForConditionalGeneration, LorgnetteProcessor


GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    built, processor = joined(write_backbones(tmp_path_factory.mktemp("backbones")), dropout=0.0)
    built.generation_config.eos_token_id = None
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return built.eval(), processor


# ------------------------------------------------------------------------------------------------ batches of training


def test_seq2seq_trainer_scores_what_is_generated_and_not_the_answers(parts, tmp_path):
    built, processor = parts
    collator, rows = LorgnetteCollator(processor), pairs(4)
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        predict_with_generate=True,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        per_device_eval_batch_size=2,
    )
    trainer = Seq2SeqTrainer(built, arguments, data_collator=collator, eval_dataset=rows, processing_class=processor)
    predicted = trainer.predict(rows, **GREEDY).predictions
    for start in (0, 2):
        expected = built.generate(**collator.prompts(rows[start : start + 2]), **GREEDY)
        found = torch.tensor(predicted[start : start + 2])[:, : expected.shape[1]]
        assert torch.equal(found, expected)
    built.train()


@pytest.mark.parametrize("kind", [{}, {"pad_to_multiple_of": 8}], ids=["as it is", "padded to a multiple"])
@pytest.mark.parametrize("shown", [True, False], ids=["images", "words alone"])
def test_a_batch_with_labels_is_cut_to_its_prompts(parts, kind, shown):
    built, processor = parts
    rows = [row | {"text": row["text"] * (row["index"] + 1)} for row in pairs(3)]
    batch = LorgnetteCollator(processor, **kind)(rows)
    prompts = LorgnetteCollator(processor).prompts(rows)
    if not shown:
        for given in (batch, prompts):
            del given["pixel_values"]
            given["input_ids"][given["input_ids"] == processor.image_token_id] = 5
    assert torch.equal(built.generate(**batch, **GREEDY), built.generate(**prompts, **GREEDY))


def test_prompts_of_unequal_length_are_padded_on_the_left(parts):
    built, processor = parts
    rows = [row | {"question": "What?" * (row["index"] + 1)} for row in pairs(3)]
    collator = LorgnetteCollator(processor, query_column="question")
    expected = built.generate(**collator.prompts(rows), **GREEDY)
    assert torch.equal(built.generate(**collator(rows), **GREEDY), expected)
    for row, whole in zip(rows, expected, strict=True):
        alone = built.generate(**collator.prompts([row]), **GREEDY)
        assert torch.equal(whole[-5:], alone[0, -5:])


def test_labels_that_do_not_say_where_a_prompt_ends_are_refused(parts):
    built, processor = parts
    batch = LorgnetteCollator(processor)(pairs(2))
    everywhere = batch | {"labels": batch["input_ids"].clone()}  # as trainers of chats label
    with pytest.raises(ValueError, match=r"Row 0 of the data set has .* not one answer behind a prompt"):
        built.generate(**everywhere, **GREEDY)
    twice = batch | {"labels": batch["labels"].clone()}
    twice["labels"][1, 2] = 7
    with pytest.raises(ValueError, match=r"Row 1 of the data set has .* not one answer"):
        built.generate(**twice, **GREEDY)
    with pytest.raises(ValueError, match="of the same shape"):
        built.generate(labels=batch["labels"], pixel_values=batch["pixel_values"], **GREEDY)
    without = {name: value for name, value in batch.items() if name != "labels"}
    with pytest.raises(ValueError, match="shared_input_ids, supervised_positions without labels"):
        built.generate(**without, **GREEDY)
    packed = LorgnetteCollator(processor, pack_to=120)(pairs(2))
    with pytest.raises(ValueError, match=r"sequence_ids: .* packed"):
        built.generate(**packed, **GREEDY)


@pytest.mark.parametrize("shown", [True, False], ids=["images", "words alone"])
def test_prompts_that_are_padded_on_the_right_are_refused(parts, shown):
    built, processor = parts
    texts = [processor.build_prompt("What?" * (n + 1), num_images=int(shown)) for n in range(2)]
    images = [tiny.picture(n) for n in range(2)] if shown else None
    given = processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
    with pytest.raises(ValueError, match="Row 0 of the batch is padded on the right"):
        built.generate(**given, **GREEDY)
    built.generate(**processor(images=images, text=texts, padding=True, return_tensors="pt"), **GREEDY)


# ------------------------------------------------------------------------------------------------ ways of decoding


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_lookup_num_tokens", 3),
        ("prefill_chunk_size", 4),
        ("token_healing", True),
        ("assistant_early_exit", 1),
        ("use_mtp", True),
        ("cache_implementation", "paged"),
    ],
)
@pytest.mark.parametrize("way", ["keyword", "config", "the model's"])
def test_ways_of_decoding_that_read_ids_alone_are_refused_wherever_they_are_asked_for(name, value, way):
    built = model()
    kwargs = {"keyword": {name: value}, "config": {"generation_config": GenerationConfig(**{name: value})}}.get(way, {})
    if way == "the model's":
        setattr(built.generation_config, name, value)
    for given in (inputs(), {"inputs_embeds": torch.zeros(1, 3, 32)}):
        with pytest.raises(ValueError, match=f"{name}.*: this way of decoding sees token ids alone"):
            built.generate(**given, **kwargs, **GREEDY)
    with pytest.raises(ValueError, match=f"{name}.*: this way of decoding sees token ids alone"):
        built.base_model.generate(**inputs(), **kwargs, **GREEDY)


def test_a_keyword_wins_over_a_config():
    built, batch = model(), inputs()
    expected = built.generate(**batch, **GREEDY)
    built.generation_config.prompt_lookup_num_tokens = 3
    settings = GenerationConfig(prompt_lookup_num_tokens=2, **GREEDY)
    given = built.generate(**batch, generation_config=settings, prompt_lookup_num_tokens=None)
    assert torch.equal(given, expected)
    with pytest.raises(ValueError, match="assistant_model: this way"):
        built.generate(**batch, assistant_model=built.language_model, prompt_lookup_num_tokens=None, **GREEDY)


def test_words_alone_may_be_decoded_by_looking_them_up():
    built, ids = model(), inputs()["input_ids"][:1, :6]
    expected = built.generate(ids, **GREEDY)
    assert torch.equal(built.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), expected)
    settings = GenerationConfig(prefill_chunk_size=2, **GREEDY)
    assert torch.equal(built.generate(ids, generation_config=settings), expected)
    with pytest.raises(ValueError, match=r"assistant_early_exit .* model\.language_model\.generate"):
        built.generate(ids, assistant_early_exit=1, **GREEDY)
    assert torch.equal(built.language_model.generate(ids, assistant_early_exit=1, **GREEDY), expected)


# ------------------------------------------------------------------------------------------------ pictures alone


def test_pictures_alone_are_asked_the_processors_own_query(parts, tmp_path):
    built, processor = parts
    pictures = [tiny.picture(n) for n in range(3)]
    asked = processor(images=pictures, padding=True, return_tensors="pt")
    expected = built.generate(**asked, **GREEDY)
    alone = {"pixel_values": asked["pixel_values"]}
    assert torch.equal(built.generate(**alone, **GREEDY), expected)
    cached = {"vision_features": built.get_vision_features(asked["pixel_values"]).last_hidden_state}
    assert torch.equal(built.generate(**cached, **GREEDY), expected)
    twice = built.generate(**alone, image_rows=torch.tensor([2, 0, 2]), **GREEDY)
    assert torch.equal(twice, expected[[2, 0, 2]])

    built.save_pretrained(tmp_path, save_format="full")
    settings = GREEDY | {"eos_token_id": None}
    for cls in (LorgnetteForConditionalGeneration, AutoModel):
        loaded = cls.from_pretrained(tmp_path)
        assert torch.equal(loaded.generate(**alone, **settings), built.generate(**alone, **settings))


def test_pictures_alone_and_a_qformer_that_takes_instructions():
    processor = LorgnetteProcessor(
        tiny.image_processor(),
        tiny.chat_tokenizer(),
        tiny.bert_tokenizer(),
        num_query_tokens=tiny_models.NUM_QUERY_TOKENS,
    )
    qformer = tiny_models.QFORMER | {"use_qformer_text_input": True, "vocab_size": len(processor.qformer_tokenizer)}
    built = LorgnetteForConditionalGeneration.from_backbones(
        tiny_models.vision_model(),
        tiny_models.language_model(vocab_size=len(processor.tokenizer)),
        processor=processor,
        num_query_tokens=tiny_models.NUM_QUERY_TOKENS,
        qformer_config=qformer,
    ).eval()
    asked = processor(images=[tiny.picture(0), tiny.picture(1)], return_tensors="pt")
    expected = built.generate(**asked, **GREEDY)
    assert torch.equal(built.generate(pixel_values=asked["pixel_values"], **GREEDY), expected)


def test_pictures_alone_and_no_processor(tmp_path):
    built, pictures = model(), inputs()["pixel_values"]
    with pytest.raises(ValueError, match="No processor is known to this model: give input_ids"):
        built.generate(pixel_values=pictures, **GREEDY)
    with pytest.raises(ValueError, match="No processor is known to this model: give input_ids"):
        built.base_model.generate(pixel_values=pictures, **GREEDY)
    built.save_pretrained(tmp_path, save_format="full")
    loaded = LorgnetteForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"No processor lies beside .*; give input_ids"):
        loaded.generate(pixel_values=pictures, **GREEDY)


def test_forward_says_that_there_is_no_prompt():
    built, pictures = model(), inputs()["pixel_values"]
    for called in (built, built.base_model):
        for given in ({"pixel_values": pictures}, {}):
            with pytest.raises(ValueError, match="Give input_ids, or inputs_embeds"):
                called(**given)


# ------------------------------------------------------------------------------------------------ strings that stop


def test_stop_strings_take_the_tokenizer_of_the_models_processor(parts):
    built, processor = parts
    asked = processor(images=[tiny.picture(0)], return_tensors="pt")
    expected = built.generate(**asked, stop_strings=["a"], tokenizer=processor.tokenizer, **GREEDY)
    assert torch.equal(built.generate(**asked, stop_strings=["a"], **GREEDY), expected)
    settings = GenerationConfig(stop_strings=["a"], **GREEDY)
    assert torch.equal(built.generate(**asked, generation_config=settings), expected)
    with pytest.raises(ValueError, match=r"No processor is known .* stop_strings"):
        model().generate(**inputs(), stop_strings=["a"], **GREEDY)


def test_what_is_given_in_another_place_is_named():
    built, batch = model(), inputs()
    pictures = batch["pixel_values"]
    with pytest.raises(ValueError, match=r"float32 \(2, 3, 32, 32\) in the place of input_ids.*pixel_values="):
        built.generate(pictures, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"attention_mask \(2, 15\) was given without the input_ids"):
        built.generate(pixel_values=pictures, attention_mask=batch["attention_mask"], max_new_tokens=2)
    one = {name: value[:1] for name, value in batch.items()} | {"pixel_values": pictures[0]}
    for run in (built, built.generate):
        with pytest.raises(ValueError, match=r"pixel_values is \(3, 32, 32\), and \(N, 3, H, W\) is needed"):
            run(**one)
