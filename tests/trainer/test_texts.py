"""Several texts of a picture: batches, losses, and which texts a step learns."""

import json

import pytest
import tiny
import tiny_models
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from tiny_training import joined, trainer, write_backbones
from transformers import TrainerState, set_seed

from lorgnette import LorgnetteCollator, LorgnetteProcessor
from lorgnette.trainer.arguments import DataArguments
from lorgnette.trainer.data import load_pairs
from lorgnette.trainer.labelled_text import rows_of
from lorgnette.trainer.progress import count_texts
from lorgnette.trainer.row_seeds import RowSeeds


TEXTS = [["a cat", "the red cat on a sofa", "an animal"], ["a car"], ["the dog", "What is this? The dog."]]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return write_backbones(tmp_path_factory.mktemp("backbones"))


def listed(**more) -> list[dict]:
    return [
        {"index": 10 + n, "image": tiny.picture(n), "text": texts} | {name: values[n] for name, values in more.items()}
        for n, texts in enumerate(TEXTS)
    ]


def apart(rows: list[dict]) -> list[dict]:
    return [row | {"text": text} for row in rows for text in row["text"]]


@pytest.mark.parametrize("pack_to", [None, 120])
def test_texts_in_a_list_are_learned_as_pairs_are(backbones, pack_to):
    model, processor = joined(backbones, dropout=0.0)
    pairs = LorgnetteCollator(processor)(apart(listed()))
    batch = LorgnetteCollator(processor, pack_to=pack_to)(listed())
    assert len(batch["pixel_values"]) == len(TEXTS)
    assert "image_rows" not in batch
    assert sorted(batch["row_index"].tolist()) == [10, 11, 12]
    assert (batch["labels"] != -100).sum() == (pairs["labels"] != -100).sum()
    losses = []
    for each in (pairs, batch):
        model.zero_grad()
        losses.append(model.train()(**each).loss)
        losses[-1].backward()
        losses.append(model.qformer.query_tokens.weight.grad.clone())
    torch.testing.assert_close(losses[2:], losses[:2], atol=1e-5, rtol=1e-4)


def test_a_placeholder_at_the_prompts_end_stands_once():
    """Later texts begin with another id there."""
    processor = LorgnetteProcessor(
        tiny.image_processor(), tiny.plain_tokenizer(), num_query_tokens=tiny_models.NUM_QUERY_TOKENS, query=""
    )
    collator = LorgnetteCollator(processor, query="")
    for example in (example for row in listed() for example in collator.encode(row)):
        last = max(place for place, token in enumerate(example.prompt) if token == processor.image_token_id)
        example.prompt = example.prompt[: last + 1]
        columns = collator._columns(example)
        assert columns["input_ids"].count(processor.image_token_id) == tiny_models.NUM_QUERY_TOKENS
        assert columns["text_ids"].count(0) == last


def test_features_in_place_of_pictures(backbones):
    rows = [{"index": n, "vision_features": torch.randn(5, 8), "text": texts} for n, texts in enumerate(TEXTS)]
    batch = LorgnetteCollator(joined(backbones)[1])(rows)
    assert batch["vision_features"].shape == (3, 5, 8)
    assert batch["text_ids"].max() == 3


def test_rows_with_one_text_are_as_before(backbones):
    _, processor = joined(backbones)
    plain = LorgnetteCollator(processor)([row | {"text": row["text"][0]} for row in listed()])
    one = LorgnetteCollator(processor)([row | {"text": row["text"][:1]} for row in listed()])
    assert plain.keys() == one.keys()
    assert all(torch.equal(plain[name], one[name]) for name in plain)


def test_each_question_has_the_answer_at_its_place(backbones):
    """A row for each pair, and its picture once."""
    model, processor = joined(backbones, dropout=0.0)
    rows = [row | {"question": [f"Which is {n}?" for n, _ in enumerate(row["text"])]} for row in listed()]
    collator = LorgnetteCollator(processor, query_column="question")
    batch = collator(rows)
    pairs = collator([row | {"text": text, "question": question} for row in rows
                      for text, question in zip(row["text"], row["question"], strict=True)])  # fmt: skip
    assert batch["image_rows"].tolist() == [0, 0, 0, 1, 2, 2]
    assert batch["row_index"].tolist() == [10, 10, 10, 11, 12, 12]
    assert len(batch["pixel_values"]) == len(TEXTS)
    assert torch.equal(batch["input_ids"], pairs["input_ids"])
    torch.testing.assert_close(model(**batch).loss, model(**pairs).loss)
    message = "row 10: column 'question' has 1, column 'text' has 3 texts: each question needs one answer"
    with pytest.raises(ValueError, match=message):
        collator([rows[0] | {"question": ["Why?"]}])
    with pytest.raises(ValueError, match="row 10: column 'question', text 1 of 3, is empty"):
        collator([rows[0] | {"question": ["Why?", " ", "What?"]}])


