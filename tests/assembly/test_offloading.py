"""A language model that is offloaded answers as one that is not, or is refused; it is neither trained nor saved."""

from pathlib import Path

import pytest
import torch
from tiny_experts import joined, with_experts
from tiny_forms import hub_with_backbones, inputs, load, logits
from tiny_forms import joined as joined_from_hub
from tiny_models import language_model, model
from tiny_retrieval import retriever
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from lorgnette import LorgnetteForImageTextRetrieval
from lorgnette.assembly.foreign_adapters import replace_lora


SAVE_FORMATS = ("thin", "full", "merged")
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]}
# names are the language model's, but for "language_model" and "vision_model"
EVERYTHING = {"model.embed_tokens": "disk", "model.layers": "disk", "model.norm": "disk", "lm_head": "disk",
              "model.rotary_emb": "cpu"}  # fmt: skip
MAPS = {
    "a part on the disk": {"device_map": "auto", "max_memory": {"cpu": "100KB"}},
    "less on the disk": {"device_map": "auto", "max_memory": {"cpu": "50KB"}},
    "sequential": {"device_map": "sequential", "max_memory": {"cpu": "120KB"}},
    "all on the disk": {"device_map": "auto", "max_memory": {"cpu": 0}},
    "all, by name": {"device_map": {"": "disk"}},
    "all, as a string": {"device_map": "disk"},
    "modules, by name": {"device_map": EVERYTHING},
    "the part, by name": {"device_map": {"language_model": "disk", "vision_model": "cpu"}},
    "buffers too": {"device_map": "auto", "max_memory": {"cpu": "100KB"}, "offload_buffers": True},
}


@pytest.fixture
def saved(tmp_path, monkeypatch) -> tuple[Path, torch.Tensor]:
    """Folders of one model in all forms, and its logits."""
    hub_with_backbones(tmp_path / "hub", monkeypatch)
    built = joined_from_hub(LORA)
    for form in SAVE_FORMATS:
        built.save_pretrained(tmp_path / form, save_format=form)
    return tmp_path, logits(built)


@pytest.mark.parametrize("asked", MAPS)
def test_an_offloaded_language_model_gives_the_same_logits(asked: str, saved):
    folder, expected = saved
    for form in SAVE_FORMATS:
        loaded, info = load(folder / form, **MAPS[asked], offload_folder=folder / "off", output_loading_info=True)
        assert not info["missing_keys"]
        offloaded = [key for key, value in loaded.named_parameters() if value.is_meta]
        assert offloaded
        assert all(key.startswith("language_model.") for key in offloaded)
        torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)  # and once more


@pytest.mark.parametrize("asked", ["a part on the disk", "all, by name"])
def test_remote_code_gives_the_same_logits(asked: str, saved):
    """As a script has it that imports transformers alone, where the package is installed."""
    folder, expected = saved
    for form in SAVE_FORMATS:
        name = "modeling_lorgnette.LorgnetteForConditionalGeneration"
        remote = get_class_from_dynamic_module(name, folder / form)
        loaded = remote.from_pretrained(folder / form, **MAPS[asked], offload_folder=folder / "off").eval()
        assert type(loaded).__module__.startswith("transformers_modules.")
        assert any(value.is_meta for value in loaded.parameters())
        torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)


def test_adapters_are_switched_and_words_are_generated(saved):
    folder, _ = saved
    plain, loaded = load(folder / "full"), load(folder / "full", **MAPS["a part on the disk"], offload_folder=folder)
    batch = inputs(image_token_id=plain.config.image_token_id)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(**batch, **settings), plain.generate(**batch, **settings))
    with plain.disable_adapter(), loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(plain))


@pytest.mark.parametrize("text", ["gpt2", "opt", "gemma3_text"])
def test_other_language_models(text: str, tmp_path):
    built = model(text=text)  # gpt2, opt and gemma tie their tables
    built.save_pretrained(tmp_path / "saved")
    for asked in (MAPS["a part on the disk"], MAPS["all, by name"]):
        loaded = load(tmp_path / "saved", **asked, offload_folder=tmp_path / "off")
        torch.testing.assert_close(logits(loaded), logits(built), atol=1e-4, rtol=1e-4)


