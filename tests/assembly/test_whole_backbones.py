"""A backbone is there with all its weights, or there is an error: none is filled with random numbers in silence."""

import pytest
import torch
from tiny import image_processor
from tiny_blip2 import blip2
from tiny_forms import form_of, hub_with_backbones, joined, load, logits, rewrite, rewritten
from tiny_hub import TinyHub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> TinyHub:
    return hub_with_backbones(tmp_path / "hub", monkeypatch)


def test_a_config_of_ones_own_does_not_say_what_lies_in_the_folder(hub, tmp_path):
    built = joined()
    built.save_pretrained(tmp_path / "thin")
    assert built.config.saved_form is None
    loaded, info = load(tmp_path / "thin", config=built.config, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(built))


def test_backbone_weights_that_are_nowhere_are_an_error(hub, tmp_path):
    """transformers draws random ones, and says so in a warning."""
    built = joined()
    built.save_pretrained(tmp_path / "thin")
    built.save_pretrained(tmp_path / "full", save_format="full")
    (tmp_path / "thin" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"thin lacks \d+ weights of its backbones"):
        load(tmp_path / "thin", config=built.config)
    rewrite(tmp_path / "full", lambda key: not key.startswith("vision_model.layers."))
    with pytest.raises(ValueError, match=r"full lacks \d+ weights of its backbones \(vision_model.layers"):
        load(tmp_path / "full")
    for name, gone, message in (
        ("tiny/llama", "model.norm.weight", r"lacks 1 weights of a LlamaForCausalLM \(language_model.model.norm"),
        ("tiny/vit", "layernorm.weight", r"lacks 1 weights of a ViTModel \(vision_model.layernorm"),
    ):
        joined().save_pretrained(tmp_path / "again")
        with rewritten(hub.snapshot(name), lambda key, gone=gone: key != gone):
            with pytest.raises(ValueError, match=message):
                load(tmp_path / "again")
            with pytest.raises(ValueError, match=message):
                joined()


def test_a_pooler_that_nothing_reads_may_be_missing(hub, tmp_path):
    with rewritten(hub.snapshot("tiny/vit"), lambda key: not key.startswith("pooler.")):
        built = joined()
        for form in ("thin", "full"):
            built.save_pretrained(tmp_path / form, save_format=form)
            assert torch.equal(logits(load(tmp_path / form)), logits(built))
        joined(seed=2).save_pretrained(tmp_path / "other")  # each load has drawn a pooler of its own
        built.load_bridge(tmp_path / "other", "other")
        built.set_bridge("other")
        assert torch.equal(logits(built), logits(load(tmp_path / "other")))


def test_a_vit_out_of_a_blip2_is_fetched_again(hub, tmp_path):
    hub.add("tiny/vit", blip2(), image_processor())
    built = joined()
    built.save_pretrained(tmp_path)
    assert form_of(tmp_path) == "thin"
    assert torch.equal(logits(load(tmp_path)), logits(built))
