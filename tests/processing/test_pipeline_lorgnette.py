"""`pipeline("image-to-text")` and the stock `pipeline("image-text-to-text")`, in this process."""

from unittest import mock

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from datasets import Dataset, Image, IterableDataset
from tiny_models import NUM_QUERY_TOKENS, QFORMER, language_model, vision_model
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteImageToTextPipeline, LorgnetteProcessor


TOKENS = {"generate_kwargs": {"max_new_tokens": 4, "do_sample": False}}
PICTURES = [PIL.Image.new("RGB", (40, 30), colour) for colour in ("red", "white", "black")]


@pytest.fixture(scope="module")
def parts():
    processor = LorgnetteProcessor(
        tiny.image_processor(), tiny.chat_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS, system_prompt="Be brief."
    )
    model = LorgnetteForConditionalGeneration.from_backbones(
        vision_model(),
        language_model("llama", vocab_size=len(processor.tokenizer)),
        processor=processor,
        num_query_tokens=NUM_QUERY_TOKENS,
        qformer_config=dict(QFORMER),
    )
    model.generation_config.eos_token_id = None
    torch.manual_seed(0)
    with torch.no_grad():  # with weights as small as they come, pictures do not change an answer
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (1 if "language_model" in name else 0.1))
    return model.eval(), processor


@pytest.fixture(scope="module")
def pipe(parts):
    model, processor = parts
    return LorgnetteImageToTextPipeline(model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def expected(parts):
    """What the model says by hand, of each picture."""
    model, processor = parts

    def say(picture, query=None, **kwargs):
        inputs = processor(images=picture, text=processor.build_prompt(query), return_tensors="pt")
        kwargs = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": processor.stop_token_ids} | kwargs
        ids = model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]
        return [{"generated_text": text.strip()} for text in processor.batch_decode(ids, skip_special_tokens=True)]

    return say


def test_one_and_many(pipe, expected, tmp_path):
    PICTURES[0].save(tmp_path / "a.png")
    one = expected(PICTURES[0])
    assert pipe(PICTURES[0], **TOKENS) == one
    assert pipe(str(tmp_path / "a.png"), **TOKENS) == one
    assert pipe({"path": str(tmp_path / "a.png")}, **TOKENS) == one
    assert pipe(np.asarray(PICTURES[0]), **TOKENS) == one
    many = [expected(picture) for picture in PICTURES]
    assert len({str(answer) for answer in many}) > 1, "the answers do not depend on the picture"
    assert pipe(PICTURES, **TOKENS) == many
    assert pipe([str(tmp_path / "a.png"), PICTURES[1]], **TOKENS) == many[:2]
    assert pipe(np.stack([np.asarray(picture) for picture in PICTURES]), **TOKENS) == many
    assert list(pipe((picture for picture in PICTURES), **TOKENS)) == many


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_batched_equals_one_by_one(pipe, expected, batch_size):
    many = [expected(picture) for picture in PICTURES]
    assert pipe(PICTURES, batch_size=batch_size, **TOKENS) == many
    assert list(pipe(iter(PICTURES), batch_size=batch_size, **TOKENS)) == many


def test_prompts_of_different_lengths_in_a_batch(pipe):
    rows = [[PICTURES[0]], [PICTURES[1], PICTURES[2]]]  # two images make a longer prompt
    assert pipe(rows, batch_size=2, **TOKENS) == [pipe([row], **TOKENS)[0] for row in rows]


def test_datasets(pipe, expected):
    rows = Dataset.from_dict({"image": PICTURES}).cast_column("image", Image())
    many = [expected(picture) for picture in PICTURES]
    assert pipe(rows["image"], **TOKENS) == many
    assert pipe(rows, **TOKENS) == many
    assert list(pipe(KeyDataset(rows, "image"), batch_size=2, **TOKENS)) == many
    stream = IterableDataset.from_generator(lambda: ({"image": picture} for picture in PICTURES))
    assert list(pipe(stream, **TOKENS)) == many


def test_the_task_s_names_for_its_images(pipe, expected):
    for name in ("inputs", "images"):
        assert pipe(**{name: PICTURES[0]}, **TOKENS) == expected(PICTURES[0])
    with pytest.raises(ValueError, match="given twice"):
        pipe(PICTURES[0], images=PICTURES[0])


def test_prompts(pipe, expected):
    assert pipe(PICTURES[0], prompt="What <image> is it?", **TOKENS) == expected(PICTURES[0], "What <image> is it?")


def test_generation_settings(pipe, expected):
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    many = [expected(picture, **beams) for picture in PICTURES[:2]]
    assert [len(answers) for answers in many] == [2, 2]
    assert pipe(PICTURES[:2], generate_kwargs=beams, batch_size=2) == many
    assert pipe(PICTURES[0], max_new_tokens=4, generate_kwargs={"do_sample": False}) == expected(PICTURES[0])
    with pytest.raises(ValueError, match="twice"):
        pipe(PICTURES[0], max_new_tokens=4, **TOKENS)


def test_settings_of_the_whole_pipeline(parts, expected):
    model, processor = parts
    pipe = LorgnetteImageToTextPipeline(
        model=model, processor=processor, prompt="What?", max_new_tokens=2, batch_size=2, device="cpu"
    )
    assert pipe(PICTURES[:2]) == [expected(picture, "What?", max_new_tokens=2) for picture in PICTURES[:2]]


