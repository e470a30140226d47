"""`torch.compile`: training is one graph in either stage, of few shapes, and the numbers are the plain run's."""

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from tiny import bert_tokenizer, image_processor, picture
from tiny_models import NUM_QUERY_TOKENS, QFORMER, bert, inputs, model, vision_model
from tiny_training import joined, trainer, write_backbones
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from transformers import CompileConfig, set_seed

from lorgnette import LorgnetteCollator, LorgnetteForImageTextRetrieval, LorgnetteProcessor
from lorgnette.modeling import modeling_loss
from lorgnette.trainer.nan_guard import nan_guard


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def built(stage, multiple=None, lengths=(1, 3, 2)):
    """A model that trains, and a collator."""
    if stage == 1:
        processor = LorgnetteProcessor.from_backbones(
            image_processor(), None, qformer=bert_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS
        )
        torch.manual_seed(0)
        made = LorgnetteForImageTextRetrieval.from_backbones(
            vision_model(),
            qformer=bert(vocab_size=len(processor.qformer_tokenizer)),
            qformer_config=NO_DROPOUT,
            processor=processor,
        )
    else:
        processor = LorgnetteProcessor(image_processor(), tiny.chat_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS)
        made = model(processor=processor, qformer_config=QFORMER | NO_DROPOUT)
    return made.train(), LorgnetteCollator(processor, pad_to_multiple_of=multiple)


def rows_of(*lengths):
    return [{"image": picture(n), "text": "cat " * length, "index": n} for n, length in enumerate(lengths)]