def test_stage_1_has_a_row_for_each_text_and_each_picture_once():
    processor = LorgnetteProcessor(tiny.image_processor(), None, qformer_tokenizer=tiny.bert_tokenizer())
    collator = LorgnetteCollator(processor)
    batch = collator(listed())
    assert batch["input_ids"].shape[0] == 6
    assert len(batch["pixel_values"]) == len(TEXTS)
    assert batch["image_rows"].tolist() == [0, 0, 0, 1, 2, 2]
    assert batch["image_ids"].tolist() == [10, 11, 12]
    assert batch["row_index"].tolist() == [10, 10, 10, 11, 12, 12]
    for wrong, error, message in (
        (None, TypeError, "row 11: image_id is None; rows of one picture need the same integer or string"),
        (1.5, TypeError, "row 11: image_id is 1.5"),
        (2**63, ValueError, "row 11: image_id is 9223372036854775808, which has more than 64 bits"),
    ):
        with pytest.raises(error, match=message):
            collator(listed(image_id=[7, wrong, 7]))
    numbered = collator(listed(image_id=[7, "a.jpg", 7]))["image_ids"].tolist()
    assert numbered[0] == numbered[2] == 7 != numbered[1]
    unnumbered = [{k: v for k, v in row.items() if k != "index"} for row in listed()]
    assert "image_ids" not in collator(unnumbered)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], ValueError, "row 11: column 'text' is an empty list: the picture has no text"),
        (["a", None, "b"], ValueError, "row 11: column 'text', text 1 of 3, is None"),
        (["a", "b", "  "], ValueError, "row 11: column 'text', text 2 of 3, is empty"),
        (["a", 5], TypeError, "row 11: column 'text', text 1 of 2, holds a int, 5; a string is needed"),
    ],
)
def test_a_bad_text_is_named_with_its_place(backbones, texts, error, message):
    rows = listed()
    rows[1]["text"] = texts
    for processor in (
        joined(backbones)[1],
        LorgnetteProcessor(tiny.image_processor(), None, qformer_tokenizer=tiny.bert_tokenizer()),
    ):
        with pytest.raises(error, match=message):
            LorgnetteCollator(processor)(rows)


def test_a_text_that_is_too_long_is_named_with_its_place(backbones):
    for processor in (
        joined(backbones)[1],
        LorgnetteProcessor(tiny.image_processor(), None, qformer_tokenizer=tiny.bert_tokenizer()),
    ):
        rows = listed()
        rows[0]["text"] = ["a cat", "a cat " * 100]
        with pytest.raises(ValueError, match=r"row 10: text 1 of 2: \d+ tokens are more than the maximum of 120"):
            LorgnetteCollator(processor, max_length=120)(rows)


def test_messages_and_a_list_of_texts_exclude_each_other(backbones):
    chat = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    with pytest.raises(ValueError, match="row 10: the row has messages and a list of texts in 'text'"):
        LorgnetteCollator(joined(backbones)[1])([row | {"messages": chat} for row in listed()])


def test_a_batch_shows_each_text_behind_its_prompt_once(backbones):
    _, processor = joined(backbones)
    runs = rows_of(LorgnetteCollator(processor)(listed()), processor)
    learned = [[text for text, kind in row if kind == "learned"] for row in runs]
    ends = processor.tokenizer.decode(processor.encode_answer("x")[-1:])
    assert [" ".join(each.split()) for each in "".join(learned[0]).split(ends)[:3]] == TEXTS[0]
    assert sum(kind == "picture" for _, kind in runs[0]) == 1
    shown = "".join(text for text, kind in runs[0] if kind == "prompt")
    single = rows_of(LorgnetteCollator(processor)([listed()[1] | {"text": TEXTS[0][0]}]), processor)[0]
    assert shown == "".join(text for text, kind in single if kind == "prompt")


def numbered_texts(folder, count=5):
    rows = [{"image": f"{n}.png", "text": [f"picture {n} text {k}" for k in range(count)]} for n in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
def test_so_many_texts_are_drawn_anew_in_each_epoch(tmp_path, streaming):
    data = DataArguments(
        dataset=numbered_texts(tmp_path),
        eval_split="train",
        texts_per_image="2",
        streaming=streaming,
        shuffle_buffer_size=0,
    )
    seeds = RowSeeds(3, augment=False, texts=data.num_texts, columns=["text"])
    train, evaluation = load_pairs(data, evaluate=True, seed=3, row_seeds=seeds)

    def drawn(skip=0):
        rows = train.skip(skip).take(6) if streaming else train
        return [row["text"] for row in rows]

    first = drawn()
    assert all(len(texts) == 2 and len(set(texts)) == 2 and sorted(texts) == texts for texts in first)
    assert drawn() == first
    if not streaming:
        seeds.on_epoch_begin(None, TrainerState(epoch=1.0), None)
    assert drawn(6) != first
    assert [row["text"] for row in evaluation] == [[f"picture {n} text {k}" for k in (0, 1)] for n in range(6)]
    every = {text for epoch in range(30) for text in _epoch(seeds, train, epoch)[0]} if not streaming else None
    assert every is None or every == {f"picture 0 text {k}" for k in range(5)}


def _epoch(seeds, rows, epoch):
    seeds.on_epoch_begin(None, TrainerState(epoch=float(epoch)), None)
    return [row["text"] for row in rows]


def test_texts_are_drawn_of_lists_that_were_checked(tmp_path):
    """And of chats none are: a message is no text."""
    rows = [{"image": "a.png", "text": ["a", "b", "c"], "question": ["Q?", "Q?"]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    data = DataArguments(dataset=str(tmp_path / "rows.jsonl"), texts_per_image="2", query_column="question")
    seeds = RowSeeds(0, augment=False, texts=2, columns=["text", "question"])
    train, _ = load_pairs(data, evaluate=False, seed=0, row_seeds=seeds)
    with pytest.raises(ValueError, match="row 0: column 'text' has 3, column 'question' has 2 texts"):
        train[0]
    seeds.draws = False
    assert len(train[0]["text"]) == 3
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"image": "a.png", "messages": chat}))
    data = DataArguments(dataset=str(tmp_path / "chats.jsonl"), texts_per_image="1")
    with pytest.raises(ValueError, match=r"texts_per_image is 1, and .*chats\.jsonl has chats"):
        load_pairs(data, evaluate=False, seed=0, row_seeds=seeds)


