"""What other people's programs ask of a processor: keywords, placeholders' places, an id inside the table."""

import pytest
import torch
from tiny import chat_tokenizer, gemma_like_tokenizer, image_processor, picture, plain_tokenizer
from tiny_models import language_model, vision_model
from transformers import AddedToken

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteProcessor


def processor() -> LorgnetteProcessor:
    return LorgnetteProcessor(image_processor(), chat_tokenizer(), num_query_tokens=4)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"query": "What?"}, "does not read query: was queries meant"),
        ({"prompt": "What?"}, "does not read prompt: was queries meant"),
        ({"question": "What?"}, "does not read question: was queries meant"),
        ({"video": [picture()]}, "does not read video: was videos meant"),
        ({"text_kwargs": {"paddding": True}}, "does not read paddding: was padding meant"),
        ({"images_kwargs": {"do_rezise": True}}, "does not read do_rezise: was do_resize meant"),
        ({"common_kwargs": {"return_tensorz": "pt"}}, "does not read return_tensorz: was return_tensors meant"),
        ({"text_pair": "What?"}, "LorgnetteProcessor does not read text_pair$"),
        ({"text_kwargs": {"text_target": "a cat"}}, "does not read text_target$"),
        ({"return_offsets_mapping": True}, "does not read return_offsets_mapping$"),
        ({"return_length": True}, "does not read return_length$"),
        ({"paddding": True}, "does not read paddding: was padding meant"),
        ({"image": None}, "does not read image: was images meant"),
        ({"xyzzy": 2}, "does not read xyzzy$"),
        ({"videos": [picture()]}, "LorgnetteProcessor does not read videos$"),
        ({"audio": [0.0]}, "does not read audio$"),
        ({"videos": [[], [picture()]]}, "does not read videos$"),
        ({"videos_kwargs": {"fps": 2}}, "does not read videos_kwargs$"),
    ],
)
def test_a_keyword_that_nothing_reads_is_named(keywords, message):
    for given in ({"images": picture()}, {}):
        with pytest.raises(TypeError, match=message):
            processor()(**given, **keywords)


def test_keywords_that_say_nothing_are_taken():
    plain = processor()(images=picture())
    for videos in (None, [], [[], []]):
        given = processor()(images=picture(), videos=videos, audios=[], audio=None, fps=2)
        assert given.keys() == plain.keys()
        given = processor()(images=picture(), text_pair=None, return_length=False)
        assert given.keys() == plain.keys()


def test_where_placeholders_stand_is_told_to_who_asks():
    """vLLM finds each image by these, as transformers' own processors give them."""
    made = processor()
    prompt = made.build_prompt("an <image> in words", num_images=2)
    answer = made(
        images=[picture(), picture(1)],
        text=prompt,
        return_text_replacement_offsets=True,
        return_mm_token_type_ids=True,
        return_tensors="pt",
    )
    (offsets,) = answer["text_replacement_offsets"]
    expanded, last = "", 0
    for found in offsets:
        start, end = found["span"]
        assert prompt[start:end] == "<image>" == found["text"]
        expanded += prompt[last:start] + found["replacement"]
        assert expanded[found["new_span"][0] : found["new_span"][1]] == "<image>" * made.num_query_tokens
        last = end
    assert len(offsets) == 2
    assert torch.equal(answer["mm_token_type_ids"] == 1, answer["input_ids"] == made.image_token_id)
    assert (
        made._get_num_multimodal_tokens(image_sizes=[(30, 40), (8, 8)])["num_image_tokens"]
        == [made.num_query_tokens] * 2
    )
    ids = made.tokenizer(made.image_token * 3, add_special_tokens=False)["input_ids"]
    assert ids == [made.image_token_id] * 3


RESERVED = ["<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|tool_call|>"]


@pytest.mark.parametrize("special", [True, False], ids=["special", "ordinary"])
@pytest.mark.parametrize("tokenizer", [chat_tokenizer, gemma_like_tokenizer, plain_tokenizer])
def test_a_token_that_is_kept_free_becomes_the_placeholder(tokenizer, special, tmp_path):
    """Its id is inside the language model's table, where vLLM looks every id up."""
    base = tokenizer()
    base.add_tokens([AddedToken(token, special=special) for token in RESERVED], special_tokens=special)
    size, free = len(base), base.convert_tokens_to_ids(RESERVED[1])
    made = LorgnetteProcessor(image_processor(), base)
    made.save_pretrained(tmp_path)
    for one in (made, LorgnetteProcessor.from_pretrained(tmp_path)):
        assert one.image_token_id == free
        assert len(one.tokenizer) == size
        assert RESERVED[1] not in one.tokenizer.get_vocab()
        row = one(images=picture(), text="a cat<image>")["input_ids"][0]
        assert row.count(free) == one.num_query_tokens
        assert one.decode([free], skip_special_tokens=True).strip() == ""
        words = one(text=one.apply_chat_template([{"role": "user", "content": f"{RESERVED[1]} <image>"}]))
        assert free not in words["input_ids"][0]
    assert RESERVED[1] in base.get_vocab()  # the caller's is as it was
    written = "a cat on the road"
    assert made.tokenizer(written)["input_ids"] == base(written)["input_ids"]


