"""`LorgnetteCollator`: labels on the output alone, and bad rows named."""

import pickle

import pytest
import tiny
import torch

from lorgnette import LorgnetteCollator, LorgnetteProcessor


QUERIES = 4
LMS = {"chatml": tiny.chat_tokenizer, "gemma": tiny.gemma_like_tokenizer, "plain": tiny.plain_tokenizer}
ROWS = [
    {"image": tiny.picture(0), "text": "A cat."},
    {"image": tiny.picture(1), "text": "A much longer caption: <image> <|im_end|> of a dog."},
]


def make(lm="chatml", **kwargs):
    return LorgnetteProcessor(tiny.image_processor(), LMS[lm](), num_query_tokens=QUERIES, **kwargs)


def chat(*contents, **columns):
    roles = ("user", "assistant") * len(contents)
    return {
        "messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)],
        **columns,
    }


def learnt(processor, batch, row):
    return processor.decode(batch["labels"][row][batch["labels"][row] != -100])


class TestColumns:
    @pytest.mark.parametrize("lm", LMS)
    def test_labels_are_the_output_and_its_end(self, lm):
        processor = make(lm, system_prompt=None if lm == "gemma" else "Be brief.")
        batch = LorgnetteCollator(processor)(ROWS)
        end = processor.decode(processor.encode_example("")[1]).strip()
        for row, example in enumerate(ROWS):
            assert learnt(processor, batch, row).strip() == example["text"] + end
            labels, ids, mask = (batch[name][row] for name in ("labels", "input_ids", "attention_mask"))
            assert torch.equal(ids[labels != -100], labels[labels != -100])
            assert (labels[ids == processor.image_token_id] == -100).all()
            assert (ids == processor.image_token_id).sum() == QUERIES
            # right padding: prompt, output, padding, in this order
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)
            assert (labels[mask == 0] == -100).all()
            prompt = processor(images=example["image"], text=processor.build_prompt(), return_tensors="pt")
            assert torch.equal(ids[: prompt["input_ids"].shape[1]], prompt["input_ids"][0])
        expected = processor(images=[row["image"] for row in ROWS], return_tensors="pt", padding=True)["pixel_values"]
        assert torch.equal(batch["pixel_values"], expected)
        assert {name: value.dtype for name, value in batch.items() if name != "pixel_values"} == dict.fromkeys(
            ("input_ids", "attention_mask", "labels", "shared_input_ids", "supervised_positions"), torch.int64
        )

    def test_column_names_and_queries(self):
        processor = make()
        rows = [{"picture": tiny.picture(), "answer": "Red.", "question": "What colour?", "index": 7}]
        collator = LorgnetteCollator(processor, "picture", "answer", query_column="question")
        batch = collator(rows)
        assert "What colour?" in processor.decode(batch["input_ids"][0])
        assert batch["row_index"].tolist() == [7]
        batch = LorgnetteCollator(processor, "picture", "answer", query="Which <image>?")(rows)
        assert "Which <image>?" in processor.decode(batch["input_ids"][0])
        with pytest.raises(ValueError, match="query and query_column"):
            LorgnetteCollator(processor, query="a", query_column="b")

    def test_several_images_and_none(self):
        chat = [{"role": "user", "content": "Anything?"}, {"role": "assistant", "content": "Nothing."}]
        rows = [{"image": [tiny.picture(0), tiny.picture(1)], "text": "Two."}, {"messages": chat}]
        batch = LorgnetteCollator(make())(rows)
        assert batch["pixel_values"].shape[0] == 2
        assert (batch["input_ids"] == make().image_token_id).sum(1).tolist() == [2 * QUERIES, 0]

    def test_an_empty_list_of_images_is_named(self):
        with pytest.raises(ValueError, match="row 1 of the batch: column 'image' is an empty list"):
            LorgnetteCollator(make())([{"image": tiny.picture(), "text": "a"}, {"image": [], "text": "b"}])

    def test_features_in_place_of_images(self):
        rows = [{"vision_features": torch.full((5, 3), float(n)), "text": "A cat."} for n in range(2)]
        batch = LorgnetteCollator(make())(rows)
        assert "pixel_values" not in batch
        assert torch.equal(batch["vision_features"], torch.stack([row["vision_features"] for row in rows]))
        with pytest.raises(ValueError, match=r"differ in shape: \[\(4, 3\), \(5, 3\)\]"):
            LorgnetteCollator(make())([rows[0], {"vision_features": torch.zeros(4, 3), "text": "A dog."}])

    def test_instructions(self):
        processor = make(qformer_tokenizer=tiny.bert_tokenizer())
        rows = [
            {"image": [tiny.picture()] * 2, "text": "a", "q": "the cat?"},
            {"image": tiny.picture(), "text": "b", "q": "a"},
        ]
        batch = LorgnetteCollator(processor, query_column="q")(rows)
        texts = processor.qformer_tokenizer.batch_decode(batch["qformer_input_ids"], skip_special_tokens=True)
        assert texts == ["the cat?", "the cat?", "a"]
        assert batch["qformer_attention_mask"].shape == batch["qformer_input_ids"].shape

    def test_stage_1(self):
        processor = LorgnetteProcessor.from_backbones(tiny.image_processor(), None, qformer=tiny.bert_tokenizer())
        batch = LorgnetteCollator(processor)([{**row, "index": 3} for row in ROWS])
        assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "row_index", "image_ids"}
        assert processor.decode(batch["input_ids"][0]) == "[CLS] a cat. [SEP]" + " [PAD]" * int(
            (1 - batch["attention_mask"][0]).sum()
        )

    def test_workers_can_have_it(self):
        collator = pickle.loads(pickle.dumps(LorgnetteCollator(make())))
        loader = torch.utils.data.DataLoader(ROWS, batch_size=2, collate_fn=collator, num_workers=1)
        batch, expected = next(iter(loader)), LorgnetteCollator(make())(ROWS)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