def losses_and_gradients(run, own, batch):
    own.zero_grad()
    torch.manual_seed(3)  # stage 1 draws negatives
    loss = run(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in own.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("stage", [1, 2])
def test_one_graph_has_the_loss_and_the_gradients_of_the_plain_run(stage, multiple):
    own, collator = built(stage, multiple)
    batch = collator(rows_of(1, 3, 2))
    loss, gradients = losses_and_gradients(own, own, batch)
    compiled = torch.compile(own, backend="aot_eager", fullgraph=True)  # a break is an error
    found, found_gradients = losses_and_gradients(compiled, own, batch)
    torch.testing.assert_close(found, loss, atol=1e-6, rtol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_hundred_batches_of_varied_length_are_compiled_once(stage):
    own, collator = built(stage, multiple=32 if stage == 1 else 128)
    counter = CompileCounter()
    compiled = torch.compile(own, backend=counter)
    lengths = torch.randint(1, 8, (100, 3), generator=torch.Generator().manual_seed(0))
    lengths[:, 0] += lengths[:, 0] == lengths[:, 1]  # stage 1 wants captions that differ
    widths = set()
    for row in lengths.tolist():
        rows = rows_of(*row)
        widths.add(LorgnetteCollator(collator.processor)(rows)["input_ids"].shape[1])
        assert torch.isfinite(compiled(**collator(rows)).loss)
    assert len(widths) > 3
    assert counter.frame_count == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("text", [None, "gemma2"])
def test_the_compiled_head_sees_the_labels_positions_alone(text, monkeypatch):
    if text is None:
        own, collator = built(2, multiple=16)
    else:
        processor = LorgnetteProcessor(image_processor(), tiny.chat_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS)
        own = model(text=text, processor=processor, qformer_config=QFORMER | NO_DROPOUT).train()
        collator = LorgnetteCollator(processor, pad_to_multiple_of=16)
    batch = collator(rows_of(1, 3, 2))
    assert batch["input_ids"].shape[1] % 16 == batch["supervised_positions"].shape[0] % 16 == 0
    labelled = int((batch["labels"] != -100).sum())
    assert 0 < labelled <= len(batch["supervised_positions"]) < batch["labels"].numel() / 2
    loss = own(**batch).loss
    positions = batch.pop("supervised_positions")
    torch.testing.assert_close(own(**batch).loss, loss)  # without them the places are looked for
    vocabulary = own.config.text_config.vocab_size
    recorded = []

    def backend(graph, _inputs):
        nodes = [node for part in graph.modules() if isinstance(part, GraphModule) for node in part.graph.nodes]
        heads = [node.meta["example_value"] for node in nodes if node.target is torch._C._nn.linear]
        recorded[:] = [logits.shape[:-1].numel() for logits in heads if logits.shape[-1] == vocabulary]
        return graph

    def compiled_loss(at_once, **inputs):
        torch._dynamo.reset()
        monkeypatch.setattr(modeling_loss, "LOGITS_AT_ONCE", at_once * vocabulary)
        return torch.compile(own, backend=backend, fullgraph=True)(**inputs).loss

    torch.testing.assert_close(compiled_loss(10_000, **batch), loss)
    assert recorded == [batch["labels"][:, batch["shared_input_ids"].shape[1] :].numel()]
    batch["supervised_positions"] = positions
    torch.testing.assert_close(compiled_loss(10_000, **batch), loss)
    assert recorded == [len(positions)]
    torch.testing.assert_close(compiled_loss(8, **batch), loss)
    assert recorded == [8] * (len(positions) // 8)


@pytest.mark.parametrize("stage", [1, 2])
def test_what_is_wrong_is_told_by_a_compiled_model_too(stage):
    own, collator = built(stage, multiple=8)
    compiled = torch.compile(own, backend="aot_eager", fullgraph=True)
    batch = collator(rows_of(1, 3, 2))
    compiled(**batch)
    broken = batch | {"pixel_values": batch["pixel_values"].clone()}
    broken["pixel_values"][1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="Row 1 of the data set: image 1 of the batch has values that are not finite"):
        compiled(**broken)
    if stage == 1:
        same = batch | {"input_ids": batch["input_ids"][:1].repeat(3, 1)}
        with pytest.raises(
            ValueError, match="Row 0 of the data set and the 2 others of its batch have the same caption"
        ):
            compiled(**same)
        left = batch["attention_mask"].clone()
        left[2, 0] = 0
        with pytest.raises(ValueError, match="Row 2 of the data set is padded on the left"):
            compiled(**batch | {"attention_mask": left})
    else:
        ids = batch["input_ids"].clone()
        ids[2, (ids[2] == own.config.image_token_id).nonzero()[0]] = 5
        with pytest.raises(ValueError, match="Row 2 of the data set has 3 image placeholders"):
            compiled(**batch | {"input_ids": ids})
        with pytest.raises(ValueError, match="supervised_positions names 1 positions, and labels has"):
            compiled(
                **batch
                | {"supervised_positions": batch["supervised_positions"].clone().index_fill_(0, torch.arange(1, 16), 0)}
            )


def test_several_texts_a_picture_are_one_graph_as_well():
    own, collator = built(1, multiple=8)
    batch = collator(rows_of(1, 3, 2, 5)) | {"image_rows": torch.tensor([1, 0, 1, 2]), "image_ids": torch.arange(3)}
    batch["pixel_values"] = batch["pixel_values"][:3]
    loss, gradients = losses_and_gradients(own, own, batch)
    compiled = torch.compile(own, backend="aot_eager", fullgraph=True)
    found, found_gradients = losses_and_gradients(compiled, own, batch)
    torch.testing.assert_close(found, loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found_gradients, gradients, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="1 of the 3 pictures of the batch have no text"):
        compiled(**batch | {"image_rows": torch.tensor([1, 0, 1, 0])})


def test_packed_documents_are_one_graph_as_well():
    own, collator = built(2)
    collator.pack_to = 128
    batch = collator(rows_of(1, 3, 2))
    loss, gradients = losses_and_gradients(own, own, batch)
    compiled = torch.compile(own, backend="aot_eager", fullgraph=True)
    found, found_gradients = losses_and_gradients(compiled, own, batch)
    torch.testing.assert_close(found, loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found_gradients, gradients, atol=1e-6, rtol=1e-5)
    wrong = batch | {"sequence_ids": batch["sequence_ids"].masked_fill(batch["sequence_ids"] == 1, 7)}
    with pytest.raises(ValueError, match=r"numbered in their order, from 0; these are \[0, 7, 2\]"):
        compiled(**wrong)


def test_the_stock_trainer_compiles_and_learns_the_same(tmp_path, monkeypatch):
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.delenv(name, raising=False)  # TrainingArguments sets them, and so they are put back
    backbones, losses = write_backbones(tmp_path), []
    for compiled in (False, True):
        set_seed(0)
        how = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        run = trainer(*joined(backbones, dropout=0.0), tmp_path / "out", max_steps=3, optim="sgd", **how)
        run.data_collator.pad_to_multiple_of = 128
        with nan_guard(run):
            run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[1][0] != losses[1][2]


# a sliding window is cut in another way once it is full
@pytest.mark.parametrize(("text", "graphs"), [("llama", 1), ("gemma3_text", 2)])
def test_a_static_cache_is_compiled_and_says_what_a_growing_one_says(text, graphs):
    own, batch = model(text=text), inputs(rows=3)
    batch["attention_mask"][1, :2] = 0  # as padding on the left is
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    plain = own.generate(**batch, **how)
    compiling = CompileConfig(backend="eager", mode="default", fullgraph=True)
    compiling._compile_all_devices = True  # transformers compiles on GPUs alone otherwise
    static = own.generate(**batch, **how, cache_implementation="static", compile_config=compiling)
    assert torch.equal(static.sequences, plain.sequences)
    torch.testing.assert_close(static.logits, plain.logits, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs
