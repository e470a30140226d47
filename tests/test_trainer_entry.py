"""`python -m lorgnette.trainer`: how a recipe is read, and what is refused before anything is loaded."""

import pytest
from transformers import TrainingArguments

from lorgnette.trainer.__main__ import main
from lorgnette.trainer.arguments import TRAINING_DEFAULTS, DataArguments, ModelArguments
from lorgnette.trainer.recipe import parse_recipe
from lorgnette.trainer.stage2 import check_arguments, checkpoint_to_resume


BASE = ["--vision", "v", "--text", "t", "--dataset", "d", "--use_cpu"]


def parse(*argv):
    return parse_recipe(
        (ModelArguments, DataArguments, TrainingArguments),
        argv,
        prog="test",
        description="",
        defaults=TRAINING_DEFAULTS,
        check=check_arguments,
    )


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_the_command_line_wins_over_yaml_and_yaml_over_the_defaults(recipe):
    path = recipe(
        "vision: v\ntext: t\ndataset: d\nuse_cpu: true\nlearning_rate: 1e-4\neval_strategy: no\nmax_steps: 7\n"
        "report_to: [tensorboard, wandb]\nlora: {r: 4, target_modules: [q_proj]}\nvision_feature_layer: null\n"
    )
    model, data, training = parse("--config", path, "--max_steps", "9", "--text", "other", "--num-query-tokens=4")
    assert (model.vision, model.text, model.num_query_tokens, model.vision_feature_layer) == ("v", "other", 4, None)
    assert model.lora == {"r": 4, "target_modules": ["q_proj"]}
    assert (training.learning_rate, training.max_steps, training.report_to) == (1e-4, 9, ["tensorboard", "wandb"])
    assert training.eval_strategy == "no"
    assert (training.remove_unused_columns, training.ddp_find_unused_parameters) == (False, False)
    assert training.prediction_loss_only
    assert parse(*BASE, "--lora", "{}", "--vision_feature_layer", "null")[0].lora == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown field 'learning_rat' (did you mean learning_rate?)"),
        ("num_query_tokens: many", "--num_query_tokens/--num-query-tokens: invalid int value: 'many'"),
        ("num_query_tokens: [1, 2]", "num_query_tokens takes a single value, not a list"),
        ("learning_rate:", "learning_rate takes a single value, not null"),
        ("- a list", "is not a mapping"),
        ("a: b: c", "cannot read the recipe"),
    ],
)
def test_a_mistake_in_the_recipe_is_one_message_and_status_2(recipe, capsys, text, message):
    with pytest.raises(SystemExit) as exit_:
        parse(*BASE, "--config", recipe(text))
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--vision", "v", "--dataset", "d"], "text not given"),
        (["--vision", "v", "--text", "t"], "dataset not given"),
        ([*BASE, "--learning_rat", "1"], "unknown option '--learning_rat' (did you mean learning_rate?)"),
        ([*BASE, "--config", "gone.yaml"], "cannot read the recipe gone.yaml"),
        ([*BASE, "--model", "m"], "model 'm' is given: it has settled vision, text"),
        ([*BASE, "--lora", "r=4"], "lora is neither a mapping nor JSON"),
        ([*BASE, "--eval_strategy", "epoch"], "set eval_split, eval_dataset or eval_fraction"),
        ([*BASE, "--eval_fraction", "2"], "has to lie between 0 and 1"),
        ([*BASE, "--streaming"], "streaming needs max_steps"),
        ([*BASE, "--remove_unused_columns", "true"], "remove_unused_columns has to stay false"),
        ([*BASE, "--text_column", "image"], "name the same column"),
        ([*BASE, "--load_best_model_at_end"], "save and eval strategy to match"),
    ],
)
def test_contradictions_are_one_message_and_status_2(capsys, argv, message):
    with pytest.raises(SystemExit) as exit_:
        parse(*argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_command_lists_those_that_exist(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["stage3"])
    assert exit_.value.code == 2
    assert "choose from stage2" in capsys.readouterr().err.replace("'", "")


def test_resuming_takes_the_last_complete_checkpoint_and_nothing_is_overwritten(tmp_path):
    def args(resume=None):
        return TrainingArguments(str(tmp_path), use_cpu=True, resume_from_checkpoint=resume)

    assert checkpoint_to_resume(args()) is None
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        checkpoint_to_resume(args("true"))
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert checkpoint_to_resume(args("true")) == str(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume(args(str(tmp_path / "checkpoint-5"))) == str(tmp_path / "checkpoint-5")
    with pytest.raises(FileNotFoundError, match="checkpoint-100 is not a complete checkpoint"):
        checkpoint_to_resume(args(str(tmp_path / "checkpoint-100")))
    with pytest.raises(FileExistsError, match="already holds a trained model or its checkpoints"):
        checkpoint_to_resume(args())
