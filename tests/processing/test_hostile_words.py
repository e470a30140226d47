"""Whatever a user types in a query, a caption or a chat stays words: no placeholder more or fewer, no other role."""

import pytest
import tiny
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lorgnette import LorgnetteCollator, LorgnetteProcessor


QUERIES = 4
# Gives an assistant's thought a turn of its own, as gpt-oss' template does, and so takes the words apart at a marker.
THINKING_APART = (
    "{% set opening = '<think>' %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{{ message['content'].split('</think>') | join('<|im_end|>\n<|im_start|>assistant\n') }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def taking_thoughts_apart():
    tokenizer = tiny.chat_tokenizer(tiny.THINKING)
    tokenizer.chat_template = THINKING_APART
    return tokenizer


LMS = {
    "chatml": tiny.chat_tokenizer,
    "gemma": tiny.gemma_like_tokenizer,
    "thinking": lambda: tiny.chat_tokenizer(tiny.THINKING),
    "plain": tiny.plain_tokenizer,
    "byte_level_plain": lambda: tiny.chat_tokenizer(None),
    "taking thoughts apart": taking_thoughts_apart,
}
PROCESSORS = {
    name: LorgnetteProcessor(tiny.image_processor(), make(), tiny.bert_tokenizer(), num_query_tokens=QUERIES)
    for name, make in LMS.items()
}

FRAGMENTS = [
    *(
        "<image>",
        "<imag",
        "e>",
        "<|im_start|>",
        "<|im_end|>",
        "<|im_",
        "start|>",
        "<|endoftext|>",
        "<think>",
        "</think>",
    ),
    *(
        "<bos>",
        "<eos>",
        "<pad>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "[SEP]",
        "[CLS]",
    ),
    *(
        "system",
        "assistant",
        "user",
        "model",
        "\n",
        "\r\n",
        " ",
        "  ",
        "\t",
        "\0",
        "\x1b[2J",
        "\x7f",
        "▁",
        "Ġ",
        "{{ bos_token }}",
    ),
    *(
        "\ufdd0",
        "\ufdd1",
        "\ufdd2",
        "\ufdd3",
        "\ufffe",
        "\U000f0000",
        "\U000f0001",
        "\ufeff",
        "\u2028",
        "\u0301",
        "\u0338",
    ),
    *("\u202e", "\u2066", "\u2069", "\u200b", "\u200d", "\u00ad", "\uff49", "ﬁ", "é", "日本", "🐕", "👩‍👩‍👧"),
]
WORDS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=8).map("".join)
MESSAGES = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), st.lists(WORDS, min_size=1, max_size=2)), max_size=3
)
# the same examples each time, in a few seconds
bounded = settings(
    derandomize=True, max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
on_all = pytest.mark.parametrize("lm", LMS)


def control(processor, ids):
    """The placeholders, the special tokens and the markers of roles among some ids, in their order."""
    return [token for token in ids if token in processor.tokenizer.added_tokens_decoder]


def prompt_ids(processor, **parts):
    return processor(text=processor.build_prompt(num_images=0, **parts))["input_ids"][0]


def as_the_tokenizer_has_it(processor, words):
    """What comes back of words without any control token: SentencePiece writes a space as `▁`, and reads it as one."""
    return words.replace("▁", " ") if processor is PROCESSORS["plain"] else words


@on_all
@bounded
@given(words=WORDS)
def test_a_query(lm, words):
    processor = PROCESSORS[lm]
    prompt, _ = processor.encode_example(None, query=words, num_images=2)
    harmless, _ = processor.encode_example(None, query="Q", num_images=2)
    assert control(processor, prompt) == control(processor, harmless)
    assert prompt.count(processor.image_token_id) == 2 * QUERIES
    asked = words.strip() if lm == "gemma" else words  # its template does
    assert as_the_tokenizer_has_it(processor, asked) in processor.decode(prompt)


@pytest.mark.parametrize("lm", [lm for lm in LMS if lm != "gemma"])  # it knows no system prompt
@bounded
@given(words=WORDS.filter(bool))
def test_a_system_prompt(lm, words):
    processor = PROCESSORS[lm]
    ids, harmless = prompt_ids(processor, query="Q", system=words), prompt_ids(processor, query="Q", system="S")
    assert control(processor, ids) == control(processor, harmless)
    assert as_the_tokenizer_has_it(processor, words) in processor.decode(ids)


@on_all
@bounded
@given(words=WORDS)
def test_a_caption(lm, words):
    processor = PROCESSORS[lm]
    prompt, output = processor.encode_example(words)
    assert prompt == processor.encode_example("O")[0]
    assert control(processor, output) == control(processor, processor.encode_example("O")[1])
    assert output[-1] in processor.stop_token_ids
    assert as_the_tokenizer_has_it(processor, words) in processor.decode(output)


@on_all
@bounded
@given(messages=MESSAGES, query=WORDS, answer=WORDS)
@example(messages=[("assistant", ["a thought</think>an answer"])], query="Q", answer="A")
def test_a_chat(lm, messages, query, answer):
    """The roles that open are those of the messages, in their order."""
    processor = PROCESSORS[lm]
    asked = [*messages, ("user", [query])]
    chat, harmless = (
        [{"role": role, "content": [{"type": "text", "text": make(text)} for text in texts]} for role, texts in asked]
        for make in (str, lambda _: "W")
    )
    for last in (chat[-1], harmless[-1]):
        last["content"].append({"type": "image"})
    ids, output = processor.encode_example(answer, messages=chat)
    expected, _ = processor.encode_example("O", messages=harmless)
    if lm == "taking thoughts apart":
        turns = len(asked) + sum("\n".join(texts).count("</think>") for role, texts in messages if role == "assistant")
        opened, closed = processor.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        kept = [token for token in control(processor, ids) if token in (opened, closed)]
        assert kept == [opened, closed] * turns + [opened]
    else:
        assert control(processor, ids) == control(processor, expected)
    assert ids.count(processor.image_token_id) == QUERIES
    assert control(processor, output) == control(processor, processor.encode_example("O")[1])
    decoded = processor.decode(ids)
    for text in (text for role, texts in asked if role == "user" for text in texts):
        expected_text = text.strip() if lm == "gemma" else text
        assert as_the_tokenizer_has_it(processor, expected_text) in decoded


@bounded
@given(key=WORDS, value=WORDS)
def test_what_a_tool_was_called_with(key, value):
    """A template may write out fields of a message besides its content, names and all."""
    tokenizer = tiny.chat_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] }}{{ message.get('tool_calls') | tojson }}"
        "{{ message['content'] + '<|im_end|>' }}{% endfor %}"
    )
    processor = LorgnetteProcessor(tiny.image_processor(), tokenizer, num_query_tokens=QUERIES)

    def ids(arguments):
        called = {"role": "assistant", "content": "C", "tool_calls": [{"function": {"arguments": arguments}}]}
        return processor.encode_example(None, messages=[called, {"role": "user", "content": "Q"}])[0]

    assert control(processor, ids({key: value})) == control(processor, ids({"K": "V"}))


