"""`python -m lorgnette.trainer`: how a recipe is read, and what is refused before anything is loaded."""

import json
import logging
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import tiny
import tiny_models
import torch
import yaml
from repository import ROOT
from safetensors.torch import load_file
from tiny_training import write_backbones, write_pairs
from transformers import AutoModel, TrainingArguments

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteForImageTextRetrieval, LorgnetteProcessor
from lorgnette.trainer import retrieval
from lorgnette.trainer.__main__ import COMMANDS, main, run
from lorgnette.trainer.arguments import TRAINING_DEFAULTS, DataArguments, Stage1Arguments, Stage2Arguments
from lorgnette.trainer.recipe import parse_recipe
from lorgnette.trainer.run import check_arguments
from lorgnette.trainer.stage1 import check_negatives
from lorgnette.trainer.stage2 import build


RECIPES = [path for path in ROOT.glob("recipes/*.yaml") if path.stem != "cache"]
BASE = ["--vision", "v", "--text", "t", "--dataset", "d", "--use_cpu"]


def parse(*argv):
    return parse_recipe(
        (Stage2Arguments, DataArguments, TrainingArguments),
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
        "report_to: [tensorboard, wandb]\nlora: {r: 4, target_modules: [q_proj]}\nvision_feature_layer: -2\n"
    )
    model, _, training = parse("--config", path, "--max_steps", "9", "--text", "other", "--num-query-tokens=4")
    assert (model.vision, model.text, model.num_query_tokens, model.vision_feature_layer) == ("v", "other", 4, -2)
    assert model.lora == {"r": 4, "target_modules": ["q_proj"]}
    assert (training.learning_rate, training.max_steps, training.report_to) == (1e-4, 9, ["tensorboard", "wandb"])
    assert training.eval_strategy == "no"
    assert (training.remove_unused_columns, training.ddp_find_unused_parameters) == (False, False)
    assert training.prediction_loss_only
    assert training.accelerator_config.dispatch_batches is False
    model, _, _ = parse("--config", path, "--lora", "{}", "--vision_feature_layer", "null")
    assert (model.lora, model.vision_feature_layer) == ({}, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown field 'learning_rat' (did you mean learning_rate or qformer_learning_rate or"),
        ("num_query_tokens: many", "--num_query_tokens/--num-query-tokens: invalid int value: 'many'"),
        ("num_query_tokens: [1, 2]", "num_query_tokens takes a single value, not a list"),
        ("learning_rate:", "learning_rate takes a single value, not null"),
        ("- a list", "is not a mapping"),
        ("lora:\n  r: 4\nseed: 1\nseed: 2", "seed given twice"),
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
        ([*BASE, "--learning_rat", "1"], "unknown option '--learning_rat' (did you mean learning_rate or qformer"),
        ([*BASE, "--config", "gone.yaml"], "cannot read the recipe gone.yaml"),
        ([*BASE, "--model", "m"], "model 'm' is given, which fixes vision, text"),
        ([*BASE, "--qformer_config", '{"use_qformer_text_input": true}'], "use_qformer_text_input needs qformer"),
        ([*BASE, "--lora", "r=4"], "lora is neither a mapping nor JSON"),
        ([*BASE, "--eval_strategy", "epoch"], "set eval_split, eval_dataset or eval_fraction"),
        ([*BASE, "--eval_fraction", "2"], "has to be between 0 and 1"),
        ([*BASE, "--streaming"], "streaming needs max_steps"),
        ([*BASE, "--remove_unused_columns", "true"], "remove_unused_columns has to stay false"),
        ([*BASE, "--label_smoothing_factor", "0.1"], "label_smoothing_factor is 0.1, and has to stay 0"),
        ([*BASE, "--text_column", "image"], "have the same name: image, image"),
        ([*BASE, "--messages_column", "image"], "have the same name: image, image"),
        ([*BASE, "--messages_column", "chat", "--query_column", "q"], "hold the texts, leave out query_column"),
        ([*BASE, "--load_best_model_at_end"], "save and eval strategy to match"),
    ],
)
def test_contradictions_are_one_message_and_status_2(capsys, argv, message):
    with pytest.raises(SystemExit) as exit_:
        parse(*argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [("--learning_rat", "1"), ("--max_steps", "few"), ("--text_column", "image")])
def test_the_message_is_all_that_is_printed(capsys, argv):
    with pytest.raises(SystemExit):
        parse(*BASE, *argv)
    message, hint = capsys.readouterr().err.splitlines()
    assert message.startswith("test: error: ")
    assert hint == "test --help lists all options"


