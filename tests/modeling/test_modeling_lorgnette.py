"""The whole model: assembly from any ViT, what is frozen, what the language model keeps, and wrong input."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import (
    IMAGE_SIZE,
    NUM_PATCHES,
    NUM_QUERY_TOKENS,
    QFORMER,
    SIGLIP2,
    VISION,
    VOCAB_SIZE,
    bert,
    inputs,
    language_model,
    model,
    vision_model,
)
from transformers import BertModel, CLIPConfig, CLIPModel, CLIPTextConfig, ViTForImageClassification, ViTModel

from lorgnette import LorgnetteForConditionalGeneration


def trainable(built: LorgnetteForConditionalGeneration) -> set[str]:
    return {name for name, parameter in built.named_parameters() if parameter.requires_grad}


class TestFrozenMeansFrozen:
    @pytest.mark.parametrize("instruct", [False, True])
    def test_the_trainable_set_is_exact_and_each_of_it_gets_a_gradient(self, instruct: bool):
        built = model(qformer_config=QFORMER | {"use_qformer_text_input": instruct}).train()
        lora = {name for name, _ in built.language_model.named_parameters(prefix="language_model") if "lora_" in name}
        assert len(lora) == 2 * 2 * 4  # layers, A and B, projections
        own = {name for name, _ in built.named_parameters() if name.startswith(("qformer.", "projector."))}
        assert trainable(built) == own | lora
        batch = inputs()
        if instruct:
            batch["qformer_input_ids"] = torch.tensor([[5, 6, 7], [8, 9, 0]])
        built(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == VOCAB_SIZE, -100)).loss.backward()
        assert {name for name, parameter in built.named_parameters() if parameter.grad is not None} == trainable(built)

    def test_the_vit_stays_in_eval_mode_and_builds_no_graph(self):
        built = model().train()
        assert built.training
        assert built.qformer.training
        assert not any(module.training for module in built.vision_model.modules())
        assert not built.get_vision_features(inputs()["pixel_values"].requires_grad_()).last_hidden_state.requires_grad

    def test_from_pretrained_does_not_thaw(self, tmp_path):
        built = model()
        built.save_pretrained(tmp_path)
        loaded = LorgnetteForConditionalGeneration.from_pretrained(tmp_path)
        assert trainable(loaded) == trainable(built)
        loaded, info = LorgnetteForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert trainable(loaded) == trainable(built)
        assert not info["missing_keys"]

    def test_assembly_leaves_the_backbones_bit_identical(self):
        built = model()
        for name, tensor in vision_model().state_dict().items():
            assert torch.equal(built.vision_model.state_dict()[name], tensor), name
        ours = {name.replace(".base_layer", ""): tensor for name, tensor in built.language_model.state_dict().items()}
        for name, tensor in language_model().state_dict().items():
            assert torch.equal(ours[name], tensor), name


class TestTheLanguageModelKeepsWhatItKnew:
    def test_without_adapters_and_image_logits_are_the_originals(self):
        built, original, ids = model(), language_model(), inputs()["input_ids"][:, :6]
        with torch.no_grad():
            expected = original(ids).logits
            assert not torch.equal(built(ids).logits, expected)  # LoRA is at work
            with built.disable_adapter():
                assert torch.equal(built(ids).logits, expected)
            assert not torch.equal(built(ids).logits, expected)
            built.disable_adapters()
            assert torch.equal(built(ids).logits, expected)
            built.enable_adapters()
        assert trainable(built) == trainable(model())

    def test_fresh_lora_changes_nothing_yet(self):
        built = LorgnetteForConditionalGeneration.from_backbones(
            vision_model(), language_model(), lora={}, qformer_config=QFORMER
        )
        ids = inputs()["input_ids"][:, :6]
        with torch.no_grad():
            assert torch.equal(built(ids).logits, language_model()(ids).logits)

    def test_the_vocabulary_is_not_resized(self):
        assert model().get_input_embeddings().num_embeddings == VOCAB_SIZE
        assert model()(**inputs()).logits.shape == (2, 15, VOCAB_SIZE)

    def test_the_context_manager_nests(self):
        built, original, ids = model(), language_model(), inputs()["input_ids"][:, :6]
        with torch.no_grad(), built.disable_adapter():
            with built.disable_adapter():
                pass
            assert torch.equal(built(ids).logits, original(ids).logits)

    def test_disable_adapters_without_lora_says_so(self):
        built = LorgnetteForConditionalGeneration.from_backbones(
            vision_model(), language_model(), qformer_config=QFORMER
        )
        with pytest.raises(ValueError, match="No adapter"):
            built.disable_adapters()


class TestVision:
    @pytest.mark.parametrize("architecture", VISION)
    def test_any_vit_all_tokens_or_patches_alone(self, architecture: str):
        prefix = VISION[architecture][2]
        every, patches = (
            model(architecture, vision_feature_select_strategy=strategy)
            .get_vision_features(inputs()["pixel_values"])
            .last_hidden_state
            for strategy in ("full", "default")
        )
        assert every.shape == (2, prefix + NUM_PATCHES, 24)
        assert torch.equal(patches, every[:, prefix:])
        assert model(architecture)(**inputs()).logits.isfinite().all()

    def test_any_layer(self):
        pixels, tower = inputs()["pixel_values"], vision_model()
        with torch.no_grad():
            expected = tower(pixels, output_hidden_states=True)
        for layer in range(-3, 3):
            assert torch.equal(
                model(vision_feature_layer=layer).get_vision_features(pixels).last_hidden_state,
                expected.hidden_states[layer],
            )
        assert torch.equal(
            model(vision_feature_layer=None).get_vision_features(pixels).last_hidden_state, expected.last_hidden_state
        )

    def test_siglip2_of_variable_resolution_masks_its_padding(self):
        torch.manual_seed(0)
        model_class, config = SIGLIP2
        built = LorgnetteForConditionalGeneration.from_backbones(
            model_class(config), language_model(), qformer_config=QFORMER, num_query_tokens=NUM_QUERY_TOKENS
        ).eval()
        batch = inputs(rows=1)
        patches = torch.randn(1, NUM_PATCHES, 3 * 8 * 8)
        batch |= {
            "pixel_values": patches,
            "pixel_attention_mask": torch.tensor([[1] * 12 + [0] * 4]),
            "spatial_shapes": torch.tensor([[3, 4]]),
        }
        with torch.no_grad():
            expected = built(**batch).logits
            batch["pixel_values"] = torch.where(
                batch["pixel_attention_mask"][..., None] == 0, torch.tensor(9.0), patches
            )
            torch.testing.assert_close(built(**batch).logits, expected)

    def test_a_clip_checkpoint_gives_its_vision_tower(self, tmp_path):
        text = CLIPTextConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30
        )
        clip = CLIPModel(
            CLIPConfig(text_config=text.to_dict(), vision_config=VISION["clip"][1].to_dict(), projection_dim=8)
        )
        clip.save_pretrained(tmp_path)
        for source in (clip, tmp_path):
            built = LorgnetteForConditionalGeneration.from_backbones(source, language_model(), qformer_config=QFORMER)
            assert built.config.vision_config.model_type == "clip_vision_model"
            theirs, ours = clip.vision_model.state_dict(), built.vision_model.state_dict()
            assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())

    def test_features_stand_in_for_pixels(self):
        built, batch = model(), inputs()
        with torch.no_grad():
            expected = built(**batch).logits
            features = built.get_vision_features(batch.pop("pixel_values")).last_hidden_state
            assert torch.equal(built(**batch, vision_features=features).logits, expected)

    def test_image_features(self):
        features = model(attn_implementation="eager").get_image_features(
            inputs()["pixel_values"], output_attentions=True
        )
        assert features.last_hidden_state.shape == (2, 1 + NUM_PATCHES, 24)
        assert features.pooler_output.shape == (2, NUM_QUERY_TOKENS, 32)
        assert features.qformer_outputs.cross_attentions[0].shape == (2, 2, NUM_QUERY_TOKENS, 1 + NUM_PATCHES)


class TestForward:
    def test_visual_tokens_replace_the_placeholders_and_nothing_else(self):
        built, batch = model(), inputs()
        with torch.no_grad():
            soft = built.get_image_features(batch["pixel_values"]).pooler_output
            is_placeholder = batch["input_ids"] == VOCAB_SIZE
            embeds = built.get_input_embeddings()(batch["input_ids"].masked_fill(is_placeholder, 0))
            embeds[is_placeholder] = soft.flatten(0, 1)
            expected = built.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
            outputs = built(**batch)
        assert torch.equal(outputs.logits, expected)
        assert torch.equal(outputs.image_hidden_states, soft)

    def test_several_images_a_row_and_none(self):
        built, one = model(), inputs(rows=1)
        image = torch.full((1, NUM_QUERY_TOKENS), VOCAB_SIZE)
        two = torch.cat([one["input_ids"], image], dim=1)
        none = torch.randint(3, 300, two.shape, generator=torch.Generator().manual_seed(0))
        pixels = inputs(rows=2)["pixel_values"]
        with torch.no_grad():
            together = built(torch.cat([two, none]), pixel_values=pixels).logits
            torch.testing.assert_close(together[:1], built(two, pixel_values=pixels).logits)
            torch.testing.assert_close(together[1:], built(none).logits)

    def test_an_image_changes_the_answer(self):
        built, batch = model(), inputs()
        with torch.no_grad():
            shuffled = batch | {"pixel_values": batch["pixel_values"].flip(0)}
            assert not torch.allclose(built(**batch).logits, built(**shuffled).logits)

    def test_the_loss_is_the_language_models_own(self):
        built, batch = model(), inputs()
        labels = batch["input_ids"].clone()
        labels[:, :10] = -100
        with torch.no_grad():
            mean = built(**batch, labels=labels)
            logits, targets = mean.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            torch.testing.assert_close(mean.loss, torch.nn.functional.cross_entropy(logits, targets))
            summed = built(**batch, labels=labels, num_items_in_batch=torch.tensor(100)).loss
        torch.testing.assert_close(summed * 100, mean.loss * (targets != -100).sum())

    def test_tuples_on_request(self):
        batch = inputs()
        assert torch.equal(model()(**batch, return_dict=False)[0], model()(**batch).logits)

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_attention_implementation_reaches_every_part(self, attention: str):
        built = model()
        built.set_attn_implementation(attention)
        parts = (built.vision_model, built.qformer, built.language_model)
        assert {part.config._attn_implementation for part in parts} == {attention}

    def test_bfloat16(self):
        built = model(dtype="bfloat16")
        assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}
        assert built(**inputs()).logits.dtype == torch.bfloat16


class TestBadInput:
    def test_too_few_placeholders_name_the_row_and_both_counts(self):
        batch = inputs()
        batch["input_ids"][1, 6] = 5
        with pytest.raises(
            ValueError, match=r"Row 1 of the batch has 3 image placeholders \(id 320\).*7 for 2 image.*takes 4"
        ):
            model()(**batch)
        with pytest.raises(ValueError, match="Row 71 of the data set has 3"):
            model()(**batch, row_index=torch.tensor([70, 71]))

    def test_images_without_placeholders_and_placeholders_without_images(self):
        batch = inputs()
        with pytest.raises(ValueError, match="8 for 0 image"):
            model()(batch["input_ids"])
        with pytest.raises(ValueError, match="0 for 2 image"):
            model()(batch["input_ids"].clamp(max=VOCAB_SIZE - 1), pixel_values=batch["pixel_values"])
        with pytest.raises(ValueError, match="8 for 3 image"):
            model()(batch["input_ids"], pixel_values=inputs(rows=3)["pixel_values"])

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_pixels_that_are_not_finite_name_the_row(self, value: float):
        batch = inputs(rows=3)
        batch["pixel_values"][2, 0, 3, 3] = value
        with pytest.raises(ValueError, match=r"Row 2 of the batch: image 2 of the batch.*not finite"):
            model()(**batch)

    def test_labels_on_placeholders(self):
        batch = inputs()
        with pytest.raises(ValueError, match="Row 0 of the batch has labels on image placeholders"):
            model()(**batch, labels=batch["input_ids"])

    def test_a_row_longer_than_the_context(self):
        batch = inputs(text_tokens=130)
        labels = batch["input_ids"].masked_fill(batch["input_ids"] == VOCAB_SIZE, -100)
        with pytest.raises(
            ValueError, match="Row 8 of the data set has 265 tokens; the language model's context is 256"
        ):
            model()(**batch, labels=labels, row_index=torch.tensor([8, 9]))

    def test_an_instruction_is_not_left_out(self):
        with pytest.raises(ValueError, match="reads the instruction as well: give qformer_input_ids"):
            model(qformer_config=QFORMER | {"use_qformer_text_input": True})(**inputs())

    def test_pixels_and_features_at_once(self):
        with pytest.raises(ValueError, match="either pixel_values or vision_features"):
            model()(**inputs(), vision_features=torch.zeros(2, 17, 24))

    def test_features_of_another_width(self):
        batch = inputs()
        del batch["pixel_values"]
        with pytest.raises(ValueError, match=r"48 wide.*24"):
            model()(**batch, vision_features=torch.zeros(2, 17, 48))

    def test_pictures_of_another_size(self):
        batch = inputs() | {"pixel_values": torch.zeros(2, 3, IMAGE_SIZE // 2, IMAGE_SIZE)}
        with pytest.raises(ValueError, match="size"):
            model()(**batch)


class TestAssembly:
    def test_started_from_a_bert(self):
        built = model(qformer=bert(), qformer_config={"cross_attention_frequency": 1})
        assert built.config.qformer_config.vocab_size == 60
        assert built.config.qformer_config.cross_attention_frequency == 1
        layer = built.qformer.encoder.layer[1]
        assert torch.equal(layer.intermediate_query.dense.weight, bert().encoder.layer[1].intermediate.dense.weight)

    def test_from_folders_and_no_path_is_recorded(self, tmp_path):
        vision_model().save_pretrained(tmp_path / "vit")
        language_model().save_pretrained(tmp_path / "lm")
        bert().save_pretrained(tmp_path / "bert")
        built = LorgnetteForConditionalGeneration.from_backbones(
            tmp_path / "vit", str(tmp_path / "lm"), qformer=tmp_path / "bert", lora={"r": 2}
        )
        assert str(tmp_path) not in built.config.to_json_string(use_diff=False)
        assert built.config.text_backbone is None
        assert torch.equal(built.vision_model.layernorm.weight, vision_model().layernorm.weight)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"image_token_id": 7}, "image_token_id is 320, the processor's 7"),
            ({"num_query_tokens": 9}, "num_query_tokens is 4, the processor's 9"),
            ({"qformer_tokenizer": object()}, "use_qformer_text_input is False.*has a qformer_tokenizer"),
        ],
    )
    def test_a_processor_of_another_model(self, fields: dict, message: str):
        matching = {"image_token_id": VOCAB_SIZE, "num_query_tokens": NUM_QUERY_TOKENS, "qformer_tokenizer": None}
        matching["tokenizer"] = SimpleNamespace(get_vocab=dict)
        model().check_processor(SimpleNamespace(**matching))
        with pytest.raises(ValueError, match=message):
            model().check_processor(SimpleNamespace(**matching | fields))

    def test_backbones_of_two_dtypes(self):
        with pytest.raises(ValueError, match=r"torch.float32.*torch.bfloat16"):
            LorgnetteForConditionalGeneration.from_backbones(vision_model(), language_model().to(torch.bfloat16))

    def test_a_language_model_in_the_vits_place(self):
        with pytest.raises(ValueError, match="LlamaModel is no ViT: its config has no patch_size"):
            LorgnetteForConditionalGeneration.from_backbones(language_model(), language_model())

    def test_a_vit_or_a_bert_in_the_language_models_place(self):
        for wrong in (vision_model(), bert()):
            with pytest.raises(ValueError, match=r"(ViTModel|BertModel) is no causal language model"):
                LorgnetteForConditionalGeneration.from_backbones(vision_model(), wrong)

    def test_an_encoder_in_the_language_models_place(self, tmp_path):
        """transformers gives a BERT a language model's head; it would see the words that it is to predict."""
        bert().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="BertLMHeadModel is no causal language model"):
            LorgnetteForConditionalGeneration.from_backbones(vision_model(), tmp_path)

    def test_a_classifier_gives_its_vit(self):
        classifier = ViTForImageClassification(VISION["vit"][1])
        built = LorgnetteForConditionalGeneration.from_backbones(classifier, language_model(), qformer_config=QFORMER)
        assert built.vision_model is classifier.vit

    def test_a_field_that_the_qformer_does_not_know(self):
        with pytest.raises(ValueError, match=r"does not know: \['hiden_size'\]"):
            model(qformer_config={"hiden_size": 16})

    def test_a_folder_that_is_not_there(self, tmp_path):
        for source in (tmp_path / "nowhere", "./nowhere", "out/backbones/nowhere"):
            with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere"):
                LorgnetteForConditionalGeneration.from_backbones(source, language_model())
        with pytest.raises(FileNotFoundError, match=r"nowhere.gguf"):
            LorgnetteForConditionalGeneration.from_backbones(vision_model(), tmp_path / "nowhere.gguf")

    def test_a_checkpoint_of_another_architecture(self, tmp_path):
        BertModel(bert().config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match='"bert" checkpoint'):
            LorgnetteForConditionalGeneration.from_pretrained(tmp_path)

    def test_the_vit_may_have_a_head_that_is_not_used(self):
        torch.manual_seed(0)
        built = LorgnetteForConditionalGeneration.from_backbones(
            ViTModel(VISION["vit"][1], add_pooling_layer=False), language_model(), qformer_config=QFORMER
        )
        assert isinstance(built.vision_model, ViTModel)
