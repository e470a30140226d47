"""Several texts for one prompt in a row: the loss and the logits of pairs that have a row of their own."""

import pytest
import torch
from tiny_models import NUM_QUERY_TOKENS, QFORMER, TEXT, VOCAB_SIZE, language_model, model, vision_model
from transformers import AutoModelForCausalLM, GPTNeoConfig, masking_utils
from transformers.masking_utils import create_causal_mask

from lorgnette import LorgnetteForConditionalGeneration
from lorgnette.assembly.packing import PADDING, _text_mask_function, check_sequences, packed, positions
from lorgnette.modeling.modeling_base import KV_CACHE


PLACEHOLDERS = [VOCAB_SIZE] * NUM_QUERY_TOKENS
# of each picture its prompt and its texts; the second prompt ends with its picture, and the texts of the first are past
# the sliding window of the tiny Gemma, counted in columns
ROWS = (
    ([5, 7, *PLACEHOLDERS, 9], [[11, 12, 13, 14, 15, 16, 17], [21, 22], [31, 32, 33, 34, 35], [41], [51, 52, 53]]),
    ([6, *PLACEHOLDERS], [[18, 19, 20], [23, 24, 25, 26]]),
    ([5, *PLACEHOLDERS, 10, 8], [[27, 28, 29]]),
)


def _batch(rows: list[dict[str, list[int]]], pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    padding = {"input_ids": 0, "labels": -100, "attention_mask": 0, "sequence_ids": PADDING, "text_ids": 0}
    columns = {
        name: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=padding[name]
        )
        for name in rows[0]
    }
    return columns | {"pixel_values": pictures}


def pictures() -> torch.Tensor:
    return torch.randn(len(ROWS), 3, 32, 32, generator=torch.Generator().manual_seed(0))


def pairs() -> dict[str, torch.Tensor]:
    """Each text in a row of its own."""
    made, shown = [], []
    for number, (prompt, texts) in enumerate(ROWS):
        for text in texts:
            ids = prompt + text
            made.append({"input_ids": ids, "labels": [-100] * len(prompt) + text, "attention_mask": [1] * len(ids)})
            shown.append(number)
    return _batch(made, pictures()[shown])


def together() -> dict[str, torch.Tensor]:
    """The texts of a picture in one row."""
    made = []
    for number, (prompt, texts) in enumerate(ROWS):
        row = {"input_ids": prompt[:-1], "labels": [-100] * (len(prompt) - 1), "text_ids": [0] * (len(prompt) - 1)}
        for place, text in enumerate(texts, start=1):
            # the first text goes on from the prompt itself; a placeholder is not written again
            again = prompt[-1] if place == 1 or prompt[-1] != VOCAB_SIZE else 0
            row["input_ids"] = row["input_ids"] + [again, *text]
            row["labels"] = row["labels"] + [-100, *text]
            row["text_ids"] = row["text_ids"] + [place] * (1 + len(text))
        made.append(row | {"sequence_ids": [number] * len(row["input_ids"])})
    return _batch(made, pictures())


def packed_together() -> dict[str, torch.Tensor]:
    """All in one row, one after another."""
    batch = together()
    kept = batch["sequence_ids"] != PADDING
    return {name: value if name == "pixel_values" else value[kept][None] for name, value in batch.items()}


