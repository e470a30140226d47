"""Parts whose code is not transformers' own are refused at the join, however they are given."""

import json
from pathlib import Path

import pytest
import tiny
import tiny_models
from tiny_hub import TinyHub
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,  # the top level's needs torchvision in 5.17
)

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteForImageTextRetrieval, LorgnetteProcessor


CODE = {
    "llama": (LlamaConfig, LlamaForCausalLM, "AutoModelForCausalLM"),
    "vit": (ViTConfig, ViTModel, "AutoModel"),
    "bert": (BertConfig, BertModel, "AutoModel"),
}
PARTS = {"llama": tiny_models.language_model, "vit": tiny_models.vision_model, "bert": tiny_models.bert}
CALLED = {"llama": "language model", "vit": "ViT", "bert": "BERT"}


def with_own_code(folder: Path, kind: str) -> Path:
    """A folder of a model whose classes are in a file beside its weights."""
    config_class, model_class, auto_class = CODE[kind]
    part = PARTS[kind]()
    part.save_pretrained(folder)
    source = (
        f"from transformers import {config_class.__name__}, {model_class.__name__}\n\n\n"
        f"class OwnConfig({config_class.__name__}):\n    model_type = 'own_{kind}'\n\n\n"
        f"class OwnModel({model_class.__name__}):\n    config_class = OwnConfig\n"
    )
    (folder / "modeling_own.py").write_text(source)
    fields = json.loads((folder / "config.json").read_text())
    fields["model_type"] = f"own_{kind}"
    fields["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", auto_class: "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def loaded(folder: Path, kind: str) -> PreTrainedModel:
    auto = AutoModelForCausalLM if kind == "llama" else AutoModel
    return auto.from_pretrained(folder, trust_remote_code=True)


def join(kind: str, part) -> LorgnetteForConditionalGeneration:
    parts = {"vision": tiny_models.vision_model(), "text": tiny_models.language_model(), "qformer": None}
    parts |= {{"llama": "text", "vit": "vision", "bert": "qformer"}[kind]: part}
    return LorgnetteForConditionalGeneration.from_backbones(**parts, lora={"r": 2})


@pytest.mark.parametrize("given", ["folder", "Hub id", "object"])
@pytest.mark.parametrize("kind", CODE)
def test_they_are_refused_with_the_reason(kind: str, given: str, tmp_path, monkeypatch):
    folder = with_own_code(tmp_path / kind, kind)
    part = folder
    if given == "Hub id":
        hub = TinyHub(tmp_path / "hub", monkeypatch)
        hub.add("tiny/own", PARTS[kind]())
        for file in folder.iterdir():
            (hub.snapshot("tiny/own") / file.name).write_bytes(file.read_bytes())
        part = "tiny/own"
    elif given == "object":
        part = loaded(folder, kind)
        before = {name: weight.clone() for name, weight in part.state_dict().items()}
    with pytest.raises(ValueError, match=f"The {CALLED[kind]} .* has code of its own") as caught:
        join(kind, part)
    assert "would not bring that code along" in str(caught.value)
    if given == "object":
        assert all(weight.equal(before[name]) for name, weight in part.state_dict().items())
        assert not any("lora" in name for name, _ in part.named_parameters())


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_stage_1_refuses_them_as_well(kind: str, tmp_path):
    folder = with_own_code(tmp_path, kind)
    for part in (folder, loaded(folder, kind)):
        parts = {"vision": part} if kind == "vit" else {"vision": tiny_models.vision_model(), "qformer": part}
        with pytest.raises(ValueError, match=f"The {CALLED[kind]} .* has code of its own"):
            LorgnetteForImageTextRetrieval.from_backbones(**parts)


def test_a_class_of_ones_own_is_code_of_its_own():
    """Also where its config is transformers', or it is known to the Auto classes in this process alone."""

    class Llama(LlamaForCausalLM):
        pass

    class Config(LlamaConfig):
        model_type = "registered_llama"

    class Registered(LlamaForCausalLM):
        config_class = Config

    fields = tiny_models.language_model().config.to_dict()
    AutoConfig.register("registered_llama", Config)
    AutoModelForCausalLM.register(Config, Registered)
    for part in (Llama(LlamaConfig.from_dict(fields)), Registered(Config(**fields))):
        with pytest.raises(ValueError, match="has code of its own"):
            join("llama", part)


def test_code_beside_a_model_that_transformers_knows_is_not_run(tmp_path):
    """As transformers itself reads such a repository without trust_remote_code: many have code from before."""
    folder = with_own_code(tmp_path, "llama")
    (folder / "modeling_own.py").write_text("raise RuntimeError('it was run')\n")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "llama"}))
    assert type(join("llama", folder).language_model) is LlamaForCausalLM


def test_a_vit_of_transformers_in_a_model_with_own_code_is_taken(tmp_path):
    """Its class and its config are transformers': nothing else of that model is kept."""

    class Classifier(tiny_models.ViTModel):
        def __init__(self, config):
            super().__init__(config)
            self.vit = ViTModel(config)

    classifier = Classifier(tiny_models.vision_model().config)
    assert join("vit", classifier).vision_model is classifier.vit


TOKENIZER = "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
IMAGES = (
    "from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil\n\n\n"
    "class Own(ViTImageProcessorPil):\n    pass\n"
)
AUTO_MAPS = {"tokenizer": {"AutoTokenizer": ["own.Own"] * 2}, "images": {"AutoImageProcessor": "own.Own"}}
# kind -> what it is called, its file of settings, the field that names its class, its code
READERS = {
    "tokenizer": ("tokenizer", "tokenizer_config.json", "tokenizer_class", TOKENIZER),
    "images": ("image processor", "preprocessor_config.json", "image_processor_type", IMAGES),
}


def reader_with_own_code(folder: Path, kind: str) -> Path:
    (tiny.chat_tokenizer() if kind == "tokenizer" else tiny.image_processor()).save_pretrained(folder)
    tiny_models.language_model().config.save_pretrained(folder)
    _, file, field, code = READERS[kind]
    fields = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(fields | {field: "Own", "auto_map": AUTO_MAPS[kind]}))
    (folder / "own.py").write_text(code)
    return folder


@pytest.mark.parametrize("given", ["folder", "object"])
@pytest.mark.parametrize("kind", READERS)
def test_what_reads_pictures_and_words_is_transformers_own(kind: str, given: str, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    part = folder = reader_with_own_code(tmp_path, kind)
    match = f"The {READERS[kind][0]} of .* has code of its own"
    if given == "object":
        auto = AutoTokenizer if kind == "tokenizer" else AutoImageProcessor
        part, match = auto.from_pretrained(folder, trust_remote_code=True), f"{READERS[kind][0]} is a Own, "
    parts = {"vision": tiny.image_processor(), "text": tiny.chat_tokenizer()}
    with pytest.raises(ValueError, match=match) as caught:
        LorgnetteProcessor.from_backbones(**parts | {"text" if kind == "tokenizer" else "vision": part})
    assert "would not bring" in str(caught.value)
    if kind == "tokenizer":
        with pytest.raises(ValueError, match=match):
            LorgnetteProcessor.from_backbones(**parts, qformer=part)
        if given == "folder":  # whose tokenizer is asked for the placeholder's id
            tiny_models.language_model(vocab_size=400).save_pretrained(folder)
            with pytest.raises(ValueError, match=match):
                join("llama", folder)
