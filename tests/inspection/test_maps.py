"""Maps show where something was read from, and looking changes nothing."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_inspection import rows, train, untrained
from tiny_models import VISION, model
from tiny_training import write_backbones

from lorgnette import LorgnetteCollator, LorgnetteForConditionalGeneration, LorgnetteProcessor
from lorgnette.inspection.attribution import explain_row
from lorgnette.inspection.maps import _words, denormalized_picture, eager_attention, rollout, rollout_to_image


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    built, processor = untrained(write_backbones(tmp_path_factory.mktemp("backbones")))
    return train(built, LorgnetteCollator(processor), steps=30), processor


def test_shares_add_up_and_the_model_is_left_as_it_was(trained):
    built, processor = trained
    before = {name: value.clone() for name, value in built.state_dict().items()}
    attention = [part.config._attn_implementation for part in (built.language_model, built.qformer)]
    assert "eager" not in attention
    built.train()
    attribution = explain_row(built, LorgnetteCollator(processor), rows(1)[0])
    assert built.training
    assert attribution.queries.shape == (1, 4, 4, 4)
    np.testing.assert_allclose(attribution.queries.sum((-1, -2)) + attribution.elsewhere, 1, atol=1e-5)
    assert attribution.words
    for word in attribution.words:
        assert word.visual_tokens.sum() == pytest.approx(1, abs=1e-4)
        assert 0.05 < word.patches.sum() <= 1.0001
        assert 0 < word.probability <= 1
    assert "".join(word.text for word in attribution.words).strip() == attribution.answer
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())
    assert [part.config._attn_implementation for part in (built.language_model, built.qformer)] == attention
    assert all(parameter.grad is None for parameter in built.parameters())


def test_the_queries_maps_are_the_attention_of_the_patches(trained):
    built, processor = trained
    attribution = explain_row(built, LorgnetteCollator(processor), rows(1)[0])
    pixels = LorgnetteCollator(processor)(rows(1))["pixel_values"]
    with eager_attention(built), torch.no_grad():
        features = built.get_vision_features(pixels).last_hidden_state
        maps = built.qformer(features, output_attentions=True).cross_attentions[0][0].mean(0)  # (Q, 17)
    np.testing.assert_allclose(attribution.queries[0].reshape(4, 16), maps[:, 1:].numpy(), atol=1e-6)
    np.testing.assert_allclose(attribution.elsewhere[0], maps[:, 0].numpy(), atol=1e-5)


def test_a_word_is_read_from_the_patch_that_decides_it(trained):
    """The Q-Former is made to look at one patch alone; then that is where every word comes from."""
    built, processor = trained
    attention = built.qformer.encoder.layer[0].crossattention.attention
    project = attention.project

    def blinkered(source):
        keys, values = project(source)
        values = values.clone()
        values[:, :, torch.arange(17) != 6] = 0
        return keys, values

    attention.project = blinkered
    try:
        attribution = explain_row(built, LorgnetteCollator(processor), rows(1)[0])
    finally:
        del attention.project
    for word in attribution.words:
        assert np.unravel_index(word.patches.argmax(), (4, 4)) == (1, 1)  # token 6 is the sixth patch, after CLS


def test_rollout_multiplies_layers_and_reading_keeps_what_each_query_read():
    first, second = torch.tensor([[0.0, 0.0], [0.5, 0.0]]), torch.tensor([[0.0, 0.25], [0.0, 0.0]])
    torch.testing.assert_close(rollout([first, second]), (torch.eye(2) + second) @ (torch.eye(2) + first))
    own = [torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [0.0, 0.0]])]  # in layer 1 query 0 reads query 1
    cross = [torch.tensor([[0.0, 0.0, 0.1], [0.7, 0.0, 0.0]])]
    torch.testing.assert_close(rollout_to_image(own, cross, [0], 2), torch.tensor([[0.7, 0.0, 0.1], [0.7, 0.0, 0.0]]))


@pytest.mark.parametrize("vision", sorted(VISION))
def test_patches_are_told_from_what_comes_before_them(vision, trained):
    built = model(vision)
    processor = trained[1]
    with torch.no_grad():
        built.language_model.resize_token_embeddings(len(processor.tokenizer) + 1)
    built.config.image_token_id = processor.image_token_id
    attribution = explain_row(built, LorgnetteCollator(processor), rows(1)[0], max_new_tokens=3)
    assert attribution.queries.shape == (1, 4, 4, 4)
    assert attribution.picture.size == (32, 32)
    before = VISION[vision][2]
    assert (attribution.elsewhere < 1e-5).all() == (before == 0)


def test_characters_of_several_tokens_are_whole_in_their_words():
    from tiny import chat_tokenizer, image_processor

    processor, answer = LorgnetteProcessor(image_processor(), chat_tokenizer()), "un café 🐈 naïf"
    ids = processor.tokenizer.encode(answer, add_special_tokens=False)
    words = _words(processor, ids)
    assert len(ids) > len(answer)
    assert [text.strip() for text, _ in words] == answer.split()
    assert [place for _, tokens in words for place in tokens] == list(range(len(ids)))


def test_the_picture_is_the_one_that_was_given(trained):
    processor = trained[1]
    row = {"image": Image.new("RGB", (32, 32), (200, 100, 50))}
    pixels = processor.encode_images([row["image"]], return_tensors="pt")
    drawn = np.asarray(denormalized_picture(processor, pixels, (4, 4), (8, 8)))
    assert np.abs(drawn.astype(int) - (200, 100, 50)).max() <= 1


def test_patches_of_variable_resolution_are_put_together_again():
    from tiny import chat_tokenizer
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    processor = LorgnetteProcessor(Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16), chat_tokenizer())
    pixels = np.zeros((16, 64, 3), dtype=np.uint8)
    pixels[:8, 40:] = (250, 120, 10)
    encoded = processor.encode_images([Image.fromarray(pixels)], return_tensors="pt")
    grid = tuple(encoded["spatial_shapes"][0].tolist())
    drawn = denormalized_picture(processor, encoded, grid, (8, 8))
    assert drawn.size == (grid[1] * 8, grid[0] * 8)
    again = np.asarray(drawn.resize((64, 16), Image.Resampling.BOX)).astype(int)
    assert np.abs(again[2:6, 48:60] - (250, 120, 10)).max() < 12
    assert again[10:, :].max() < 12


def test_a_row_of_features_has_no_picture(trained):
    built, processor = trained
    assert explain_row(built, LorgnetteCollator(processor), {"vision_features": torch.zeros(17, 24)}) is None


def test_a_bridge_without_layers_has_no_maps(tmp_path):
    vision, text = write_backbones(tmp_path)
    processor = LorgnetteProcessor.from_backbones(vision, text, num_query_tokens=4)
    fields = {"use_pooled_features": True, "num_hidden_layers": 0, "hidden_size": 16, "num_attention_heads": 2}
    built = LorgnetteForConditionalGeneration.from_backbones(vision, text, processor=processor, qformer_config=fields)
    assert explain_row(built.eval(), LorgnetteCollator(processor), rows(1)[0]) is None