def _without_dropout(**fields) -> torch.nn.Module:
    built = model(**fields, qformer_config={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    for part in built.language_model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        elif isinstance(getattr(part, "dropout", None), float):  # OPT's
            part.dropout = 0.0
    return built


def _loss_and_gradients(built: torch.nn.Module, batch: dict[str, torch.Tensor], **kwargs) -> tuple:
    built.zero_grad()
    loss = built.train()(**batch, **kwargs).loss
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in built.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", TEXT)
def test_texts_of_a_picture_are_as_pairs_of_their_own(architecture, attention):
    """Loss and gradients; and another text leaves the logits of all others as they are, bit for bit."""
    built = _without_dropout(text=architecture)
    built.language_model.set_attn_implementation(attention)
    expected = _loss_and_gradients(built, pairs())
    for batch in (together(), packed_together()):
        torch.testing.assert_close(_loss_and_gradients(built, batch), expected, atol=1e-5, rtol=1e-5)

    built.eval()
    batch, changed = together(), together()
    second = (batch["text_ids"] == 2) & (batch["sequence_ids"] == 0)
    changed["input_ids"][second & (batch["labels"] != -100)] = 3
    with torch.no_grad():
        before, after = built(**batch), built(**changed)
    assert before.logits.shape[:2] == batch["input_ids"].shape
    assert not torch.equal(before.logits[second], after.logits[second])
    assert torch.equal(before.logits[~second], after.logits[~second])
    torch.testing.assert_close(before.loss, expected[0], atol=1e-5, rtol=1e-5)  # in evaluation, too


def test_a_window_is_counted_in_positions():
    """Gemma's sliding layers see 16 tokens back: those of other texts do not count."""
    built = _without_dropout(text="gemma3_text")
    assert built.language_model.config.sliding_window == 16
    prompt, texts = ROWS[0]
    batch = together()
    last = (batch["sequence_ids"] == 0) & (batch["text_ids"] == len(texts))
    assert int(last[0].nonzero()[0]) > 16  # columns from the row's first
    built.eval()
    with torch.no_grad():
        logits = built(**batch).logits[last]
        ids = torch.tensor([prompt + texts[-1]])
        alone = built(input_ids=ids, pixel_values=pictures()[:1]).logits[0, len(prompt) - 1 :]
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_and_num_items_in_batch_change_nothing():
    built = _without_dropout()
    expected = _loss_and_gradients(built, pairs(), num_items_in_batch=50)
    assert not torch.isclose(expected[0], _loss_and_gradients(built, pairs())[0])
    torch.testing.assert_close(
        _loss_and_gradients(built, together(), num_items_in_batch=50), expected, atol=1e-5, rtol=1e-5
    )
    built.gradient_checkpointing_enable()
    torch.testing.assert_close(
        _loss_and_gradients(built, together(), num_items_in_batch=50), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_mask_is_transformers_own_without_its_vmap(attention, monkeypatch):
    batch, lm = together(), language_model("llama")
    lm.set_attn_implementation(attention)
    ids, embeds = (batch["sequence_ids"], batch["text_ids"]), torch.zeros(*batch["input_ids"].shape, 32)
    expected = create_causal_mask(
        config=lm.config,
        inputs_embeds=embeds,
        attention_mask=ids[0] != PADDING,
        **{KV_CACHE: None},
        and_mask_function=_text_mask_function(*ids, positions(*ids), window=None),
    )
    monkeypatch.setattr(masking_utils, "_vmap_expansion_sdpa", None)
    found = packed(lm, ids[0], embeds, None, ids[1])["attention_mask"]
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype


def test_positions_of_each_text_go_on_from_the_prompt():
    sequences = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, PADDING], [2, 2, 2, 2, 3, 3, 3, 3, 3, 3]])
    texts = torch.tensor([[0, 0, 1, 1, 2, 2, 1, 2, 2, 0], [0, 1, 2, 3, 0, 0, 0, 1, 1, 1]])
    assert positions(sequences, texts)[:, :9].tolist() == [[0, 1, 2, 3, 2, 3, 0, 0, 1], [0, 1, 1, 1, 0, 1, 2, 3, 4]]


def test_a_text_begins_with_the_embedding_of_the_prompts_end():
    """Which is that of a picture where the prompt ends with one: the ids of later texts cannot say so."""
    built, batch = model(), together()
    embeds = torch.arange(batch["input_ids"].numel(), dtype=torch.float).view(*batch["input_ids"].shape, 1)
    given = packed(built.language_model, batch["sequence_ids"], embeds, batch["labels"], batch["text_ids"])
    end = len(ROWS[1][0]) - 1
    second = end + 1 + len(ROWS[1][1][0])
    assert given["inputs_embeds"][1, second] == given["inputs_embeds"][1, end] == embeds[1, end]
    moved = (given["inputs_embeds"] != embeds)[..., 0]
    assert torch.equal(moved, ((batch["text_ids"] > 1) & (batch["labels"] == -100)))
    assert (given["labels"][moved] == -100).all()


def test_what_cannot_be_kept_apart_is_refused():
    built, batch = model(), together()
    wrong = batch["text_ids"].clone()
    wrong[1] = torch.tensor([0, 2, 1])[wrong[1]]
    with pytest.raises(ValueError, match=r"count its texts from 1; those of sequence 1 are \[0, 2, 1\]"):
        built(**batch | {"text_ids": wrong})
    with pytest.raises(ValueError, match="text_ids are given without the sequence_ids"):
        built(**{name: value for name, value in batch.items() if name != "sequence_ids"})
    built.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' cannot mask several texts of one prompt: take eager"):
        check_sequences(batch["sequence_ids"], built.language_model, {}, batch["text_ids"])


@pytest.mark.parametrize(("architecture", "field"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings")])
def test_padding_has_positions_within_the_context(architecture, field):
    """The first row is longer than the context, and so is the padding of the others."""
    batch, longest = together(), len(ROWS[0][0]) + len(ROWS[0][1][0])
    built = LorgnetteForConditionalGeneration.from_backbones(
        vision_model(),
        language_model(architecture, **{field: longest}),
        num_query_tokens=NUM_QUERY_TOKENS,
        qformer_config=QFORMER,
    )
    assert batch["input_ids"].shape[1] > longest + 2  # OPT has two more
    assert built.eval()(**batch).loss.isfinite()


def test_an_lm_that_counts_its_window_in_columns_is_refused():
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64}
    lm = AutoModelForCausalLM.from_config(GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]]))
    batch = together()
    with pytest.raises(ValueError, match="GPTNeoForCausalLM counts its window in columns, of which other texts take"):
        check_sequences(batch["sequence_ids"], lm, {}, batch["text_ids"])
    check_sequences(batch["sequence_ids"], lm, {})


def test_the_context_is_that_of_each_text():
    """A row may be longer than the context; a text with its prompt may not, and the error names its row."""
    built = model()
    longest = len(ROWS[0][0]) + len(ROWS[0][1][0])
    batch = together()
    built.language_model.config.max_position_embeddings = longest
    assert batch["input_ids"].shape[1] > longest
    built(**batch)
    built.language_model.config.max_position_embeddings = longest - 1
    with pytest.raises(ValueError, match=f"Row 30 of the data set has {longest} tokens; .* context is {longest - 1}"):
        built(**batch, row_index=torch.tensor([30, 31, 32]))
