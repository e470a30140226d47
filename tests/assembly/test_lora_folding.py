"""LoRA as part of the weights for a while: the same logits, and afterwards the same tensors."""

import pytest
import torch
from tiny_models import model

from lorgnette.assembly import lora_folding
from lorgnette.assembly.lora_folding import foldable, folded, pays
from lorgnette.modeling.modeling_lora import lora_layers


IDS = torch.arange(3, 15).view(2, 6)


def logits(built: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return built.language_model.eval()(input_ids=IDS).logits


def state(built: torch.nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in built.language_model.named_parameters()}


def assert_untouched(built: torch.nn.Module, before: dict[str, tuple[int, torch.Tensor]]) -> None:
    for name, (pointer, value) in state(built).items():
        assert pointer == before[name][0], name
        assert torch.equal(value, before[name][1]), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "opt"])
def test_folded_weights_answer_as_lora_does_and_the_own_tensors_come_back(architecture):
    built = model(text=architecture)
    plain, before = logits(built), state(built)
    layers = foldable(built.language_model)
    with folded(built.language_model):
        inside = logits(built)
        moved = [name for name, p in built.language_model.named_parameters() if p.data_ptr() != before[name][0]]
    torch.testing.assert_close(inside, plain, atol=1e-5, rtol=1e-5)
    assert len(layers) == sum(name.endswith("base_layer.weight") for name in moved)
    assert_untouched(built, before)
    assert torch.equal(logits(built), plain)
    with built.disable_adapter():
        assert not torch.equal(logits(built), plain)


def test_an_error_inside_puts_the_tensors_back():
    built = model()
    before = state(built)
    with pytest.raises(RuntimeError, match="within"), folded(built.language_model):
        raise RuntimeError("within")
    assert_untouched(built, before)
    assert not any(layer.merged for layer in foldable(built.language_model))


def test_what_is_off_or_not_plain_stays_as_it_is():
    built = model()
    assert foldable(built.language_model)
    with built.disable_adapter():
        off, before = logits(built), state(built)
        assert foldable(built.language_model) == []
        with folded(built.language_model):
            assert torch.equal(logits(built), off)
            assert_untouched(built, before)
    assert foldable(model(lora={"r": 2, "use_dora": True}).language_model) == []


def test_generate_folds_where_it_pays(monkeypatch):
    """The same tokens; without a GPU nothing is folded."""
    built = model().eval()
    assert not pays(built.language_model)
    settings = {"max_new_tokens": 6, "do_sample": False}
    plain, before = built.generate(input_ids=IDS, **settings), state(built)
    seen = []
    monkeypatch.setattr(lora_folding, "pays", lambda _: True)
    handle = built.language_model.register_forward_pre_hook(
        lambda module, _: seen.append(any(layer.merged for layer in lora_layers(module).values()))
    )
    assert torch.equal(built.generate(input_ids=IDS, **settings), plain)
    handle.remove()
    assert seen == [True] * 6
    assert_untouched(built, before)
