"""What a run tells besides Trainer's figures: stage 1's losses apart, sample answers, its end, and what it held out."""

import json
import re

import datasets
import pytest
import tiny
import tiny_models
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import write_backbones, write_pairs
from transformers import TrainerCallback

from lorgnette.trainer import progress, run
from lorgnette.trainer.__main__ import main
from lorgnette.trainer.progress import SAMPLES, figures_line
from lorgnette.trainer.provenance import HELD_OUT


def options(text: str) -> list[str]:
    return text.split()


COMMON = options("--use_cpu --report_to none --per_device_train_batch_size 3 --learning_rate 1e-3 --num_query_tokens 4")
COMMON += ["--qformer_config", json.dumps(tiny_models.QFORMER)]  # by default checkpoints would be of gigabytes


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Backbones and pictures in folders, as options of a command."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    vision, text = write_backbones(tmp_path)
    data = write_pairs(tmp_path / "pictures")
    return {"vision": ["--vision", vision], "text": ["--text", text], "data": ["--dataset", str(data)]}


@pytest.fixture
def trained(tmp_path, parts, caplog):
    """The folder of a run of stage 2 that held out a part, and what it logged."""
    with caplog.at_level("INFO", logger="lorgnette"):
        more = options("--lora {} --eval_fraction 0.25 --max_steps 4 --sample_answers 2 --load_best_model_at_end true")
        more += options("--eval_strategy steps --eval_steps 2 --save_steps 2")
        backbones = [*parts["vision"], *parts["text"]]
        main(["stage2", *backbones, *parts["data"], *COMMON, *more, "--output_dir", f"{tmp_path}/out"])
    return tmp_path / "out", caplog.text


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_a_run_says_what_it_was_and_what_comes_next(trained, capsys):
    folder, log = trained
    losses = [entry for entry in history(folder) if "loss" in entry]
    assert [entry["step"] for entry in losses] == [4], "fewer steps than logging_steps: the last one is logged"
    assert re.search(rf"{folder}/checkpoint-[24] has the best (eval_)?loss: \d", log)
    assert "the model is that one" in log
    assert f"next: lorgnette caption {folder} PICTURE" in log


def test_answers_to_held_out_pictures_are_kept_with_the_pictures(trained):
    folder, _ = trained
    held_out = json.loads((folder / HELD_OUT).read_text())
    assert held_out["split"] == "train"
    assert len(held_out["rows"]) == 3
    page = (folder / SAMPLES).read_text()
    assert page.count("## Step") == 2
    thumbnails = re.findall(r"!\[\]\((samples/(\d+)\.jpg)\) \| (\d+) \|", page)
    assert len(thumbnails) == 4
    for path, name, number in thumbnails:
        assert (folder / path).is_file()
        assert name == number
        assert int(number) in held_out["rows"]


