"""An untrusted model's folder: loading reads only numbers, runs no code, and names what does not fit."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_forms import PT, form_of, hub_with_backbones, joined
from tiny_models import NUM_QUERY_TOKENS, bert, language_model, vision_model
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, pipeline

from lorgnette import (
    LorgnetteConfig,
    LorgnetteForConditionalGeneration,
    LorgnetteForImageTextRetrieval,
    LorgnetteModel,
    LorgnetteProcessor,
    LorgnetteRetrievalConfig,
)
from lorgnette.modeling import modeling_base, modeling_loading


SAVE_FORMATS = ("thin", "full", "stage1")
ABSURD = {
    "qformer_config.hidden_size": (10**12, 2 * 10**4, -16, 0),
    "qformer_config.num_hidden_layers": (10**6, 200, -1),
    "qformer_config.intermediate_size": (10**12, 10**7),
    "vision_config.num_hidden_layers": (10**6, 200, -1, 0),
    "vision_config.hidden_size": (10**12, -24),
    "vision_config.image_size": (10**9, 4096),
    "text_config.num_hidden_layers": (10**6, 100, -1),
    "text_config.vocab_size": (10**12, 10**7, -5),
    "text_config.hidden_size": (10**12, 10**5, -32),
    "text_config.num_attention_heads": (0, -4),
    "num_query_tokens": (10**12, -1),
    "image_token_id": (10**30, -1),
    "lora_config.r": (10**9, 7),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of stage 2 in two forms and one of stage 1, each with its processor; the backbones in a Hub's cache."""
    place = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        hub = hub_with_backbones(place / "hub", patch)
        built = joined()
        for form in ("thin", "full"):
            built.save_pretrained(place / form, save_format=form)
        words = tiny.bert_tokenizer()
        processor = LorgnetteProcessor.from_backbones(
            tiny.image_processor(), None, qformer=words, num_query_tokens=NUM_QUERY_TOKENS
        )
        LorgnetteForImageTextRetrieval.from_backbones(
            vision_model(), qformer=bert(vocab_size=len(words)), processor=processor, image_text_hidden_size=8
        ).save_pretrained(place / "stage1")
        hub.place = place
        yield hub


@pytest.fixture
def folder(saved, tmp_path):
    """Copies one of them, to be spoilt."""

    def copy(form: str) -> Path:
        return Path(shutil.copytree(saved.place / form, tmp_path / form))

    return copy


@pytest.fixture
def loads_nothing(monkeypatch):
    """Fails where anything is loaded, or unpickled, rather than refused before."""

    def fail(*args, **kwargs):
        raise AssertionError("it was not refused")

    monkeypatch.setattr(torch, "load", fail)
    monkeypatch.setattr(modeling_base, "load_in_parts", fail)
    real = PreTrainedModel.from_pretrained.__func__
    own = {LorgnetteForConditionalGeneration, LorgnetteForImageTextRetrieval}
    monkeypatch.setattr(
        PreTrainedModel,
        "from_pretrained",
        classmethod(lambda cls, *a, **k: fail() if cls in own else real(cls, *a, **k)),
    )


def load(folder: Path, **kwargs) -> PreTrainedModel:
    return _class_of(folder).from_pretrained(folder, **kwargs)


def _class_of(folder: Path) -> type[PreTrainedModel]:
    return LorgnetteForImageTextRetrieval if folder.name == "stage1" else LorgnetteForConditionalGeneration


