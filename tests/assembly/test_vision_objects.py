"""A ViT is the same model as a Hub id, as a folder and as an object; and it sees a picture in one way."""

import pytest
import torch
from tiny_hub import TinyHub
from tiny_models import QFORMER, language_model, vision_model
from transformers import (
    Aimv2Config,
    Aimv2Model,
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteForImageTextRetrieval
from lorgnette.assembly.backbone_checks import check_vision_model


VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
TOWER = VIT | {"num_attention_heads": 4}
WORDS = VIT | {"vocab_size": 40, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WORDS = {name: value for name, value in WORDS.items() if name not in ("image_size", "patch_size")}
MAKERS = {
    "vit with a head": lambda: ViTForImageClassification(ViTConfig(**VIT)),
    "dinov2 with a head": lambda: Dinov2ForImageClassification(
        Dinov2Config(**{name: value for name, value in VIT.items() if name != "intermediate_size"})
    ),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**VIT)),
    "beit": lambda: BeitModel(BeitConfig(**VIT)),
    "ijepa": lambda: IJepaModel(IJepaConfig(**VIT)),
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=TOWER, text_config=WORDS)),
    "aimv2": lambda: Aimv2Model(Aimv2Config(vision_config=TOWER, text_config=WORDS)),
    "siglip": lambda: SiglipModel(SiglipConfig(vision_config=TOWER, text_config=WORDS)),
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=TOWER | {"model_type": "clip_vision_model"},
            text_config=language_model().config,
            image_token_index=3,
        )
    ),
}


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MAKERS[kind]().eval()


def join(vision, model_class=LorgnetteForConditionalGeneration):
    parts = (vision, language_model()) if model_class is LorgnetteForConditionalGeneration else (vision,)
    return model_class.from_backbones(*parts, qformer_config=QFORMER, num_query_tokens=4).eval()


def features(vision) -> tuple[type, torch.Tensor]:
    built = join(vision)
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return type(built.vision_model), built.get_vision_features(pictures).last_hidden_state


@pytest.mark.parametrize("kind", MAKERS)
def test_id_folder_and_object_are_one_model(kind: str, tmp_path, monkeypatch):
    hub = TinyHub(tmp_path / "hub", monkeypatch)
    hub.add("tiny/vision", made(kind))
    made(kind).save_pretrained(tmp_path / "folder")
    expected_class, expected = features("tiny/vision")
    for given in (tmp_path / "folder", made(kind)):
        found_class, found = features(given)
        assert found_class is expected_class
        assert torch.equal(found, expected)


def test_the_tower_of_a_model_that_answers_is_found():
    llava = made("llava")
    assert join(llava).vision_model is llava.model.vision_tower


def test_sapiens2_as_an_object(tmp_path):
    sapiens = pytest.importorskip("transformers.models.sapiens2")
    torch.manual_seed(0)
    model = sapiens.Sapiens2Model(sapiens.Sapiens2Config(**VIT)).eval()
    model.save_pretrained(tmp_path)
    (of_folder, expected), (of_object, found) = features(tmp_path), features(model)
    assert of_folder is of_object is sapiens.Sapiens2Model
    assert torch.equal(found, expected)


def test_a_model_without_the_class_that_a_save_is_loaded_with():
    from transformers import Dinov2Backbone

    config = Dinov2Config(**{name: value for name, value in VIT.items() if name != "intermediate_size"})
    with pytest.raises(ValueError, match=r"Dinov2Backbone has no Dinov2Model in it.*Dinov2Model.from_pretrained"):
        join(Dinov2Backbone(config))


def _pruned(vit):
    del vit.layers[-1]


def _hook(vit):
    vit.register_forward_hook(lambda module, args, output: output)


def _activation(vit):
    vit.layers[0].mlp.activation_fn = torch.nn.ReLU()


@pytest.mark.parametrize("model_class", [LorgnetteForConditionalGeneration, LorgnetteForImageTextRetrieval])
@pytest.mark.parametrize("change", [_pruned, _hook, _activation], ids=lambda change: change.__name__[1:])
def test_a_vit_that_its_config_does_not_describe(change, model_class):
    vit = vision_model()
    change(vit)
    with pytest.raises(ValueError, match="The ViT ViTModel is not what its config describes: its module"):
        join(vit, model_class)


