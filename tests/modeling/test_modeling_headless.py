"""`LorgnetteModel`, on which the head stands, and which of two names the cache has."""

import copy

import pytest
import torch
from tiny_models import inputs, language_model, model, vision_model
from transformers import AutoModel, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteModel
from lorgnette.modeling.modeling_base import KV_CACHE


@pytest.mark.parametrize("text", ["llama", "gpt2", "opt", "gemma3_text", "cohere"])
def test_its_states_under_the_head_are_the_models_logits(text):
    built, batch = model(text=text), inputs()
    with torch.no_grad():
        outputs, logits = built.base_model(**batch), built(**batch).logits
        states = outputs.last_hidden_state
        theirs = built.language_model.get_output_embeddings()(states) * getattr(
            built.config.text_config, "logit_scale", 1.0
        )
    assert torch.equal(theirs, logits)
    width = built.get_input_embeddings().embedding_dim  # OPT's embeddings and states are narrower than its layers
    assert states.shape == (*batch["input_ids"].shape, width)
    assert outputs.image_hidden_states.shape == (2, 4, width)


def test_it_is_made_of_the_models_own_parts(tmp_path):
    built = model()
    assert isinstance(built.base_model, LorgnetteModel)
    assert built.base_model is built.base_model
    assert list(built.base_model.state_dict()) == list(built.state_dict())
    assert all(one is other for one, other in zip(built.base_model.parameters(), built.parameters(), strict=True))
    for mode in (True, False):
        built.train(mode)
        assert built.base_model.training is mode
        assert not built.base_model.vision_model.training

    copied = copy.deepcopy(built)
    assert copied.base_model is not built.base_model
    assert copied.base_model.qformer is copied.qformer
    copied.qformer = copy.deepcopy(copied.qformer)  # as another bridge is put in
    assert copied.base_model.qformer is copied.qformer


def test_auto_model_loads_it_from_a_models_folder_and_a_save_of_it_is_one(tmp_path):
    built, batch = model(), inputs()
    built.save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model").eval()
    assert type(loaded) is LorgnetteModel
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in built.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        assert torch.equal(loaded(**batch).last_hidden_state, built.base_model(**batch).last_hidden_state)
    loaded.save_pretrained(tmp_path / "again")
    again = LorgnetteForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, built(**batch).logits)
    settings = {"max_new_tokens": 6, "do_sample": False}
    built.generation_config.eos_token_id = loaded.generation_config.eos_token_id = [5, 7]
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again").eval()
    assert again.generation_config.eos_token_id == [5, 7]
    for one in (loaded, again):
        assert torch.equal(one.generate(**batch, **settings), built.generate(**batch, **settings))


def test_a_batch_that_does_not_fit_is_refused_there_too():
    built, batch = model(), inputs()
    with pytest.raises(ValueError, match=r"has 8 for 1 image\(s\), and each image takes 4"):
        built.base_model(**batch | {"pixel_values": batch["pixel_values"][:1]})


# ------------------------------------------------------------------------------------------------ the cache's name


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated in transformers 5.24")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_by_either_name_and_given_by_transformers(name):
    built, batch = model(), inputs(rows=1)
    words = {"input_ids": batch["input_ids"][:, -1:]}
    first = {name: value[:, :-1] if value.ndim == 2 else value for name, value in batch.items()}
    with torch.no_grad():
        before = built(**first, use_cache=True)
        assert KV_CACHE in before
        assert KV_CACHE in CausalLMOutputWithPast.__dataclass_fields__
        last = built(**words, **{name: before[KV_CACHE]}, use_cache=True).logits[:, -1]
        torch.testing.assert_close(last, built(**batch).logits[:, -1])


def test_both_names_at_once_are_refused():
    built, batch = model(), inputs()
    for forward in (built, built.base_model):
        with pytest.raises(ValueError, match="two names of one thing"):
            forward(**batch, cache=DynamicCache(), past_key_values=DynamicCache())


def test_a_language_model_is_given_one_name(monkeypatch):
    """Of two its decoder would heed one alone, and not say which: a prompt's shared beginning was ignored so."""
    built, batch = model(), inputs()
    given = []
    forward = type(built.language_model).forward

    def noting(self, *args, **kwargs):
        given.append({"cache", "past_key_values"} & set(kwargs))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(built.language_model), "forward", noting)
    built(**batch)
    built.generate(**batch, max_new_tokens=3, do_sample=False)
    assert given
    assert all(names <= {KV_CACHE} for names in given)


def test_an_encoder_is_found_by_its_modality():
    assert model().base_model.get_encoder(modality="image").config.model_type == vision_model().config.model_type


def test_a_language_model_whose_decoder_is_itself_is_refused(monkeypatch):
    built = model()
    monkeypatch.setattr(type(built.language_model), "base_model", property(lambda self: self))
    with pytest.raises(ValueError, match="has no decoder apart from its head"):
        built.base_model(**inputs())


def test_lora_is_put_on_by_peft_alone(monkeypatch):
    """transformers' own way asks for a release of peft, another one with each of its releases."""
    import transformers.integrations.peft as theirs

    for name in ("add_adapter", "enable_adapters", "disable_adapters", "set_adapter", "load_adapter"):
        monkeypatch.setattr(theirs.PeftAdapterMixin, name, lambda *_, **__: pytest.fail("transformers' was called"))
    built, batch = model(), inputs()
    with torch.no_grad(), built.disable_adapter():
        original = built(**batch).logits
    with torch.no_grad():
        assert not torch.equal(original, built(**batch).logits)
    assert language_model().state_dict().keys() < {
        name.replace(".base_layer.", ".") for name in built.language_model.state_dict()
    }


def test_what_trains_stays_so_where_it_generates():
    bare = model().base_model
    for name, parameter in bare.named_parameters():
        parameter.requires_grad_("projector" in name)
    bare.generate(**inputs(), max_new_tokens=1)
    assert {name for name, parameter in bare.named_parameters() if parameter.requires_grad} == {
        "projector.weight",
        "projector.bias",
    }
