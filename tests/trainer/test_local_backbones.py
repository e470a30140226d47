"""Checkpoints over local backbones: what they hold, where they load, and what a resume and an export make of them."""

import json
import logging
import shutil
from pathlib import Path

import datasets
import pytest
import tiny
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny import picture
from tiny_forms import form_of, keys_in, load, rewrite
from tiny_training import write_backbones, write_pairs
from transformers import TrainingArguments
from without_lorgnette import load_without_lorgnette

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteForImageTextRetrieval
from lorgnette.assembly.card_metadata import card_metadata, license_of
from lorgnette.assembly.fingerprints import folder_fingerprint
from lorgnette.hub_upload import prepare
from lorgnette.modeling.modeling_loading import weight_files
from lorgnette.modeling.modeling_saving import keys_to_ignore_on_save, resolve_save_format
from lorgnette.publishing import export
from lorgnette.trainer.__main__ import main
from lorgnette.trainer.checkpoints import check_backbones
from lorgnette.trainer.local_backbones import local_sources, named_in_checkpoints


QFORMER = json.dumps(tiny_models.QFORMER)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train four steps over backbones in `tmp_path`, with two checkpoints; gives the output folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    vision, text = write_backbones(tmp_path)
    for part in (tiny_models.bert(vocab_size=len(tiny.bert_tokenizer())), tiny.bert_tokenizer()):
        part.save_pretrained(tmp_path / "bert")
    data = write_pairs(tmp_path / "pictures")
    shared = f"--dataset {data} --use_cpu --report_to none --per_device_train_batch_size 4 --save_steps 2 --max_steps 4"
    parts = {
        "stage1": ["--vision", vision, "--qformer", str(tmp_path / "bert"), "--num_query_tokens", "4"],
        "stage2": ["--vision", vision, "--text", text, "--num_query_tokens", "4", "--qformer_config", QFORMER],
    }
    parts["stage2"] += ["--lora", '{"r": 2, "lora_dropout": 0.1}']

    def train(*options, stage: str = "stage2", output: str = "out", model: str | None = None) -> Path:
        given = parts[stage] if model is None else ["--model", model]
        main([stage, *given, *shared.split(), "--output_dir", str(tmp_path / output), *options])
        return tmp_path / output

    return train


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def assert_equal_files(first: Path, second: Path) -> None:
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


