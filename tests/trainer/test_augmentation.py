"""`augment`: training pictures change at random and those of evaluation do not; a resumed run draws the same."""

import datasets
import numpy as np
import pytest
import tiny
import torch
from tiny_training import joined, trainer, write_backbones, write_pairs
from transformers import TrainerState, set_seed

from lorgnette import LorgnetteCollator
from lorgnette.trainer.arguments import DataArguments
from lorgnette.trainer.augmentation import augment
from lorgnette.trainer.data import load_pairs
from lorgnette.trainer.row_seeds import RowSeeds


def row_seeds() -> RowSeeds:
    return RowSeeds(0, augment=True, texts=None, columns=[])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` prepares out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return write_backbones(tmp_path_factory.mktemp("backbones"))


def test_parts_and_mirror_images_are_drawn_as_blip2_does():
    columns, rows = np.meshgrid(np.arange(80), np.arange(60))
    pixels = np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)  # each pixel says where it was
    picture = tiny.Image.fromarray(pixels)
    areas, ratios, mirrored = [], [], 0
    for seed in range(300):
        changed = augment(picture, np.random.default_rng(seed))
        recorded = np.asarray(changed).astype(int)
        step = recorded[0, 1, 0] - recorded[0, 0, 0]
        assert (np.diff(recorded[..., 0], axis=1) == step).all()
        assert (np.diff(recorded[..., 1], axis=0) == 1).all()
        assert abs(step) == 1
        mirrored += step == -1
        areas.append(changed.width * changed.height / (80 * 60))
        ratios.append(changed.width / changed.height)
    assert 0.48 < min(areas) < 0.55 < 0.9 < max(areas) <= 1
    assert 0.73 < min(ratios) < 0.85 < 1.2 < max(ratios) < 1.36
    assert 120 < mirrored < 180
    strip = augment(tiny.picture(width=400, height=4), np.random.default_rng(0))
    assert strip.size == (400, 4)


@pytest.mark.parametrize("streaming", [False, True])
def test_training_rows_alone_change_and_each_time_otherwise(backbones, tmp_path, streaming):
    folder, seeds = write_pairs(tmp_path / "pictures"), row_seeds()
    data = DataArguments(
        dataset=str(folder), eval_split="train", streaming=streaming, shuffle_buffer_size=0, augment=True
    )
    train, evaluation = load_pairs(data, evaluate=True, seed=0, row_seeds=seeds)
    collator = LorgnetteCollator(joined(backbones)[1])

    def pixels(rows, skip=0):
        rows = [row for row, _ in zip(iter(rows.skip(skip)), range(4), strict=False)]
        return collator(rows)["pixel_values"]

    plain, first = pixels(evaluation), pixels(train)
    assert not any(torch.equal(a, b) for a, b in zip(plain, first, strict=True))
    assert torch.equal(first, pixels(train))
    if streaming:
        assert not any(torch.equal(a, b) for a, b in zip(pixels(train, skip=12), first, strict=True))
    else:
        seeds.on_epoch_begin(None, TrainerState(epoch=1.0), None)
        assert not any(torch.equal(a, b) for a, b in zip(pixels(train), first, strict=True))
    assert torch.equal(pixels(evaluation), plain)


@pytest.mark.parametrize(
    "settings", [{}, {"streaming": True}, pytest.param({"dataloader_num_workers": 1}, marks=pytest.mark.slow)]
)
def test_a_resumed_run_is_the_uninterrupted_one(backbones, tmp_path, settings):
    streaming = settings.pop("streaming", False)
    data = DataArguments(
        dataset=str(write_pairs(tmp_path / "pictures")), streaming=streaming, shuffle_buffer_size=3, augment=True
    )

    def run(folder, seed, augmented=True):
        set_seed(seed)
        seeds = row_seeds() if augmented else None
        rows, _ = load_pairs(data, evaluate=False, seed=0, row_seeds=seeds)
        saving = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
        batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}  # an epoch is three steps
        built = trainer(*joined(backbones), folder, rows=rows, **batches, **saving, **settings)
        if augmented:
            built.add_callback(seeds)
        return built

    def losses(trainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = run(tmp_path / "whole", seed=0)
    whole.train()
    resumed = run(tmp_path / "resumed", seed=1)  # starts from other random weights, which the checkpoint replaces
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == 8
    plain = run(tmp_path / "plain", seed=0, augmented=False)
    plain.train()
    assert losses(plain) != losses(whole)


def test_a_cache_has_nothing_to_augment(tmp_path):
    (tmp_path / "vision_features.json").write_text("{}")
    with pytest.raises(ValueError, match=r"augment changes pictures, and .* is a feature cache"):
        load_pairs(DataArguments(dataset=str(tmp_path), augment=True), evaluate=False, seed=0, row_seeds=row_seeds())
