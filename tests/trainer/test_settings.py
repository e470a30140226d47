"""Settings of the stock Trainer that leave the loss as it is, or are refused by name."""

import pytest
import torch
from tiny_training import joined, pairs, trainer, write_backbones
from transformers.utils import is_liger_kernel_available


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> tuple[str, str]:
    return write_backbones(tmp_path_factory.mktemp("backbones"))


def losses(backbones: tuple[str, str], folder, **settings) -> list[float]:
    torch.manual_seed(0)
    run = trainer(*joined(backbones, dropout=0.0), folder, **settings)
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry] + [run.evaluate()["eval_loss"]]


@pytest.fixture(scope="module")
def plain(backbones, tmp_path_factory) -> list[float]:
    return losses(backbones, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "settings",
    [
        {"include_num_input_tokens_seen": "non_padding"},
        {"auto_find_batch_size": True},
        {"prediction_loss_only": False, "eval_do_concat_batches": False},
        {"prediction_loss_only": False, "include_for_metrics": ["inputs", "loss"]},
        {"gradient_checkpointing": True},
        {"average_tokens_across_devices": False},
    ],
    ids=lambda settings: next(reversed(settings)),
)
def test_losses_are_those_of_a_plain_run(backbones, tmp_path, plain, settings):
    assert losses(backbones, tmp_path, **settings) == pytest.approx(plain, rel=1e-5)


def test_predictions_are_logits_alone(backbones, tmp_path):
    run = trainer(*joined(backbones), tmp_path, prediction_loss_only=False)
    rows = pairs(3)
    assert run.predict(rows).predictions.shape[0] == len(rows)


def test_columns_that_were_dropped_are_missed_by_name(backbones, tmp_path):
    with pytest.raises(ValueError, match="set remove_unused_columns=False"):
        losses(backbones, tmp_path, remove_unused_columns=True)


@pytest.mark.skipif(is_liger_kernel_available(), reason="liger-kernel is installed")
def test_kernels_that_are_not_installed_are_named(backbones, tmp_path):
    with pytest.raises(ImportError, match="liger-kernel"):
        losses(backbones, tmp_path, use_liger_kernel=True)
