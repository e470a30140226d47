"""Several bridges over one ViT and one LM: each speaks as the model that it came from, bit for bit."""

import pytest
import tiny_training
import torch
from tiny_forms import form_of, hub_with_backbones, joined, load
from tiny_forms import logits as output_of
from tiny_models import QFORMER, inputs, language_model, model, vision_model

from lorgnette import LorgnetteForConditionalGeneration
from lorgnette.assembly import foreign_adapters
from lorgnette.assembly.foreign_adapters import replace_lora


# What makes the adapter sets differ: LoRA of another rank and other targets, none, another width and layer.
KINDS = {
    "lora": {"lora": {"r": 4, "target_modules": ["v_proj", "up_proj"], "lora_dropout": 0.5}},
    "shape": {"qformer_config": QFORMER | {"hidden_size": 8, "num_hidden_layers": 3}, "vision_feature_layer": -2},
}


def built(kind: str | None = None, **kwargs) -> LorgnetteForConditionalGeneration:
    """A model whose bridge is like no other's; the backbones are the same for all."""
    made = model(**KINDS.get(kind, {}), **kwargs)
    torch.manual_seed(len(kind or ""))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def logits(made: LorgnetteForConditionalGeneration) -> torch.Tensor:
    with torch.no_grad():
        return made(**inputs()).logits


