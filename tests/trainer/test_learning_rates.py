"""Learning rates by part: which parameters get them, and what Trainer logs."""

import pytest
import tiny_models
import tiny_retrieval
import torch
from transformers import Trainer, TrainingArguments

from lorgnette.trainer.arguments import Stage1Arguments, Stage2Arguments
from lorgnette.trainer.learning_rates import LearningRates


def test_every_trainable_parameter_is_in_one_group_and_the_qformers_have_their_rate(tmp_path):
    model = tiny_models.model(lora={"r": 2})
    args = TrainingArguments(
        output_dir=tmp_path, use_cpu=True, learning_rate=1e-3, weight_decay=0.1, report_to="none", max_steps=10
    )
    rates = {"qformer_learning_rate": 5e-5, "projector_learning_rate": 2e-3}
    trainer = Trainer(model, args)
    LearningRates.use(trainer, **rates, text_learning_rate=None)
    trainer.create_optimizer_and_scheduler(10)
    rate = {id(p): (g["initial_lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups for p in g["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(rate) == len(trainable) == sum(len(g["params"]) for g in trainer.optimizer.param_groups)
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    for name, parameter in trainable.items():
        learning_rate, decay = rate[id(parameter)]
        expected = {"qformer": 5e-5, "projector": 2e-3}.get(name.split(".")[0], 1e-3)
        assert learning_rate == expected, name
        assert decay == (0.0 if "bias" in name or "LayerNorm" in name or "layernorm" in name else 0.1), name
    assert trainer._get_learning_rate() == 1e-3  # what is logged is `learning_rate`


def test_an_optimizer_that_divides_the_parameters_itself_is_refused(tmp_path, monkeypatch):
    args = TrainingArguments(output_dir=tmp_path, use_cpu=True, optim="lomo", report_to="none")
    monkeypatch.setattr(  # what Trainer makes of it where lomo_optim is installed
        Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args, model: (torch.optim.SGD, {"model": model}))
    )
    with pytest.raises(ValueError, match="optim lomo divides the parameters by itself: leave out qformer_learning"):
        LearningRates(args, {"qformer_learning_rate": 5e-5})(tiny_models.model())


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="qformer_learning_rate is 0"):
        Stage2Arguments(vision="v", text="t", qformer_learning_rate=0.0)
    with pytest.raises(ValueError, match="projector_learning_rate is -1"):
        Stage2Arguments(vision="v", text="t", projector_learning_rate=-1.0)
    with pytest.raises(ValueError, match="text_learning_rate is 0"):
        Stage1Arguments(vision="v", qformer="b", text_learning_rate=0.0)


def test_the_text_half_of_stage_1_has_its_own_rate(tmp_path):
    model = tiny_retrieval.retriever()
    args = TrainingArguments(output_dir=tmp_path, use_cpu=True, learning_rate=1e-3, report_to="none", max_steps=10)
    trainer = Trainer(model, args)
    LearningRates.use(trainer, text_learning_rate=1e-5)
    trainer.create_optimizer_and_scheduler(10)
    rate = {id(p): g["initial_lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    slow = {name for name, p in model.named_parameters() if p.requires_grad and rate[id(p)] == 1e-5}
    layers = [f"qformer.encoder.layer.{n}.{part}." for n in range(2) for part in ("intermediate", "output")]
    text = ("qformer.embeddings.", "text_head.", *layers)
    assert slow == {name for name, _ in model.named_parameters() if name.startswith(text)}
    assert len(slow) > 10
    assert trainer._get_learning_rate() == 1e-3
