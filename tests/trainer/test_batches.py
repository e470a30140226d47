"""What a batch need not do twice: a picture that is in it several times, and padding."""

import pytest
import tiny
import torch
from datasets import Dataset
from tiny import bert_tokenizer, image_processor, picture
from tiny_models import NUM_QUERY_TOKENS, QFORMER, bert, model, vision_model
from tiny_training import joined, trainer, write_backbones
from transformers.trainer_pt_utils import LengthGroupedSampler

from lorgnette import LorgnetteCollator, LorgnetteForImageTextRetrieval, LorgnetteProcessor
from lorgnette.trainer.arguments import DataArguments
from lorgnette.trainer.data import load_pairs


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SHOWN = [0, 1, 0, 2, 1]  # five rows, three pictures


@pytest.fixture
def processor():
    return LorgnetteProcessor(image_processor(), tiny.chat_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS)


def stage1_processor():
    return LorgnetteProcessor.from_backbones(
        image_processor(), None, qformer=bert_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS
    )


def rows_of(pictures):
    return [{"image": pictures[n], "text": f"the cat {k}"} for k, n in enumerate(SHOWN)]


@pytest.mark.parametrize("kind", ["object", "path", "bytes", "datasets"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_picture_is_loaded_and_encoded_once(kind, stage, processor, tmp_path, monkeypatch):
    if stage == 1:
        processor = stage1_processor()
    pictures = [picture(n) for n in range(3)]
    for n, one in enumerate(pictures):
        one.save(tmp_path / f"{n}.png")
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    forms = {
        "object": pictures,
        "path": [str(path) for path in paths],
        "bytes": [path.read_bytes() for path in paths],
        "datasets": [{"bytes": path.read_bytes(), "path": None} for path in paths],
    }
    collator, loads, load_image = LorgnetteCollator(processor), [], LorgnetteProcessor.load_image
    monkeypatch.setattr(LorgnetteProcessor, "load_image", lambda *args: loads.append(1) or load_image(*args))
    batch = collator(rows_of(forms[kind]))
    assert len(loads) == 3
    assert batch["image_rows"].tolist() == SHOWN
    each = collator([{**row, "image": tiny.picture(n)} for row, n in zip(rows_of(pictures), SHOWN, strict=True)])
    assert "image_rows" not in each
    assert torch.equal(batch["pixel_values"][batch["image_rows"]], each["pixel_values"])


def test_pictures_that_are_changed_at_random_are_no_longer_one(processor):
    rows = [row | {"augmentation_seed": n} for n, row in enumerate(rows_of([picture(n) for n in range(3)]))]
    batch = LorgnetteCollator(processor)(rows)
    assert "image_rows" not in batch
    assert len(batch["pixel_values"]) == 5


@pytest.mark.parametrize("stage", [1, 2])
def test_the_vit_sees_a_picture_once(stage, processor):
    if stage == 1:
        processor = stage1_processor()
        torch.manual_seed(0)
        built = LorgnetteForImageTextRetrieval.from_backbones(
            vision_model(),
            qformer=bert(vocab_size=len(processor.qformer_tokenizer)),
            qformer_config=NO_DROPOUT,
            processor=processor,
        )
    else:
        built = model(processor=processor, qformer_config=QFORMER | NO_DROPOUT)
    batch = LorgnetteCollator(processor)(rows_of([picture(n) for n in range(3)]))
    recorded = []
    built.vision_model.register_forward_hook(lambda *_: recorded.append(1) or None)
    built.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: recorded.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    found = []
    whole = {name: value for name, value in batch.items() if name != "image_rows"}
    whole["pixel_values"] = batch["pixel_values"][batch["image_rows"]]
    if stage == 1:
        whole["image_ids"] = batch["image_rows"]  # a picture's texts are no negatives of each other
    for one in (batch, whole):
        built.zero_grad()
        torch.manual_seed(0)  # which negatives are drawn
        loss = built.train()(**one).loss
        loss.backward()
        found.append((loss, {name: p.grad.clone() for name, p in built.named_parameters() if p.requires_grad}))
    assert recorded == [3, 1, 5, 1]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_answers_to_several_questions_about_a_picture(processor):
    built = model(processor=processor)
    batch = LorgnetteCollator(processor).prompts(rows_of([picture(n) for n in range(3)]))
    whole = {name: value for name, value in batch.items() if name != "image_rows"}
    whole["pixel_values"] = batch["pixel_values"][batch["image_rows"]]
    once, each = (built.generate(**one, max_new_tokens=5, do_sample=False) for one in (batch, whole))
    assert torch.equal(once, each)


def test_rows_are_grouped_by_length(tmp_path):
    texts = ["a" * (1 + 7 * n % 40) for n in range(400)]
    rows = Dataset.from_dict({"image": [picture()] * 400, "text": texts})
    rows.save_to_disk(tmp_path / "data")
    data = DataArguments(dataset=str(tmp_path / "data"))
    train, _ = load_pairs(data, evaluate=False, seed=0, length_column="length")
    assert train["length"][:] == [len(text) for text in texts]
    assert train[0]["image"] is not None
    run = trainer(
        *joined(write_backbones(tmp_path)),
        tmp_path / "out",
        rows=train,
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=4,
    )
    sampler = run._get_train_sampler()
    assert isinstance(sampler, LengthGroupedSampler)
    lengths = torch.tensor([len(texts[n]) for n in sampler]).view(-1, 4)
    spread = lengths.amax(1) - lengths.amin(1)
    assert spread.float().mean() < 5  # of 40; in batches drawn at random it is 24
    data.streaming = True
    with pytest.raises(ValueError, match="a stream cannot be grouped by length"):
        load_pairs(data, evaluate=False, seed=0, length_column="length")


def test_evaluation_is_grouped_by_length_as_well(tmp_path):
    """Trainer does so where training is, and would look for `input_ids` in rows without lengths."""
    texts = ["a" * n for n in range(1, 13)]
    Dataset.from_dict({"image": [picture()] * 12, "text": texts}).save_to_disk(tmp_path / "data")
    data = DataArguments(dataset=str(tmp_path / "data"), eval_fraction=0.5)
    train, evaluation = load_pairs(data, evaluate=True, seed=0, length_column="length")
    assert evaluation["length"][:] == [len(text) for text in evaluation["text"][:]]
    grouped = {"train_sampling_strategy": "group_by_length", "per_device_eval_batch_size": 3}
    run = trainer(*joined(write_backbones(tmp_path)), tmp_path / "out", rows=train, **grouped)
    run.eval_dataset = evaluation
    assert isinstance(run._get_eval_sampler(evaluation), LengthGroupedSampler)
    assert run.evaluate()["eval_loss"] > 0


def test_chats_have_the_length_of_their_words(tmp_path):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image", "text": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    Dataset.from_dict({"image": [picture()], "chat": [messages]}).save_to_disk(tmp_path / "data")
    data = DataArguments(dataset=str(tmp_path / "data"), messages_column="chat")
    rows, _ = load_pairs(data, evaluate=False, seed=0, length_column="length")
    assert rows[0]["length"] == len("What is it?A cat.")


def test_a_packed_run_learns_what_a_padded_one_does(tmp_path):
    """Three steps of the stock Trainer: the losses it logs."""
    losses = []
    for pack_to in (None, 160):
        torch.manual_seed(0)
        run = trainer(*joined(write_backbones(tmp_path), dropout=0.0), tmp_path / "out", max_steps=3, optim="sgd")
        run.data_collator.pack_to = pack_to
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