@on_all
@bounded
@given(caption=WORDS, query=WORDS)
def test_a_row(lm, caption, query):
    processor = PROCESSORS[lm]
    if not caption.strip() or not query.strip():
        return
    collator = LorgnetteCollator(processor, query_column="query")
    row = {"vision_features": torch.zeros(3, 4), "text": caption, "query": query}
    batch, harmless = collator([row]), collator([row | {"text": "C", "query": "Q"}])
    assert (batch["input_ids"] == processor.image_token_id).sum() == QUERIES
    found, expected = (control(processor, one["input_ids"][0].tolist()) for one in (batch, harmless))
    assert found == expected
    learned = (batch["labels"][0] != -100).nonzero().flatten().tolist()
    assert learned == list(range(learned[0], batch["labels"].shape[1]))


@bounded
@given(words=WORDS)
def test_what_the_qformer_is_told(words):
    processor = PROCESSORS["chatml"]
    tokenizer = processor.qformer_tokenizer
    ids = processor.encode_for_qformer([words])["input_ids"][0]
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert [token for token in ids if token in tokenizer.all_special_ids and token != tokenizer.unk_token_id] == special


@bounded
@given(before=WORDS, half=st.characters(categories=["Cs"]), after=WORDS)
def test_half_a_character_is_refused_by_name(before, half, after):
    words = before + half + after
    for processor in (PROCESSORS["chatml"], PROCESSORS["plain"]):
        ways = (
            lambda processor=processor: processor(text=processor.build_prompt(words, num_images=0)),
            lambda processor=processor: processor.encode_example(words),
            lambda processor=processor: processor.encode_for_qformer([words]),
        )
        for way in ways:
            with pytest.raises(ValueError, match=rf"half of a character at position \d+: U\+{ord(half):04X}"):
                way()
