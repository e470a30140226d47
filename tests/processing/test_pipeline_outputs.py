"""The pipeline, whatever its generation config says of outputs, and with strings that stop an answer."""

import pytest
import tiny
import torch
from tiny_models import NUM_QUERY_TOKENS, QFORMER, language_model, vision_model
from transformers import GenerationConfig

from lorgnette import (
    LorgnetteCollator,
    LorgnetteForConditionalGeneration,
    LorgnetteImageToTextPipeline,
    LorgnetteProcessor,
)
from lorgnette.trainer.generation import generate_texts


PICTURES = [tiny.picture(n) for n in range(3)]


def parts_of_a_pipeline() -> tuple[LorgnetteForConditionalGeneration, LorgnetteProcessor]:
    processor = LorgnetteProcessor(tiny.image_processor(), tiny.chat_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS)
    model = LorgnetteForConditionalGeneration.from_backbones(
        vision_model(),
        language_model("llama", vocab_size=len(processor.tokenizer)),
        processor=processor,
        num_query_tokens=NUM_QUERY_TOKENS,
        qformer_config=dict(QFORMER),
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), processor


@pytest.mark.parametrize("way", ["keyword", "config", "the model's", "the pipeline's"])
@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True},
        {"return_dict_in_generate": True, "output_scores": True, "num_beams": 2, "num_return_sequences": 2},
        {"stop_strings": None},
    ],
    ids=["dict", "dict of beams", "stop strings"],
)
def test_outputs_and_stop_strings(settings, way):
    asked = {"max_new_tokens": 6, "do_sample": False}
    model, processor = parts_of_a_pipeline()
    inputs = processor(images=PICTURES[:1], return_tensors="pt")
    if "stop_strings" in settings:  # what it says third
        new_ids = model.generate(**inputs, **asked)[0, inputs["input_ids"].shape[1] :]
        settings = {"stop_strings": [processor.decode(new_ids[2])]}
    plain = {name: settings[name] for name in ("num_beams", "num_return_sequences", "stop_strings") if name in settings}
    ids = model.generate(**inputs, tokenizer=processor.tokenizer, **asked | plain, pad_token_id=0)
    ids = ids[:, inputs["input_ids"].shape[1] :]
    expected = [{"generated_text": text.strip()} for text in processor.batch_decode(ids, skip_special_tokens=True)]
    if "stop_strings" in settings:
        assert 0 < ids.shape[1] < 6

    given = {"generate_kwargs": dict(asked)}
    if way == "keyword":
        given["generate_kwargs"] |= settings
    elif way == "config":
        given["generate_kwargs"] = {"generation_config": GenerationConfig(**asked, **settings, pad_token_id=0)}
    elif way == "the model's":
        model.generation_config.update(**settings)
    at_start = {"generate_kwargs": asked | settings} if way == "the pipeline's" else {}
    pipe = LorgnetteImageToTextPipeline(model=model, processor=processor, device="cpu", **at_start)
    given = {} if at_start else given
    assert pipe(PICTURES[0], **given) == expected
    assert pipe(PICTURES, batch_size=2, **given)[0] == expected


def test_texts_that_are_generated_for_rows_and_a_model_that_returns_all_there_is():
    model, processor = parts_of_a_pipeline()
    rows, settings = [{"image": picture} for picture in PICTURES], {"max_new_tokens": 3, "do_sample": False}
    expected = list(generate_texts(model, LorgnetteCollator(processor), rows, decoding=settings, batch_size=2))
    model.generation_config.return_dict_in_generate = True
    assert list(generate_texts(model, LorgnetteCollator(processor), rows, decoding=settings, batch_size=2)) == expected