def test_an_answer_ends_with_its_turn(parts, monkeypatch):
    """A base LM's generation config knows its own EOS only, not the end of a turn in the chat template."""
    model, processor = parts
    inputs = processor(images=PICTURES[0], return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    monkeypatch.setattr(LorgnetteProcessor, "stop_token_ids", [int(generated[1])])
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    pipe = LorgnetteImageToTextPipeline(model=model, processor=processor, device="cpu")
    assert pipe(PICTURES[0], **TOKENS) == [{"generated_text": processor.decode(generated[:2]).strip()}]


def test_bad_images(pipe, tmp_path):
    (tmp_path / "cat.png").write_text("words")
    with pytest.raises(ValueError, match=r"the image: .*cat\.png is no picture"):
        pipe(str(tmp_path / "cat.png"))
    for images in ([PICTURES[0], tmp_path / "cat.png"], iter([PICTURES[0], tmp_path / "cat.png"])):
        with pytest.raises(ValueError, match=r"image 1: .*cat\.png is no picture"):
            list(pipe(images, **TOKENS))
    for nothing, message in (
        (None, "no images"),
        ([], "images is an empty list"),
        ([[]], "image 0: row 0 has an empty list of images"),
        ([PICTURES[:1], []], "image 1: row 0 has an empty list of images"),
        ([None], "image 0: the image is None"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(nothing)
    with pytest.raises(TypeError, match="int"):
        pipe(7)


def test_needs_a_processor(parts):
    model, processor = parts
    with pytest.raises(ValueError, match="processor="):
        LorgnetteImageToTextPipeline(model=model, tokenizer=processor.tokenizer, device="cpu")


def test_a_qformer_that_reads_the_prompt(parts):
    """Instruct-aware (InstructBLIP): the pipeline and a chat tell the Q-Former what is asked."""
    processor = LorgnetteProcessor(
        tiny.image_processor(), tiny.chat_tokenizer(), tiny.bert_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS
    )
    words = {"use_qformer_text_input": True, "vocab_size": len(processor.qformer_tokenizer)}
    model = LorgnetteForConditionalGeneration.from_backbones(
        vision_model(),
        language_model("llama", vocab_size=len(processor.tokenizer)),
        processor=processor,
        num_query_tokens=NUM_QUERY_TOKENS,
        qformer_config=QFORMER | words,
    ).eval()
    pipe = LorgnetteImageToTextPipeline(model=model, processor=processor, device="cpu")
    chat = pipeline("image-text-to-text", model=model, processor=processor)
    message = {"role": "user", "content": [{"type": "text", "text": "a cat?"}, {"type": "image", "image": PICTURES[0]}]}
    with mock.patch.object(model.qformer, "forward", wraps=model.qformer.forward) as forward:
        expected_answers = [
            pipe(PICTURES[0], prompt="a cat?", **TOKENS),
            chat([message], return_full_text=False, **TOKENS),
        ]
    assert expected_answers[0][0]["generated_text"].strip() == expected_answers[1][0]["generated_text"].strip()
    ids = processor.qformer_tokenizer("a cat?", return_tensors="pt")["input_ids"]
    assert [call.kwargs["input_ids"].tolist() for call in forward.call_args_list] == [ids.tolist()] * 2


def test_saves_what_it_loads(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = pipeline("image-to-text", model=str(tmp_path), trust_remote_code=True, device="cpu")
    assert type(again).__name__ == "LorgnetteImageToTextPipeline"
    assert again(PICTURES, batch_size=2, **TOKENS) == pipe(PICTURES, **TOKENS)
    again.save_pretrained(tmp_path / "again")
    third = pipeline("image-to-text", model=str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    assert third(PICTURES[0], **TOKENS) == pipe(PICTURES[0], **TOKENS)


@pytest.fixture(scope="module")
def stock(parts):
    model, processor = parts
    return pipeline("image-text-to-text", model=model, processor=processor, device="cpu")


class TestImageTextToText:
    def test_text(self, stock, parts, expected):
        prompt = parts[1].build_prompt("What?")
        for batch_size in (1, 2):
            answers = stock(
                PICTURES[:2], text=[prompt, prompt], return_full_text=False, batch_size=batch_size, **TOKENS
            )
            assert [answer["generated_text"].strip() for answer in answers] == [
                expected(picture, "What?")[0]["generated_text"] for picture in PICTURES[:2]
            ]

    def test_chat(self, stock, parts, expected):
        content = [{"type": "text", "text": "What?"}, {"type": "image", "image": PICTURES[0]}]
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
        answer = stock(text=chat, return_full_text=False, **TOKENS)
        assert answer[0]["generated_text"].strip() == expected(PICTURES[0], "What?")[0]["generated_text"]

    def test_text_without_a_place_for_the_image(self, stock):
        with pytest.raises(ValueError, match="each image needs its <image> in the text"):
            stock(PICTURES[0], text="What?")

    def test_no_images(self, stock, parts):
        with pytest.raises(ValueError, match="row 0: 1 <image> in the text, 0 images given"):
            stock([[]], text=parts[1].build_prompt())


def test_runs_in_the_models_dtype(parts):
    model, processor = parts
    pipe = LorgnetteImageToTextPipeline(model=model, processor=processor, device="cpu")
    model.to(torch.bfloat16)
    try:
        assert pipe.preprocess(PICTURES[0])["pixel_values"].dtype == torch.bfloat16
        assert isinstance(pipe(PICTURES[0], **TOKENS)[0]["generated_text"], str)
    finally:
        model.to(torch.float32)
