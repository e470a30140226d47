"""`lorgnette init`: the recipe fits the data, its reasons are beside the lines, and it trains as it stands."""

import csv
import json
import re
import shlex
import sys
from pathlib import Path

import datasets
import pytest
import tiny
import tiny_models
import tiny_retrieval
import yaml
from datasets import Dataset, DatasetDict
from repository import ROOT
from tiny_training import CAPTIONS, write_backbones
from transformers import TrainingArguments

from lorgnette import cli
from lorgnette.trainer import init
from lorgnette.trainer.__main__ import main
from lorgnette.trainer.arguments import DataArguments, SourceArguments, Stage2Arguments
from lorgnette.trainer.columns import contents_of
from lorgnette.trainer.init import MOST_EPOCHS, MOST_HELD_OUT, plan
from lorgnette.trainer.run import parse
from lorgnette.trainer.stage2 import check as check_stage2


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` prepares out of the user's cache; work in a folder of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    vision, text = write_backbones(tmp_path_factory.mktemp("parts"))
    options = ["--vision", vision, "--text", text, "--qformer", "null", "--num_query_tokens", "4"]
    return [*options, "--qformer_config", json.dumps(tiny_models.QFORMER), "--use_cpu"]


def texts(count: int) -> list[str]:
    return [f"{CAPTIONS[n % len(CAPTIONS)]} {n}" for n in range(count)]


def write_pictures(folder: Path, count: int) -> list[str]:
    folder.mkdir()
    for n in range(count):
        tiny.picture(n).save(folder / f"{n:03d}.png")
    return [f"{n:03d}.png" for n in range(count)]


def write_csv(folder: Path, count: int) -> Path:
    with (folder / "rows.csv").open("w", newline="") as file:
        rows = zip(write_pictures(folder / "pics", count), texts(count), strict=True)
        csv.writer(file).writerows([("file", "caption"), *((f"pics/{name}", text) for name, text in rows)])
    return folder / "rows.csv"


def write_pairs(folder: Path, count: int) -> Path:
    for name, text in zip(write_pictures(folder / "my pictures", count), texts(count), strict=True):
        (folder / "my pictures" / name).with_suffix(".txt").write_text(text)
    return folder / "my pictures"


def write_coco(folder: Path, count: int) -> Path:
    names = write_pictures(folder / "coco", count)
    annotations = [{"image_id": n, "caption": f"{text}, {place}"} for n, text in enumerate(texts(count))
                   for place in range(5)]  # fmt: skip
    images = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    (folder / "coco" / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "coco" / "captions.json"


def write_llava(folder: Path, count: int) -> Path:
    rows = [
        {"image": name, "conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": text}]}
        for name, text in zip(write_pictures(folder / "chats", count), texts(count), strict=True)
    ]  # fmt: skip
    (folder / "chats" / "llava.json").write_text(json.dumps(rows))
    return folder / "chats" / "llava.json"


def parsed(path: str) -> tuple[Stage2Arguments, DataArguments, TrainingArguments]:
    """The recipe as stage 2 reads it."""
    return parse("stage2", Stage2Arguments, ["--config", path, "--use_cpu"], "", check_stage2)


@pytest.mark.parametrize("count", [6, 40, 120])
@pytest.mark.parametrize("write", [write_csv, write_pairs, write_coco, write_llava])
def test_the_recipe_trains_as_it_stands(tmp_path, parts, capsys, write, count):
    source = write(tmp_path, count).relative_to(tmp_path)
    main(["init", "--dataset", str(source)])
    output = capsys.readouterr().out
    model, data, training = parsed("recipe.yaml")
    assert model.lora == {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
    columns = {"write_csv": ("file", "caption"), "write_llava": ("image", "messages")}.get(
        write.__name__, ("image", "text")
    )
    assert (data.image_column, data.text_name) == columns
    assert not training.dataloader_drop_last
    assert (training.eval_strategy != "no") == (data.eval_fraction is not None) == (count >= 20)
    if data.eval_fraction is not None:
        assert 8 <= data.eval_fraction * count + 1e-3 <= 9
    rows = count if data.eval_fraction is None else count - 8
    size = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert rows / size >= 3
    assert size <= (6 if write is write_coco else 32)
    folder = f"out/{'my-pictures' if write is write_pairs else source.stem}"
    assert training.output_dir == folder
    for command in ("check stage2 --config recipe.yaml", "train stage2 --config recipe.yaml", f"caption {folder} "):
        assert f"  lorgnette {command}" in output

    run = ["--config", "recipe.yaml", *parts, "--max_steps", "2"]
    main(["check", "stage2", *run])
    report = json.loads(Path(folder, "check.json").read_text())
    assert report["bad"] == []
    assert sum(report["rows"].values()) == count
    main(["stage2", *run])
    assert Path(folder, "config.json").exists()


def test_each_line_has_its_reason(tmp_path):
    main(["init", "--dataset", write_csv(tmp_path, 40).name, "--output", "recipes/mine.yaml"])
    text = Path("recipes/mine.yaml").read_text()
    assert "# Stage 2 for" in text
    assert "40 pictures are few" in text
    assert re.search(r"^eval_fraction: 0.2 +# 8 of 40 rows are held out$", text, flags=re.MULTILINE)
    assert re.search(r"^vision: google/\S+ +# chosen for \d+ GB of ", text, flags=re.MULTILINE)
    assert re.search(r"^learning_rate: 5e-4 +# ", text, flags=re.MULTILINE)
    assert all(len(line) <= 140 for line in text.splitlines())
    for name in yaml.safe_load(text):
        assert text.count(f"\n{name}: ") == 1, name


def test_an_existing_file_stays_unless_forced(tmp_path):
    source = str(write_csv(tmp_path, 6))
    Path("recipe.yaml").write_text("mine")
    with pytest.raises(FileExistsError, match=r"recipe\.yaml exists: .* --force"):
        main(["init", "--dataset", source])
    assert Path("recipe.yaml").read_text() == "mine"
    main(["init", "--dataset", source, "--force", "--vision", "a/vit", "--text", "a/lm", "--qformer", "null"])
    model, _, _ = parsed("recipe.yaml")
    assert (model.vision, model.text, model.qformer) == ("a/vit", "a/lm", None)


@pytest.mark.parametrize(
    ("memory", "backbones"),
    [
        ((0.0, False), ("google/vit-base-patch16-224", "HuggingFaceTB/SmolLM2-135M-Instruct")),
        ((16.0, False), ("google/siglip2-base-patch16-224", "HuggingFaceTB/SmolLM2-135M-Instruct")),
        ((64.0, False), ("google/siglip2-base-patch16-224", "HuggingFaceTB/SmolLM2-360M-Instruct")),
        ((6.0, True), ("google/vit-base-patch16-224", "HuggingFaceTB/SmolLM2-135M-Instruct")),
        ((24.0, True), ("google/siglip2-base-patch16-224", "HuggingFaceTB/SmolLM2-360M-Instruct")),
        ((80.0, True), ("google/siglip2-so400m-patch14-384", "HuggingFaceTB/SmolLM2-1.7B-Instruct")),
    ],
)
def test_more_memory_means_larger_backbones(tmp_path, monkeypatch, memory, backbones):
    monkeypatch.setattr(init, "memory_of_this_machine", lambda: memory)
    main(["init", "--dataset", str(write_csv(tmp_path, 6))])
    model, _, _ = parsed("recipe.yaml")
    assert (model.vision, model.text) == backbones
    where = "GPU memory" if memory[1] else "memory, no CUDA GPU" if memory[0] else "unknown memory"
    assert where in Path("recipe.yaml").read_text()


def test_the_memory_of_this_machine_is_known():
    assert init.memory_of_this_machine()[0] > 0.5


@pytest.mark.parametrize("rows", [1, 2, 6, 19, 20, 40, 120, 1000, 8000, 30_000, 1_000_000])
@pytest.mark.parametrize("texts_each", [1.0, 5.0])
@pytest.mark.parametrize("at_once", [4, 8, 16])
def test_rows_fill_batches(rows, texts_each, at_once):
    numbers = plan(rows, texts_each, at_once)
    assert numbers.held_out == 0 if rows < 20 else 8 <= numbers.held_out <= MOST_HELD_OUT
    assert numbers.at_once <= at_once
    assert numbers.batch <= max(numbers.rows, 1)
    assert numbers.batch % numbers.at_once == 0
    assert numbers.batch in (1, 2) or numbers.steps >= 4
    assert 1 <= numbers.epochs <= MOST_EPOCHS
    assert numbers.epochs * numbers.steps >= 1000 or numbers.epochs == MOST_EPOCHS


FILES = [f"{n}.jpg" for n in range(4)]
SENTENCES = ["a cat", "a dog", "a bird", "a car"]
CHATS = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}] for text in SENTENCES]


@pytest.mark.parametrize(
    ("columns", "image", "text", "query"),
    [
        ({"image": FILES, "text": SENTENCES}, "image", "text", None),
        ({"id": SENTENCES, "path": FILES, "caption": SENTENCES}, "path", "caption", None),
        ({"image": FILES, "words": SENTENCES}, "image", "words", None),
        (
            {"image": FILES, **{f"caption_{n}": SENTENCES for n in (10, 2, 0)}},
            "image",
            ["caption_0", "caption_2", "caption_10"],
            None,
        ),
        ({"image": FILES, "captions": [SENTENCES] * 4}, "image", "captions", None),
        ({"image": FILES, "question": SENTENCES, "answer": SENTENCES}, "image", "answer", "question"),
        ({"img": [f"https://example.org/{name}?w=1" for name in FILES], "title": SENTENCES}, "img", "title", None),
        ({"image": FILES, "messages": CHATS, "text": SENTENCES}, "image", None, None),
    ],
)
def test_columns_are_recognised(tmp_path, columns, image, text, query):
    Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")
    found = contents_of(SourceArguments(dataset=str(tmp_path / "rows.parquet")))
    assert (found.image_column, found.text_column, found.query_column) == (image, text, query)
    assert found.messages_column == ("messages" if text is None else None)
    main(["init", "--dataset", str(tmp_path / "rows.parquet")])
    _, data, _ = parsed("recipe.yaml")
    assert data.image_column == image
    assert data.query_column == query
    assert data.text_name == ("messages" if text is None else "text" if isinstance(text, list) else text)


def test_columns_that_are_not_recognised_are_listed(tmp_path):
    source = str(tmp_path / "rows.parquet")
    Dataset.from_dict({"image": FILES, "a": SENTENCES, "b": SENTENCES}).to_parquet(source)
    with pytest.raises(ValueError, match=r"\(a, b all hold text\): give --text_column"):
        main(["init", "--dataset", source])
    with pytest.raises(ValueError, match="has no column 'c'; it has image, a, b"):
        main(["init", "--dataset", source, "--text_column", "c"])
    main(["init", "--dataset", source, "--text_column", '["a", "b"]'])
    assert parsed("recipe.yaml")[1].text_columns == ["a", "b"]
    Dataset.from_dict({"a": SENTENCES, "n": [1] * 4}).to_parquet(source)
    with pytest.raises(ValueError, match="no column with pictures is recognised among a, n"):
        main(["init", "--dataset", source, "--output", "other.yaml"])
    with pytest.raises(SystemExit):  # before anything is imported
        main(["init", "--dataset", str(tmp_path / "gone.csv"), "--output", "other.yaml"])
    assert not Path("other.yaml").exists()


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_the_commands_of_the_page(tmp_path, parts, monkeypatch, capsys, page):
    """From a folder of pictures to a captioned new one, by the commands of the pages, with tiny backbones."""
    page = (ROOT / page).read_text(encoding="utf-8")
    tiny.picture(99).save("new.jpg")
    block = page.split("<!-- run by tests/trainer/test_init.py -->\n```bash\n")[1].split("```")[0]
    write_pairs(tmp_path, 40).rename(tmp_path / "my-pictures")
    for line in block.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "lorgnette"
        tiny_run = [*parts, "--max_steps", "2"] if "--config" in arguments else []
        monkeypatch.setattr(sys, "argv", [program, *arguments, *tiny_run])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0, line
    assert capsys.readouterr().out.startswith("./my-pictures: pairs, 40 rows")
    assert Path("out/my-pictures/config.json").exists()


def test_splits_of_the_data_set_are_used(tmp_path):
    rows = Dataset.from_dict({"image": FILES * 10, "text": SENTENCES * 10})
    DatasetDict(train=rows, validation=rows, test=rows).save_to_disk(tmp_path / "saved")
    main(["init", "--dataset", "saved"])
    _, data, training = parsed("recipe.yaml")
    assert (data.train_split, data.eval_split, data.eval_fraction) == ("train", "validation", None)
    assert training.eval_strategy == "steps"
    DatasetDict(all=rows).save_to_disk(tmp_path / "one")
    main(["init", "--dataset", "one", "--force"])
    _, data, _ = parsed("recipe.yaml")
    assert (data.train_split, data.eval_fraction) == ("all", 0.2)


def test_a_trained_qformer_keeps_its_config(tmp_path):
    data = write_csv(tmp_path, 4)
    main(["init", "--dataset", str(data)])
    assert yaml.safe_load(Path("recipe.yaml").read_text())["qformer_config"] == {"use_pooled_features": True}
    tiny_retrieval.retriever().save_pretrained(tmp_path / "stage1")
    main(["init", "--dataset", str(data), "--qformer", str(tmp_path / "stage1"), "--force"])
    assert "qformer_config" not in yaml.safe_load(Path("recipe.yaml").read_text())
    tiny_models.bert().save_pretrained(tmp_path / "bert")
    main(["init", "--dataset", str(data), "--qformer", str(tmp_path / "bert"), "--force"])
    assert "qformer_config" in yaml.safe_load(Path("recipe.yaml").read_text())