def test_trackers_get_the_answers_as_a_table(tmp_path, parts, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    more = options("--eval_fraction 0.25 --max_steps 1 --sample_answers 2 --eval_strategy steps --eval_steps 1")
    more += options("--save_strategy no --report_to tensorboard")
    backbones = [*parts["vision"], *parts["text"]]
    main(["stage2", *backbones, *parts["data"], *COMMON, *more, "--output_dir", f"{tmp_path}/out"])
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    (event,) = board.Tensors("samples/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text.startswith("| row | text | answer |\n| --- | --- | --- |\n| ")
    assert len(text.splitlines()) == 4


def test_evaluate_uses_what_training_held_out(trained, parts, tmp_path):
    folder, _ = trained
    evaluate = ["evaluate", *parts["data"], "--metrics", "exact_match", "--max_new_tokens", "2"]
    main([*evaluate, "--model", str(folder), "--output_dir", f"{tmp_path}/found"])
    report = json.loads((tmp_path / "found" / "metrics.json").read_text())
    assert (report["rows"], report["split"]) == (3, "train (held out)")
    predictions = [json.loads(line) for line in (tmp_path / "found" / "predictions.jsonl").read_text().splitlines()]
    assert sorted(row["index"] for row in predictions) == json.loads((folder / HELD_OUT).read_text())["rows"]
    main([*evaluate, "--model", str(folder / "checkpoint-2"), "--output_dir", f"{tmp_path}/of_checkpoint"])
    main([*evaluate, "--model", str(folder), "--split", "train", "--output_dir", f"{tmp_path}/all"])
    assert json.loads((tmp_path / "all" / "metrics.json").read_text())["rows"] == 12
    (folder / HELD_OUT).unlink()
    with pytest.raises(ValueError, match="test"):
        main([*evaluate, "--model", str(folder), "--output_dir", f"{tmp_path}/none"])


def test_held_out_rows_are_kept_by_a_run_that_does_not_evaluate(tmp_path, parts):
    more = options("--eval_fraction 0.25 --max_steps 1 --save_strategy no")
    main(
        ["stage2", *parts["vision"], *parts["text"], *parts["data"], *COMMON, *more, "--output_dir", f"{tmp_path}/out"]
    )
    assert len(json.loads((tmp_path / "out" / HELD_OUT).read_text())["rows"]) == 3


def test_stage_1_logs_its_losses_apart(tmp_path, parts):
    for part in (tiny_models.bert(vocab_size=len(tiny.bert_tokenizer())), tiny.bert_tokenizer()):
        part.save_pretrained(tmp_path / "bert")
    more = options("--max_steps 5 --logging_steps 2 --save_strategy no --itm_weight 2 --dataloader_drop_last true")
    sources = [*parts["vision"], *parts["data"], "--qformer", str(tmp_path / "bert")]
    main(["stage1", *sources, *COMMON, *more, "--output_dir", f"{tmp_path}/out"])
    logged = [entry for entry in history(tmp_path / "out") if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 5]
    for entry in logged:
        whole = entry["loss_itc"] + 2 * entry["loss_itm"] + entry["loss_itg"]
        assert float(entry["loss"]) == pytest.approx(whole, abs=2e-3)


def test_a_line_of_figures_has_the_losses_the_rate_and_the_speed():
    logs = {"loss": 5.8243, "grad_norm": 25.2, "learning_rate": 0.00027333, "epoch": 0.32258}
    logs |= {"loss_itc": 2.708, "loss_itm": 0.64131, "loss_itg": 2.4742, "texts_per_second": 27.84321}
    assert figures_line(logs, 10, 1200) == (
        "step   10/1200  epoch 0.32  loss 5.824   itc 2.708   itm 0.6413  itg 2.474   lr 2.73e-04  27.84 texts/s"
    )
    found = {"eval_loss": 4.1207, "eval_runtime": 0.36, "eval_samples_per_second": 138.9, "epoch": 0.8065}
    assert figures_line(found, 25, 1200) == "step   25/1200  epoch 0.81  eval_loss 4.121   138.9 rows/s"
    assert figures_line({"eval_cider": 1.25}, 25, 1200) == "step   25/1200  eval_cider 1.25"


@pytest.mark.parametrize("bar", [False, True])
def test_a_run_prints_lines_in_place_of_dictionaries_and_times_training_alone(
    tmp_path, parts, capsys, bar, monkeypatch
):
    clock = iter(range(1000))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    more = options("--eval_fraction 0.25 --max_steps 4 --logging_steps 2 --eval_strategy steps --eval_steps 1")
    more += options(f"--sample_answers 0 --save_strategy no --disable_tqdm {not bar}")
    main(
        ["stage2", *parts["vision"], *parts["text"], *parts["data"], *COMMON, *more, "--output_dir", f"{tmp_path}/out"]
    )
    output, errors = capsys.readouterr()
    assert "{" not in output
    assert ("4/4 [" in errors) == bar
    lines = re.findall(r"step \d/4  epoch.*", errors)
    kinds = [re.search("train_loss|eval_loss|loss", line)[0] for line in lines]
    assert kinds == ["eval_loss", "loss", *["eval_loss"] * 2, "loss", "eval_loss", "train_loss"]
    # two steps of three rows, and a second each on this clock: evaluations after each step are left out
    assert [line for line in lines if " loss " in line and not line.endswith(" 3 texts/s")] == []


def test_an_interruption_says_how_to_continue(tmp_path, parts, caplog, monkeypatch):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    sources = [*parts["vision"], *parts["text"], *parts["data"]]
    more = options("--lora {} --max_steps 4 --save_steps 2")
    command = ["stage2", *sources, *COMMON, *more, "--output_dir", f"{tmp_path}/out"]
    with monkeypatch.context() as patch:
        patch.setattr(run, "CleanPush", Interrupt)
        with pytest.raises(SystemExit) as ended:
            main(command)
    assert ended.value.code == 130
    assert "Interrupted after step 3 of 4" in caplog.text
    assert f"{tmp_path}/out/checkpoint-2: --resume_from_checkpoint true continues from it" in caplog.text
    with caplog.at_level("INFO", logger="lorgnette"):
        main([*command, "--resume_from_checkpoint", "true"])
    assert f"training resumes from {tmp_path}/out/checkpoint-2" in caplog.text
