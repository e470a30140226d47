"""TRL's trainers, unpatched, on a saved model, where lorgnette is not installed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import chat_tokenizer, image_processor
from tiny_models import NUM_QUERY_TOKENS, QFORMER, inputs, language_model, vision_model
from tiny_training import pairs
from transformers import AutoModelForImageTextToText
from without_lorgnette import WITHOUT_LORGNETTE

from lorgnette import LorgnetteCollator, LorgnetteForConditionalGeneration, LorgnetteProcessor


pytest.importorskip("trl", minversion="1.16", reason="older ones score tokens on a GPU alone")
import trl_script
from trl_script import rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved")
    processor = LorgnetteProcessor(image_processor(), chat_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS)
    past_the_table = processor.image_token_id  # 311 of 311 rows: an index error, wherever it is looked up
    without_dropout = QFORMER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    built = LorgnetteForConditionalGeneration.from_backbones(
        vision_model(),
        language_model(vocab_size=past_the_table),
        processor=processor,
        lora={"r": 2},
        qformer_config=without_dropout,
        num_query_tokens=NUM_QUERY_TOKENS,
    )
    built.save_pretrained(place)
    return place


@pytest.fixture
def run(folder, tmp_path):
    """What the script reports of a kind of training, and what it printed."""

    def of(kind: str) -> tuple[dict, str]:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
        environment |= {"TRANSFORMERS_VERBOSITY": "warning"}
        code = WITHOUT_LORGNETTE + f"import runpy; runpy.run_path({trl_script.__file__!r}, run_name='__main__')"
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), kind, str(tmp_path / "report.json")],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((tmp_path / "report.json").read_text()), done.stdout + done.stderr

    return of


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "messages", "dpo", "grpo"])
def test_a_trainer_of_trls_trains_what_trains_and_its_save_loads(run, tmp_path, kind):
    report, printed = run(kind)
    assert len(report["losses"]) == 2
    assert report["changed"] == report["trainable"]
    if kind in ("sft", "messages"):
        # TRL's count has the placeholders that it labels with messages, which is what the warning says
        assert report["losses"][0] == pytest.approx(report["summed"] / report["labels"], abs=1e-4)
        left_out = report["labels"] - report["words"]
        assert left_out == (2 * NUM_QUERY_TOKENS if kind == "messages" else 0)
    assert ("labels of the batch are on image placeholders" in printed) == (kind == "messages")
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.isfinite(saved(**inputs(image_token_id=saved.config.image_token_id)).logits).all()


def mean_of_states(outputs, labels, num_items_in_batch=None):
    return outputs.logits.logsumexp(-1).mean()


@pytest.mark.slow
@pytest.mark.parametrize("own_loss", ["label_smoothing_factor", "compute_loss_func"])
def test_a_loss_outside_of_the_model_takes_no_labels_on_placeholders(tmp_path, own_loss):
    from trl import SFTConfig, SFTTrainer

    processor = LorgnetteProcessor(image_processor(), chat_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS)
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": [], "bf16": False}
    settings |= {"max_length": None, "gradient_checkpointing": False, "save_strategy": "no"}

    def trainer(kind: str) -> SFTTrainer:
        built = LorgnetteForConditionalGeneration.from_backbones(
            vision_model(), language_model(), processor=processor, lora={"r": 2}, qformer_config=dict(QFORMER)
        )
        smoothing = {"label_smoothing_factor": 0.1} if own_loss == "label_smoothing_factor" else {}
        own = {} if smoothing else {"compute_loss_func": mean_of_states}
        arguments = SFTConfig(str(tmp_path), **settings, **smoothing)
        return SFTTrainer(built, args=arguments, train_dataset=rows(kind), processing_class=processor, **own)

    with pytest.raises(ValueError, match=rf"labels of the batch are on image placeholders.*{own_loss}.*completion"):
        trainer("messages").train()
    assert trainer("sft").train().global_step == 1


@pytest.mark.slow
def test_our_collator_serves_trls_trainer(folder, tmp_path):
    from trl import SFTConfig, SFTTrainer

    built, processor = (
        LorgnetteForConditionalGeneration.from_pretrained(folder),
        LorgnetteProcessor.from_pretrained(folder),
    )
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
    settings |= {"use_cpu": True, "report_to": [], "bf16": False, "gradient_checkpointing": False}
    settings |= {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    arguments = SFTConfig(str(tmp_path), **settings)
    rows = Dataset.from_list([{name: row[name] for name in ("image", "text")} for row in pairs()])
    collator = LorgnetteCollator(processor)
    trainer = SFTTrainer(built, args=arguments, train_dataset=rows, data_collator=collator, processing_class=processor)
    before = LorgnetteForConditionalGeneration.from_pretrained(folder)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        expected = before.eval()(**batch).loss
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.slow
def test_a_peft_config_for_trl_is_refused_with_what_to_do(folder, tmp_path):
    from trl import SFTConfig, SFTTrainer

    built, processor = (
        LorgnetteForConditionalGeneration.from_pretrained(folder),
        LorgnetteProcessor.from_pretrained(folder),
    )
    with pytest.raises(ValueError, match="TRL train it without a peft_config"):
        SFTTrainer(
            built,
            args=SFTConfig(str(tmp_path), use_cpu=True, report_to=[], bf16=False),
            train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b"}]),
            processing_class=processor,
            peft_config=LoraConfig(target_modules=["q_proj"]),
        )
