"""Stage 1 with several texts a picture: the losses of pairs in rows of their own, for one pass of the picture."""

from unittest import mock

import pytest
import torch
from tiny import picture
from tiny_models import NUM_PATCHES, NUM_QUERY_TOKENS, SIGLIP2, bert
from tiny_retrieval import WORDS, processor, retriever, text_qformer

from lorgnette import LorgnetteForImageTextRetrieval
from lorgnette.modeling import modeling_retrieval
from lorgnette.modeling.modeling_contrastive import draw_negatives, matching_loss


SEVERAL = {  # three pictures: their texts, in the rows' order; two captions are of two pictures
    "equal": [["the cat", "a cat"], ["a dog", "the red dog"], ["the cat", "a bird on the road"]],
    "ragged": [["the cat", "a cat", "a picture of a cat"], ["a dog"], ["the cat", "a bird on the road"]],
    "mixed": [
        ["the cat", "a cat", "a bird"],
        ["a dog", "the red dog", "a car"],
        ["the cat", "a road", "a car", "a tree"],
    ],
}
MIXED = [2, 0, 1, 0, 2, 1, 2, 0, 1, 2]  # in no order: two rows of a data set may show one picture


def lists(kind: str, **fields) -> dict[str, torch.Tensor]:
    rows = [n for n, texts in enumerate(SEVERAL[kind]) for _ in texts]
    texts = [text for texts in SEVERAL[kind] for text in texts]
    if kind == "mixed":
        order = sorted(range(len(rows)), key=[rows.index(n) + MIXED[:i].count(n) for i, n in enumerate(MIXED)].index)
        rows, texts = [rows[n] for n in order], [texts[n] for n in order]
        assert rows == MIXED
    images = [picture(n) for n in range(3)]
    batch = dict(processor()(images=images, text=texts, padding=True, return_tensors="pt"))
    return batch | {"image_rows": torch.tensor(rows)} | fields


def in_rows_of_their_own(batch: dict[str, torch.Tensor], image_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = batch["image_rows"]
    alone = {name: tensor for name, tensor in batch.items() if name != "image_rows"}
    pictures = {
        name: alone[name][rows] for name in ("pixel_values", "vision_features", "pixel_attention_mask") if name in alone
    }
    return alone | pictures | {"image_ids": image_ids[rows]}


def losses_and_gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(0)
    out = model(**batch)
    out.loss.backward()
    return {n: out[n].detach() for n in ("loss", "loss_itc", "loss_itm", "loss_itg")} | {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


class TestEqualsPairsInRowsOfTheirOwn:
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("kind", SEVERAL)
    def test_losses_and_gradients(self, kind, attention):
        model, batch = retriever(attn_implementation=attention), lists(kind)
        pairs = in_rows_of_their_own(batch, torch.tensor([30, 10, 20]))
        found, expected = (losses_and_gradients(model, each) for each in (batch, pairs))
        assert_equal(found, expected)
        unknown = model(**pairs | {"image_ids": None})  # as if each row had another picture
        assert abs(unknown.loss_itc.item() - expected["loss_itc"].item()) > 1e-3

    @pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.0, 1.0, 1.0)])
    def test_each_loss_by_itself(self, weights):
        model = retriever(**dict(zip(("itc_weight", "itm_weight", "itg_weight"), weights, strict=True)))
        batch = lists("ragged")
        found, expected = model(**batch), model(**in_rows_of_their_own(batch, torch.arange(3)))
        assert found.keys() == expected.keys()
        for name in found.keys() - {"logits_per_image"}:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)

    def test_two_pictures_of_one_number_in_a_batch_of_lists(self):
        """A row with a list, and a row of the same picture by itself."""
        model, batch = retriever(), lists("ragged")
        batch["pixel_values"][2] = batch["pixel_values"][0]
        ids = torch.tensor([5, 6, 5])
        assert_equal(
            losses_and_gradients(model, batch | {"image_ids": ids}),
            losses_and_gradients(model, in_rows_of_their_own(batch, ids)),
        )

    def test_checkpointed(self):
        plain, checkpointed = retriever().train(), retriever().train()
        checkpointed.gradient_checkpointing_enable()
        expected, found = (losses_and_gradients(model, lists("mixed")) for model in (plain, checkpointed))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    def test_padding_of_pictures(self):
        model_class, config = SIGLIP2
        torch.manual_seed(0)
        model = LorgnetteForImageTextRetrieval.from_backbones(
            model_class(config), qformer=bert(vocab_size=WORDS), processor=processor(), image_text_hidden_size=8
        ).eval()
        mask = torch.ones(3, NUM_PATCHES)
        mask[1, 9:] = mask[2, 4:] = 0
        batch = lists("mixed", vision_features=torch.randn(3, NUM_PATCHES, 24), pixel_attention_mask=mask)
        del batch["pixel_values"]
        found = losses_and_gradients(model, batch)
        assert_equal(found, losses_and_gradients(model, in_rows_of_their_own(batch, torch.arange(3))))
        assert (found["loss"] - model(**batch | {"pixel_attention_mask": None}).loss).abs() > 1e-5

    def test_cosines_are_of_pictures_and_texts(self):
        model, batch = retriever(), lists("ragged")
        cosines = model(**batch).logits_per_image
        assert cosines.shape == (3, 6)
        of_pairs = model(**in_rows_of_their_own(batch, torch.arange(3)), return_loss=False).logits_per_image
        torch.testing.assert_close(cosines[batch["image_rows"]], of_pairs, atol=1e-6, rtol=0)
        torch.testing.assert_close(model(**batch, return_loss=False).logits_per_image, cosines, atol=1e-6, rtol=0)

    def test_eval_repeats(self):
        model, batch = retriever(), lists("mixed")
        assert torch.equal(model(**batch).loss, model(**batch).loss)