def test_an_offloaded_model_is_neither_trained_nor_saved(saved):
    folder, _ = saved
    loaded = load(folder / "full", **MAPS["a part on the disk"], offload_folder=folder / "off")
    batch = inputs(image_token_id=loaded.config.image_token_id)
    match = r"\d+ weights are offloaded \(language_model.*neither trained nor saved"
    with pytest.raises(ValueError, match=match):
        loaded.train()(**batch, labels=batch["input_ids"].clone())
    for form in (None, *SAVE_FORMATS):
        with pytest.raises(ValueError, match=match):
            loaded.save_pretrained(folder / "again", save_format=form)
    assert not (folder / "again").exists()


@pytest.mark.parametrize("asked", ["a part on the disk", "all, by name"])
def test_an_offloaded_model_is_given_no_other_lora(asked: str, saved):
    folder, expected = saved
    joined_from_hub({"r": 4}, seed=5).save_pretrained(folder / "other")
    loaded = load(folder / "full", **MAPS[asked], offload_folder=folder / "off")
    keys = list(loaded.state_dict())
    for give in (
        lambda: loaded.load_lm_adapter(folder / "other" / "lm_adapter"),
        lambda: loaded.load_bridge(folder / "other", "other"),
        lambda: replace_lora(loaded, None, {}),
    ):
        with pytest.raises(ValueError, match=r"\d+ weights are offloaded \(language_model.*nor given another LoRA"):
            give()
    assert list(loaded.state_dict()) == keys
    assert loaded.bridges == ["default"]
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_offloaded_is_refused(tmp_path):
    joined(language_model(), use_dora=True).save_pretrained(tmp_path / "dora")
    experts = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    joined(with_experts("mixtral"), **experts).save_pretrained(tmp_path / "experts")
    for folder in ("dora", "experts"):
        with pytest.raises(ValueError, match="offloads a part of a language model with DoRA or LoRA on parameters"):
            load(tmp_path / folder, **MAPS["all, by name"], offload_folder=tmp_path / "off")
    model().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="to the disk: give an offload_folder"):
        load(tmp_path / "plain", **MAPS["a part on the disk"])
    parts = {"language_model": "cpu", "vision_model": "disk"}
    with pytest.raises(ValueError, match="only the language model can be offloaded to the disk"):
        load(tmp_path / "plain", device_map=parts, offload_folder=tmp_path / "off")
    assert not (tmp_path / "off").exists()


def test_names_that_are_no_modules_are_refused(saved):
    folder, expected = saved
    for name in ("language_model.model.layers.0", "projector", "model.layers.7"):
        with pytest.raises(ValueError, match=f"device_map names '{name}', which is no module of the language model"):
            load(folder / "full", device_map={name: "disk", "": "cpu"}, offload_folder=folder / "off")
    loaded = load(folder / "full", offload_state_dict=True, **MAPS["a part on the disk"], offload_folder=folder / "off")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "placing",
    [
        {"device_map": "auto", "max_memory": {"cpu": "20KB"}},
        {"device_map": "disk"},
        {"device_map": {"": "disk"}},
        {"device_map": {"vision_model": "disk"}},
        {"device_map": {"embeddings": "disk", "": "cpu"}},
    ],
    ids=str,
)
def test_stage_1_has_nothing_that_can_be_offloaded(placing, tmp_path):
    retriever().save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="only a language model can be offloaded, which a LorgnetteForImageTextRetrie"):
        LorgnetteForImageTextRetrieval.from_pretrained(tmp_path / "saved", offload_folder=tmp_path / "off", **placing)
    LorgnetteForImageTextRetrieval.from_pretrained(tmp_path / "saved", device_map="auto")
    assert not (tmp_path / "off").exists()


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {"language_model": "cpu", "vision_model": "cpu"}])
def test_a_device_map_that_offloads_nothing(device_map, tmp_path):
    built = model()
    built.save_pretrained(tmp_path)
    loaded = load(tmp_path, device_map=device_map)
    assert not any(value.is_meta for value in loaded.parameters())
    assert logits(loaded).shape == logits(built).shape
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(built))
