"""Backbone weights that are no longer what was loaded: a save knows by the weights, and not by what has a gradient."""

import time
from collections.abc import Callable

import pytest
import torch
from tiny_forms import form_of, hub_with_backbones, joined, load, logits
from tiny_hub import TinyHub
from tiny_models import model, vision_model
from torch import nn

from lorgnette import LorgnetteForConditionalGeneration
from lorgnette.assembly.foreign_adapters import replace_lora
from lorgnette.modeling.modeling_saving import backbone_checksums, changed_backbone_weights


HEAD = "language_model.lm_head.weight"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> TinyHub:
    return hub_with_backbones(tmp_path / "hub", monkeypatch)


def trained_and_frozen_again(built: nn.Module) -> None:
    head = built.get_parameter(HEAD).requires_grad_(True)
    with torch.no_grad():
        head += 0.1
    head.requires_grad_(False)


def loaded_state_dict(built: nn.Module) -> None:
    norms = {key: value for key, value in built.language_model.state_dict().items() if "norm" in key}
    built.language_model.load_state_dict({key: value + 0.1 for key, value in norms.items()}, strict=False)


def assigned_state_dict(built: nn.Module) -> None:
    built.load_state_dict({HEAD: built.get_parameter(HEAD) * 1.5}, strict=False, assign=True)


def copied_vision_model(built: nn.Module) -> None:
    built.vision_model.load_state_dict(vision_model(seed=7).state_dict())


def new_data(built: nn.Module) -> None:
    weight = built.language_model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.clone().mul_(2)


def one_number(built: nn.Module) -> None:
    with torch.no_grad():
        built.language_model.model.layers[1].self_attn.q_proj.base_layer.weight[3, 4] += 1


def rows_in_another_order(built: nn.Module) -> None:
    weight = built.get_parameter(HEAD)
    weight.data = weight.data.flip(0)


def another_module(built: nn.Module) -> None:
    built.language_model.lm_head = nn.Linear(32, built.config.vocab_size, bias=False).requires_grad_(False)


