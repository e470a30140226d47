"""`1e-6` is a number wherever it stands in a recipe, as in YAML 1.2; what is quoted is a string."""

from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import QFORMER, language_model
from tiny_training import write_backbones
from transformers import TrainingArguments, get_scheduler

from lorgnette.assembly.lora_targets import resolve_lora_config
from lorgnette.trainer.arguments import TRAINING_DEFAULTS, DataArguments, Stage2Arguments
from lorgnette.trainer.recipe import parse_recipe
from lorgnette.trainer.stage2 import build


NEEDED = {"vision": "v", "text": "t", "dataset": "d", "use_cpu": "true"}


def parse(folder: Path, text: str, *argv: str) -> tuple[Stage2Arguments, DataArguments, TrainingArguments]:
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in NEEDED.items()) + text)
    types = (Stage2Arguments, DataArguments, TrainingArguments)
    return parse_recipe(types, ["--config", str(path), *argv], prog="test", description="", defaults=TRAINING_DEFAULTS)


@pytest.mark.parametrize(
    ("written", "number"),
    [("5e-2", 0.05), ("1E-6", 1e-6), ("+1e3", 1e3), ("-2.5e+1", -25.0), (".5e-1", 0.05), ("1.e2", 100.0), ("0.1", 0.1)],
)
def test_numbers_of_any_spelling_at_any_depth(tmp_path, written, number):
    text = (
        f"lora: {{lora_dropout: {written}, rank_pattern: {{q: [{written}]}}}}\nlr_scheduler_kwargs:\n  a: {written}\n"
    )
    model_args, _, training_args = parse(tmp_path, text)
    assert model_args.lora == {"lora_dropout": number, "rank_pattern": {"q": [number]}}
    assert training_args.lr_scheduler_kwargs == {"a": number}
    assert type(training_args.lr_scheduler_kwargs["a"]) is float


@pytest.mark.parametrize("written", ['"1e-6"', "'5e-2'", "1e", "e5", "1e-6x", "0x1e", "v1e3", "1e-6 of it", "1_0e-6"])
def test_strings_stay_strings(tmp_path, written):
    model_args, _, _ = parse(tmp_path, f"lora: {{revision: {written}}}\n")
    assert model_args.lora["revision"] == yaml.safe_load(written)
    assert not isinstance(model_args.lora["revision"], float)


def test_fields_that_are_strings_stay_as_they_were_written(tmp_path):
    model_args, data_args, training_args = parse(
        tmp_path, "query: 1e-6\nvision_revision: 1e10\nlearning_rate: 1e-4\ntext_column: 12e3\noptim_args: eps=1e-6\n"
    )
    assert (model_args.query, model_args.vision_revision, data_args.text_column) == ("1e-6", "1e10", "12e3")
    assert (training_args.learning_rate, training_args.optim_args) == (1e-4, "eps=1e-6")


def test_the_command_line_knows_them_too(tmp_path):
    model_args, _, training_args = parse(
        tmp_path, "", "--lora", '{"lora_dropout": 5e-2, "r": 2}', "--lr_scheduler_kwargs", '{"min_lr": 1e-6}'
    )
    assert model_args.lora == {"lora_dropout": 0.05, "r": 2}
    assert training_args.lr_scheduler_kwargs == {"min_lr": 1e-6}


@pytest.mark.parametrize("field", ["lr_scheduler_kwargs", "lora", "qformer_config"])
def test_what_is_no_json_is_named(tmp_path, capsys, field):
    with pytest.raises(SystemExit):
        parse(tmp_path, "", f"--{field}", '{"min_lr": .5e-6}')
    assert f"{field} is " in capsys.readouterr().err


def test_a_rank_is_a_whole_number_however_it_is_written():
    assert resolve_lora_config({"r": 8e0}, language_model())["r"] == 8
    assert isinstance(resolve_lora_config({"r": 8e0}, language_model())["r"], int)
    with pytest.raises(ValueError, match=r"lora\['r'\] is 8.5; it has to be a whole number"):
        resolve_lora_config({"r": 8.5}, language_model())


def test_a_model_and_a_schedule_are_built_of_them(tmp_path):
    vision, text = write_backbones(tmp_path)
    qformer = QFORMER | {"hidden_dropout_prob": "1e-1", "layer_norm_eps": "1e-12", "initializer_range": "2e-2"}
    fields = ", ".join(f"{name}: {value}" for name, value in qformer.items())
    model_args, _, training_args = parse(
        tmp_path,
        f"qformer_config: {{{fields}}}\nlora: {{r: 2, lora_dropout: 5e-2, lora_alpha: 1e1}}\nnum_query_tokens: 4\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}\n",
        *("--vision", vision, "--text", text),
    )
    model, _ = build(model_args)
    assert model.config.qformer_config.hidden_dropout_prob == 0.1
    assert model.config.lora_config["lora_dropout"] == 0.05
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_scheduler(
        training_args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=0,
        num_training_steps=4,
        scheduler_specific_kwargs=training_args.lr_scheduler_kwargs,
    )
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(1e-6)]
