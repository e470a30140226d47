"""Chats as data sets hold them: what is read, and what is refused with its row and type."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import tiny
import torch
from datasets import Dataset

from lorgnette import LorgnetteCollator, LorgnetteProcessor
from lorgnette.assembly.conversations import conversations_of, messages_of, parts_of
from lorgnette.trainer.data import _length, _open_chat
from lorgnette.trainer.generation import references_of


ASKED = [{"type": "text", "text": "What?"}, {"type": "image"}]
ANSWER = {"role": "assistant", "content": "a cat"}
CHAT = [{"role": "user", "content": ASKED}, ANSWER]
WORDS = [{"role": "user", "content": "What?"}, ANSWER]  # the image comes after them
COLUMNS = {"role": ["user", "assistant"], "content": [ASKED, "a cat"]}


@pytest.fixture(scope="module")
def processor():
    return LorgnetteProcessor(tiny.image_processor(), tiny.chat_tokenizer(), num_query_tokens=4)


def array(items: list) -> np.ndarray:
    held = np.empty(len(items), dtype=object)
    held[:] = items
    return held


@dataclass
class Message:
    role: str
    content: list | str
    tool_calls: list | None = None


SAVE_FORMATS = {
    "dataclasses": [Message(**message) for message in CHAT],
    "JSON": json.dumps(CHAT),
    "JSON in bytes": json.dumps(CHAT).encode(),
    "JSON of a dict of lists": json.dumps(COLUMNS),
    "JSON of each message": [json.dumps(message) for message in CHAT],
    "dict of lists": COLUMNS,
    "dict of arrays": {name: array(column) for name, column in COLUMNS.items()},
    "array of dicts": array(CHAT),
    "tuple": tuple(CHAT),
    "table of pandas": pandas.DataFrame(WORDS),
    "records of pandas": pandas.DataFrame(CHAT).to_dict("records"),
    "column of pandas": pandas.Series(CHAT, index=[4, 5]),
    "array of parts": [{"role": "user", "content": array(ASKED)}, ANSWER],
    "tuple of parts": [{"role": "user", "content": tuple(ASKED)}, ANSWER],
    "parts as a dict of lists": [
        {"role": "user", "content": {"type": ["text", "image"], "text": ["What?", None]}},
        ANSWER,
    ],
    "one part": [{"role": "user", "content": ASKED[0]}, ANSWER],
    "string of numpy": [{"role": np.str_("user"), "content": np.str_("What?")}, ANSWER],
    "filled up with None": [
        {"role": "user", "content": [part | {"image": None, "url": None} for part in ASKED]},
        ANSWER,
    ],
}


@pytest.mark.parametrize("form", SAVE_FORMATS)
def test_what_is_unambiguous_is_read(processor, form):
    rows = [{"image": tiny.picture(n), "messages": chat} for n, chat in enumerate((CHAT, SAVE_FORMATS[form]))]
    batch = LorgnetteCollator(processor)(rows)
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    assert torch.equal(batch["labels"][0], batch["labels"][1])
    assert references_of(rows[1], "messages") == ["a cat"]
    assert [message["role"] for message in _open_chat(SAVE_FORMATS[form], 0, None)] == ["user", "assistant"]
    assert _length({"messages": SAVE_FORMATS[form]}) == len("What?a cat")
    written = {
        processor.apply_chat_template(chat).replace("<image>\n", "").replace("\n<image>", "")
        for chat in (CHAT, SAVE_FORMATS[form])
    }
    assert len(written) == 1


def test_columns_of_datasets(processor):
    struct = Dataset.from_dict({"messages": [{"role": ["user", "assistant"], "content": ["What?", "a cat"]}]})
    text = Dataset.from_dict({"messages": [json.dumps(WORDS)]})
    lists = Dataset.from_dict({"messages": [WORDS]})
    collator = LorgnetteCollator(processor)
    expected = collator([{"messages": WORDS, "image": tiny.picture()}])["input_ids"]
    for rows in (struct, text, lists, lists.with_format("numpy"), struct.with_format("numpy")):
        assert torch.equal(collator([rows[0] | {"image": tiny.picture()}])["input_ids"], expected)
    frame = lists.to_pandas()  # an array of dicts in each row
    assert torch.equal(collator([frame.iloc[0].to_dict() | {"image": tiny.picture()}])["input_ids"], expected)


def test_batches_of_conversations(processor):
    expected = [processor.apply_chat_template(CHAT)] * 2
    for batch in (
        [CHAT, CHAT],
        (CHAT, CHAT),
        array([CHAT, CHAT]),
        [json.dumps(CHAT)] * 2,
        json.dumps([CHAT, CHAT]),
        [COLUMNS] * 2,
        pandas.Series([CHAT, CHAT]),
    ):
        assert processor.apply_chat_template(batch) == expected


REFUSED = {
    "strings": (["What?", "a cat"], TypeError, "a str begins that is no JSON of messages: 'What.*message 0."),
    "a string": ("What?", TypeError, "a str begins that is no JSON of messages: 'What"),
    "broken JSON": (json.dumps(CHAT)[:-3], TypeError, "a str begins that is no JSON of messages"),
    "JSON of a number": ("5", TypeError, "the messages are a (str|int)"),
    "a number": (5, TypeError, "the messages are a int"),
    "NaN": (float("nan"), TypeError, "the messages are a float"),
    "one message": (CHAT[0], TypeError, "the messages are one message"),
    "no message": ([None, *CHAT], TypeError, "NoneType.*.message 0."),
    "a list in a list": ([CHAT], TypeError, r"\(a list\).*.message 0."),
    "no part": (
        [{"role": "user", "content": [ASKED[0], None]}, ANSWER],
        TypeError,
        "part 1 is a NoneType.*.message 0.",
    ),
    "a number as a part": ([{"role": "user", "content": [5]}, ANSWER], TypeError, "part 0 is a int.*.message 0."),
    "a number as content": ([CHAT[0], ANSWER | {"content": 5}], TypeError, "not a int.*.message 1."),
    "NaN as content": ([CHAT[0] | {"content": float("nan")}, ANSWER], TypeError, "not a float.*.message 0."),
    "text without text": (
        [{"role": "user", "content": [{"type": "text", "text": None}]}, ANSWER],
        ValueError,
        "a part is.*.message 0.",
    ),
    "no role": (
        [{"content": "What?"}, ANSWER],
        ValueError,
        "a message has no role, but {'content': 'str'}.*.message 0.",
    ),
    "None as a role": ([{"role": None, "content": "What?"}, ANSWER], ValueError, "a message has no role.*.message 0."),
    "other names": (
        [{"from": "human", "value": "What?"}],
        ValueError,
        "a message has no role, but .*'from'.*.message 0.",
    ),
    "lists of two lengths": (
        {"role": ["user", "assistant"], "content": ["What?"]},
        ValueError,
        "different lengths: {'role': 2, 'content': 1}",
    ),
    "an object": (SimpleNamespace(role="user"), TypeError, "the messages are a SimpleNamespace"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_rest_is_refused_with_row_and_type(processor, case):
    chat, kind, message = REFUSED[case]
    row = {"index": 7, "image": tiny.picture(), "messages": chat}
    collator = LorgnetteCollator(processor)
    for read in (
        lambda: collator([row]),
        lambda: collator.prompts([row]),
        lambda: collator.prompt_lengths([row]),
        lambda: references_of(row, "messages"),
        lambda: _open_chat(chat, 7, None),
    ):
        with pytest.raises(kind, match=f"row 7: .*{message}"):
            read()
    if case != "a list in a list":
        with pytest.raises(kind, match=message.partition(".*.mess")[0]):
            processor.apply_chat_template(chat)


def test_errors_do_not_repeat_a_long_chat(processor):
    for chat in (
        "x" * 100_000,
        ["x" * 100_000],
        [{"x" * 100_000: "y"}],
        {"x" * 100_000: [1], "y": [1, 2]},
        "[" * 100_000,
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            LorgnetteCollator(processor)([{"image": tiny.picture(), "messages": chat}])
        assert len(str(caught.value)) < 500


def test_parts_that_were_written_as_a_string_are_no_words(processor):
    parts = json.dumps([{"type": "image"}, {"type": "text", "text": "what is it?"}])
    for read in (messages_of, conversations_of, processor.apply_chat_template):
        with pytest.raises(TypeError, match=r"the content of a message is JSON of parts.*json.loads"):
            read([{"role": "user", "content": parts}])
    answer = '[{"bbox": [1, 2, 3, 4]}]'
    assert processor.build_prompt(system=answer, output=answer).count(answer) == 2
    for words in (answer, "[1, 2] is a list", "[1, 2]", "[]", '[{"kind": 1}]', ' [ {"kind": 1}]', "[half", "[{half"):
        assert parts_of({"role": "user", "content": words}) == [{"type": "text", "text": words}]
        assert words in processor.apply_chat_template([{"role": "user", "content": words}])
    assert parts_of({"role": "user", "content": [{"type": "text", "text": parts}]})[0]["text"] == parts


def test_the_conversation_of_a_batch_that_is_wrong_is_named():
    right = [{"role": "user", "content": "what is it?"}]
    with pytest.raises(ValueError, match=r"a message has no role.*\(message 1\) \(conversation 2\)"):
        conversations_of([right, right, [*right, {"content": "a cat"}]])
