"""`python -m lorgnette.trainer evaluate` from end to end, and the callback that measures the same during training."""

import json
import os
import subprocess
import sys

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Image, Value
from tiny_training import CAPTIONS, joined, pairs, trainer, write_backbones, write_pairs

from lorgnette import LorgnetteCollator
from lorgnette.trainer.__main__ import main
from lorgnette.trainer.arguments import Stage2Arguments
from lorgnette.trainer.callbacks import GenerateMetricsCallback
from lorgnette.trainer.decoding import decoding_of
from lorgnette.trainer.generation import generate_texts, references_of
from lorgnette.trainer.metrics import Cider
from lorgnette.trainer.stage2 import build


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A saved model that has learnt to say something, and a folder of pictures with captions."""
    folder = tmp_path_factory.mktemp("learned")
    model, processor = joined(write_backbones(folder), dropout=0.0)
    run = trainer(model, processor, folder / "model", max_steps=60, per_device_train_batch_size=12)
    run.train()
    run.save_model()
    return folder / "model", write_pairs(folder / "pictures")


def evaluate(model, data, output, *options, split="train", metrics=("cider", "bleu", "rouge_l", "exact_match")):
    command = ["evaluate", "--model", model, "--dataset", data, "--split", split, "--output_dir", output]
    main([str(part) for part in [*command, "--max_new_tokens", 12, *options, "--metrics", *metrics]])
    lines = (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((output / "metrics.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def test_a_saved_model_is_measured_on_a_folder_of_pictures(learned, tmp_path):
    model, data = learned
    report, predictions = evaluate(model, data, tmp_path / "out")
    assert [row["index"] for row in predictions] == list(range(len(CAPTIONS)))
    assert [row["references"] for row in predictions] == [[text] for text in CAPTIONS]
    texts = [row["prediction"] for row in predictions]
    assert any(texts)
    measured = Cider().compute(predictions=texts, references=CAPTIONS)
    assert report["metrics"]["cider"] == measured
    assert set(report["metrics"]) == {"cider", "bleu", "rouge_l", "exact_match"}
    assert all("tokenization" in result for result in report["metrics"].values())
    assert (report["rows"], report["skipped"], report["split"]) == (len(CAPTIONS), 0, "train")
    assert (report["model"], report["dataset"]) == (str(model), str(data))
    assert report["decoding"] == {"preset": "caption", **decoding_of("caption", 12)}
    assert report["versions"]["torch"] == torch.__version__
    table = (tmp_path / "out" / "metrics.md").read_text(encoding="utf-8")
    assert f"| cider | {measured['cider']:.4f} | 0 to 10 |" in table
    assert "| bleu_4 |" in table

    # one by one, from a stream, through a YAML file: the same texts
    recipe = tmp_path / "evaluate.yaml"
    recipe.write_text("batch_size: 1\nstreaming: true\ndecoding: caption\n")
    assert evaluate(model, data, tmp_path / "single", "--config", recipe)[1] == predictions


def test_prompts_are_those_of_training_and_answers_those_of_the_processor(learned):
    folder, _ = learned
    rows = pairs(5)
    model, processor = build(Stage2Arguments(model=str(folder)))
    collator = LorgnetteCollator(processor)
    batch, prompts = collator(rows), collator.prompts([{**row, "text": ["one", "two"]} for row in rows])
    for row in range(len(rows)):
        labels = batch["labels"][row][batch["attention_mask"][row].bool()]
        whole = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
        assert torch.equal(prompt, whole[: (labels != -100).long().argmax()])
    assert torch.equal(prompts["pixel_values"], batch["pixel_values"])

    decoding = decoding_of("greedy", 12)
    model.train()
    found = [text for _, text in generate_texts(model, collator, rows, decoding=decoding, batch_size=3)]
    assert model.training
    assert model.qformer.training
    assert not model.vision_model.training
    inputs = processor(images=[row["image"] for row in rows], return_tensors="pt")
    ids = model.eval().generate(**inputs, **decoding, eos_token_id=processor.stop_token_ids)
    expected_texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found == [text.strip() for text in expected_texts]

    # features of the frozen ViT in place of the pictures
    features = model.get_vision_features(batch["pixel_values"]).last_hidden_state
    cached = [{"index": row["index"], "vision_features": features[n]} for n, row in enumerate(rows)]
    assert [text for _, text in generate_texts(model, collator, cached, decoding=decoding, batch_size=5)] == found

    # conversations, with and without a picture, in one batch
    words = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    mixed = [{"messages": words}, {"messages": words, "image": rows[0]["image"]}]
    assert len(list(generate_texts(model, collator, mixed, decoding=decoding, batch_size=2))) == 2


def test_several_references_class_labels_and_questions(learned, tmp_path):
    model, pictures = learned
    paths = [str(pictures / f"{n}.png") for n in range(4)]
    several = Dataset.from_dict({"picture": paths, "said": [["a cat", "one cat"]] * 4, "asked": ["What?"] * 4})
    several.to_parquet(tmp_path / "several.parquet")
    columns = ["--image_column", "picture", "--text_column", "said", "--query_column", "asked"]
    _, predictions = evaluate(model, tmp_path / "several.parquet", tmp_path / "out", *columns)
    assert predictions[0]["references"] == ["a cat", "one cat"]
    features = Features({"image": Image(), "text": ClassLabel(names=["cat", "dog"]), "extra": Value("int64")})
    labelled = Dataset.from_dict({"image": paths, "text": [0, 1, 0, 1], "extra": [0] * 4}, features)
    labelled.save_to_disk(tmp_path / "labelled")
    _, predictions = evaluate(model, tmp_path / "labelled", tmp_path / "out", metrics=["exact_match"])
    assert [row["references"] for row in predictions] == [["cat"], ["dog"]] * 2
    with pytest.raises(ValueError, match="references 0 has 1 answers; VQA accuracy needs 4"):
        evaluate(model, tmp_path / "labelled", tmp_path / "out", metrics=["vqa_accuracy"])


def test_unreadable_pictures_stop_or_are_counted(learned, tmp_path):
    model, pictures = learned
    (tmp_path / "broken.png").write_bytes(b"no picture")
    paths = [str(pictures / "0.png"), str(tmp_path / "broken.png"), str(pictures / "1.png"), "gone.png"]
    rows = [{"image": path, "text": "a cat"} for path in paths]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"row 1: .*broken.png"):
        evaluate(model, tmp_path / "rows.jsonl", tmp_path / "out")
    report, predictions = evaluate(model, tmp_path / "rows.jsonl", tmp_path / "out", "--skip-unreadable")
    assert [row["index"] for row in predictions] == [0, 2]
    left_out = json.loads((tmp_path / "out" / "unreadable.json").read_text())["train"]
    assert (report["skipped"], list(left_out)) == (2, ["1", "3"])
    assert "gone.png" in left_out["3"]
    (tmp_path / "none.jsonl").write_text(json.dumps(rows[1]))
    with pytest.raises(ValueError, match="none of its 1 rows can be read"):
        evaluate(model, tmp_path / "none.jsonl", tmp_path / "out", "--skip-unreadable")


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["a cat", " ", "the dog"], "the text is empty"),
        ([["a cat"], ["a dog", ""], ["the dog"]], "text 1 of 2 is empty"),
    ],
)
def test_empty_texts_stop_or_are_left_out_as_in_training(learned, tmp_path, texts, reason):
    model, pictures = learned
    rows = [{"image": str(pictures / f"{number}.png"), "text": text} for number, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="row 1: column 'text' has"):
        evaluate(model, tmp_path / "rows.jsonl", tmp_path / "out")
    report, predictions = evaluate(model, tmp_path / "rows.jsonl", tmp_path / "out", "--skip_unreadable")
    assert [row["index"] for row in predictions] == [0, 2]
    assert (report["rows"], report["skipped"]) == (2, 1)
    assert json.loads((tmp_path / "out" / "unreadable.json").read_text()) == {"train": {"1": reason}}


def test_the_precision_of_an_earlier_training_is_not_taken_over(learned, tmp_path):
    AcceleratorState._reset_state()
    assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"
    report, _ = evaluate(*learned, tmp_path / "out", split="train[:1]")
    assert report["mixed_precision"] == "no"
    AcceleratorState._reset_state()


@pytest.mark.slow
def test_two_processes_share_the_rows_and_keep_their_order(learned, tmp_path):
    model, data = learned
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["lorgnette.trainer", "evaluate", "--model", model, "--dataset", data, "--split", "train[:7]"]
    command += ["--max_new_tokens", "12", "--batch_size", "2", "--output_dir", tmp_path / "two"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, errors = process.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its workers
            raise
    assert process.returncode == 0, errors[-3000:]
    _, alone = evaluate(model, data, tmp_path / "one", split="train[:7]")
    lines = (tmp_path / "two" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == alone
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["processes"] == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "d"], "model not given"),
        (["--model", "m"], "dataset not given"),
        (["--model", "m", "--dataset", "d", "--metrics", "cidre"], "'cidre' is no metric of generated texts"),
        (["--model", "m", "--dataset", "d", "--decoding", "beam"], "there is no decoding 'beam'"),
        (["--model", "m", "--dataset", "d", "--max_length", "9"], "unknown option '--max_length'"),
        (["--model", "m", "--dataset", "d", "--batch_size", "0"], "batch_size is 0"),
    ],
)
def test_mistakes_are_one_message_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", *argv])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the callback


def run_with_callback(folder, output, callbacks=(), **arguments):
    torch.manual_seed(0)
    model, processor = joined((str(folder / "vit"), str(folder / "llama")))
    run = trainer(model, processor, output, max_steps=6, eval_strategy="steps", eval_steps=2, **arguments)
    for make in callbacks:
        run.add_callback(make(processor, run))
    run.train()
    return run


def test_the_callback_s_figures_choose_the_best_model_and_change_no_training(tmp_path):
    write_backbones(tmp_path)
    reported = []

    def make(processor, run):
        return GenerateMetricsCallback(
            processor,
            pairs(5),
            metrics=["cider", "bleu"],
            batch_size=2,
            report=lambda *arguments: reported.append(arguments[-1]),
        )

    plain = run_with_callback(tmp_path, tmp_path / "plain")
    run = run_with_callback(
        tmp_path,
        tmp_path / "measured",
        [make],
        metric_for_best_model="eval_cider",
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=2,
    )
    evaluations = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4, 6]
    assert all(0 <= entry["eval_cider"] <= 10 and "eval_bleu_4" in entry for entry in evaluations)
    assert [figures["eval_cider"] for figures in reported] == [entry["eval_cider"] for entry in evaluations]
    assert run.state.best_metric == max(entry["eval_cider"] for entry in evaluations)

    def losses(run):
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    assert losses(run) == losses(plain)  # with dropout: the same random numbers were drawn
    assert run.evaluate(metric_key_prefix="test")["test_cider"] == pytest.approx(run.state.best_metric)


def test_the_callback_refuses_what_it_could_not_measure(tmp_path):
    _, processor = joined(write_backbones(tmp_path))
    with pytest.raises(ValueError, match="no rows"):
        GenerateMetricsCallback(processor, [])
    with pytest.raises(ValueError, match="there is no column 'caption', only"):
        GenerateMetricsCallback(processor, pairs(2), text_column="caption")
    with pytest.raises(ValueError, match="VQA accuracy needs 4"):
        GenerateMetricsCallback(processor, pairs(2), metrics=["vqa_accuracy"])


@pytest.mark.parametrize(
    ("value", "error"), [(None, TypeError), ([], ValueError), ("  ", ValueError), (["a", 1], TypeError)]
)
def test_references_that_are_none_name_the_row(value, error):
    with pytest.raises(error, match="row 7: column 'text'"):
        references_of({"index": 7, "text": value}, "text")


def test_a_recipe_measures_texts_at_each_evaluation_and_tells_trackers(tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    (vision, text), data = write_backbones(tmp_path), write_pairs(tmp_path / "pictures")
    qformer = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    command = (
        f"stage2 --vision {vision} --text {text} --num_query_tokens 4 --dataset {data} --eval_fraction 0.25 --use_cpu "
        f"--output_dir {tmp_path}/out --max_steps 2 --eval_strategy steps --eval_steps 1 --report_to tensorboard "
        "--generate_metrics cider exact_match --generate_samples 2 --per_device_eval_batch_size 2 "
        "--metric_for_best_model eval_exact_match --save_strategy best"
    )
    main([*command.split(), "--qformer_config", json.dumps(qformer)])
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_cider" in entry] == [1, 2]
    scalars = events.EventAccumulator(str(tmp_path / "logs")).Reload().Scalars("eval/cider")
    assert [scalar.step for scalar in scalars] == [1, 2]


def test_a_recipe_measures_the_answers_of_chats(tmp_path):
    (vision, text), pictures = write_backbones(tmp_path), pairs(4)
    chats = [
        [
            {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": row["text"]}]},
        ]
        for row in pictures
    ]
    rows = Dataset.from_dict({"image": [row["image"] for row in pictures], "chat": chats})
    rows.save_to_disk(tmp_path / "chats")
    command = (
        f"stage2 --vision {vision} --text {text} --num_query_tokens 4 --dataset {tmp_path}/chats "
        f"--messages_column chat --eval_fraction 0.5 --use_cpu --output_dir {tmp_path}/out --max_steps 1 "
        "--eval_strategy steps --eval_steps 1 --report_to none --generate_metrics exact_match --generate_samples 2"
    )
    qformer = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    main([*command.split(), "--qformer_config", json.dumps(qformer)])
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_exact_match" in entry] == [1]
    evaluation = f"evaluate --model {tmp_path}/out --dataset {tmp_path}/chats --split train --messages_column chat "
    evaluation += f"--metrics exact_match --decoding greedy --max_new_tokens 3 --output_dir {tmp_path}/measured"
    main(evaluation.split())
    lines = (tmp_path / "measured" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["references"] for line in lines] == [[row["text"]] for row in pictures]


def test_a_recipe_that_cannot_measure_texts_is_refused(capsys):
    base = ["stage2", "--vision", "v", "--text", "t", "--dataset", "d", "--use_cpu", "--generate_metrics", "cider"]
    for options, message in [
        ([], "set eval_strategy"),
        (["--generate_decoding", "beam"], "there is no decoding 'beam'"),
        (["--generate_samples", "0"], "generate_samples is 0"),
    ]:
        with pytest.raises(SystemExit):
            main([*base, *options])
        assert message in capsys.readouterr().err
