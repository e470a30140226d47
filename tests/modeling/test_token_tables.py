"""Tokens past the language model's table are refused by name; a table that was resized trains, is saved and loads."""

from pathlib import Path

import pytest
import tiny
import tiny_forms
import tiny_training
import torch
from tiny_forms import form_of, hub_with_backbones, load, logits, stirred
from tiny_models import NUM_QUERY_TOKENS, QFORMER, language_model, vision_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteProcessor


def processor_of(tokenizer: PreTrainedTokenizerBase) -> LorgnetteProcessor:
    return LorgnetteProcessor.from_backbones(tiny.image_processor(), tokenizer, num_query_tokens=NUM_QUERY_TOKENS)


def joined(text, processor: LorgnetteProcessor | None, **kwargs) -> LorgnetteForConditionalGeneration:
    return LorgnetteForConditionalGeneration.from_backbones(
        vision_model(), text, processor=processor, qformer_config=dict(QFORMER), lora={"r": 2}, **kwargs
    )


def table(built: LorgnetteForConditionalGeneration) -> int:
    return built.get_input_embeddings().weight.shape[0]


def grown_tokenizer(size: int = 3) -> PreTrainedTokenizerBase:
    tokenizer = tiny.chat_tokenizer()
    tokenizer.add_tokens([f"<new{number}>" for number in range(size)])
    return tokenizer


def test_tokens_past_the_table_are_refused_by_name(tmp_path):
    text = language_model(vocab_size=len(tiny.chat_tokenizer()))
    first, before = len(tiny.chat_tokenizer()), {name: value.clone() for name, value in text.named_parameters()}
    match = rf"3 tokens of the tokenizer are past .* table of {first} embeddings \('<new0>' has the id {first}\): .*"
    with pytest.raises(ValueError, match=match + rf"resize_token_embeddings\({first + 3}\)"):
        joined(text, processor_of(grown_tokenizer()))
    tokenizer = tiny.chat_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # as guides for models without a pad token tell
    with pytest.raises(ValueError, match=r"1 tokens .*\('\[PAD\]' has the id"):
        joined(text, processor_of(tokenizer))
    after = processor_of(tiny.chat_tokenizer())
    after.tokenizer.add_tokens(["<later>"])  # past the placeholder's id, which alone is excepted
    with pytest.raises(ValueError, match=r"1 tokens .*\('<later>' has the id"):
        joined(text, after)
    assert before.keys() == dict(text.named_parameters()).keys()  # no LoRA was put on either
    text.save_pretrained(tmp_path)
    grown_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=match):  # and where nobody names a processor
        joined(tmp_path, None)


def test_the_placeholder_alone_may_be_past_the_table():
    text = language_model(vocab_size=len(tiny.chat_tokenizer()))
    processor = processor_of(tiny.chat_tokenizer())
    assert processor.image_token_id == table(joined(text, processor))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", [None, "full", "merged"])
def test_a_language_model_that_was_resized_joins_trains_and_is_saved(form: str | None, tied: bool, tmp_path):
    tokenizer = grown_tokenizer()
    text = language_model(vocab_size=len(tiny.chat_tokenizer()), tie_word_embeddings=tied)
    text.resize_token_embeddings(len(tokenizer))
    processor = processor_of(tokenizer)
    made = joined(text, processor)
    new_tokens_are_looked_up(made, processor, tmp_path)
    made.save_pretrained(tmp_path / "saved", save_format=form)
    loaded = load(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), logits(made.eval()), atol=1e-4, rtol=1e-4)
    assert table(loaded) == len(tokenizer) == loaded.config.vocab_size


def new_tokens_are_looked_up(
    made: LorgnetteForConditionalGeneration, processor: LorgnetteProcessor, folder: Path
) -> None:
    """Two steps with texts that have the new tokens."""
    rows = [row | {"text": f"<new0> {row['text']} <new1>"} for row in tiny_training.pairs()]
    frozen = {name: value.clone() for name, value in made.named_parameters() if not value.requires_grad}
    tiny_training.trainer(made, processor, folder / "out", rows=rows).train()
    assert all(torch.equal(made.get_parameter(name), value) for name, value in frozen.items())


@pytest.mark.parametrize("size", [320, 400])
def test_a_whole_model_of_hub_backbones_that_is_resized_is_saved_in_full(size: int, tmp_path, monkeypatch):
    hub_with_backbones(tmp_path / "hub", monkeypatch)
    made = tiny_forms.joined()
    before = table(made)
    made.resize_token_embeddings(size)
    with pytest.raises(ValueError, match=r"cannot be saved thin: .*language_model"):
        made.save_pretrained(tmp_path / "thin", save_format="thin")
    for form in (None, "merged"):
        made.save_pretrained(tmp_path / str(form), save_format=form)
        assert form_of(tmp_path / str(form)) == (form or "full")
        loaded = load(tmp_path / str(form))
        assert table(loaded) == size != before
        torch.testing.assert_close(logits(loaded), logits(made), atol=1e-4, rtol=1e-4)
    assert not made.language_model.lm_head.weight.requires_grad
    assert not made.get_input_embeddings().weight.requires_grad


def test_tokens_that_are_added_after_the_join_are_neither_trained_nor_saved(tmp_path):
    processor = processor_of(tiny.chat_tokenizer())
    made = joined(language_model(vocab_size=len(tiny.chat_tokenizer())), processor)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    processor.tokenizer.add_tokens(["<later>"])
    with pytest.raises(ValueError, match=r"1 tokens .*\('<later>' has the id"):
        tiny_training.trainer(made, processor, tmp_path / "out").train()
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())
    with pytest.raises(ValueError, match=r"1 tokens .*\('<later>' has the id"):
        made.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    made.resize_token_embeddings(len(processor.tokenizer))
    made.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(made.eval()))


def test_the_headless_model_resizes_the_head_too(tmp_path, monkeypatch):
    hub_with_backbones(tmp_path / "hub", monkeypatch)
    made = tiny_forms.joined()
    made.base_model.resize_token_embeddings(330)
    made.save_pretrained(tmp_path / "base")
    loaded = load(tmp_path / "base")
    assert table(loaded) == loaded.get_output_embeddings().weight.shape[0] == 330
    assert torch.equal(logits(loaded), logits(made))
    headless = AutoModel.from_pretrained(tmp_path / "base", trust_remote_code=True)
    headless.resize_token_embeddings(340)
    headless.save_pretrained(tmp_path / "headless")
    assert logits(load(tmp_path / "headless")).shape[-1] == 340


def test_a_hub_language_model_is_resized_before_it_is_joined(tmp_path, monkeypatch):
    hub_with_backbones(tmp_path / "hub", monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained("tiny/llama")
    tokenizer.add_tokens(["<new0>", "<new1>"])
    with pytest.raises(ValueError, match="'<new0>'"):
        joined("tiny/llama", processor_of(tokenizer))
    text = AutoModelForCausalLM.from_pretrained("tiny/llama")
    text.resize_token_embeddings(len(tokenizer))
    processor = processor_of(tokenizer)
    made = stirred(joined(text, processor))
    new_tokens_are_looked_up(made, processor, tmp_path)
    made.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(made.eval()))