def test_lists_of_class_labels_are_their_names(tmp_path):
    features = Features(image=Value("string"), text=List(ClassLabel(names=["cat", "dog"])))
    Dataset.from_dict({"image": ["a.png"], "text": [[1, 0]]}, features=features).save_to_disk(tmp_path / "saved")
    train, _ = load_pairs(DataArguments(dataset=str(tmp_path / "saved")), evaluate=False, seed=0)
    assert train[0]["text"] == ["dog", "cat"]


@pytest.mark.parametrize("given", ["0", "-1", "some", "1.5"])
def test_a_number_of_texts_is_all_or_from_1(given):
    with pytest.raises(ValueError, match=f"texts_per_image is '{given}'; it is `all`, or a number from 1"):
        DataArguments(dataset="x", texts_per_image=given)


def test_rows_of_one_file_have_one_number(tmp_path):
    """Those with a picture inside the file have their row's, whatever their name."""
    rows = [{"image": name, "text": f"text {n}"} for n, name in enumerate(["a.png", "b.png", "a.png"])]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, _ = load_pairs(DataArguments(dataset=str(tmp_path / "rows.jsonl")), evaluate=False, seed=0)
    first, second, third = (row["image_id"] for row in found)
    assert first == third != second
    inside = [{"bytes": b"1", "path": "0.jpg"}, {"bytes": b"2", "path": "0.jpg"}]
    Dataset.from_dict({"image": inside, "text": ["a", "b"]}).to_parquet(tmp_path / "rows.parquet")
    found, _ = load_pairs(DataArguments(dataset=str(tmp_path / "rows.parquet")), evaluate=False, seed=0)
    assert [row["image_id"] for row in found] == [0, 1]
    Dataset.from_dict({"image": inside, "text": ["a", "b"], "image_id": [5, 5]}).to_parquet(tmp_path / "own.parquet")
    found, _ = load_pairs(DataArguments(dataset=str(tmp_path / "own.parquet")), evaluate=False, seed=0)
    assert [row["image_id"] for row in found] == [5, 5]


def test_texts_of_a_batch_are_counted(backbones):
    _, processor = joined(backbones)
    rows = listed()
    assert int(count_texts(LorgnetteCollator(processor)(rows))) == 6
    assert int(count_texts(LorgnetteCollator(processor, pack_to=200)(rows))) == 6
    assert int(count_texts(LorgnetteCollator(processor, pack_to=200)(apart(rows)))) == 6
    assert count_texts(LorgnetteCollator(processor)(apart(rows))) == 6
    retrieval = LorgnetteProcessor(tiny.image_processor(), None, qformer_tokenizer=tiny.bert_tokenizer())
    assert count_texts(LorgnetteCollator(retrieval)(rows)) == 6


def test_a_resumed_run_learns_the_texts_of_the_uninterrupted_one(backbones, tmp_path):
    rows = [{"image": str(tmp_path / f"{n}.png"), "text": [f"{text} {k}" for k in range(4)]} for n, text in
            enumerate(["a cat", "a dog", "the car", "a bird", "the road", "a red dog"])]  # fmt: skip
    for n in range(len(rows)):
        tiny.picture(n).save(tmp_path / f"{n}.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataArguments(dataset=str(tmp_path / "rows.jsonl"), texts_per_image="1")

    def run(name, seed, texts=data.num_texts):
        set_seed(seed)
        seeds = RowSeeds(0, augment=False, texts=texts, columns=["text"])
        found, _ = load_pairs(data, evaluate=False, seed=0, row_seeds=seeds)
        saving = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
        built = trainer(*joined(backbones), tmp_path / name, rows=found, per_device_train_batch_size=2, **saving)
        built.add_callback(seeds)
        return built

    def losses(trainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = run("whole", seed=0)
    whole.train()
    resumed = run("resumed", seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    others = run("others", seed=0, texts=None)
    others.train()
    assert losses(others) != losses(whole)