def weights(made: LorgnetteForConditionalGeneration) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in made.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models of each kind and one without LoRA, and what they say."""
    folder, outputs = tmp_path_factory.mktemp("bridges"), {}
    for kind in KINDS:
        made = built(kind)
        made.save_pretrained(folder / kind)
        outputs[kind] = logits(made)
    bare = built("bare")
    replace_lora(bare, None, {})
    bare.generation_config.eos_token_id = 7
    bare.save_pretrained(folder / "bare")
    outputs["bare"] = logits(bare)
    return folder, outputs


def test_each_speaks_as_the_model_it_came_from(folders):
    folder, outputs = folders
    ours = built()
    outputs = outputs | {"default": logits(ours)}
    before = weights(ours)
    for kind in ("lora", "shape", "bare"):
        ours.load_bridge(folder / kind, kind)
    assert ours.active_bridge == "default"
    assert same(before, weights(ours))  # loaded, and not in use
    assert ours.bridges == ["bare", "default", "lora", "shape"]
    for name in ("lora", "bare", "shape", "default", "bare", "lora", "default"):
        ours.set_bridge(name)
        assert torch.equal(logits(ours), outputs[name]), name
    assert same(before, weights(ours))
    ours.set_bridge("bare")
    assert ours.generation_config.eos_token_id == 7


def test_layers_of_a_bridge_that_was_in_use_are_put_back_and_not_built_again(folders, monkeypatch):
    folder, outputs = folders
    ours = built()
    ours.load_bridge(folder / "lora", "lora")
    ours.set_bridge("lora")
    its_own = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    ours.set_bridge("default")
    monkeypatch.delattr(foreign_adapters, "attach_lora")
    ours.to(torch.float64)  # what is beside the model follows when it is put to use
    ours.set_bridge("lora")
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float64}
    again = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    assert all(one is other for one, other in zip(its_own, again, strict=True))  # an optimizer still has them
    assert not any(module.training for module in ours.modules())
    torch.testing.assert_close(logits(ours).float(), outputs["lora"], rtol=0, atol=1e-5)


def test_adapters_off_stay_off(folders):
    folder, _ = folders
    ours, ids = built(), inputs()["input_ids"][:, :6]
    ours.load_bridge(folder / "lora", "lora")
    with torch.no_grad():
        original = language_model()(ids).logits
        with ours.disable_adapter():
            ours.set_bridge("lora")
            assert torch.equal(ours(ids).logits, original)
        assert not torch.equal(ours(ids).logits, original)
        ours.disable_adapters()
        ours.set_bridge("default")
        assert torch.equal(ours(ids).logits, original)
        ours.enable_adapters()
        assert not torch.equal(ours(ids).logits, original)


def test_adapters_off_stay_off_through_a_bridge_without_lora(folders):
    folder, outputs = folders
    ours, ids = built(), inputs()["input_ids"][:, :6]
    ours.load_bridge(folder / "bare", "bare")
    default = logits(ours)
    with torch.no_grad():
        original = language_model()(ids).logits
        ours.disable_adapters()
        for name in ("bare", "default"):
            ours.set_bridge(name)
            assert torch.equal(ours(ids).logits, original)
        ours.enable_adapters()
        with ours.disable_adapter():
            ours.set_bridge("bare")
        assert torch.equal(logits(ours), outputs["bare"])
        ours.set_bridge("default")
        assert torch.equal(logits(ours), default)


def test_training_trains_the_one_in_use(folders, tmp_path):
    folder, outputs = folders
    ours = built()
    default, before = logits(ours), weights(ours)
    ours.load_bridge(folder / "lora", "lora")
    ours.set_bridge("lora")
    initial = weights(ours)
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=1e-2)
    labels = inputs()["input_ids"].clone()
    labels[:, :10] = -100
    ours.train()(**inputs(), labels=labels).loss.backward()
    optimizer.step()
    moved = {name.split(".")[0] for name, tensor in weights(ours).items() if not torch.equal(tensor, initial[name])}
    assert moved == {"qformer", "projector", "language_model"}
    trained = logits(ours.eval())
    assert not torch.equal(trained, outputs["lora"])
    ours.set_bridge("default")
    assert torch.equal(logits(ours), default)
    assert same(weights(ours), before)
    ours.set_bridge("lora")
    assert torch.equal(logits(ours), trained)


def test_the_one_in_use_is_saved(folders, tmp_path):
    folder, outputs = folders
    ours = built()
    ours.load_bridge(folder / "shape", "shape")
    ours.set_bridge("shape")
    ours.save_pretrained(tmp_path)
    again = LorgnetteForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.bridges == ["default"]
    assert again.config.qformer_config.hidden_size == 8
    assert torch.equal(logits(again), outputs["shape"])


def test_a_bridge_brings_the_processor_that_it_was_saved_with(tmp_path):
    backbones = tiny_training.write_backbones(tmp_path)
    one, processor = tiny_training.joined(backbones)
    other, its_own = tiny_training.joined(backbones)
    its_own.query = "What is broken?"
    other.save_pretrained(tmp_path / "other")
    one.load_bridge(tmp_path / "other", "broken")
    one.set_bridge("broken")
    one.save_pretrained(tmp_path / "saved")
    assert "What is broken?" in (tmp_path / "saved" / "processor_config.json").read_text()
    one.set_bridge("default")
    assert one._processor is processor


def test_from_thin_folders(tmp_path, monkeypatch):
    hub_with_backbones(tmp_path / "hub", monkeypatch)
    ours = joined()
    outputs = {"default": output_of(ours)}
    for name, lora in (("other", {"r": 3, "target_modules": ["v_proj"]}), ("third", {"r": 2})):
        other = joined(lora, seed=len(name))
        other.save_pretrained(tmp_path / name)
        assert form_of(tmp_path / name) == "thin"
        outputs[name] = output_of(other)
        ours.load_bridge(tmp_path / name, name)
    for name in ("other", "third", "default"):
        ours.set_bridge(name)
        assert torch.equal(output_of(ours), outputs[name])
    ours.set_bridge("other")
    ours.save_pretrained(tmp_path / "saved")
    assert form_of(tmp_path / "saved") == "thin"
    assert torch.equal(output_of(load(tmp_path / "saved")), outputs["other"])


def test_a_merged_model_has_no_bridge(tmp_path):
    built("lora").save_pretrained(tmp_path, save_format="merged")
    with pytest.raises(ValueError, match=r"another language model.*saved merged, its LoRA merged into the language"):
        built().load_bridge(tmp_path, "merged")


def test_what_does_not_belong_is_refused(tmp_path):
    ours = built()
    before = weights(ours)
    others = {
        "lm": {"language_model": language_model(seed=5)},
        "vit": {"vision_model": vision_model(seed=5)},
        "width": {"language_model": language_model(hidden_size=48)},
        "kind": {"language_model": language_model("qwen2")},
        "queries": {"num_query_tokens": 3},
        "placeholder": {"language_model": language_model(), "image_token_id": 319},
    }
    for name, parts in others.items():
        other = LorgnetteForConditionalGeneration.from_backbones(
            parts.get("vision_model", vision_model()),
            parts.get("language_model", language_model()),
            qformer_config=QFORMER,
            num_query_tokens=parts.get("num_query_tokens", 4),
        )
        other.config.image_token_id = parts.get("image_token_id", other.config.image_token_id)
        other.save_pretrained(tmp_path / name)
    for name, message in {
        "lm": r"another language model: \d+ of 21 tensors differ \(lm_head",
        "vit": r"another ViT: \d+ of \d+ tensors differ \(embeddings",
        "width": "text_config.hidden_size is 48, this model's 32",
        "kind": "text_config.model_type is 'qwen2', this model's 'llama'",
        "queries": "num_query_tokens is 3, this model's 4",
        "placeholder": "image_token_id is 319, this model's 320",
    }.items():
        with pytest.raises(ValueError, match=message):
            ours.load_bridge(tmp_path / name, name)
    with pytest.raises(FileNotFoundError):
        ours.load_bridge(tmp_path / "nowhere", "nowhere")
    with pytest.raises(ValueError, match=r"There is an adapter set 'default' already; there are \['default'\]"):
        ours.load_bridge(tmp_path / "lm", "default")
    with pytest.raises(ValueError, match=r"There is no adapter set 'lm'; there are \['default'\]"):
        ours.set_bridge("lm")
    assert same(before, weights(ours))
