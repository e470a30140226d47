"""Several pairs in a row: the loss and the logits of pairs that have a row of their own."""

import pytest
import tiny
import torch
from tiny_models import NUM_QUERY_TOKENS, TEXT, model
from tiny_packs import LENGTHS, documents, side_by_side
from transformers import AutoModelForCausalLM, BartConfig, Lfm2Config, MambaConfig

from lorgnette import LorgnetteCollator, LorgnetteProcessor
from lorgnette.assembly.packing import PADDING, check_sequences, packed, positions
from lorgnette.trainer.collator import packs


SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def padded(docs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    def column(name: str, padding: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([doc[name] for doc in docs], batch_first=True, padding_value=padding)

    return {
        "input_ids": column("input_ids", 0),
        "labels": column("labels", -100),
        "attention_mask": torch.stack([torch.arange(max(LENGTHS)) < length for length in LENGTHS]).long(),
        "pixel_values": torch.stack([doc["pixel_values"] for doc in docs]),
    }


def positions_of(batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
    return batch["sequence_ids"] == number


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", TEXT)
def test_packed_pairs_are_as_if_alone(architecture, attention):
    """Loss and gradients; and another text in one of them leaves the others' logits as they are, bit for bit."""
    built = model(text=architecture, qformer_config={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    built.language_model.set_attn_implementation(attention)
    for part in built.language_model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        elif isinstance(getattr(part, "dropout", None), float):  # OPT's
            part.dropout = 0.0
    found = []
    for batch in (padded(documents()), side_by_side(documents())):
        built.zero_grad()
        loss = built.train()(**batch).loss
        loss.backward()
        found.append((loss, {name: p.grad.clone() for name, p in built.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)

    built.eval()
    batch, changed = side_by_side(documents()), side_by_side(documents())
    changed["input_ids"][0, 9 + 2 + NUM_QUERY_TOKENS : 9 + 14] = 5
    with torch.no_grad():
        before, after = (built(**one).logits for one in (batch, changed))
        alone = [built(doc["input_ids"][None], pixel_values=doc["pixel_values"][None]).logits[0] for doc in documents()]
    assert not torch.equal(before[positions_of(batch, 1)], after[positions_of(batch, 1)])
    for number in (0, 2, 3, 4):
        assert torch.equal(before[positions_of(batch, number)], after[positions_of(batch, number)])
    for number, logits in enumerate(alone):
        torch.testing.assert_close(before[positions_of(batch, number)], logits, atol=1e-5, rtol=1e-5)


def test_positions_are_counted_from_each_document():
    ids = torch.tensor([[0, 0, 0, 1, 2, 2, PADDING], [3, 3, 4, 4, 4, PADDING, PADDING]])
    assert positions(ids).tolist() == [[0, 1, 2, 0, 0, 1, 0], [0, 1, 0, 1, 2, 0, 0]]


def test_flash_attention_is_given_lengths():
    """All tokens in one row, without padding; see test_gpu.py for what it makes of them."""
    built, batch = model(), side_by_side(documents())
    built.language_model.config._attn_implementation = "flash_attention_2"
    embeds = torch.arange(batch["input_ids"].numel(), dtype=torch.float).view(*batch["input_ids"].shape, 1)
    given = packed(built.language_model, batch["sequence_ids"], embeds, batch["labels"])
    kept = batch["sequence_ids"] != PADDING
    assert torch.equal(given["inputs_embeds"], embeds[kept][None])
    assert given["attention_mask"] is None
    assert given["cu_seq_lens_q"].tolist() == given["cu_seq_lens_k"].tolist() == [0, 9, 23, 30, 41, 62]
    assert (given["max_length_q"], given["max_length_k"]) == (21, 21)
    assert given["position_ids"].tolist() == [[place for length in LENGTHS for place in range(length)]]
    assert torch.equal(given["labels"], batch["labels"][kept][None])


def test_packs_are_few_and_hold_all():
    assert packs([5, 9, 3, 12, 2], 10) == [[3], [1], [0, 2, 4]]
    lengths = torch.randint(1, 60, (100,)).tolist()
    shared = packs(lengths, 64)
    assert sorted(n for pack in shared for n in pack) == list(range(100))
    assert max(sum(lengths[n] for n in pack) for pack in shared) <= 64
    assert len(shared) <= 1.25 * sum(lengths) / 64 + 1


def test_the_collator_packs_what_it_would_pad():
    processor = LorgnetteProcessor(tiny.image_processor(), tiny.chat_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS)
    texts = ["a cat", "a red car on the road", "the dog", "What is this? The bird, the cat and the dog."]
    rows = [{"image": tiny.picture(n), "text": text, "index": 10 + n} for n, text in enumerate(texts)]
    plain, shared = LorgnetteCollator(processor)(rows), LorgnetteCollator(processor, pack_to=150)(rows)
    assert "attention_mask" not in shared
    assert len(shared["input_ids"]) < len(rows)
    order = [index - 10 for index in shared["row_index"].tolist()]
    assert sorted(order) == [0, 1, 2, 3]
    assert torch.equal(shared["pixel_values"], plain["pixel_values"][order])
    for number, row in enumerate(order):
        columns, is_token = positions_of(shared, number), plain["attention_mask"][row] == 1
        for name in ("input_ids", "labels"):
            assert torch.equal(shared[name][columns], plain[name][row][is_token])
    outside = shared["sequence_ids"] == PADDING
    assert (shared["labels"][outside] == -100).all()
    assert (shared["input_ids"][outside] == processor.tokenizer.pad_token_id).all()


def test_errors_name_the_row_of_the_data_set():
    batch = side_by_side(documents()) | {"row_index": torch.tensor([70, 71, 72, 73, 74])}
    built = model()
    batch["pixel_values"][3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Row 73 of the data set: image 3"):
        built(**batch)
    batch["input_ids"][0, 9 + 3] = 5
    with pytest.raises(ValueError, match=r"Row 71 of the data set has 3 image placeholders"):
        built(**batch)


def test_what_cannot_be_kept_apart_is_refused():
    built, batch = model(), side_by_side(documents())
    with pytest.raises(ValueError, match="numbered in their order, from 0; these are"):
        built(**batch | {"sequence_ids": batch["sequence_ids"].flip(0)})
    with pytest.raises(ValueError, match="sequence_ids and position_ids"):
        built(**batch, position_ids=batch["input_ids"])
    built.language_model.config._attn_implementation = "paged|eager"
    with pytest.raises(ValueError, match=r"'paged\|eager' cannot mask sequences: take eager, sdpa"):
        built(**batch)
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(ValueError, match="MambaForCausalLM carries a state"):
        check_sequences(batch["sequence_ids"], mamba, {})
    convolved = AutoModelForCausalLM.from_config(Lfm2Config(layer_types=["conv", "full_attention"], **SMALL))
    with pytest.raises(ValueError, match="Lfm2ForCausalLM has layers of conv, in which sequences would see each other"):
        check_sequences(batch["sequence_ids"], convolved, {})
    sizes = {"vocab_size": 20, "d_model": 8, "decoder_layers": 1, "decoder_ffn_dim": 8, "decoder_attention_heads": 2}
    bart = AutoModelForCausalLM.from_config(BartConfig(**sizes))
    with pytest.raises(ValueError, match="BartForCausalLM takes no position_ids"):
        check_sequences(batch["sequence_ids"], bart, {})
    with pytest.raises(ValueError, match="pack_to is 0"):
        LorgnetteCollator(LorgnetteProcessor(tiny.image_processor(), tiny.chat_tokenizer()), pack_to=0)
    stage1 = LorgnetteProcessor.from_backbones(tiny.image_processor(), None, qformer=tiny.bert_tokenizer())
    with pytest.raises(ValueError, match="pack_to is for stage 2"):
        LorgnetteCollator(stage1, pack_to=64)
