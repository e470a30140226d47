"""The inspector's command line, as a user calls it."""

import json
import sys

import pytest
import torch
from PIL import Image
from tiny_inspection import ROWS, rows, train, untrained
from tiny_training import write_backbones

from lorgnette import LorgnetteCollator, LorgnetteForConditionalGeneration, LorgnetteProcessor, cli
from lorgnette.assembly.foreign_adapters import detach_lora, put_back_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained model's folder, with its backbones and pictures beside it."""
    root = tmp_path_factory.mktemp("inspected")
    backbones = write_backbones(root)
    model, processor = untrained(backbones)
    lora = detach_lora(model.language_model)
    model.language_model.save_pretrained(backbones[1])  # with the fixture's louder head, and without LoRA
    put_back_lora(model.language_model, lora)
    train(model, LorgnetteCollator(processor)).save_pretrained(root / "model")
    (root / "pictures").mkdir()
    with open(root / "pictures" / "metadata.jsonl", "w") as metadata:
        for row in rows():
            row["image"].save(root / "pictures" / f"{row['index']}.png")
            metadata.write(json.dumps({"file_name": f"{row['index']}.png", "text": row["text"]}) + "\n")
    return root


@pytest.fixture
def inspect(monkeypatch):
    """Run `lorgnette inspect` in this process, which gives its status."""
    monkeypatch.setenv("COLUMNS", "80")

    def command(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["lorgnette", "inspect", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    return command


def test_a_healthy_model_is_printed_and_written(folder, tmp_path, monkeypatch, capsys, inspect):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = ["--dataset", str(folder / "pictures"), "--split", "train", "--device", "cpu", "--rows", str(ROWS)]
    options += ["--vision", str(folder / "vit"), "--image", str(folder / "pictures" / "1.png")]
    written = [f"--{kind}={tmp_path / f'report.{kind}'}" for kind in ("html", "json")]
    assert inspect(str(folder / "model"), *options, *written) == 0
    printed = capsys.readouterr().out
    assert "1.png: answer " in " ".join(printed.split())
    assert "…" not in printed  # nothing is cut off in 80 columns
    assert "Answers depend on the picture" in printed
    assert "✗" not in printed
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["passed"] is True
    assert [check["name"] for check in report["checks"] if check["passed"] is None] == ["text_only"]  # no --text
    assert report["flow"][0]["shape"] == [3, 32, 32]
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_a_red_check_is_status_1(folder, tmp_path, capsys, inspect):
    model = LorgnetteForConditionalGeneration.from_pretrained(folder / "model")
    with torch.no_grad():
        model.projector.weight.mul_(1e4)
    model.save_pretrained(tmp_path / "loud")
    LorgnetteProcessor.from_pretrained(folder / "model").save_pretrained(tmp_path / "loud")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    assert inspect(str(tmp_path / "loud"), "--image", str(tmp_path / "red.png"), "--device", "cpu") == 1
    assert "word embeddings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{model}", "--image", "gone.png"], "gone.png"),
        (["{model}", "--dataset", "{pictures}", "--split", "gone"], "gone"),
        (["{model}", "--dataset", "{pictures}", "--split", "train", "--text-column", "words"], "words"),
        (["{nowhere}"], "nowhere"),
        (["{model}", "--rows", "0"], "--rows"),
        (["{model}", "--html", "{pictures}"], "is a directory"),
        (["{model}", "--html", "{model}/config.json/deep/report.html"], "config.json"),
        (["{pictures}"], "pictures"),
        ([], "MODEL"),
    ],
)
def test_a_mistake_is_status_2_and_one_line(folder, tmp_path, monkeypatch, capsys, inspect, options, message):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    paths = {name: str(folder / name) for name in ("model", "pictures", "nowhere")}
    assert inspect(*(option.format(**paths) for option in options)) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("lorgnette inspect: error: ")
    assert message in last