def test_what_nothing_reads_may_be_there_or_not(tmp_path):
    """A pooler, and what is put in the place of masked patches."""
    torch.manual_seed(0)
    built = join(ViTModel(ViTConfig(**VIT), add_pooling_layer=False, use_mask_token=True).eval())
    pictures = torch.randn(1, 3, 32, 32)
    built.save_pretrained(tmp_path)
    loaded = LorgnetteForConditionalGeneration.from_pretrained(tmp_path)
    expected = built.get_vision_features(pictures).last_hidden_state
    assert torch.equal(loaded.get_vision_features(pictures).last_hidden_state, expected)


# ------------------------------------------------------------------------------------------------ random numbers


@pytest.mark.parametrize("model_class", [LorgnetteForConditionalGeneration, LorgnetteForImageTextRetrieval])
def test_a_random_mask_is_refused(model_class, tmp_path):
    model = ViTMAEModel(ViTMAEConfig(**VIT))
    model.save_pretrained(tmp_path)
    for given in (model, tmp_path, ViTMAEForPreTraining(ViTMAEConfig(**VIT, decoder_num_attention_heads=4))):
        with pytest.raises(ValueError, match=r"ViTMAEModel sees one picture differently each time.*ViTModel"):
            join(given, model_class)


def test_the_encoder_of_a_masked_autoencoder_sees_all_patches_in_order(tmp_path):
    """What the error advises."""
    torch.manual_seed(0)
    ViTMAEForPreTraining(ViTMAEConfig(**VIT, decoder_num_attention_heads=4)).save_pretrained(tmp_path)
    built = join(ViTModel.from_pretrained(tmp_path))
    masked = ViTMAEModel.from_pretrained(tmp_path, mask_ratio=0.0)
    pictures = torch.randn(2, 3, 32, 32)
    in_order = torch.arange(16.0).expand(2, 16)
    with torch.no_grad():
        expected = masked(pictures, noise=in_order).last_hidden_state
    torch.testing.assert_close(built.get_vision_features(pictures).last_hidden_state, expected)


class Noisy(torch.nn.Module):
    def forward(self, states):
        return states + 0.1 * torch.rand_like(states)


def test_whatever_else_draws_random_numbers_in_eval_mode_is_refused():
    model = ViTModel(ViTConfig(**VIT)).eval()
    join(model)
    model.layernorm = torch.nn.Sequential(model.layernorm, Noisy())
    with pytest.raises(ValueError, match="sees one picture differently each time"):
        check_vision_model(model)


def test_the_look_at_a_picture_leaves_everything_as_it_was():
    model = ViTModel(ViTConfig(**VIT, hidden_dropout_prob=0.5)).train()
    from lorgnette.assembly.backbone_checks import check_vision_model

    state = torch.get_rng_state()
    check_vision_model(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_no_sequence_of_vectors_is_refused():
    """A ViT whose config has all fields, and whose output is another width."""
    from tiny_models import SIGLIP2

    join(Siglip2VisionModel(SIGLIP2[1]))
    model = ViTModel(ViTConfig(**VIT), add_pooling_layer=False).eval()
    model.layernorm = torch.nn.Linear(24, 12)
    with pytest.raises(ValueError, match=r"makes \(1, 17, 12\) of a picture.*\(1, L, 24\)"):
        check_vision_model(model)


def test_a_layer_of_another_width_is_refused():
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4)
    config.num_hidden_layers = 2
    swin = SwinModel(config).eval()
    parts = {"qformer_config": QFORMER, "num_query_tokens": 4}
    LorgnetteForConditionalGeneration.from_backbones(swin, language_model(), vision_feature_layer=-1, **parts)
    with pytest.raises(ValueError, match=r"vision_feature_layer 0 of SwinModel is \(1, 64, 12\) .*\(1, L, 24\)"):
        LorgnetteForConditionalGeneration.from_backbones(swin, language_model(), vision_feature_layer=0, **parts)
