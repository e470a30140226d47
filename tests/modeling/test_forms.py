"""Thin, full and merged: what is in the folder, that each loads elsewhere, and that each becomes the others."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import bert_tokenizer, chat_tokenizer, image_processor, picture
from tiny_forms import (
    assert_equal_weights,
    copy_of,
    form_of,
    hub_with_backbones,
    joined,
    keep_uploads,
    keys_in,
    load,
    logits,
    stirred,
)
from tiny_hub import TinyHub
from tiny_models import QFORMER, bert, inputs, language_model, model, vision_model
from tiny_training import pairs, trainer, write_backbones
from transformers import PreTrainedModel, Trainer
from without_lorgnette import load_without_lorgnette

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteForImageTextRetrieval, LorgnetteProcessor
from lorgnette.trainer.checkpoints import check_backbones
from lorgnette.trainer.vision_tower import VisionTower


MERGED = {"atol": 1e-4, "rtol": 1e-4}  # float32: W x + B A x, and (W + B A) x


@pytest.fixture
def hub(tmp_path, monkeypatch) -> TinyHub:
    return hub_with_backbones(tmp_path / "hub", monkeypatch)


# ------------------------------------------------------------------------------------------------ each form


def test_what_came_from_the_hub_is_saved_thin(hub, tmp_path):
    built = joined()
    built.save_pretrained(tmp_path / "saved")
    assert form_of(tmp_path / "saved") == "thin"
    assert keys_in(tmp_path / "saved") == {name for name, p in built.named_parameters() if p.requires_grad}
    loaded, info = load(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(built))
    assert_equal_weights(loaded, copy_of(built))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == keys_in(tmp_path / "saved")
    assert not loaded.training
    assert loaded.generation_config.eos_token_id == built.generation_config.eos_token_id
    kinds = {path.suffix for path in (tmp_path / "saved").iterdir()}
    assert kinds == {".json", ".jinja", ".py", ".safetensors", ""}


@pytest.mark.slow
@pytest.mark.parametrize(("form", "without"), [("thin", ""), ("merged", "peft")])
def test_a_process_without_lorgnette_gets_the_same(hub, tmp_path, form, without):
    """No lorgnette, no network, and for the merged format no peft; a re-save keeps the format."""
    built = joined()
    processor = built._processor
    batch = dict(processor(images=picture(), text=processor.build_prompt(), return_tensors="pt"))
    save_file(batch, tmp_path / "inputs.safetensors")
    before = copy_of(built)
    built.save_pretrained(tmp_path / form, save_format=form)
    assert_equal_weights(built, before)
    report, tensors = load_without_lorgnette(tmp_path / form, tmp_path, resaved=tmp_path / "again", without=without)
    with torch.no_grad():
        expected = built(**batch).logits
    tolerance = MERGED if form == "merged" else {"atol": 0, "rtol": 0}
    for name in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        torch.testing.assert_close(tensors[name], expected, **tolerance)
    assert ("lora" in " ".join(report["trainable"])) == (form == "thin")
    red = processor(
        images=Image.new("RGB", (40, 30), (200, 30, 30)), text=processor.build_prompt(), return_tensors="pt"
    )
    sequences = built.generate(**red, max_new_tokens=5, do_sample=False)
    caption = processor.batch_decode(sequences[:, red["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
    assert report["caption"][0]["generated_text"].strip() == caption
    for again in ("again-model", "again-captions"):
        assert form_of(tmp_path / again) == form
        torch.testing.assert_close(logits(load(tmp_path / again)), logits(built), **tolerance)


@pytest.mark.parametrize("lora", [{"r": 2, "use_rslora": True}, {"r": 2, "use_dora": True}, {"r": 2}])
@pytest.mark.parametrize("text", ["llama", "gpt2"])
def test_merging_follows_peft_and_leaves_the_model_alone(text, lora, tmp_path):
    built = stirred(model(text=text, lora=lora))
    before = copy_of(built)
    built.save_pretrained(tmp_path, save_format="merged")
    assert_equal_weights(built, before)
    assert built.config.lora_config is not None
    merged = load(tmp_path)
    assert not [name for name in keys_in(tmp_path) if "lora" in name or "base_layer" in name]
    torch.testing.assert_close(logits(merged), logits(built), **MERGED)
    batch = inputs(rows=1)
    greedy = [one.generate(**batch, max_new_tokens=8, do_sample=False) for one in (merged, built)]
    assert torch.equal(*greedy)
    with built.disable_adapter():
        assert not torch.allclose(logits(merged), logits(built), atol=1e-2)


def test_a_language_model_with_tied_words(hub, tmp_path):
    hub.add("tiny/llama", language_model(vocab_size=len(chat_tokenizer()), tie_word_embeddings=True), chat_tokenizer())
    built = joined()
    for form in ("thin", "full", "merged"):
        built.save_pretrained(tmp_path / form, save_format=form)
        loaded = load(tmp_path / form)
        assert loaded.language_model.lm_head.weight is loaded.get_input_embeddings().weight
        torch.testing.assert_close(logits(loaded), logits(built), **MERGED)


def test_stage_1_is_thin_too(hub, tmp_path):
    made = LorgnetteProcessor.from_backbones("tiny/vit", None, qformer=bert_tokenizer(), num_query_tokens=4)
    built = LorgnetteForImageTextRetrieval.from_backbones(
        "tiny/vit", qformer=bert(vocab_size=len(made.qformer_tokenizer)), processor=made
    ).eval()
    for form in ("thin", "full"):
        built.save_pretrained(tmp_path / form, save_format=form)
        loaded = LorgnetteForImageTextRetrieval.from_pretrained(tmp_path / form)
        assert_equal_weights(loaded, copy_of(built))
        with torch.no_grad():
            pictures, texts = [picture(0), picture(1)], ["the cat", "a dog"]
            assert torch.equal(loaded.retrieve(pictures, texts), built.retrieve(pictures, texts))
    assert not [name for name in keys_in(tmp_path / "thin") if name.startswith("vision_model.")]
    with pytest.raises(ValueError, match="no LoRA to merge"):
        built.save_pretrained(tmp_path / "merged", save_format="merged")
    tower = VisionTower.from_pretrained(
        tmp_path / "thin", config=built.config.__class__.from_pretrained(tmp_path / "thin")
    )
    assert_equal_weights(tower.vision_model, copy_of(built.vision_model))


# ------------------------------------------------------------------------------------------------ from form to form


@pytest.mark.parametrize(
    ("first", "then"), [("thin", "full"), ("thin", "merged"), ("full", "thin"), ("full", "merged")]
)
def test_from_one_form_to_another(hub, tmp_path, first, then):
    built = joined()
    built.save_pretrained(tmp_path / "first", save_format=first)
    load(tmp_path / "first").save_pretrained(tmp_path / "then", save_format=then)
    assert form_of(tmp_path / "then") == then
    tolerance = MERGED if then == "merged" else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(logits(load(tmp_path / "then")), logits(built), **tolerance)


@pytest.mark.parametrize("form", [None, "full", "merged"])
def test_a_merged_model_stays_merged(hub, tmp_path, form):
    joined().save_pretrained(tmp_path / "merged", save_format="merged")
    merged = load(tmp_path / "merged")
    merged.save_pretrained(tmp_path / "again", save_format=form)
    assert form_of(tmp_path / "again") == "merged"
    assert torch.equal(logits(load(tmp_path / "again")), logits(merged))
    with pytest.raises(ValueError, match="LoRA is merged into its language model, which is no longer tiny/llama"):
        merged.save_pretrained(tmp_path / "thin", save_format="thin")
    assert not (tmp_path / "thin").exists()


def test_a_new_lora_on_a_merged_model_is_not_folded_in(hub, tmp_path):
    built = joined()
    built.save_pretrained(tmp_path / "merged", save_format="merged")
    built.save_pretrained(tmp_path / "thin")
    merged = load(tmp_path / "merged")
    with pytest.raises(ValueError, match="trained on tiny/llama; the language model here has another LoRA merged"):
        merged.load_lm_adapter(tmp_path / "thin" / "lm_adapter")
    adapter = tmp_path / "thin" / "lm_adapter" / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": None}))
    merged.load_lm_adapter(tmp_path / "thin" / "lm_adapter")
    for form in ("full", None):
        merged.save_pretrained(tmp_path / "new", save_format=form)
        assert form_of(tmp_path / "new") == "full"
        load(tmp_path / "new").save_pretrained(tmp_path / "again")  # is not the Hub's language model, and so not thin
        assert form_of(tmp_path / "again") == "full"
        assert torch.equal(logits(load(tmp_path / "again")), logits(merged))
    merged.save_pretrained(tmp_path / "twice", save_format="merged")
    torch.testing.assert_close(logits(load(tmp_path / "twice")), logits(merged), **MERGED)


@pytest.mark.parametrize("form", ["merged", "full"])
def test_shards(hub, tmp_path, form):
    built = joined()
    built.save_pretrained(tmp_path, save_format=form, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits(load(tmp_path)), logits(built), **MERGED)


def test_what_means_nothing_in_a_thin_save_is_refused(hub, tmp_path):
    built = joined()
    for argument in ({"variant": "fp16"}, {"save_original_format": True}):
        with pytest.raises(ValueError, match=f"{next(iter(argument))} is for the formats that transformers loads"):
            built.save_pretrained(tmp_path / "saved", **argument)
    assert not (tmp_path / "saved").exists()
    built.save_pretrained(tmp_path / "saved", save_original_format=False)
    assert torch.equal(logits(load(tmp_path / "saved")), logits(built))


def test_unknown_forms(tmp_path):
    with pytest.raises(ValueError, match="'slim'; a model is saved as thin, full, merged"):
        model().save_pretrained(tmp_path, save_format="slim")
    with pytest.raises(ValueError, match="no LoRA to merge"):
        LorgnetteForConditionalGeneration.from_backbones(
            vision_model(), language_model(), qformer_config=QFORMER
        ).save_pretrained(tmp_path, save_format="merged")
    assert list(tmp_path.iterdir()) == []


def test_push_to_hub_sends_the_form_that_is_asked_for(hub, tmp_path, monkeypatch):
    built, sent = joined(), []

    keep_uploads(monkeypatch, tmp_path, lambda folder: sent.append(form_of(folder)))
    built.push_to_hub("me/eyes", save_format="merged")
    built.push_to_hub("me/eyes")
    built.save_pretrained(tmp_path / "saved", save_format="full", push_to_hub=True, repo_id="me/eyes")
    assert sent == ["merged", "thin", "full"]
    gathered = {name: value * 2 for name, value in built.state_dict().items()}
    built.save_pretrained(tmp_path / "saved", True, gathered, True, repo_id="me/eyes")  # in transformers' order
    doubled = load_file(tmp_path / "me" / "eyes" / "model.safetensors")["projector.weight"]
    assert torch.equal(doubled, gathered["projector.weight"])


# ------------------------------------------------------------------------------------------------ what cannot be thin


def test_backbones_from_folders_are_saved_in_full_and_no_path_is(hub, tmp_path):
    for vision in (
        shutil.copytree(hub.snapshot("tiny/vit"), tmp_path / "vit"),
        vision_model().from_pretrained(tmp_path / "vit"),
    ):
        built = LorgnetteForConditionalGeneration.from_backbones(
            vision, "tiny/llama", qformer_config=QFORMER, lora={"r": 2}, num_query_tokens=4
        )
        built.save_pretrained(tmp_path / "first")
        load(tmp_path / "first").save_pretrained(tmp_path / "saved")
        for folder in (tmp_path / "first", tmp_path / "saved"):
            assert form_of(folder) == "full"
            assert not [file for file in folder.glob("*.json") if str(tmp_path) in file.read_text()]
        with pytest.raises(ValueError, match="cannot be saved thin: its ViT comes from a folder or from memory"):
            built.save_pretrained(tmp_path / "thin", save_format="thin")


def test_no_folder_of_a_save_has_a_pickle_or_a_path_of_ours(tmp_path):
    """The sub-folders too: the adapter's, and the second tokenizer's of a processor."""
    backbones = write_backbones(tmp_path)
    bert_tokenizer().save_pretrained(tmp_path / "bert")
    made = LorgnetteProcessor.from_backbones(*backbones, qformer=tmp_path / "bert", num_query_tokens=4)
    fields = {**QFORMER, "use_qformer_text_input": True, "vocab_size": len(made.qformer_tokenizer)}
    built = LorgnetteForConditionalGeneration.from_backbones(
        *backbones, processor=made, lora={"r": 2}, qformer_config=fields
    )
    built.save_pretrained(tmp_path / "first")
    load(tmp_path / "first").save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "first", tmp_path / "saved"):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.parent.name for path in files} == {folder.name, "lm_adapter", "qformer_tokenizer"}
        assert {path.suffix for path in files} <= {".json", ".jinja", ".md", ".py", ".safetensors"}
        assert [path for path in files if str(tmp_path).encode() in path.read_bytes()] == []


def test_random_or_trained_backbones_are_saved_in_full(hub, tmp_path):
    built = joined()
    random = LorgnetteForConditionalGeneration(built.config)
    with pytest.raises(ValueError, match="its language model is random, and not what tiny/llama holds"):
        random.save_pretrained(tmp_path / "thin", save_format="thin")
    random.save_pretrained(tmp_path / "random")
    built.language_model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 weights of its backbones train \(language_model.lm_head.weight"):
        built.save_pretrained(tmp_path / "thin", save_format="thin")
    with torch.no_grad():
        built.language_model.lm_head.weight.mul_(2)
    built.save_pretrained(tmp_path / "trained")
    assert form_of(tmp_path / "random") == form_of(tmp_path / "trained") == "full"
    for made, name in ((random, "random"), (built, "trained")):  # a save of the save is full as well
        load(tmp_path / name).save_pretrained(tmp_path / "again")
        assert form_of(tmp_path / "again") == "full"
        assert torch.equal(logits(load(tmp_path / "again")), logits(made.eval()))
    assert built.config.text_backbone == "tiny/llama"


# ------------------------------------------------------------------------------------------------ loading thin


@pytest.mark.parametrize(("gone", "what"), [("tiny/vit", "ViT"), ("tiny/llama", "language model")])
def test_a_backbone_that_is_missing_is_named(hub, tmp_path, gone, what):
    built = joined()
    built.save_pretrained(tmp_path / "thin")
    shutil.rmtree(hub.folder / f"models--{gone.replace('/', '--')}")
    prefix = "vision" if what == "ViT" else "text"
    commit = getattr(built.config, f"{prefix}_backbone_revision")
    with pytest.raises(OSError, match=f"without its {what}, which is {gone} at commit {commit}.*hf download {gone}"):
        load(tmp_path / "thin")


def test_the_recorded_commit_is_what_is_loaded(hub, tmp_path):
    built = joined()
    built.save_pretrained(tmp_path / "thin")
    hub.add("tiny/vit", vision_model(seed=5), image_processor())
    assert torch.equal(logits(load(tmp_path / "thin")), logits(built))


@pytest.mark.parametrize("config", ["by name", "given"])
def test_arguments_of_from_pretrained_reach_all_parts(hub, tmp_path, config):
    joined().save_pretrained(tmp_path / "thin")
    wishes = {"dtype": "bfloat16", "attn_implementation": "eager", "device_map": "cpu"}
    if config == "given":
        wishes["config"] = LorgnetteForConditionalGeneration.config_class.from_pretrained(tmp_path / "thin")
    loaded = load(tmp_path / "thin", **wishes)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    parts = (loaded, loaded.language_model, loaded.vision_model, loaded.qformer)
    assert {part.config._attn_implementation for part in parts} == {"eager"}
    assert load(tmp_path / "thin", qformer_backbone="tiny/bert").config.qformer_backbone == "tiny/bert"
    with pytest.raises(TypeError, match="unheard_of"):
        load(tmp_path / "thin", unheard_of=1)


@pytest.mark.parametrize("form", ["thin", "full"])
def test_a_device_map_places_whole_parts(hub, tmp_path, form):
    joined().save_pretrained(tmp_path / form, save_format=form)
    loaded = load(tmp_path / form, device_map={"language_model": "cpu", "vision_model": "meta", "projector": "cpu"})
    devices = {key.split(".", 1)[0]: parameter.device.type for key, parameter in loaded.named_parameters()}
    assert devices == {"language_model": "cpu", "vision_model": "meta", "qformer": "cpu", "projector": "cpu"}
    with pytest.raises(ValueError, match="device_map names vision_model, and not language_model"):
        load(tmp_path / form, device_map={"vision_model": "cpu"})
    with pytest.raises(ValueError, match="qformer lies beside language_model; here on meta and cpu"):
        load(tmp_path / form, device_map={"language_model": "cpu", "vision_model": "cpu", "qformer": "meta"})


def test_quantisation_is_for_the_language_model_alone(hub, tmp_path, monkeypatch):
    """What transformers is asked for, without the library that would do it."""
    joined().save_pretrained(tmp_path / "thin")
    asked = {}
    original = PreTrainedModel.from_pretrained.__func__

    def watch(cls, *args, **kwargs):
        asked[cls.__name__] = (kwargs.pop("quantization_config", None), kwargs.get("device_map"))
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(watch))
    load(tmp_path / "thin", quantization_config="4 bit")
    beside = {"": torch.device("cpu")}  # where transformers has put the language model, by itself
    assert asked == {"LlamaForCausalLM": ("4 bit", None), "ViTModel": (None, beside)}


def test_weights_that_the_folder_lacks_are_told_and_are_no_leftovers(hub, tmp_path):
    built = joined(lora={"r": 2, "target_modules": ["q_proj"]})
    built.config.lora_config = None
    del built.language_model.model.layers[1].self_attn.q_proj.lora_A["default"]
    weights = {k: v for k, v in built.state_dict().items() if k.startswith("qformer.")} | {"extra": torch.ones(1)}
    joined().save_pretrained(tmp_path / "thin")
    save_file(
        {k: v.contiguous() for k, v in weights.items()}, tmp_path / "thin" / "model.safetensors", {"format": "pt"}
    )
    loaded, info = load(tmp_path / "thin", output_loading_info=True)
    assert info["unexpected_keys"] == {"extra"}
    trains = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert info["missing_keys"] == {name for name in trains if not name.startswith("qformer.")}
    assert not [n for n, p in loaded.named_parameters() if "lora_B" in n and p.any()]
    assert all(p.isfinite().all() and p.abs().max() < 10 for p in loaded.parameters())


# ------------------------------------------------------------------------------------------------ saving twice


def test_a_full_disk_leaves_the_older_save(hub, tmp_path, monkeypatch):
    import transformers.modeling_utils as modeling_utils

    built = joined()
    folder = tmp_path / "saved"
    built.save_pretrained(folder, save_format="full", max_shard_size="50KB")
    (folder / "notes.txt").write_text("mine")
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    written = []

    def break_off(tensors, path, **kwargs):
        Path(path).write_bytes(b"half")
        written.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(modeling_utils, "safe_save_file", break_off)
        with pytest.raises(OSError, match="No space left"):
            joined(seed=2).save_pretrained(folder, save_format="thin")
    assert written
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    assert torch.equal(logits(load(folder)), logits(built))


def test_a_save_that_is_killed_half_way_is_no_model(hub, tmp_path, monkeypatch):
    """Neither old weights under a new config nor the reverse: the config goes first and comes last."""
    folder = tmp_path / "saved"
    joined().save_pretrained(folder, save_format="full")
    replaced = []

    def replace(source, target):
        if Path(target).name == "config.json":
            raise KeyboardInterrupt
        replaced.append(Path(target).name)
        shutil.move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", replace)
        with pytest.raises(KeyboardInterrupt):
            joined(seed=2).save_pretrained(folder, save_format="thin")
    assert "model.safetensors" in replaced
    assert not (folder / "config.json").exists()


def test_what_a_killed_save_has_left_goes_with_the_next(hub, tmp_path):
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "model.safetensors").write_bytes(b"half")
    built = joined()
    built.save_pretrained(tmp_path)
    assert not (tmp_path / ".unfinished").exists()
    assert torch.equal(logits(load(tmp_path)), logits(built))


def test_a_save_replaces_shards_of_another_number(hub, tmp_path):
    """transformers leaves `model.safetensors` where shards come, and reads it in their place."""
    first, then = joined(), joined(seed=2)
    assert not torch.equal(logits(first), logits(then))
    for size in ("20KB", "50GB", "25KB"):
        first.save_pretrained(tmp_path, save_format="full")
        then.save_pretrained(tmp_path, save_format="thin", max_shard_size=size)
        assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size != "50GB")
        assert keys_in(tmp_path) == {name for name, p in then.named_parameters() if p.requires_grad}
        assert torch.equal(logits(load(tmp_path)), logits(then))


# ------------------------------------------------------------------------------------------------ Trainer


def train(folder: Path, seed: int = 1, resume: Path | None = None, **arguments) -> Trainer:
    built = joined({"r": 2, "lora_dropout": 0.1}, seed=seed)
    run = trainer(built, built._processor, folder, max_steps=4, save_strategy="steps", save_steps=2, **arguments)
    run.train(resume_from_checkpoint=str(resume) if resume else None)
    return run


def test_a_run_resumed_from_a_thin_checkpoint_is_the_uninterrupted_one(hub, tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert form_of(checkpoint) == "thin"
    assert not [key for key in keys_in(checkpoint) if key.startswith("vision_model.")]
    warnings = []
    monkeypatch.setattr(
        "transformers.trainer.logger.warning", lambda message, *args, **kwargs: warnings.append(message)
    )
    resumed = train(tmp_path / "resumed", seed=2, resume=checkpoint)
    assert [warning for warning in warnings if "keys" in warning] == []
    assert_equal_weights(resumed.model, copy_of(whole.model))
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed)]
    assert losses[0] == losses[1]


def test_the_best_thin_checkpoint_is_restored(hub, tmp_path):
    run = train(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, greater_is_better=True
    )  # the greatest loss, so that the first is the one to restore
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    assert_equal_weights(run.model, copy_of(load(best)))
    batch = run.data_collator(pairs(2))
    with torch.no_grad():
        assert torch.equal(run.model.eval()(**batch).logits, load(best)(**batch).logits)


def test_a_thin_checkpoint_belongs_to_its_backbones(hub, tmp_path):
    built = joined()
    built.save_pretrained(tmp_path / "checkpoint-2")
    check_backbones(str(tmp_path / "checkpoint-2"), built)
    commit = built.config.vision_backbone_revision
    moved = hub.add("tiny/vit", vision_model(seed=5), image_processor())
    match = f"ViT tiny/vit at commit {commit}, and this run's is tiny/vit at commit {moved}: use the former"
    with pytest.raises(ValueError, match=match):
        check_backbones(str(tmp_path / "checkpoint-2"), joined())
    built.save_pretrained(tmp_path / "checkpoint-2", save_format="full")  # it brings its own
    check_backbones(str(tmp_path / "checkpoint-2"), joined())