def test_an_unknown_command_lists_those_that_exist(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["stage3"])
    assert exit_.value.code == 2
    assert f"choose from {', '.join(COMMANDS)}" in capsys.readouterr().err.replace("'", "")


RECIPE = """
vision: {vision}
text: {text}
qformer_config: {{hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 32}}
num_query_tokens: 4
lora: {{r: 2}}
query: What is this?
dataset: {data}
eval_fraction: 0.25
max_length: 80
output_dir: {output}
max_steps: 4
per_device_train_batch_size: 2
learning_rate: 1e-3
qformer_learning_rate: 1e-4
logging_steps: 1
save_steps: 2
eval_strategy: steps
eval_steps: 2
load_best_model_at_end: true
report_to: none
use_cpu: true
"""


def test_a_recipe_trains_resumes_and_leaves_a_model_to_go_on_from(tmp_path, recipe, monkeypatch, caplog):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (vision, text), data = write_backbones(tmp_path), write_pairs(tmp_path / "pictures")
    path = recipe(RECIPE.format(vision=vision, text=text, data=data, output=tmp_path / "out"))
    main(["stage2", "--config", path])
    assert [record.message for record in caplog.records if "runs on the CPU" in record.message] != []
    assert "gets no LoRA" not in caplog.text
    whole = losses(tmp_path / "out" / "trainer_state.json")
    weights = load_file(tmp_path / "out" / "model.safetensors")

    with pytest.raises(FileExistsError, match="already holds a trained model"):
        main(["stage2", "--config", path])
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    main(["stage2", "--config", path, "--resume_from_checkpoint", "true"])
    assert losses(tmp_path / "out" / "trainer_state.json") == whole
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in resumed.items())
    assert LorgnetteProcessor.from_pretrained(tmp_path / "out").query == "What is this?"

    # on from the saved model, from a stream, with a question for each picture and a new system prompt
    rows = [{"image": f"pictures/{n}.png", "said": "a cat", "asked": "What?"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main(
        f"stage2 --model {tmp_path}/out --dataset {tmp_path}/rows.jsonl --streaming --text_column said "
        f"--query_column asked --output_dir {tmp_path}/next --max_steps 2 --report_to none --use_cpu "
        "--system_prompt Briefly.".split()
    )
    processor = LorgnetteProcessor.from_pretrained(tmp_path / "next")
    assert (processor.query, processor.system_prompt) == ("What is this?", "Briefly.")


def test_two_recipes_from_pictures_to_words(tmp_path, recipe, monkeypatch):
    """Cache, stage 1, what it retrieves, stage 2 on its Q-Former; each command reads what the one before it wrote."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (vision, text), data = write_backbones(tmp_path), write_pairs(tmp_path / "pictures")
    for part in (tiny_models.bert(vocab_size=len(tiny.bert_tokenizer())), tiny.bert_tokenizer()):
        part.save_pretrained(tmp_path / "bert")
    features = str(tmp_path / "features")
    main(["cache", "--vision", vision, "--dataset", str(data), "--output_dir", features, "--dtype", "float32"])
    run = [
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "6",
        "--dataloader_drop_last",
        "--use_cpu",
        "--report_to",
        "none",
    ]
    stage1 = ["--vision", vision, "--qformer", str(tmp_path / "bert"), "--num_query_tokens", "4", *run]
    main(["stage1", *stage1, "--dataset", features, "--output_dir", str(tmp_path / "stage1")])

    model = AutoModel.from_pretrained(tmp_path / "stage1")
    assert isinstance(model, LorgnetteForImageTextRetrieval)
    found = ["--split", "train", "--batch_size", "4", "--rerank", "2"]
    for source in (features, str(data)):
        output = tmp_path / Path(source).name / "found"
        main(
            ["retrieval", "--model", str(tmp_path / "stage1"), "--dataset", source, *found, "--output_dir", str(output)]
        )
    reports = [
        json.loads((tmp_path / name / "found" / "metrics.json").read_text()) for name in ("features", "pictures")
    ]
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert (reports[0]["pictures"], reports[0]["texts"]) == (12, 4)
    assert reports[0]["metrics"]["itc"].keys() == reports[0]["metrics"]["itc_and_itm"].keys()
    assert reports[0]["metrics"]["itc"]["image_to_text_recall@5"] == 1  # of four texts

    # the tokenizer has no capitals: to the model these are the same texts, and no wrong ones of each other
    renamed = datasets.load_dataset("imagefolder", data_dir=str(data), split="train").map(
        lambda row, n: {"text": row["text"].upper() if n >= 4 else row["text"]}, with_indices=True
    )
    renamed.save_to_disk(tmp_path / "renamed")
    renamed = {"dataset": str(tmp_path / "renamed"), "output_dir": str(tmp_path / "found"), "split": "train"}
    report = retrieval.measure(
        retrieval.RetrievalArguments(model=str(tmp_path / "stage1"), batch_size=4, rerank=2, **renamed)
    )
    assert (report["texts"], report["metrics"]) == (4, reports[0]["metrics"])

    processor = LorgnetteProcessor.from_backbones(vision, None, qformer=tmp_path / "bert", num_query_tokens=4)
    LorgnetteForImageTextRetrieval.from_backbones(
        vision, qformer=tmp_path / "bert", processor=processor, itm_weight=0.0
    ).save_pretrained(tmp_path / "unmatched")
    with pytest.raises(ValueError, match="unmatched was trained with itm_weight 0, and matching re-ranks: set rerank"):
        retrieval.measure(retrieval.RetrievalArguments(model=str(tmp_path / "unmatched"), **renamed))

    stage2 = ["stage2", "--vision", vision, "--text", text, "--qformer", str(tmp_path / "stage1"), *run]
    main([*stage2, "--dataset", features, "--output_dir", str(tmp_path / "stage2"), "--max_steps", "1"])
    built = LorgnetteForConditionalGeneration.from_pretrained(tmp_path / "stage2")
    assert built.config.num_query_tokens == 4
    assert reports[0]["model_revision"] is None
    too_large = ["stage1", *stage1, "--dataset", features, "--per_device_train_batch_size", "13", "--output_dir"]
    both = [str(tmp_path / "x"), "--per_device_eval_batch_size", "4", "--eval_split", "train[:3]", "--eval_strategy"]
    expected = (
        r"the 12 rows of the training data do not fill one batch of 13 on 1 process\(es\): lower "
        "per_device_train_batch_size$"
    )
    with pytest.raises(ValueError, match=expected):
        main([*too_large, str(tmp_path / "x")])
    expected = r"lower per_device_train_batch_size; the 3 rows of the evaluation .* lower per_device_eval_batch_size$"
    with pytest.raises(ValueError, match=expected):
        main([*too_large, *both, "epoch", "--dataset", str(data)])
    assert not (tmp_path / "x" / "config.json").exists()
    with pytest.raises(ValueError, match=r"cache .* does not belong to this model: vision_feature_layer is None .* 1"):
        main(
            [
                "stage1",
                *stage1,
                "--vision_feature_layer",
                "1",
                "--dataset",
                features,
                "--output_dir",
                str(tmp_path / "x"),
            ]
        )


@pytest.mark.slow
def test_retrieval_is_refused_behind_a_launcher_of_several(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["lorgnette.trainer", "retrieval", "--model", "m", "--dataset", "d", "--output_dir", str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode
    assert "ranks all pictures against all texts in one process, not 2" in done.stderr


class _Processes:
    """Arguments as one of several processes has them."""

    def __init__(self, args, world_size):
        self.args, self.world_size = args, world_size

    def __getattr__(self, name):
        return getattr(self.args, name)


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ("aabb", {}, r"a batch of it, 2 from row 10 on, has one caption alone"),
        ("abbb", {}, "2 from row 12 on"),
        ("aba", {}, "1 from row 12 on, has one picture alone"),
        ("aba", {"dataloader_drop_last": True}, None),
        ("aabb", {"per_device_eval_batch_size": 4}, None),
        ("aabb", {"train_sampling_strategy": "group_by_length"}, None),
        ("abab", {}, None),
        ("aabb", {"itm_weight": 1.0, "world_size": 2}, "2 from row 10 on, has one caption alone"),
        ("aabb", {"world_size": 2}, None),
        ("abcd", {"rows_of_a_picture": 2}, "2 from row 10 on, has one picture alone"),
        ("abcd", {"rows_of_a_picture": 2, "per_device_eval_batch_size": 4}, None),
        ([["a", "b"], ["b", "a"]], {}, "2 from row 10 on, has one caption alone"),
        ([["a", "b"], ["b", "c"]], {}, None),
        ([["a", "b"], ["b", "a"]], {"per_device_eval_batch_size": 1}, "1 from row 10 on, has one picture alone"),
        ("abab", {"per_device_train_batch_size": 3}, "the last of 7 pairs would be a batch by itself, after 2 of 3"),
        ("abab", {"per_device_train_batch_size": 3, "max_steps": 2}, None),
        ("abab", {"per_device_train_batch_size": 3, "max_steps": 2, "gradient_accumulation_steps": 2}, "the last of 7"),
        ("abab", {"per_device_train_batch_size": 3, "dataloader_drop_last": True}, None),
    ],
)
def test_stage1_sees_to_it_that_batches_have_negatives(tmp_path, texts, settings, message):
    """Before it trains: it would stop at its first evaluation, or at the end of the first epoch."""
    settings = {"per_device_eval_batch_size": 2, "use_cpu": True, "report_to": "none"} | settings
    same, itm_weight = settings.pop("rows_of_a_picture", 1), settings.pop("itm_weight", 0.0)
    processes = settings.pop("world_size", 1)
    numbers = range(10, 10 + len(texts))
    rows = datasets.Dataset.from_dict(
        {"text": list(texts), "index": numbers, "image": [f"{n // same}.png" for n in numbers]}
    )
    trainer = SimpleNamespace(
        args=_Processes(TrainingArguments(str(tmp_path), **settings), processes),
        train_dataset=datasets.Dataset.from_dict({"text": list("abcdefg")}),
        eval_dataset=rows.with_transform(lambda batch: batch),
        model=SimpleNamespace(config=SimpleNamespace(itc_weight=1.0, itm_weight=itm_weight)),
    )
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_negatives(DataArguments(dataset="d"), trainer)
    trainer.model.config.itc_weight = trainer.model.config.itm_weight = 0.0  # generation has no use for negatives
    check_negatives(DataArguments(dataset="d"), trainer)


@pytest.mark.parametrize("option", ["--query_column", "--messages_column"])
def test_stage1_leaves_no_column_unread(tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        main(
            ["stage1", "--vision", "v", "--qformer", "b", "--dataset", "d", "--output_dir", str(tmp_path), option, "x"]
        )
    assert "leave out query_column and messages_column" in capsys.readouterr().err


def test_stage1_refuses_chats_that_are_found_with_the_data():
    found = DataArguments(dataset="d", messages_column="messages")
    with pytest.raises(ValueError, match=r"stage 1 learns from pairs .* without messages_column 'messages': leave out"):
        check_negatives(found, SimpleNamespace())


def test_chats_train(tmp_path, recipe, monkeypatch):
    """Pictures in the messages' parts, their paths relative to the file; the broken one is named with its row."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (vision, text), pictures = write_backbones(tmp_path), write_pairs(tmp_path / "pictures")
    asked = [[{"type": "text", "text": "What?"}, {"type": "image", "path": f"{n}.png"}] for n in range(4)]
    rows = [
        {"chat": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a cat"}]} for parts in asked
    ]
    (pictures / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = recipe(RECIPE.format(vision=vision, text=text, data=pictures / "rows.jsonl", output=tmp_path / "out"))
    chats = ["stage2", "--config", path, "--messages_column", "chat", "--max_steps", "2"]
    main(chats)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    (pictures / "2.png").write_bytes(b"words")
    with pytest.raises(ValueError, match=r"^row 2: .*2\.png is no picture"):
        main([*chats, "--output_dir", str(tmp_path / "other")])


def test_trackers_are_told_of_a_run_whose_qformer_reads_the_query(tmp_path, recipe, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    (vision, text), data = write_backbones(tmp_path), write_pairs(tmp_path / "pictures")
    for part in (tiny_models.bert(vocab_size=len(tiny.bert_tokenizer())), tiny.bert_tokenizer()):
        part.save_pretrained(tmp_path / "bert")
    changes = f"--report_to tensorboard --qformer {tmp_path}/bert --max_steps 2".split()
    instructed = ["--qformer_config", '{"use_qformer_text_input": true}']
    path = recipe(RECIPE.format(vision=vision, text=text, data=data, output=tmp_path / "out"))
    main(["stage2", "--config", path, *changes, *instructed])
    assert list((tmp_path / "logs").rglob("events.*"))
    assert LorgnetteProcessor.from_pretrained(tmp_path / "out").qformer_tokenizer is not None


def test_restored_checkpoints_list_no_keys_and_a_language_model_without_lora_is_told(tmp_path, monkeypatch, caplog):
    """The ViT has other names in files than in memory: a save in full, of both stages, writes those of the files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    (vision, text), data = write_backbones(tmp_path), write_pairs(tmp_path / "pictures")
    for part in (tiny_models.bert(vocab_size=len(tiny.bert_tokenizer())), tiny.bert_tokenizer()):
        part.save_pretrained(tmp_path / "bert")
    shared = f"--vision {vision} --qformer {tmp_path}/bert --dataset {data} --eval_fraction 0.25 --use_cpu "
    shared += "--max_steps 2 --per_device_train_batch_size 3 --per_device_eval_batch_size 3 --dataloader_drop_last "
    shared += "--report_to none --save_steps 1 --eval_strategy steps --eval_steps 1 --load_best_model_at_end"
    for stage, own in (("stage1", []), ("stage2", ["--text", text])):
        output = tmp_path / stage
        command = [stage, *shared.split(), *own, "--output_dir", str(output)]
        main(command)
        saved = load_file(output / "model.safetensors")
        assert "vision_model.encoder.layer.0.attention.attention.key.weight" in saved
        main([*command, "--resume_from_checkpoint", str(output / "checkpoint-1")])
        again = load_file(output / "model.safetensors")
        assert all(torch.equal(value, again[name]) for name, value in saved.items())
        assert [message for message in caplog.messages if "keys in the checkpoint" in message] == []
        told = [message for message in caplog.messages if "The language model gets no LoRA (--lora '{}'" in message]
        assert len(told) == (2 if stage == "stage2" else 0)
    weights = [*AutoModel.from_pretrained(tmp_path / "stage1").vision_model.parameters()]
    assert all(map(torch.equal, weights, AutoModel.from_pretrained(vision).parameters()))


def losses(state):
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


def test_the_module_lists_its_commands_and_a_command_its_options(capsys):
    command = [sys.executable, "-m", "lorgnette.trainer", "--help"]
    assert "stage2: " in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with pytest.raises(SystemExit) as exit_:
        main(["stage2", "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "--num_query_tokens" in shown
    assert "--learning_rate" in shown


def test_an_error_of_a_run_is_a_line_unless_debugging(monkeypatch, capsys):
    def broken(argv, prog):
        raise ValueError("row 3: the text\nis empty")

    monkeypatch.setattr("lorgnette.trainer.stage2.main", broken)
    for command in (["stage2", "--use_cpu"], ["check", "stage2", "--use_cpu"]):
        with pytest.raises(SystemExit) as ended:
            run(command)
        assert ended.value.code == 2
        assert capsys.readouterr().err == (
            f"python -m lorgnette.trainer {' '.join(command[:-1])}: error: row 3: the text is empty "
            "(python -m lorgnette.trainer --debug … shows where)\n"
        )
        with pytest.raises(ValueError, match="row 3"):
            run(["--debug", *command])


def test_the_module_prints_a_data_error_as_a_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "text": "a cat"}\n{"image"')
    command = [sys.executable, "-m", "lorgnette.trainer", "init", "--dataset", str(tmp_path / "rows.jsonl")]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    *_, last = done.stderr.splitlines()
    assert last.startswith(f"python -m lorgnette.trainer init: error: dataset '{tmp_path}/rows.jsonl': line 2, ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_are_shipped_can_be_read(path):
    arguments = Stage2Arguments if "lora" in yaml.safe_load(path.read_text()) else Stage1Arguments
    given = ["--vision", "v", "--qformer", "b", "--dataset", "d", "--use_cpu", "--output_dir", "out"]
    given += ["--text", "t"] if arguments is Stage2Arguments else []
    _, data, training = parse_recipe(
        (arguments, DataArguments, TrainingArguments),
        ["--config", str(path), *given],
        prog="test",
        description="",
        defaults=TRAINING_DEFAULTS,
        check=check_arguments,
    )
    assert data.has_eval == (training.eval_strategy != "no")
    assert training.dataloader_drop_last == (arguments is Stage1Arguments)


def test_retrieval_takes_one_picture_a_row():
    rows = datasets.Dataset.from_dict({"index": [7], "image": [["a.png", "b.png"]]})
    with pytest.raises(ValueError, match=r"row 7 has a list of pictures \(2\)"):
        _ = retrieval._Pictures(rows, "image")[0]
    features = [{"index": 7, "vision_features": torch.zeros(2, 17, 24)}]
    with pytest.raises(ValueError, match=r"row 7 has a list of pictures \(2\)"):
        retrieval._features(features)


@pytest.mark.parametrize("name", ["/no/such/folder", "./out/none", "out/none/deep"])
def test_a_saved_model_that_is_not_there(name):
    """transformers would say of the path that it is no Hub id."""
    with pytest.raises(FileNotFoundError, match=f"There is no folder {name}"):
        build(Stage2Arguments(model=name))
