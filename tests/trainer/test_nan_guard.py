"""A loss that is not finite stops the run, in all its processes, before a weight moves."""

import math

import pytest
import torch
from nan_worker import spoil
from processes import run_processes
from tiny_training import joined, trainer, write_backbones
from transformers import TrainerCallback, set_seed

from lorgnette.trainer.nan_guard import nan_guard


class Weights(TrainerCallback):
    """What the trained weights are after each step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_step_and_rows_are_named_and_no_weight_has_moved(tmp_path, value, accumulation):
    set_seed(0)
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "max_steps": 3}
    run, weights = trainer(*joined(write_backbones(tmp_path)), tmp_path / "out", **batches), Weights()
    run.add_callback(weights)
    recorded = []

    def second_step(rows):
        recorded.append(rows)
        return run.state.global_step == 1

    spoil(run.model, second_step, value)
    with pytest.raises(FloatingPointError) as caught, nan_guard(run):
        run.train()
    rows = ", ".join(map(str, recorded[-1]))
    messages = f"the loss is {value} in global step 2 on rows {rows}; the weights are those of the previous step"
    assert str(caught.value) == messages
    assert len(recorded) == accumulation + 1
    assert len(weights.after) == 1
    assert all(torch.equal(p, weights.after[0][n]) for n, p in run.model.named_parameters() if p.requires_grad)
    assert not any("nan_guard" in repr(hook) for hook in run.model._forward_hooks.values())


def test_evaluation_is_let_be(tmp_path):
    run = trainer(*joined(write_backbones(tmp_path)), tmp_path / "out")
    run.model.register_forward_hook(lambda model, args, outputs: outputs | {"loss": outputs["loss"] * float("nan")})
    with nan_guard(run):
        assert math.isnan(run.evaluate()["eval_loss"])


@pytest.mark.slow
def test_all_processes_stop(tmp_path):
    write_backbones(tmp_path)
    run_processes("nan_worker.py", tmp_path)
    messages = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert sum("the loss is nan in global step 1 on rows 3;" in text for text in messages) == 1
    assert sum(", and not finite in another process; " in text for text in messages) == 1