def texts_in(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("*.json"))


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_checkpoint_holds_what_trains_and_the_model_everything(run, tmp_path, stage, caplog):
    caplog.set_level(logging.INFO, "lorgnette.trainer.local_backbones")
    output = run(stage=stage)
    made = {"stage1": LorgnetteForImageTextRetrieval, "stage2": LorgnetteForConditionalGeneration}[stage]
    folders = {"vision": tmp_path / "vit"} | ({"text": tmp_path / "llama"} if stage == "stage2" else {})
    for step in (2, 4):
        checkpoint = output / f"checkpoint-{step}"
        model = made.from_pretrained(checkpoint)
        assert keys_in(checkpoint) == {name for name, p in model.named_parameters() if p.requires_grad}
        config = json.loads((checkpoint / "config.json").read_text())
        assert config["saved_form"] == "thin"
        for part, folder in folders.items():
            assert config[f"{part}_backbone"] == str(folder)
            assert config[f"{part}_backbone_revision"] == folder_fingerprint(folder)
    whole = made.from_pretrained(output)
    assert form_of(output) == "full"
    assert str(tmp_path) not in (output / "config.json").read_text()
    assert whole.config.vision_backbone is None
    last = model.state_dict()
    assert [key for key, value in whole.state_dict().items() if not torch.equal(value, last[key])] == []
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (output / "checkpoint-4", output)]
    left_out = sum(file.stat().st_size for folder in folders.values() for file in folder.glob("*.safetensors"))
    assert sizes[1] - sizes[0] > 0.8 * left_out
    said = [message for message in caplog.messages if message.startswith("Checkpoints hold what trains, without ")]
    assert len(said) == 1
    assert all(str(folder) in said[0] for folder in folders.values())


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path, stage):
    whole = run("--logging_steps", "1", stage=stage, output="whole")
    cut = run("--logging_steps", "1", stage=stage, output="cut")
    for path in (cut / "checkpoint-4", cut / "model.safetensors", cut / "config.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "vit").rename(tmp_path / "moved")  # a folder may move: its fingerprint counts
    run("--logging_steps", "1", "--resume_from_checkpoint", "true", "--vision", str(tmp_path / "moved"),
        stage=stage, output="cut")  # fmt: skip
    assert_equal_files(whole, cut)
    assert_equal_files(whole / "checkpoint-4", cut / "checkpoint-4")
    assert losses(whole) == losses(cut)


def test_the_best_checkpoint_is_restored(run):
    evaluation = "--eval_fraction 0.25 --eval_strategy steps --eval_steps 2 --load_best_model_at_end"
    output = run(*evaluation.split(), "--greater_is_better", "true")  # the greatest loss: not the last step's
    state = json.loads((output / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.name == "checkpoint-2"
    saved = load(output).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in load(best).state_dict().items())


def changed_weight(tmp_path: Path) -> str:
    file = tmp_path / "llama" / "model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).add_(1e-3)
    save_file(weights, file, {"format": "pt"})
    return rf"language model in the folder {tmp_path}/llama \(sha256:"


def changed_config(tmp_path: Path) -> str:
    file = tmp_path / "vit" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_norm_eps": 1e-3}))
    return rf"ViT in the folder {tmp_path}/vit \(sha256:"


@pytest.mark.parametrize("change", [changed_weight, changed_config])
def test_a_changed_backbone_is_refused(change, run, tmp_path):
    checkpoint = run() / "checkpoint-2"
    shutil.rmtree(checkpoint.with_name("checkpoint-4"))
    files = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    trained_on = change(tmp_path)
    match = rf"checkpoint-2 was trained on the {trained_on}\w+\), and this run's is in the folder .*: use the files"
    with pytest.raises(ValueError, match=match):
        run("--resume_from_checkpoint", "true")
    with pytest.raises(
        ValueError, match=r"checkpoint-2 was trained on the .* in the folder .*, which has changed: its"
    ):
        load(checkpoint)
    assert files == {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    assert not checkpoint.with_name("checkpoint-4").exists()


def test_another_backbone_is_refused_with_both_names(run, tmp_path):
    output = run()
    shutil.copytree(tmp_path / "llama", tmp_path / "other")
    rewrite(tmp_path / "other", lambda key: True)  # the same weights: only the names of the folders differ
    other = tmp_path / "other" / "model.safetensors"
    save_file({key: value * 2 for key, value in load_file(other).items()}, other, {"format": "pt"})
    match = rf"in the folder {tmp_path}/llama \(.*, and this run's is in the folder {tmp_path}/other \("
    with pytest.raises(ValueError, match=match):
        run("--resume_from_checkpoint", str(output / "checkpoint-2"), "--text", str(tmp_path / "other"))
    in_memory = load(output)  # of a model that was saved in full, nobody knows where its backbones are from
    with pytest.raises(ValueError, match=r"checkpoint-2 was trained on .*, and this run's is of unknown origin"):
        check_backbones(str(output / "checkpoint-2"), in_memory, local_sources(in_memory))


def test_elsewhere_the_error_names_the_folder(run, tmp_path):
    checkpoint = run() / "checkpoint-2"
    (tmp_path / "llama").rename(tmp_path / "elsewhere")
    match = (
        rf"without its language model, which is in the folder {tmp_path}/llama and cannot be loaded. Put that folder"
    )
    with pytest.raises(OSError, match=match):
        load(checkpoint)


@pytest.mark.slow
def test_a_process_without_lorgnette_gets_the_same_from_a_checkpoint(run, tmp_path):
    checkpoint = run() / "checkpoint-2"
    built, processor = export.load(checkpoint)
    batch = dict(processor(images=picture(), text=processor.build_prompt(), return_tensors="pt"))
    save_file(batch, tmp_path / "inputs.safetensors")
    _, tensors = load_without_lorgnette(checkpoint, tmp_path, resaved=tmp_path / "again")
    with torch.no_grad():
        expected = built(**batch).logits
    assert torch.equal(tensors["AutoModelForImageTextToText"], expected)
    for again in ("again-model", "again-captions"):  # a re-save holds everything, and no path
        assert form_of(tmp_path / again) == "full"
        assert str(tmp_path) not in texts_in(tmp_path / again)
    (tmp_path / "vit").rename(tmp_path / "moved")
    with pytest.raises(AssertionError, match=rf"OSError: .*without its ViT, which is in the folder {tmp_path}/vit"):
        load_without_lorgnette(checkpoint, tmp_path)


def test_an_export_makes_a_whole_model(run, tmp_path):
    checkpoint = run() / "checkpoint-2"
    prepare(checkpoint, None, tmp_path / "export", needs_license=False)
    assert form_of(tmp_path / "export") == "full"
    assert str(tmp_path) not in texts_in(tmp_path / "export") + (tmp_path / "export" / "README.md").read_text()
    model, again = load(checkpoint), load(tmp_path / "export").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="cannot be saved thin: its language model comes from a folder"):
        model.save_pretrained(tmp_path / "thin", save_format="thin")
    assert card_metadata(model.config, "full")["base_model"] is None
    with pytest.raises(ValueError, match="The ViT came from a folder, and its licence is not known"):
        license_of(model.config)


def test_training_goes_on_from_a_checkpoint_as_a_model(run):
    first = run()
    second = run(output="second", model=str(first / "checkpoint-2"))
    assert form_of(second / "checkpoint-2") == "thin"
    assert form_of(second) == "full"
    first_config, second_config = (
        json.loads((each / "checkpoint-2" / "config.json").read_text()) for each in (first, second)
    )
    assert {key: value for key, value in first_config.items() if "backbone" in key} == {
        key: value for key, value in second_config.items() if "backbone" in key
    }
    third = run(output="third", model=str(first))  # saved in full: its backbones are in no folder of their own
    assert form_of(third / "checkpoint-2") == "full"


@pytest.mark.parametrize("strategy", ["every_save", "end"])
def test_checkpoints_that_are_pushed_name_no_folder(strategy, tmp_path, caplog):
    caplog.set_level(logging.INFO, "lorgnette.trainer.local_backbones")
    vision, text = write_backbones(tmp_path)
    model = LorgnetteForConditionalGeneration.from_backbones(vision, text, qformer_config=tiny_models.QFORMER)
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, push_to_hub=True, hub_strategy=strategy)
    before = model.config.to_dict(), set(model._keys_to_ignore_on_save)
    with named_in_checkpoints(model, local_sources(model), args):
        assert resolve_save_format(model, None) == ("full" if strategy == "every_save" else "thin")
        backbones = {key for key in model.state_dict() if "vision_model" in key}
        assert (backbones <= keys_to_ignore_on_save(model)) == (strategy == "end")
    assert (model.config.to_dict(), model._keys_to_ignore_on_save) == before
    assert resolve_save_format(model, None) == "full"
    assert ("Checkpoints are saved in full, since they are pushed" in caplog.text) == (strategy == "every_save")


def test_a_backbone_of_pickled_weights_stays_in_checkpoints(tmp_path):
    """They are not read by a reload."""
    vision, text = write_backbones(tmp_path)
    torch.save(load_file(tmp_path / "vit" / "model.safetensors"), tmp_path / "vit" / "pytorch_model.bin")
    (tmp_path / "vit" / "model.safetensors").unlink()
    model = LorgnetteForConditionalGeneration.from_backbones(vision, text, qformer_config=tiny_models.QFORMER)
    assert set(local_sources(model)) == {"language_model"}
    with named_in_checkpoints(model, local_sources(model), TrainingArguments(str(tmp_path / "out"), use_cpu=True)):
        model.save_pretrained(tmp_path / "saved")
    assert form_of(tmp_path / "saved") == "full"
    assert str(tmp_path) not in texts_in(tmp_path / "saved")


def test_the_fingerprint_of_a_folder_is_of_its_config_and_weights(tmp_path):
    vision, _ = write_backbones(tmp_path)
    before = folder_fingerprint(vision)
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    (tmp_path / "vit" / "README.md").write_text("A ViT.")
    save_file(weights, tmp_path / "vit" / "model.safetensors", {"format": "pt", "note": "the same weights"})
    assert folder_fingerprint(vision) == before
    name, value = next((name, value) for name, value in weights.items() if value.ndim == 2)
    changes = [
        {name: value.reshape(-1)},
        {name: value.to(torch.bfloat16)},
        {name: value + torch.nn.functional.one_hot(torch.tensor(0), value.shape[1]) * 1e-3},
        {f"{name}.other": weights.pop(name)},
    ]
    found = {before}
    for change in changes:
        save_file(weights | change, tmp_path / "vit" / "model.safetensors", {"format": "pt"})
        found.add(folder_fingerprint(vision))
    (tmp_path / "vit" / "config.json").write_text("{}")
    found.add(folder_fingerprint(vision))
    assert len(found) == len(changes) + 2
    (tmp_path / "vit" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        folder_fingerprint(vision)


def test_a_run_reads_the_folders_once(run, monkeypatch):
    read = []
    monkeypatch.setattr(
        "lorgnette.assembly.fingerprints.weight_files", lambda folder: read.append(folder) or weight_files(folder)
    )
    output = run()
    assert sorted(Path(folder).name for folder in read) == ["llama", "vit"]
    read.clear()
    run("--resume_from_checkpoint", str(output / "checkpoint-2"))
    assert len(read) == 2
