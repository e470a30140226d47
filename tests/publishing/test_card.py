"""A model's card: its metadata, what it tells of training and measurements, and what it leaves out."""

import ast
import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny_training import CAPTIONS, joined, trainer, write_backbones
from transformers import TrainingArguments

from lorgnette.assembly.card_metadata import license_of
from lorgnette.hub_upload import run
from lorgnette.publishing.card import make_card
from lorgnette.publishing.guards import check_card
from lorgnette.publishing.push import push
from lorgnette.publishing.records import datasets_of, results_of, training_of
from lorgnette.trainer.arguments import SourceArguments
from lorgnette.trainer.provenance import hub_dataset, write_training_data


BACKBONES = {"vision": "google/tiny-vit", "text": "people/tiny-llama"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model and its processor, and the folder of its run; its backbones say that they came from the Hub."""
    folder = tmp_path_factory.mktemp("trained")
    model, processor = joined(write_backbones(folder))
    for part, name in BACKBONES.items():
        setattr(model.config, f"{part}_backbone", name)
        setattr(model.config, f"{part}_backbone_revision", part[0] * 40)
    run = trainer(model, processor, folder / "out", eval_strategy="steps", eval_steps=1)
    run.train()
    run.save_model()
    run.save_state()
    write_training_data(folder / "out", SourceArguments(dataset="people/pictures"), "train[:12]", len(CAPTIONS))
    return model.eval(), processor, folder / "out"


def metrics_file(path: Path, model: Path | str, **fields) -> Path:
    report = {
        "metrics": {"cider": {"cider": 1.25, "tokenization": "PTB"}, "bleu": {"bleu_1": 40.5, "bleu_4": 10.0}},
        "model": str(model),
        "dataset": "/data/pictures",
        "dataset_id": None,
        "split": "test",
        "decoding": {"preset": "greedy", "max_new_tokens": 12},
    }
    path.write_text(json.dumps(report | fields))
    return path


def hub_cards(monkeypatch, folder: Path, **licenses: str | None) -> None:
    """Lets each backbone's card on the Hub say this licence."""

    def download(name: str, filename: str, revision: str | None = None) -> str:
        part = next(part for part, key in BACKBONES.items() if key == name)
        assert (filename, revision) == ("README.md", part[0] * 40)
        license_id = licenses[part]
        card = folder / f"{part}.md"
        card.write_text(f"---\n{f'license: {license_id}' if license_id else 'tags: [x]'}\n---\nA card.")
        return str(card)

    monkeypatch.setattr("lorgnette.assembly.card_metadata.hf_hub_download", download)


def test_a_card_tells_what_is_known(trained, tmp_path, monkeypatch):
    model, processor, source = trained
    hub_cards(monkeypatch, tmp_path, vision="apache-2.0", text="apache-2.0")
    metrics = metrics_file(tmp_path / "metrics.json", source, dataset_id="people/pictures")
    make_card(model, processor, "me/eyes", source, metrics=(metrics,)).save(tmp_path / "README.md")
    check_card(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    data = yaml.safe_load(card.data.to_yaml())
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["base_model"] == list(BACKBONES.values())
    assert data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["people/pictures"]
    assert data["metrics"] == ["cider", "bleu"]
    (index,) = data["model-index"]
    assert index["name"] == "eyes"
    (result,) = index["results"]
    assert result["task"] == {"type": "image-text-to-text"}
    assert result["dataset"] == {"type": "people/pictures", "name": "people/pictures", "split": "test"}
    figures = {metric["name"].split(",")[0]: (metric["type"], metric["value"]) for metric in result["metrics"]}
    assert figures == {"cider": ("cider", 1.25), "bleu_1": ("bleu", 40.5), "bleu_4": ("bleu", 10.0)}
    state = json.loads((source / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert f"| last training loss | {losses[-1]:.4f} (step 2) |" in card.text
    assert "| learning rate | 0.01 |" in card.text
    assert "| learning rate schedule | linear |" in card.text
    assert "| data | people/pictures, train[:12] |" in card.text
    weights = sum(p.numel() for p in model.vision_model.parameters())
    assert f"| frozen ViT | ViTModel | `google/tiny-vit` at `{'v' * 12}` | {weights:,} | 0 |" in card.text
    assert "| cider | 1.2500 | 0 to 10 | people/pictures, test | greedy: max_new_tokens 12 |" in card.text
    assert "{{" not in card.text
    assert "{%" not in card.text


def test_what_was_not_recorded_is_absent(trained, tmp_path):
    model, processor, _ = trained
    card = make_card(model, processor, "me/eyes", tmp_path, license="mit", save_format="thin")
    data = card.data.to_dict()
    assert not {"datasets", "metrics", "model-index", "model_name"} & set(data)
    assert data["base_model_relation"] == "adapter"
    assert "## Training" not in card.text
    assert "## Results" not in card.text


def test_the_examples_hold_the_prompt_as_python_writes_it(trained, tmp_path, monkeypatch):
    model, processor, _ = trained
    monkeypatch.setattr(processor, "query", 'Who\'s "this"? 🙂')
    card = make_card(model, processor, "me/eyes", tmp_path, license="mit")
    prompts = re.findall(r"prompt=(.*)\)\[0\]|build_prompt\((.*)\)\n", card.text)
    assert [ast.literal_eval(one or other) for one, other in prompts] == [processor.query] * 2


def test_a_merged_card_has_no_lora(trained, tmp_path):
    model, processor, _ = trained
    cards = {
        form: make_card(model, processor, "a/b", tmp_path, license="mit", save_format=form)
        for form in ("full", "merged")
    }
    assert "with LoRA" in cards["full"].text
    assert "`peft>=" in cards["full"].text
    assert "with LoRA" not in cards["merged"].text
    assert "`peft>=" not in cards["merged"].text
    plain = sum(p.numel() for name, p in model.language_model.named_parameters() if ".lora_" not in name)
    assert f"| {plain:,} | 0 |" in cards["merged"].text


def test_what_a_run_learned_from_is_known_of_its_checkpoints(tmp_path):
    write_training_data(tmp_path / "out", SourceArguments(dataset="people/pictures"), "train", 12)
    (tmp_path / "out" / "checkpoint-2").mkdir()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        assert training_of(folder) == {"data": "people/pictures, train", "rows": "12"}
        assert datasets_of(folder) == ["people/pictures"]


def test_the_licence_is_what_the_backbones_agree_on(trained, tmp_path, monkeypatch):
    config = trained[0].config
    for licenses, message in [
        ({"vision": "mit", "text": "apache-2.0"}, "google/tiny-vit: mit, people/tiny-llama: apache-2.0"),
        ({"vision": "mit", "text": None}, "people/tiny-llama: none that is known"),
        ({"vision": "other", "text": "other"}, "do not settle"),
        ({"vision": "unknown", "text": "unknown"}, "do not settle"),
    ]:
        hub_cards(monkeypatch, tmp_path, **licenses)
        with pytest.raises(ValueError, match=message):
            license_of(config)
    hub_cards(monkeypatch, tmp_path, vision="mit", text="mit")
    assert license_of(config) == "mit"
    (tmp_path / "README.md").write_text("---\ntags: [a]\n---\n")
    with pytest.raises(ValueError, match="names no licence"):
        check_card(tmp_path / "README.md")
    with pytest.raises(FileNotFoundError, match="There is no card"):
        check_card(tmp_path / "nothing.md")


def test_figures_of_another_model_or_of_older_weights_are_refused(trained, tmp_path):
    source = trained[2]
    with pytest.raises(ValueError, match=r"is about the model .*other, not about"):
        results_of(metrics_file(tmp_path / "a.json", tmp_path / "other"), source)
    old = metrics_file(tmp_path / "b.json", source)
    os.utime(old, (1, 1))
    with pytest.raises(ValueError, match="older than the weights"):
        results_of(old, source)
    with pytest.raises(FileNotFoundError, match=r"There is no .*c\.json"):
        results_of(tmp_path / "c.json", source)
    with pytest.raises(ValueError, match="is about the model me/eyes"):  # the Hub's may be another version
        results_of(metrics_file(tmp_path / "d.json", "me/eyes"), source)
    # of data on this machine the folder's name alone
    for dataset, name in (("/data/pictures", "pictures"), (".", "a folder")):
        results = results_of(metrics_file(tmp_path / "d.json", source, dataset=dataset), source)
        assert {(result.dataset, result.dataset_id) for result in results} == {(name, None)}
    ranked = metrics_file(tmp_path / "e.json", source, metrics={"itc": {"image_to_text_recall@1": 0.5}})
    ranked.write_text(json.dumps({k: v for k, v in json.loads(ranked.read_text()).items() if k != "decoding"}))
    (recall,) = results_of(ranked, source)
    assert (recall.metric, recall.value, recall.scale, recall.how) == ("recall", 0.5, "0 to 1", "ITC")


@pytest.mark.parametrize("content", ["[1]", "{", '{"prediction": "a"}', '{"index": 0}\n{"index": 1}\n', "\xff"])
def test_what_is_no_report_is_named(tmp_path, content):
    (tmp_path / "predictions.jsonl").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"predictions\.jsonl is no"):
        results_of(tmp_path / "predictions.jsonl", tmp_path)


class Trap:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_training_arguments_are_read_without_running_anything_of_them(tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=3e-4, bf16=False, seed=20261123, use_cpu=True, report_to="none"
    )
    arguments.trap = Trap(tmp_path / "sprung")
    torch.save(arguments, tmp_path / "training_args.bin")
    facts = training_of(tmp_path)
    assert (facts["learning rate"], facts["seed"], facts["mixed precision"]) == ("0.0003", "20261123", "none")
    assert not (tmp_path / "sprung").exists()


def test_data_on_this_machine_are_not_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    local = {"dataset_id": None, "dataset_config": None, "dataset_revision": None}
    assert hub_dataset(SourceArguments(dataset="out")) == local
    assert hub_dataset(SourceArguments(dataset=str(tmp_path / "gone"))) == local
    on_hub = SourceArguments(dataset="people/pictures", dataset_config="en")
    assert hub_dataset(on_hub) == {"dataset_id": "people/pictures", "dataset_config": "en", "dataset_revision": None}
    # a feature cache tells of the data that it was made of
    metadata = {"dataset": "people/pictures", "dataset_config": None, "dataset_revision": "abc"}
    Path("out", "vision_features.json").write_text(json.dumps(metadata))
    assert hub_dataset(SourceArguments(dataset="out")) == {"dataset_id": "people/pictures"} | {
        name: metadata[name] for name in ("dataset_config", "dataset_revision")
    }


def test_a_local_export_needs_neither_a_name_nor_a_licence(tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr("lorgnette.hub_upload.check", lambda *args, **kwargs: None)  # it is slow, and tried elsewhere
    for part in joined(write_backbones(tmp_path)):
        part.save_pretrained(tmp_path / "out")
    exported = tmp_path / "my-eyes"
    run([str(tmp_path / "out"), "--dry-run", "--export-dir", str(exported)], prog="lorgnette export")
    card = ModelCard.load(exported / "README.md")
    assert card.data.license is None
    assert "\n# my-eyes\n" in card.text
    assert "the card has the folder's name, my-eyes, as its title" in caplog.text
    assert "The card names no licence, which a push needs. The ViT came from a folder" in caplog.text
    with pytest.raises(ValueError, match="names no licence"):
        push(exported, "me/eyes")
    for options in ([], ["--dry-run"]):
        with pytest.raises(SystemExit):
            run([str(tmp_path / "out"), *options], prog="lorgnette push")
        assert "lorgnette push: error: the following arguments are required: --repo-id" in capsys.readouterr().err
    with pytest.raises(ValueError, match="its licence is not known"):
        run([str(tmp_path / "out"), "--dry-run", "--repo-id", "me/eyes"])
