"""The loss on the first token of each text, in the evaluations of stage 2."""

import json

import pytest
import torch
from tiny_models import QFORMER
from tiny_training import joined, lists, pairs, trainer, write_backbones, write_pairs

from lorgnette import LorgnetteCollator
from lorgnette.trainer.__main__ import main
from lorgnette.trainer.first_token import FirstTokenCallback


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return write_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.mark.parametrize("rows", [pairs, lists])
def test_it_is_the_mean_over_all_texts(backbones, rows, tmp_path):
    """Against each text in a row of its own: the loss of a text cut to its first token."""
    model, processor = joined(backbones, dropout=0.0)
    model.eval()
    collator, losses = LorgnetteCollator(processor), []
    for row in rows():
        for text in row["text"] if isinstance(row["text"], list) else [row["text"]]:
            batch = collator([row | {"text": text}])
            del batch["supervised_positions"]  # of other labels
            first = (batch["labels"][0] != -100).nonzero()[0]
            labels = torch.full_like(batch["labels"], -100)
            labels[0, first] = batch["labels"][0, first]
            with torch.no_grad():
                losses.append(model(**batch | {"labels": labels}).loss.item())
    callback = FirstTokenCallback(model)
    run = trainer(model, processor, tmp_path, rows=rows(), per_device_eval_batch_size=3)
    run.eval_dataset = rows()
    run.callback_handler.callbacks.insert(0, callback)
    for _ in range(2):  # each evaluation counts anew
        assert run.evaluate()["eval_first_token_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert run.state.log_history[-1]["eval_first_token_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_recipe_logs_it(backbones, tmp_path, capsys):
    vision, text = backbones
    data = write_pairs(tmp_path / "data")
    options = ["stage2", "--vision", vision, "--text", text, "--dataset", str(data), "--use_cpu", "--max_steps", "2"]
    options += ["--output_dir", str(tmp_path / "out"), "--num_query_tokens", "4", "--lora", '{"r": 2}']
    options += ["--qformer_config", json.dumps(QFORMER)]
    options += ["--eval_fraction", "0.4", "--eval_strategy", "steps", "--eval_steps", "1", "--report_to", "none"]
    main([*options, "--load_best_model_at_end", "--metric_for_best_model", "first_token_loss", "--save_steps", "1"])
    logs = json.loads((tmp_path / "out/trainer_state.json").read_text())
    found = [entry["eval_first_token_loss"] for entry in logs["log_history"] if "eval_loss" in entry]
    assert len(found) == 2
    assert logs["best_metric"] == min(found)
    assert "eval_first_token_loss" in capsys.readouterr().err