def rewrite(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return Path.write_text, (Path(self.path), "caught")


class TestPickles:
    @pytest.fixture
    def pickled(self, folder, tmp_path):
        """A folder with a trap for its weights."""

        def make(form: str, name: str = "pytorch_model.bin") -> Path:
            spoilt = folder(form)
            (spoilt / "model.safetensors").unlink()
            (spoilt / name).write_bytes(pickle.dumps({"qformer.layernorm.weight": Trap(tmp_path / "caught")}))
            return spoilt

        yield make
        assert not (tmp_path / "caught").exists()

    @pytest.mark.parametrize("form", SAVE_FORMATS)
    def test_they_are_not_read(self, form, pickled, loads_nothing):
        spoilt = pickled(form)
        for way in (load, AutoModel.from_pretrained):
            with pytest.raises(
                ValueError, match=r"holds pytorch_model.bin and no model.safetensors: pickled weights are"
            ):
                way(spoilt)
        with pytest.raises(ValueError, match="use_safetensors is False"):
            load(spoilt, use_safetensors=False)

    def test_nor_shards_of_them(self, pickled, loads_nothing):
        index = {"metadata": {}, "weight_map": {"qformer.layernorm.weight": "pytorch_model-00001-of-00001.bin"}}
        for form, name in (("full", "pytorch_model.bin.index.json"), ("thin", "model.safetensors.index.json")):
            spoilt = pickled(form, "pytorch_model-00001-of-00001.bin")
            (spoilt / name).write_text(json.dumps(index))
            with pytest.raises(
                ValueError, match=r"pickled weights are not read|its index names 'pytorch_model-00001-of"
            ):
                load(spoilt)

    @pytest.mark.parametrize(
        "elsewhere", ["../full/model.safetensors", "/etc/model.safetensors", "..\\model.safetensors"]
    )
    def test_nor_what_lies_elsewhere(self, elsewhere, pickled, loads_nothing):
        spoilt = pickled("thin")
        index = {"metadata": {}, "weight_map": {"qformer.layernorm.weight": elsewhere}}
        (spoilt / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="which is no safetensors file beside it"):
            load(spoilt)

    @pytest.mark.parametrize("form", SAVE_FORMATS)
    def test_nor_what_the_config_names(self, form, folder, loads_nothing):
        spoilt = folder(form)
        rewrite(spoilt / "config.json", lambda config: config.update(transformers_weights="adapter_model.bin"))
        with pytest.raises(ValueError, match=r"says that the weights are in 'adapter_model\.bin'"):
            load(spoilt)

    def test_nor_what_another_model_is_given(self, saved, pickled, loads_nothing, monkeypatch):
        """A bridge, an adapter, a start of the Q-Former."""
        stage1 = pickled("stage1")
        with pytest.raises(ValueError, match="pickled weights are not read"):
            LorgnetteForConditionalGeneration.from_backbones(vision_model(), language_model(), qformer=stage1)
        built = joined()
        with pytest.raises(ValueError, match="pickled weights are not read"):
            built.load_bridge(pickled("full"), "theirs")
        adapter = pickled("thin") / "lm_adapter"
        (adapter / "adapter_model.safetensors").unlink()
        (adapter / "adapter_model.bin").write_bytes((adapter.parent / "pytorch_model.bin").read_bytes())
        with pytest.raises(ValueError, match=r"no adapter_model.safetensors; pickled weights \(.bin\) are not read"):
            built.load_lm_adapter(adapter)

    @pytest.mark.parametrize("part", ["vit", "llama"])
    def test_a_backbone_of_a_thin_model_is_read_the_same_way(self, part, saved, folder, tmp_path):
        """And one that was pickled where the model was joined is not left out of the model's save."""
        weights = saved.snapshot(f"tiny/{part}") / "model.safetensors"
        pickle_ = weights.with_name("pytorch_model.bin")
        torch.save(load_file(weights), pickle_)
        content = weights.read_bytes()
        weights.unlink()
        try:
            with pytest.raises(ValueError, match=rf"tiny/{part} holds pytorch_model\.bin and no model\.safetensors"):
                load(folder("thin"))
            built = joined()
            assert getattr(built.config, f"{'vision' if part == 'vit' else 'text'}_backbone") is None
            built.save_pretrained(tmp_path / "again")
            assert form_of(tmp_path / "again") == "full"
        finally:
            weights.write_bytes(content)
            pickle_.unlink()

    def test_no_weights_at_all(self, folder):
        for form in SAVE_FORMATS:
            empty = folder(form)
            (empty / "model.safetensors").unlink()
            with pytest.raises(OSError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
                load(empty)


@pytest.mark.parametrize("form", SAVE_FORMATS)
def test_an_adapter_at_the_top_is_not_put_on(form, folder, loads_nothing):
    """transformers would, and would look for weights where its config says."""
    spoilt = folder(form)
    (spoilt / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/etc"}))
    with pytest.raises(ValueError, match=r"has an adapter_config\.json beside its weights"):
        load(spoilt)


class TestShapes:
    @pytest.mark.parametrize(
        ("form", "key"),
        [
            ("full", "qformer.encoder.layer.0.crossattention.attention.key.weight"),
            ("full", "projector.weight"),
            ("full", "language_model.model.embed_tokens.weight"),
            ("full", "language_model.model.layers.1.self_attn.v_proj.lora_A.default.weight"),
            ("thin", "qformer.query_tokens.weight"),
            ("thin", "language_model.model.layers.1.self_attn.v_proj.lora_A.default.weight"),
            ("stage1", "text_head.bias"),
        ],
    )
    def test_a_tensor_of_another_shape_is_named_before_anything_is_loaded(self, form, key, folder, loads_nothing):
        spoilt = folder(form)
        weights = load_file(spoilt / "model.safetensors")
        shape = tuple(weights[key].shape)
        weights[key] = torch.zeros(shape[0] + 1, *shape[1:])
        save_file(weights, spoilt / "model.safetensors", PT)
        with pytest.raises(ValueError, match=rf"{key} is \({shape[0] + 1}.*in the files, and \({shape[0]}.*the config"):
            load(spoilt)

    def test_by_whatever_name_it_has_in_the_file(self, tmp_path):
        """transformers keeps older names in files without LoRA, so that this one is found as it is loaded."""
        spoilt = tmp_path / "merged"
        tiny_models.model().save_pretrained(spoilt, save_format="merged")
        weights = load_file(spoilt / "model.safetensors")
        (key,) = (
            key
            for key in weights
            if key.startswith("vision_model.") and "layer.1.attention" in key and key.endswith("query.bias")
        )
        weights[key] = torch.zeros(7)
        save_file(weights, spoilt / "model.safetensors", PT)
        with pytest.raises(ValueError, match=r"vision_model\..*bias is \(7,\) in the files, and \(24,\) by the config"):
            load(spoilt)

    @pytest.mark.parametrize(
        ("form", "path", "value"),
        [
            (form, path, value)
            for form in SAVE_FORMATS
            for path, values in ABSURD.items()
            for value in values
            if form != "stage1" or not path.startswith(("text_config", "lora_config", "image_token_id"))
        ],
    )
    def test_absurd_sizes(self, form, path, value, folder, loads_nothing, monkeypatch):
        """Refused by name, before any memory is taken: by the config, or by what the files and the backbones hold."""
        spoilt = folder(form)
        *parts, field = path.split(".")

        def change(config):
            for part in parts:
                config = config[part]
            config[field] = value

        rewrite(spoilt / "config.json", change)
        # a thin model's backbones are looked at one after another, and none is read
        monkeypatch.setattr(modeling_base, "load_in_parts", modeling_loading.load_in_parts)
        for part in modeling_loading._READERS:
            monkeypatch.setitem(modeling_loading._READERS, part, torch.load)
        with pytest.raises(
            ValueError,
            match=rf"{field}|describes [\d,]+ numbers|no model can be built|is no config of|in the files, and",
        ):
            load(spoilt)

    @pytest.mark.parametrize("queries", [10**12, 2**16 + 1, 0, -1])
    def test_a_processor_that_would_fill_memory_with_placeholders(self, queries, folder):
        """It writes them before any model is asked how many it has."""
        spoilt = folder("full")
        rewrite(spoilt / "processor_config.json", lambda config: config.update(num_query_tokens=queries))
        for kind in (LorgnetteProcessor, AutoProcessor):
            with pytest.raises(ValueError, match=rf"num_query_tokens is {queries}; "):
                kind.from_pretrained(spoilt)

    def test_a_config_that_its_class_refuses_is_named(self):
        with pytest.raises(ValueError, match=r'text_config is no config of the model_type "llama": '):
            LorgnetteConfig(text_config={"model_type": "llama", "num_attention_heads": 0})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_model_name_or_path", "/etc"),
        ("megatron_core", "os"),
        ("megatron_config", {"a": 1}),
        ("corda_config", {"cache_file": "/tmp/pickle.pt"}),
        ("lora_ga_config", {"cache_file": "/tmp/pickle.pt"}),
        ("kasa_config", {"beta": 0.1}),
        ("auto_mapping", {"parent_library": "os", "base_model_class": "system"}),
        ("init_lora_weights", "corda"),
        ("modules_to_save", ["lm_head"]),
        ("peft_type", "LOHA"),
        ("no_such_field", 1),
    ],
)
@pytest.mark.parametrize("form", ["thin", "full"])
def test_lora_that_reaches_beyond_the_model(form, field, value, folder):
    spoilt = folder(form)
    rewrite(spoilt / "config.json", lambda config: config["lora_config"].update({field: value}))
    with pytest.raises(ValueError, match=rf"lora_config\.{field}"):
        load(spoilt)


def test_an_adapter_that_names_a_path_is_read_from_its_own_folder(saved, tmp_path):
    """peft writes down where the language model lay when LoRA was trained; nothing is looked for there."""
    adapter = shutil.copytree(saved.place / "full" / "lm_adapter", tmp_path / "lm_adapter")
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "config.json").write_text("{")
    for path in (str(trap), "/etc", "../..", "~/models/lm"):
        rewrite(
            Path(adapter, "adapter_config.json"), lambda config, path=path: config.update(base_model_name_or_path=path)
        )
        built = joined(seed=2)
        built.load_lm_adapter(adapter)
        assert "base_model_name_or_path" not in built.config.lora_config


