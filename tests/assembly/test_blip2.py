"""BLIP-2 models of transformers come in whole: the same logits, the same words, and errors for what cannot come."""

import pytest
import tiny
import torch
from tiny_blip2 import NUM_QUERY_TOKENS, blip2, blip2_retrieval
from tiny_models import IMAGE_SIZE, VOCAB_SIZE, inputs
from transformers import Blip2Config, Blip2Processor

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteForImageTextRetrieval, LorgnetteProcessor


def batch() -> dict[str, torch.Tensor]:
    made = inputs(image_token_id=VOCAB_SIZE - 1)
    made["attention_mask"][0, :2] = 0  # a padded row
    return made


@pytest.mark.parametrize("text", ["opt", "llama", "gpt2", "qwen3"])
def test_logits_and_words_are_blip2s(text: str):
    theirs = blip2(text)
    with torch.no_grad():
        logits = theirs(**batch()).logits
        words = theirs.generate(**batch(), max_new_tokens=6, do_sample=False)
        soft = theirs.get_image_features(batch()["pixel_values"]).pooler_output
    ours = LorgnetteForConditionalGeneration.from_blip2(theirs)
    assert ours.config.vision_config.model_type == "blip_2_vision_model"
    with torch.no_grad():
        torch.testing.assert_close(ours.get_image_features(batch()["pixel_values"]).pooler_output, soft)
        torch.testing.assert_close(ours(**batch()).logits, logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(ours.generate(**batch(), max_new_tokens=6, do_sample=False), words)


def test_from_a_folder_with_lora_and_back(tmp_path):
    """The ViT that `AutoModel` does not know comes back from what we save, and LoRA that is new changes nothing."""
    theirs = blip2()
    theirs.save_pretrained(tmp_path / "blip2")
    ours = LorgnetteForConditionalGeneration.from_blip2(tmp_path / "blip2", lora={"r": 2})
    ours.save_pretrained(tmp_path / "ours")
    again = LorgnetteForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch()).logits, ours(**batch()).logits)
        torch.testing.assert_close(ours(**batch()).logits, theirs(**batch()).logits, atol=1e-5, rtol=1e-4)
    trainable = {name.split(".")[0] for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert trainable == {"qformer", "projector", "language_model"}
    assert str(tmp_path) not in (tmp_path / "ours" / "config.json").read_text()


def test_the_vision_model_alone(tmp_path):
    """BLIP-2's ViT serves as any other's, out of a BLIP-2 folder too."""
    from tiny_models import QFORMER, language_model

    theirs = blip2()
    theirs.save_pretrained(tmp_path)
    pixels = batch()["pixel_values"]
    ours = LorgnetteForConditionalGeneration.from_backbones(tmp_path, language_model(), qformer_config=QFORMER)
    with torch.no_grad():
        expected = theirs.vision_model(pixels).last_hidden_state
        assert torch.equal(ours.get_vision_features(pixels).last_hidden_state, expected)


def test_prompts_are_blip2s(tmp_path):
    """The processor writes pictures, BOS, words, and the model says what BLIP-2 says."""
    tokenizer = tiny.plain_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    theirs_processor = Blip2Processor(tiny.image_processor(IMAGE_SIZE), tokenizer, num_query_tokens=NUM_QUERY_TOKENS)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    theirs = blip2("llama", vocab_size=len(tokenizer), **ids)
    assert tokenizer.convert_tokens_to_ids("<image>") == theirs.config.image_token_index
    for part in (theirs, theirs_processor):
        part.save_pretrained(tmp_path)

    processor = LorgnetteProcessor.from_blip2(tmp_path)
    ours = LorgnetteForConditionalGeneration.from_blip2(tmp_path, processor=processor)
    for question in ("Question: what is this? Answer:", ""):
        expected = theirs_processor(images=tiny.picture(), text=question, return_tensors="pt")
        made = processor(images=tiny.picture(), queries=question, return_tensors="pt")
        assert made["input_ids"].tolist() == expected["input_ids"].tolist()
        words = theirs.generate(**expected, max_new_tokens=6, do_sample=False)
        assert ours.generate(**made, max_new_tokens=6, do_sample=False).tolist() == words.tolist()
    prompt, answer = processor.encode_example("a cat", query="What is this?")
    assert processor.tokenizer.decode(prompt[NUM_QUERY_TOKENS:] + answer) == "<s> What is this? a cat</s>"
    with pytest.raises(ValueError, match="no other role"):
        processor.build_prompt(system="Be brief.")


def test_retrieval(caplog):
    theirs = blip2_retrieval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    text = {"input_ids": torch.randint(5, 100, (2, 6), generator=generator), "attention_mask": torch.ones(2, 6).long()}
    text["attention_mask"][1, 4:] = 0
    with torch.no_grad():
        cosines = theirs(pixels, **text).logits_per_image
        matching = theirs(pixels, **text, use_image_text_matching_head=True).logits_per_image
    ours = LorgnetteForImageTextRetrieval.from_blip2(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(**text, pixel_values=pixels).logits_per_image, cosines)
        features = ours.get_vision_features(pixels).last_hidden_state
        torch.testing.assert_close(ours.match_logits({"encoder_hidden_states": features}, text), matching)
    for fresh in ("text_head", "logit_scale", "id 120"):  # a model alone does not say which word [DEC] is
        assert fresh in caplog.text
    assert ours.config.qformer_config.vocab_size == 121
    assert torch.isfinite(ours(**text, pixel_values=pixels).loss)


def test_retrieval_with_its_tokenizer(tmp_path, caplog):
    """The tokenizer beside BLIP-2 knows [DEC], and a processor of the folder fits the model."""
    tokenizer = tiny.bert_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    theirs = blip2_retrieval(vocab_size=len(tokenizer))
    for part in (theirs, tokenizer, tiny.image_processor(IMAGE_SIZE)):
        part.save_pretrained(tmp_path)
    processor = LorgnetteProcessor.from_backbones(tmp_path, None, qformer=tmp_path, num_query_tokens=NUM_QUERY_TOKENS)
    ours = LorgnetteForImageTextRetrieval.from_blip2(tmp_path, processor=processor)
    config = ours.config.qformer_config
    assert (config.dec_token_id, config.vocab_size) == (len(tokenizer) - 1, len(tokenizer))
    assert "[DEC]" not in caplog.text
    ours.save_pretrained(tmp_path / "ours")
    again = LorgnetteForImageTextRetrieval.from_pretrained(tmp_path / "ours").eval()
    pictures, texts = [tiny.picture(0), tiny.picture(1)], ["the cat", "a picture"]
    assert torch.equal(again.retrieve(pictures, texts), ours.retrieve(pictures, texts))


def test_without_generation_nothing_but_the_temperature_is_fresh(caplog):
    ours = LorgnetteForImageTextRetrieval.from_blip2(blip2_retrieval(), itg_weight=0)
    assert ours.config.qformer_config.vocab_size == 120
    assert "logit_scale" in caplog.text
    assert "text_head" not in caplog.text


def test_an_encoder_decoder_is_refused(tmp_path):
    text = {"model_type": "t5", "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    config = Blip2Config(text_config=text)
    config.save_pretrained(tmp_path)  # no weights: they are not even looked for
    with pytest.raises(ValueError, match='"t5", an encoder-decoder; a causal LM is needed'):
        LorgnetteForConditionalGeneration.from_blip2(tmp_path)


def test_what_is_no_blip2_is_refused(tmp_path):
    from tiny_models import language_model

    language_model().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match='model_type is "llama"; from_blip2 takes a BLIP-2'):
        LorgnetteForConditionalGeneration.from_blip2(tmp_path / "llama")
    with pytest.raises(ValueError, match="takes a Blip2ForConditionalGeneration; the model is a Blip2ForImageText"):
        LorgnetteForConditionalGeneration.from_blip2(blip2_retrieval())
    blip2().save_pretrained(tmp_path / "stage2")
    with pytest.raises(ValueError, match=r"lacks \d+ weights of a Blip2ForImageTextRetrieval"):
        LorgnetteForImageTextRetrieval.from_blip2(tmp_path / "stage2")
    with pytest.raises(FileNotFoundError):
        LorgnetteForConditionalGeneration.from_blip2(tmp_path / "nowhere")


def test_word_vectors_of_another_width_are_refused():
    """OPT-350m's tokens are narrower than its layers; BLIP-2 itself could not join them."""
    theirs = blip2(word_embed_proj_dim=24)
    with pytest.raises(ValueError, match="gives vectors of 32; the LM's token embeddings have 24"):
        LorgnetteForConditionalGeneration.from_blip2(theirs)