class TestOnePassAPicture:
    @staticmethod
    def shapes(model, batch):
        recorded = []
        hook = model.qformer.encoder.layer[0].register_forward_pre_hook(
            lambda layer, args: recorded.append(tuple(args[0].shape[:2]))
        )
        model(**batch)
        hook.remove()
        return recorded

    def test_the_queries_run_once_where_that_is_cheaper(self):
        model, batch = retriever(), lists("equal")
        length = batch["input_ids"].shape[1]
        written, alone, matched = self.shapes(model, batch)
        assert written == (3, NUM_QUERY_TOKENS + 2 * length)
        assert (alone, matched) == ((6, length), (18, NUM_QUERY_TOKENS + length))
        # texts that fill two others up cost more than the queries
        uneven = lists("ragged")
        length = uneven["input_ids"].shape[1]
        assert 3 * (NUM_QUERY_TOKENS + 3 * length) > 6 * (NUM_QUERY_TOKENS + length)
        assert self.shapes(model, uneven)[0] == (6, NUM_QUERY_TOKENS + length)
        # queries alone, without generation
        assert self.shapes(retriever(itg_weight=0.0), batch)[0] == (3, NUM_QUERY_TOKENS)

    def test_keys_and_values_are_made_once_and_copied_for_drawn_pictures_alone(self):
        model, batch, recorded, copied = retriever(), lists("equal"), [], []
        attention = model.qformer.encoder.layer[0].crossattention.attention
        attention.key.register_forward_pre_hook(lambda _, args: recorded.append(len(args[0])) or None)
        select = torch.Tensor.index_select
        with mock.patch.object(
            torch.Tensor,
            "index_select",
            lambda x, dim, rows: (x.ndim == 4 and copied.append(len(rows))) or select(x, dim, rows),
        ):
            model(**batch)
        assert recorded == [3]
        layers = sum(layer.has_cross_attention for layer in model.qformer.encoder.layer)
        assert copied == [6] * 2 * layers  # of eighteen rows the six whose picture is drawn

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_folded_rows_are_those_that_copy(self, attention):
        model, image = text_qformer(attention), torch.randn(2, 7, 24)
        ids, rows = torch.randint(1, 60, (8, 6)), torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
        copied = model(image, input_ids=ids, image_rows=rows).last_hidden_state
        folded = model(image, input_ids=ids, image_rows=rows, shared_rows=6).last_hidden_state
        torch.testing.assert_close(folded, copied, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_texts_beside_each_other_are_blind_to_each_other(self, attention):
        model, image = text_qformer(attention), torch.randn(2, 7, 24)
        ids = torch.randint(1, 60, (2, 3, 5))
        mask = torch.ones_like(ids)
        mask[0, 1, 3:] = mask[1, 2] = 0  # the last is no text
        with torch.no_grad():
            states = model(image, input_ids=ids, attention_mask=mask, causal_text=True).last_hidden_state
            other = ids.clone()
            other[:, 1] = torch.randint(1, 60, (2, 5))
            replaced = model(image, input_ids=other, attention_mask=mask, causal_text=True).last_hidden_state
            assert states.shape == (2, 3 + 15, 16)
            unchanged = [*range(3 + 5), *range(3 + 10, 3 + 15)]  # the queries, the first and the third text
            assert torch.equal(states[:, unchanged], replaced[:, unchanged])
            assert (states[:, 8:13] - replaced[:, 8:13]).abs().amax(dim=(1, 2)).min() > 1e-3
            for n in range(3):  # as if each stood alone, with positions from the start
                alone = model(image, input_ids=ids[:, n], attention_mask=mask[:, n], causal_text=True).last_hidden_state
                for row in range(2):
                    length = int(mask[row, n].sum())
                    start = 3 + 5 * n
                    torch.testing.assert_close(
                        states[row, start : start + length], alone[row, 3 : 3 + length], atol=1e-5, rtol=0
                    )


class TestNegatives:
    def test_matching_draws_none_of_the_same_picture_or_caption(self):
        model, drawn = retriever().train(), []

        def recorded(logits, candidates, generator=None):
            has, negatives = draw_negatives(logits, candidates, generator)
            drawn.append(negatives)
            return has, negatives

        batch = lists("ragged", image_ids=torch.tensor([1, 2, 1]))  # the first and the last are one picture
        batch["input_ids"][5] = batch["input_ids"][3]  # which then has the caption of the second
        with mock.patch.object(modeling_retrieval, "draw_negatives", recorded):
            for _ in range(60):
                model(**batch)
        texts, images = torch.stack(drawn[::2]), torch.stack(drawn[1::2])
        assert set(texts[:, 3].tolist()) == {0, 1, 2, 4}  # not its own, nor the fifth, which says the same
        assert set(images[:, [0, 1, 2, 4]].flatten().tolist()) == {3}  # no other has another number

    def test_many_draws(self):
        model, batch = retriever().train(), lists("mixed", image_ids=torch.tensor([4, 4, 9]))
        captions = [tuple(ids.tolist()) for ids in batch["input_ids"]]
        numbers = batch["image_ids"][batch["image_rows"]].tolist()
        said = {number: {c for c, n in zip(captions, numbers, strict=True) if n == number} for number in numbers}
        pairs, matched, labels = set(zip(numbers, captions, strict=True)), [], []
        inner = model.match_logits

        def recorded(image, text, **kwargs):
            matched.append((image["image_rows"], text["input_ids"]))
            return inner(image, text, **kwargs)

        def loss_of(logits, matches):
            labels.append(matches)
            return matching_loss(logits, matches)

        with (
            mock.patch.object(model, "match_logits", recorded),
            mock.patch.object(modeling_retrieval, "matching_loss", loss_of),
        ):
            for _ in range(60):
                model(**batch)
        wrong = set()
        for (rows, ids), matches in zip(matched, labels, strict=True):
            shown = zip(batch["image_ids"][rows].tolist(), (tuple(each.tolist()) for each in ids), strict=True)
            for pair, match in zip(shown, matches.tolist(), strict=True):
                assert match != 1 or pair in pairs
                if match == 0:
                    wrong.add(pair)
            assert (matches == 1).sum() == 10
        # neither a text of the picture, nor one that says the same; and each other one
        assert wrong == {(number, caption) for number in said for caption in captions if caption not in said[number]}


class TestWrongInput:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"image_rows": torch.tensor([0, 0, 1, 1, 3, 2])},
                "Row 4 of the batch: image_rows is 3, and the batch has 3",
            ),
            ({"image_rows": torch.tensor([0, 0, 1, -1, 2, 2])}, "Row 3 of the batch: image_rows is -1"),
            (
                {"image_rows": torch.tensor([0, 0, 2, 2, 2, 2])},
                "1 of the 3 pictures of the batch have no text.*picture 1",
            ),
            ({"image_rows": torch.tensor([0, 0, 1])}, "3 pictures and 6 texts"),
            (
                {"image_ids": torch.arange(6)},
                "image_ids has 6 numbers, and the batch 3 pictures and 6 texts: it needs 3",
            ),
            (
                {"row_index": torch.arange(3)},
                "row_index has 3 numbers, and the batch 3 pictures and 6 texts: it needs 6",
            ),
            ({"image_ids": torch.tensor([1, 1, 1])}, "Row 0 of the batch and the 5 others .* same caption or picture"),
        ],
    )
    def test_rows_and_numbers_that_do_not_fit(self, fields, message):
        with pytest.raises(ValueError, match=message):
            retriever()(**lists("equal") | fields)

    def test_pixels_that_are_not_finite_name_the_row(self):
        batch = lists("equal", row_index=torch.arange(10, 16))
        batch["pixel_values"][1, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="Row 12 of the data set: image"):
            retriever()(**batch)
