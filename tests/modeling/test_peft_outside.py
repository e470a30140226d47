"""peft on the whole model, from outside: it would overwrite what was trained and save none of it, so it is refused."""

import copy

import pytest
import torch
from peft import (
    CPTConfig,
    IA3Config,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)
from tiny_models import NUM_QUERY_TOKENS, QFORMER, inputs, language_model, model, vision_model
from tiny_retrieval import retriever
from transformers import Trainer, TrainingArguments

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteModel


LEARNED = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": 4}
LORA = LoraConfig(target_modules=["q_proj", "v_proj"])
WAYS = {
    "get_peft_model": lambda whole: get_peft_model(whole, LORA),
    "by another name": lambda whole: get_peft_model(whole, LORA, adapter_name="mine"),
    "for a task": lambda whole: get_peft_model(
        whole, LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules="all-linear")
    ),
    "inject_adapter_in_model": lambda whole: inject_adapter_in_model(LORA, whole),
    "another kind of adapter": lambda whole: get_peft_model(
        whole, IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    ),
    "add_adapter": lambda whole: whole.add_adapter(LORA),
    "a prompt": lambda whole: get_peft_model(whole, PromptTuningConfig(**LEARNED)),
    "a prefix": lambda whole: get_peft_model(whole, PrefixTuningConfig(**LEARNED)),
    "an encoded prompt": lambda whole: get_peft_model(whole, PromptEncoderConfig(encoder_hidden_size=8, **LEARNED)),
    "a prompt of tasks": lambda whole: get_peft_model(whole, MultitaskPromptTuningConfig(num_tasks=2, **LEARNED)),
    "a context": lambda whole: get_peft_model(
        whole, CPTConfig(**LEARNED, cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2])
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lora", [{"r": 2}, None], ids=["with LoRA", "without"])
@pytest.mark.parametrize("headless", [False, True])
def test_an_adapter_on_the_whole_model_is_refused_before_anything_changed(way, lora, headless):
    built = model(lora=lora) if lora is not None else model_without_lora()
    whole = built.base_model if headless else built
    before, trains = copy.deepcopy(built.state_dict()), trainable(built)
    with pytest.raises(ValueError, match=r"Q-Former.*from_backbones\(lora=…\)"):
        WAYS[way](whole)
    assert built.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())
    assert trainable(built) == trains


def test_stage_1_refuses_it_too():
    with pytest.raises(ValueError, match="peft cannot put an adapter"):
        get_peft_model(retriever(), LoraConfig(target_modules=["query"]))


def test_a_model_that_was_frozen_as_a_whole_is_not_trained(tmp_path):
    built, batch = model(), inputs()
    trains = trainable(built)
    prepare_model_for_kbit_training(built)
    rows = [{"input_ids": batch["input_ids"][0]}] * 2

    def collate(_):
        return batch | {"labels": batch["input_ids"].masked_fill(batch["input_ids"] == 320, -100)}

    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, remove_unused_columns=False)
    trainer = Trainer(built, arguments, data_collator=collate, train_dataset=rows)
    with pytest.raises(ValueError, match=r"Nothing of this .* prepare_model_for_kbit_training does.*freeze\(\)"):
        trainer.train()
    built.requires_grad_(True)
    built.freeze()
    assert trainable(built) == trains
    assert Trainer(built, arguments, data_collator=collate, train_dataset=rows).train().global_step == 1


def test_what_trackers_log_of_adapters_is_the_language_models():
    built = model()
    assert built.peft_config.keys() == {"default"}
    assert built.peft_config["default"].r == 2
    assert isinstance(built.base_model, LorgnetteModel)
    assert not model_without_lora().peft_config


def trainable(built) -> set[str]:
    return {name for name, parameter in built.named_parameters() if parameter.requires_grad}


def model_without_lora() -> LorgnetteForConditionalGeneration:
    return LorgnetteForConditionalGeneration.from_backbones(
        vision_model(), language_model(), qformer_config=dict(QFORMER), num_query_tokens=NUM_QUERY_TOKENS
    )