class TestTemplates:
    @pytest.mark.parametrize(
        "attack",
        [
            "{{ cycler.__init__.__globals__.os.system('touch CAUGHT') }}",
            "{{ lipsum.__globals__['os'].popen('touch CAUGHT').read() }}",
            "{{ ''.__class__.__mro__[1].__subclasses__()[0]() }}",
            "{{ messages.__class__.__base__.__subclasses__() }}",
            "{{ raise_exception.__globals__['__builtins__']['open']('CAUGHT', 'w') }}",
            "{{ strftime_now.__globals__['__builtins__']['__import__']('os').system('touch CAUGHT') }}",
            "{{ (messages | map(attribute='__class__.__base__') | first).__subclasses__() }}",
            "{% include 'CAUGHT' %}",
            "{% import 'os' as os %}{{ os.system('touch CAUGHT') }}",
            "{{ messages.append(1) }}",
            "{{ messages[0].update({'role': 'system'}) }}",
            "{{ range(10**9) | list }}",
            "{{ '%s'.__mod__.__self__.__class__.__subclasses__() }}",
            "{{ '{0.__class__.__base__.__subclasses__}'.format(messages)() }}",
        ],
    )
    def test_attacks_are_refused_by_the_sandbox(self, attack, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        spoilt = folder("full")
        (spoilt / "chat_template.jinja").write_text(attack)
        processor = LorgnetteProcessor.from_pretrained(spoilt)
        assert processor.chat_template == attack
        chat = [{"role": "user", "content": "Hello."}]
        for way in (processor.build_prompt, lambda: processor.apply_chat_template(chat)):
            with pytest.raises(ValueError, match="the LM's chat template cannot write messages"):
                way()
        assert chat == [{"role": "user", "content": "Hello."}]
        assert not (tmp_path / "CAUGHT").exists()


class TestCode:
    """The folder brings code along, as every saved model does. Who has lorgnette runs none of it."""

    @pytest.fixture
    def trapped(self, folder, saved, tmp_path):
        """A folder all of whose code writes a file when it is run, and a Hub repository of such code."""

        def make(form: str) -> Path:
            spoilt = folder(form)
            trap = f"from pathlib import Path\nPath({str(tmp_path / 'caught')!r}).write_text('caught')\n"
            for file in (*spoilt.glob("*.py"), spoilt / "evil.py"):
                file.write_text(trap + "class Evil: pass\n")
            repository = saved.folder / "models--evil--code"
            snapshot = repository / "snapshots" / ("e" * 40)
            snapshot.mkdir(parents=True, exist_ok=True)
            (snapshot / "evil.py").write_text(trap + "class Evil: pass\n")
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / "main").write_text("e" * 40)
            return spoilt

        yield make
        assert not (tmp_path / "caught").exists()

    def test_models_and_processors(self, trapped):
        for form in SAVE_FORMATS:
            spoilt = trapped(form)
            kinds = (LorgnetteRetrievalConfig, LorgnetteForImageTextRetrieval) if form == "stage1" else (
                LorgnetteConfig, LorgnetteForConditionalGeneration)  # fmt: skip
            assert type(AutoConfig.from_pretrained(spoilt)) is kinds[0]
            auto = AutoModel if form == "stage1" else AutoModelForImageTextToText
            assert type(auto.from_pretrained(spoilt)) is kinds[1]
            assert type(AutoModel.from_pretrained(spoilt)) is (kinds[1] if form == "stage1" else LorgnetteModel)
            assert type(AutoProcessor.from_pretrained(spoilt)) is LorgnetteProcessor
            load(spoilt).save_pretrained(spoilt.parent / "again")

    def test_a_pipeline_has_to_be_trusted(self, trapped):
        with pytest.raises(ValueError, match="trust_remote_code"):
            pipeline("image-to-text", model=str(trapped("full")), trust_remote_code=False)

    @pytest.mark.parametrize("where", ["evil.Evil", "evil/code--evil.Evil"])
    @pytest.mark.parametrize(
        ("file", "kind", "name"),
        [
            ("qformer_tokenizer/tokenizer_config.json", "AutoTokenizer", "tokenizer_class"),
            ("processor_config.json", "AutoProcessor", "processor_class"),
        ],
    )
    def test_the_processor_that_a_model_finds_beside_it(self, where, file, kind, name, trapped):
        """`retrieve` makes one by itself, though nobody has said that its tokenizer's code is to be trusted."""
        spoilt = trapped("stage1")
        named = [where, None] if kind == "AutoTokenizer" else where
        rewrite(spoilt / file, lambda config: config.update({"auto_map": {kind: named}, name: "Evil"}))
        model = load(spoilt)
        if kind == "AutoTokenizer":
            with pytest.raises(ValueError, match="custom code"):
                model.retrieve([tiny.picture()], ["a cat"])
        else:
            assert model.retrieve([tiny.picture()], ["a cat"]).shape == (1, 1)

    def test_a_backbone_by_the_name_of_a_kind_that_nobody_knows(self, trapped):
        spoilt = trapped("full")
        change = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
        rewrite(spoilt / "config.json", lambda config: config["vision_config"].update(change))
        with pytest.raises(ValueError, match=r'vision_config is no config of the model_type "evil"'):
            load(spoilt)