def placeholder_beside(name: str, **changed) -> tuple[int, int]:
    """The placeholder's id in a tokenizer that has one added token more, and the id of that."""
    base = chat_tokenizer()
    base.add_tokens([AddedToken(name, special=True)], special_tokens=True)
    for attribute, value in changed.items():
        setattr(base, attribute, value)
    return LorgnetteProcessor(image_processor(), base).image_token_id, base.convert_tokens_to_ids(name)


@pytest.mark.parametrize(
    "name",
    [
        "<|reserved_special_token_7|>",
        "<|RESERVED_SPECIAL_TOKEN_7|>",
        "<|reserved_token_7|>",
        "<|reserved token 7|>",
        "<|reserved_200011|>",
        "<reserved_106>",
        "[RESERVED_7]",
        "<unused7>",
        "[unused7]",
        "<|unused_7|>",
        ">>UNUSED_7<<",
        "[UNUSED_TOKEN_141]",
        "<|unused_special_token_7|>",
        "<|placeholder7|>",
        "<\uff5cplace▁holder▁no▁7\uff5c>",
        "<|dummy_7|>",
        "[control_8]",
        "<SPECIAL_20>",
        "<EXTRA_0_TOKEN>",
        "<|extra_0|>",
        "<|extra_id_0|>",
        "<extra_id_0>",
        "[PAD151700]",
    ],
)
def test_what_families_call_the_tokens_that_they_keep_free(name):
    placeholder, free = placeholder_beside(name)
    assert placeholder == free
    placeholder, used = placeholder_beside(name, chat_template="{{ '" + name + "' }}{{ messages[0]['content'] }}")
    assert placeholder == used + 1
    placeholder, used = placeholder_beside(name, sep_token=name)
    assert placeholder == used + 1


@pytest.mark.parametrize(
    "name",
    [
        "<|im_start|>",
        "<|special|>",
        "[control]",
        "<pad>",
        "[PAD]",
        "<tool_7>",
        "<|image_7|>",
        "<loc_0007>",
        "<|7|>",
        "<|0.02|>",
        "<unk_7>",
        "<|vq_7|>",
        "<|user_7|>",
        "<extra_tool_7>",
        "<control_point_7>",
        "unused7",
        "madeupword0007",
    ],
)
def test_other_tokens_are_not_taken_for_free(name):
    placeholder, used = placeholder_beside(name)
    assert placeholder not in (used, None)


def test_tokens_that_a_template_writes_are_not_free():
    base = chat_tokenizer()
    base.add_tokens([AddedToken(RESERVED[0], special=True)], special_tokens=True)
    base.chat_template = base.chat_template + "{{ '" + RESERVED[0] + "' if false }}"
    assert LorgnetteProcessor(image_processor(), base).image_token_id == len(base)


def test_the_config_says_whether_the_placeholder_is_in_the_table(tmp_path):
    for rows, inside in ((320, True), (311, False)):
        language_model(vocab_size=rows).save_pretrained(tmp_path / str(rows))
        chat_tokenizer().save_pretrained(tmp_path / str(rows))
        built = LorgnetteForConditionalGeneration.from_backbones(vision_model(), tmp_path / str(rows))
        assert built.config.image_token_id == 311
        assert built.config.image_token_in_table is inside
        assert built.config.to_dict()["image_token_in_table"] is inside


def test_model_and_processor_agree_on_a_token_that_is_kept_free(tmp_path):
    base = chat_tokenizer()
    base.add_tokens([AddedToken(token, special=True) for token in RESERVED], special_tokens=True)
    base.save_pretrained(tmp_path / "lm")
    language_model(vocab_size=len(base)).save_pretrained(tmp_path / "lm")
    built = LorgnetteForConditionalGeneration.from_backbones(vision_model(), tmp_path / "lm")
    made = LorgnetteProcessor.from_backbones(image_processor(), tmp_path / "lm")
    assert built.config.image_token_id == made.image_token_id == base.convert_tokens_to_ids(RESERVED[1])
    assert built.config.image_token_in_table
