"""What all prompts of a batch begin with is run once: the same loss and gradients, and fewer tokens through the LM."""

import pytest
import torch
from tiny_models import QFORMER, SCALED, TEXT, inputs, language_model, model
from tiny_training import joined, pairs, write_backbones
from transformers import AutoModelForCausalLM, MiniMaxConfig

from lorgnette import LorgnetteCollator
from lorgnette.assembly.shared_prefix import can_share


SHARED = 4  # of the six tokens before the picture


def batch_of(built, rows: int = 3) -> dict[str, torch.Tensor]:
    """Rows that begin alike, the last of them shorter."""
    batch = inputs(rows=rows)
    batch["input_ids"][:, :SHARED] = batch["input_ids"][0, :SHARED]
    batch["attention_mask"][-1, -2:] = 0
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == built.config.image_token_id, -100)
    labels[:, :11] = -100
    return batch | {"labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}


def without_dropout(**parts):
    """A model that draws nothing: draws could not be the same for fewer tokens."""
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    built = model(qformer_config=QFORMER | quiet, **parts)
    for module in built.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return built.train()


def widths(built) -> list[tuple[int, int]]:
    """Rows and tokens of each pass through the language model's decoder, from now on."""
    recorded: list[tuple[int, int]] = []
    decoder = built.language_model.base_model
    decoder.register_forward_pre_hook(
        lambda _, __, given: recorded.append(tuple(given["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    return recorded


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [*((name, "eager") for name in (*TEXT, *SCALED)), *((name, "sdpa") for name in (*TEXT, "cohere", "granite"))],
)
def test_loss_and_gradients_are_the_plain_runs(architecture: str, attention: str):
    built = without_dropout(text=architecture, attn_implementation=attention)
    batch, recorded = batch_of(built), widths(built)
    losses, gradients = [], []
    for shared in ({}, {"shared_input_ids": batch["input_ids"][:, :SHARED]}):
        built.zero_grad()
        loss = built(**batch, **shared).loss
        loss.backward()
        losses.append(loss)
        gradients.append({name: p.grad.clone() for name, p in built.named_parameters() if p.requires_grad})
    assert recorded == [(3, 15), (1, SHARED), (3, 15 - SHARED)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    assert any(gradient.any() for gradient in gradients[1].values())


def test_a_sliding_window_may_be_shorter_than_what_is_shared():
    built, shared = without_dropout(text="gemma3_text"), 18
    assert built.language_model.config.sliding_window < shared
    batch = inputs(rows=2, text_tokens=20)
    batch["input_ids"][:, :shared] = batch["input_ids"][0, :shared]
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :25] = -100
    found = []
    for kwargs in ({}, {"shared_input_ids": batch["input_ids"][:, :shared]}):
        built.zero_grad()
        loss = built(**batch, **kwargs).loss
        loss.backward()
        found.append((loss, {name: p.grad.clone() for name, p in built.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_the_collator_counts_what_prompts_have_in_common(tmp_path):
    built, processor = joined(write_backbones(tmp_path))
    collator = LorgnetteCollator(processor, query_column="query")
    rows = [{**row, "query": query} for row, query in zip(pairs(2), ("red or blue?", "red or green?"), strict=True)]
    batch = collator(rows)
    first, second = batch["input_ids"]
    shared = batch["shared_input_ids"].shape[1]
    assert torch.equal(batch["shared_input_ids"], batch["input_ids"][:, :shared])
    assert torch.equal(first[:shared], second[:shared])
    assert first[shared] != second[shared]

    alike = LorgnetteCollator(processor)(pairs(3))
    assert alike["shared_input_ids"].shape[1] == alike["input_ids"][0].tolist().index(processor.image_token_id) > 0
    recorded = widths(built.train())
    built(**alike)
    assert [rows for rows, _ in recorded] == [1, 3]
    assert sum(tokens for _, tokens in recorded) == alike["input_ids"].shape[1]

    assert "shared_input_ids" not in LorgnetteCollator(processor)(pairs(1))
    assert "shared_input_ids" not in LorgnetteCollator(processor, pack_to=256)(pairs(3))


def test_of_prompts_without_pictures_a_token_is_left_to_each(tmp_path):
    _, processor = joined(write_backbones(tmp_path))
    rows = [
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]}
        for answer in ("good day", "good night")
    ]
    batch = LorgnetteCollator(processor)(rows)
    first_label = (batch["labels"][0] != -100).nonzero()[0].item()
    assert batch["shared_input_ids"].shape == (2, first_label - 1)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda batch: batch["input_ids"][2, 1].add_(1), r"Row 2 .*not those of the batch's shared_input_ids"),
        (lambda batch: batch["attention_mask"][1, 0].zero_(), r"Row 1 .*cannot be shared"),
        (lambda batch: batch["labels"][1, SHARED].fill_(5), r"Row 1 .*cannot be shared"),
    ],
)
def test_tokens_that_are_not_shared_are_refused(spoil, said):
    built = model().train()
    batch = batch_of(built)
    spoil(batch)
    with pytest.raises(ValueError, match=said):
        built(**batch, shared_input_ids=batch["input_ids"][:, :SHARED].clone())


def test_a_picture_is_not_shared():
    built = model().train()
    batch = batch_of(built)
    batch["input_ids"][:] = batch["input_ids"][0]
    with pytest.raises(ValueError, match=r"Row 0 .*a picture"):
        built(**batch, shared_input_ids=batch["input_ids"][:, :8])


def test_evaluation_and_checkpointing_run_all_rows_in_full():
    built = model().train()
    batch, recorded = batch_of(built), widths(built)
    batch["shared_input_ids"] = batch["input_ids"][:, :SHARED]
    assert built.eval()(**batch).logits.shape[1] == 15
    built.train().gradient_checkpointing_enable()
    assert not can_share(built.language_model, {})
    built(**batch).loss.backward()
    assert set(recorded) == {(3, 15)}


def test_what_asks_for_all_positions_is_not_shared():
    assert can_share(language_model("llama"), {"position_ids": None, "use_cache": False})
    assert not can_share(language_model("llama"), {"output_hidden_states": True})
    assert not can_share(language_model("llama"), {"position_ids": torch.arange(3)[None]})


def test_what_is_no_key_and_no_value_is_not_shared():
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MiniMaxConfig(**sizes, layer_types=["full_attention", "linear_attention"], num_local_experts=2)
    assert not can_share(AutoModelForCausalLM.from_config(config), {})
