"""A column of chats in a file: found by itself, or left to who names texts."""

import json

import pytest
from tiny_formats import QUERY, TEXTS, assert_equal, batch_of, names, write

from lorgnette.trainer.arguments import DataArguments
from lorgnette.trainer.data import load_pairs
from lorgnette.trainer.formats import find_format


pytestmark = pytest.mark.usefixtures("own_cache")


def chats_of(column: str, more: dict) -> list[dict]:
    content = [{"type": "image"}, {"type": "text", "text": QUERY}]
    return [
        {"image": name, column: [{"role": "user", "content": content}, {"role": "assistant", "content": text}]} | more
        for name, text in zip(names(), TEXTS, strict=True)
    ]


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streamed"])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_column_of_chats_is_found(root, column, streaming, caplog):
    fields = {"streaming": True, "shuffle_buffer_size": 0} if streaming else {}
    source = write(root / "chats.jsonl", "\n".join(map(json.dumps, chats_of(column, {"id": "a"}))))
    assert find_format(str(source)) == "table"
    with caplog.at_level("INFO", logger="lorgnette"):
        found = batch_of(source, **fields)
    assert f"the chats of the column '{column}' are read, as there is no column 'text'" in caplog.text
    assert_equal(found, batch_of(source, messages_column=column, **fields))


def test_a_column_of_chats_is_left_to_who_names_texts(root):
    source = write(root / "chats.jsonl", "\n".join(map(json.dumps, chats_of("messages", {"text": "a", "said": "b"}))))
    for named, column in (({}, "text"), ({"text_column": "said"}, "said")):
        arguments = DataArguments(dataset=str(source), **named)
        load_pairs(arguments, evaluate=False, seed=0)
        assert (arguments.messages_column, arguments.text_name) == (None, column)
    write(source, "\n".join(json.dumps(row | {"conversations": row["messages"]}) for row in chats_of("messages", {})))
    with pytest.raises(ValueError, match="has no column 'text'; it has image, messages, conversations"):
        load_pairs(DataArguments(dataset=str(source)), evaluate=False, seed=0)


def test_a_mark_in_the_words_of_a_chat_is_warned_of_once(root, caplog):
    rows = [{"messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}],
             "image": name} for name in names()]  # fmt: skip
    (root / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trained, _ = load_pairs(
        DataArguments(dataset=str(root / "chats.jsonl"), messages_column="messages"), evaluate=False, seed=0
    )
    with caplog.at_level("WARNING"):
        list(trained)
    assert caplog.text.count("<image> stands in the text of a chat") == 1