class TestMessages:
    @pytest.mark.parametrize(
        "row",
        [
            chat([{"type": "text", "text": "What?"}, {"type": "image"}], "A cat.", image=tiny.picture()),
            chat([{"type": "text", "text": "What?"}, {"type": "image", "image": tiny.picture()}], "A cat."),
            chat("What?", [{"type": "text", "text": "A cat."}], image=[tiny.picture()]),
        ],
    )
    def test_one_turn_is_a_row_of_columns(self, row):
        expected = LorgnetteCollator(make(), query="What?")([{"image": tiny.picture(), "text": "A cat."}])
        batch = LorgnetteCollator(make())([row])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)

    def test_only_the_last_answer_is_learnt(self):
        processor = make()
        batch = LorgnetteCollator(processor)([chat("What?", "A cat.", "What colour?", "Black.", image=tiny.picture())])
        assert learnt(processor, batch, 0) == "Black.<|im_end|>"

    def test_the_caller_keeps_their_row(self):
        row = chat("What?", "A cat.", image=tiny.picture())
        LorgnetteCollator(make())([row])
        assert row["messages"][0]["content"] == "What?"

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (chat("What?", image=tiny.picture()), "the last of the messages has to be the assistant's"),
            ({"messages": []}, "the last of the messages"),
            (chat("What?", " ", image=tiny.picture()), "has to be text"),
            (chat("What?", [{"type": "image"}]), "has to be text"),
            (chat([{"type": "image"}], "A cat."), "1 parts .* 0 images"),
            (chat([{"type": "image"}], "A cat.", image=[tiny.picture()] * 2), "1 parts .* 2 images"),
            (
                chat([{"type": "image", "image": tiny.picture()}], "A cat.", image=tiny.picture()),
                "all have to be in the messages",
            ),
            (chat([{"type": "video"}], "A cat."), "video"),
        ],
    )
    def test_bad_chats(self, row, message):
        with pytest.raises(ValueError, match=f"row 0 of the batch: .*{message}"):
            LorgnetteCollator(make())([row])


class TestBadRows:
    @pytest.mark.parametrize(
        ("row", "kind", "message"),
        [
            ({"image": tiny.picture(), "text": ""}, ValueError, "'text' is empty"),
            ({"image": tiny.picture(), "text": " \n"}, ValueError, "'text' is empty"),
            ({"image": tiny.picture(), "text": None}, ValueError, "'text' is None"),
            ({"image": tiny.picture(), "text": ["a", 5]}, TypeError, "'text', text 1 of 2, holds a int, 5"),
            ({"image": tiny.picture(), "caption": "a"}, ValueError, r"no column 'text', only \['caption', 'image'"),
            ({"text": "a"}, ValueError, "no column 'image'.*remove_unused_columns=False"),
            ({"image": None, "text": "a"}, ValueError, "the image is None"),
            ({"image": "gone.png", "text": "a"}, FileNotFoundError, r"gone\.png"),
        ],
    )
    def test_named(self, row, kind, message):
        with pytest.raises(kind, match=f"^row 1 of the batch: .*{message}"):
            LorgnetteCollator(make())([ROWS[0], row])
        with pytest.raises(kind, match=f"^row 42: .*{message}"):
            LorgnetteCollator(make())([{**ROWS[0], "index": 41}, {**row, "index": 42}])

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"text": " "}, "'text' is empty"),
            ({"text": "\u200b"}, "'text' is '\\\\u200b', which the tokenizer turns into no tok"),  # a space of no width
            ({"text": "the cat the cat"}, "6 tokens are more than the maximum of 5"),
            ({"image": [tiny.picture(), tiny.picture()]}, "2 images; stage 1 needs one image and its texts"),
        ],
    )
    def test_pairs_that_stage_1_cannot_learn_from(self, row, message):
        processor = LorgnetteProcessor.from_backbones(tiny.image_processor(), None, qformer=tiny.bert_tokenizer())
        good = {"image": tiny.picture(), "text": "the cat", "index": 41}
        with pytest.raises(ValueError, match=f"^row 42: .*{message}"):
            LorgnetteCollator(processor, max_length=5)([good, {**good, "index": 42, **row}])

    def test_longer_than_the_context(self):
        processor = make()
        prompt, output = processor.encode_example(ROWS[1]["text"])
        limit = len(prompt) + len(output)
        LorgnetteCollator(processor, max_length=limit)(ROWS)
        message = (
            rf"row 1 .*: {limit} tokens are more than the maximum of {limit - 1}: "
            rf"{len(output)} of output, {QUERIES} for images"
        )
        with pytest.raises(ValueError, match=message):
            LorgnetteCollator(processor, max_length=limit - 1)(ROWS)
        processor.tokenizer.model_max_length = limit - 1
        with pytest.raises(ValueError, match=message):
            LorgnetteCollator(processor)(ROWS)

    def test_empty_batch(self):
        with pytest.raises(ValueError, match="empty"):
            LorgnetteCollator(make())([])
