"""What holds of any run of the stock Trainer: frozen parts, accumulation, resuming, checkpoints, bad rows."""

import datasets
import numpy as np
import pytest
import tiny
import torch
from tiny_training import joined, pairs, trainer, write_backbones, write_pairs
from transformers import TrainerCallback, set_seed

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteProcessor
from lorgnette.trainer.arguments import DataArguments
from lorgnette.trainer.data import load_pairs


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return write_backbones(tmp_path_factory.mktemp("backbones"))


def copy_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def moved(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def belongs_to_training(name):
    return name.startswith(("qformer.", "projector.")) or "lora_" in name


class Watch(TrainerCallback):
    """Sees which parameters have gradients before a step, and which parts are in train mode."""

    def __init__(self):
        self.without_gradient, self.modes = set(), set()

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.without_gradient |= {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
        self.modes.add((any(m.training for m in model.vision_model.modules()), model.qformer.training))


def test_only_qformer_projector_and_lora_move(backbones, tmp_path):
    model, processor = joined(backbones)
    before = copy_of(model)
    run, watch = trainer(model, processor, tmp_path, eval_strategy="steps", eval_steps=1), Watch()
    run.add_callback(watch)
    run.train()
    expected = {name for name in before if belongs_to_training(name)}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert moved(model, before) == expected
    assert watch.without_gradient == set()
    assert watch.modes == {(False, True)}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_gradients_equal_those_of_the_joint_batch(backbones, tmp_path, checkpointing):
    weights = []
    for size, steps in ((4, 1), (1, 4)):
        set_seed(0)
        model, processor = joined(backbones, dropout=0.0)
        before = copy_of(model)
        trainer(
            model,
            processor,
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            gradient_checkpointing=checkpointing and size == 1,
            optim="sgd",
            learning_rate=1.0,  # so that a step is the gradient
            max_grad_norm=0.0,
        ).train()
        weights.append({name: model.state_dict()[name] - before[name] for name in moved(model, before)})
    joint, accumulated = weights
    assert joint.keys() == accumulated.keys()
    for name, gradient in joint.items():
        torch.testing.assert_close(accumulated[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(backbones, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = DataArguments(dataset=str(write_pairs(tmp_path / "pictures")), streaming=streaming, shuffle_buffer_size=3)

    def run(folder, seed):
        set_seed(seed)
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}
        saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
        rows, _ = load_pairs(data, evaluate=False, seed=0)
        return trainer(*joined(backbones), folder, rows=rows, **settings, **saving)

    def losses(trainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = run(tmp_path / "whole", seed=0)
    whole.train()
    resumed = run(tmp_path / "resumed", seed=1)  # starts from other random weights, which the checkpoint replaces
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == 6
    assert moved(resumed.model, copy_of(whole.model)) == set()


def test_the_best_checkpoint_is_restored(backbones, tmp_path):
    set_seed(0)
    run = trainer(
        *joined(backbones),
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        greater_is_better=True,  # so that the first, the worst, is the one to restore
    )
    run.train()
    evaluated = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert evaluated[0] == max(evaluated) > evaluated[-1]
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluated[0], abs=1e-6)
    trainable = [p.requires_grad for name, p in run.model.named_parameters() if belongs_to_training(name)]
    assert all(trainable)


def test_a_checkpoint_reloads_with_its_processor_and_equal_logits(backbones, tmp_path):
    model, processor = joined(backbones)
    run = trainer(model, processor, tmp_path, save_strategy="steps", save_steps=2)
    run.train()
    folder = tmp_path / "checkpoint-2"
    again = LorgnetteForConditionalGeneration.from_pretrained(folder)
    batch = run.data_collator(pairs(2))
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    loaded = LorgnetteProcessor.from_pretrained(folder)
    again.check_processor(loaded)
    assert loaded.build_prompt(output="a cat") == processor.build_prompt(output="a cat")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"image": np.full((8, 8, 3), np.nan)}, "NaN"),
        ({"image": b"not a picture"}, "picture"),
        ({"image": "gone.png"}, "gone.png"),
        ({"image": None}, "None"),
        ({"text": ""}, "empty"),
        ({"text": None}, "text"),
    ],
)
def test_a_bad_row_is_named_before_any_weight_moves(backbones, tmp_path, broken, message):
    rows = pairs(4)
    rows[2] |= broken
    model, processor = joined(backbones)
    before = copy_of(model)
    with pytest.raises((ValueError, OSError, TypeError), match=rf"(?i)row 2\b.*{message}"):
        trainer(model, processor, tmp_path, rows=rows).train()
    assert moved(model, before) == set()


def test_a_truncated_file_in_a_folder_is_named_by_its_row(backbones, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = write_pairs(tmp_path / "pictures") / "2.png"
    file.write_bytes(file.read_bytes()[:400])
    rows, _ = load_pairs(DataArguments(dataset=str(file.parent)), evaluate=False, seed=0)
    with pytest.raises(ValueError, match=r"row 2\b.*2\.png"):
        trainer(*joined(backbones), tmp_path, rows=rows, per_device_train_batch_size=len(rows)).train()


def test_a_row_without_the_column_is_named(backbones, tmp_path):
    model, processor = joined(backbones)
    rows = [{"index": 7, "image": tiny.picture(), "caption": "a cat"}] * 4
    with pytest.raises((KeyError, ValueError), match=r"(?s)text.*caption"):
        trainer(model, processor, tmp_path, rows=rows).train()


def test_several_gpus_in_one_process_are_refused(backbones):
    """Trainer wraps a model so where nobody started a process a GPU, and a batch would be cut in the wrong places."""
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel cannot run LorgnetteForConditionalGeneration"):
        joined(backbones)[0]._replicate_for_data_parallel()