CHANGES = [
    trained_and_frozen_again,
    loaded_state_dict,
    assigned_state_dict,
    copied_vision_model,
    new_data,
    one_number,
    rows_in_another_order,
    another_module,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changed_is_saved_in_full_and_refused_by_name_as_thin(change: Callable, hub, tmp_path):
    built = joined()
    change(built)
    (key, *_) = changed_backbone_weights(built, None)
    with pytest.raises(ValueError, match=rf"cannot be saved thin: \d+ weights .* that were loaded \({key}"):
        built.save_pretrained(tmp_path / "thin", save_format="thin")
    assert not (tmp_path / "thin").exists()
    built.save_pretrained(tmp_path / "saved")
    assert form_of(tmp_path / "saved") == "full"
    loaded = load(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(built))
    part = key.split(".")[0]
    assert (loaded.config.vision_backbone is None) == (part == "vision_model")
    assert (loaded.config.text_backbone is None) == (part == "language_model")
    loaded.save_pretrained(tmp_path / "again")  # the changed part is now of no Hub repository
    assert form_of(tmp_path / "again") == "full"


def pruned(built: nn.Module) -> None:
    built.language_model.model.layers = built.language_model.model.layers[:1]


def pruned_vision_model(built: nn.Module) -> None:
    del built.vision_model.layers[-1]


def a_norm_taken_out(built: nn.Module) -> None:
    built.language_model.model.norm = nn.Identity()


def pruned_qformer(built: nn.Module) -> None:
    built.qformer.encoder.layer = built.qformer.encoder.layer[:1]


def head_tied_by_hand(built: nn.Module) -> None:
    built.language_model.lm_head.weight = built.get_input_embeddings().weight


def a_table_of_another_size(built: nn.Module) -> None:
    built.set_input_embeddings(nn.Embedding(400, 32).requires_grad_(False))


def a_table_below_the_pad_token(built: nn.Module) -> None:
    built._processor = None  # which would be refused first
    built.resize_token_embeddings(200)


OTHER_MODELS = {
    pruned: r"language_model.model.layers.1.\S+ is missing",
    pruned_vision_model: r"vision_model.layers.1.\S+ is missing",
    a_norm_taken_out: "language_model.model.norm.weight is missing",
    pruned_qformer: r"qformer\S+1.\S+ is missing",
    head_tied_by_hand: r"lm_head.weight is tied to \S+embed_tokens.weight, and by its config it is not",
    a_table_of_another_size: r"embed_tokens.weight is \(400, 32\), and \(311, 32\) by its config",
    a_table_below_the_pad_token: r"Padding_idx must be within num_embeddings \(.*size': 200, 'pad_token_id': 310",
}


@pytest.mark.parametrize("change", OTHER_MODELS, ids=lambda change: change.__name__)
def test_what_no_config_describes_is_saved_in_no_form(change: Callable, hub, tmp_path):
    built = joined()
    change(built)
    for form in (None, "thin", "full", "merged"):
        match = OTHER_MODELS[change]
        if form == "thin" and change is not pruned_qformer:
            match = r"cannot be saved thin: \d+ weights of its backbones are no longer those that were loaded"
        with pytest.raises(ValueError, match=match):
            built.save_pretrained(tmp_path / "saved", save_format=form)
    assert not (tmp_path / "saved").exists()


def test_a_head_that_was_untied_by_hand_is_not_saved(tmp_path):
    built = model(text="gemma3_text")
    head = built.language_model.lm_head
    head.weight = nn.Parameter(head.weight.detach() + 1, requires_grad=False)
    for form in (None, "merged"):
        with pytest.raises(ValueError, match=r"weight is not tied to .*, and by its config it is"):
            built.save_pretrained(tmp_path / "saved", save_format=form)
    assert not (tmp_path / "saved").exists()


def test_a_thin_model_that_was_loaded_is_watched_too(hub, tmp_path):
    joined().save_pretrained(tmp_path / "thin")
    loaded = load(tmp_path / "thin")
    loaded.save_pretrained(tmp_path / "again")
    assert form_of(tmp_path / "again") == "thin"
    trained_and_frozen_again(loaded)
    loaded.save_pretrained(tmp_path / "changed")
    assert form_of(tmp_path / "changed") == "full"
    assert torch.equal(logits(load(tmp_path / "changed")), logits(loaded))


def test_a_state_dict_that_was_gathered_is_what_is_looked_at(hub, tmp_path):
    built = joined()
    gathered = {key: value.clone() for key, value in built.state_dict().items()}
    built.save_pretrained(tmp_path / "thin", state_dict=gathered)
    assert form_of(tmp_path / "thin") == "thin"
    gathered[HEAD] += 1
    built.save_pretrained(tmp_path / "full", state_dict=gathered)
    assert form_of(tmp_path / "full") == "full"
    assert gathered.keys() == built.state_dict().keys()  # transformers empties what it is given
    assert torch.equal(load(tmp_path / "full").get_parameter(HEAD), gathered[HEAD])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrower_dtype_is_no_change_and_back_again_is_one(dtype: torch.dtype, hub, tmp_path):
    built = joined().to("cpu").to(dtype)
    assert not changed_backbone_weights(built, None)
    built.save_pretrained(tmp_path / "saved", save_format="thin")
    loaded = load(tmp_path / "saved")
    for key, weight in built.named_parameters():
        assert torch.equal(weight, loaded.get_parameter(key)), key
    with torch.no_grad():
        built.get_parameter(HEAD).add_(1)
    assert changed_backbone_weights(built, None) == [HEAD]
    # rounded: a reload in float32 has other weights
    assert len(changed_backbone_weights(built.float(), None)) > 10


def test_a_change_before_a_cast_is_remembered(hub):
    built = joined()
    trained_and_frozen_again(built)
    assert changed_backbone_weights(built.bfloat16(), None) == [HEAD]


def test_another_lora_is_no_change_and_hides_none(hub, tmp_path):
    built = joined(lora={"r": 2, "target_modules": ["q_proj"]})
    built.save_pretrained(tmp_path / "saved")
    built = joined(lora={"r": 4})
    built.load_lm_adapter(tmp_path / "saved" / "lm_adapter")
    assert not changed_backbone_weights(built, None)
    one_number(built)
    replace_lora(built, None, None)
    assert changed_backbone_weights(built, None) == ["language_model.model.layers.1.self_attn.q_proj.weight"]


def test_checksums_of_135_million_numbers_take_less_than_a_second():
    class Large(nn.Module):
        backbones = ("language_model",)

        def __init__(self):
            super().__init__()
            self.language_model = nn.ParameterDict({f"w{n}": torch.randn(3_375, 2_000) for n in range(20)})

    large = Large()
    start = time.process_time()
    assert len(backbone_checksums(large, dict(large.named_parameters()))) == 20
    assert time.process_time() - start < 1


def test_random_backbones_are_not_looked_at(tmp_path):
    built = LorgnetteForConditionalGeneration(model().config)
    assert built._backbone_checksums is None
    assert changed_backbone_weights(built, None) == []
