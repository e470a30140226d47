"""Stage 1: masks, losses against plain loops and against BLIP-2, what trains, and wrong input."""

import itertools

import pytest
import torch
from tiny_models import NUM_PATCHES, NUM_QUERY_TOKENS, QFORMER, SIGLIP2, bert, model, vision_model
from tiny_retrieval import CAPTIONS, WORDS, batch, processor, retriever, text_qformer
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
)

from lorgnette import (
    LorgnetteForConditionalGeneration,
    LorgnetteForImageTextRetrieval,
    LorgnetteRetrievalConfig,
)
from lorgnette.modeling.modeling_contrastive import (
    contrastive_loss,
    draw_negatives,
    generation_loss,
    group_texts,
    matching_loss,
    similarities,
)
from lorgnette.modeling.modeling_loss import POSITIONS_MULTIPLE


class TestMasks:
    """BLIP-2, figure 2."""

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_multimodal_causal(self, attention: str):
        model, image = text_qformer(attention), torch.randn(2, 7, 24)
        ids = torch.randint(1, 60, (2, 6))
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
        with torch.no_grad():
            recorded = model(image, input_ids=ids, attention_mask=mask, causal_text=True).last_hidden_state
            alone = model(image).last_hidden_state
            changed = ids.clone()
            changed[:, 3] += 1 - 2 * (changed[:, 3] == 59).long()
            later = model(image, input_ids=changed, attention_mask=mask, causal_text=True).last_hidden_state
            elsewhere = model(image + 1, input_ids=ids, attention_mask=mask, causal_text=True).last_hidden_state
        torch.testing.assert_close(recorded[:, :3], alone, atol=1e-5, rtol=0)  # queries do not see the text
        torch.testing.assert_close(
            recorded[:, 3:6], later[:, 3:6], atol=1e-5, rtol=0
        )  # nor does a token what follows it
        assert (recorded[:, 6] - later[:, 6]).abs().max() > 1e-3
        assert (recorded[:, 3:] - elsewhere[:, 3:]).abs().max() > 1e-3  # the text sees the picture through the queries

    def test_text_alone(self):
        model, ids = text_qformer("sdpa"), torch.randint(1, 60, (2, 6))
        with torch.no_grad():
            states = model(input_ids=ids)
            padded = model(
                input_ids=torch.cat([ids, torch.zeros(2, 2, dtype=torch.long)], dim=1),
                attention_mask=torch.tensor([[1] * 6 + [0] * 2] * 2),
            )
        assert states.last_hidden_state.shape == (2, 6, 16)
        assert torch.equal(states.pooler_output, states.last_hidden_state[:, 0])
        torch.testing.assert_close(padded.last_hidden_state[:, :6], states.last_hidden_state, atol=1e-5, rtol=0)

    def test_flash_attention_is_refused_where_it_would_not_mask(self):
        model, image = text_qformer("sdpa"), torch.randn(2, 7, 24)
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="flash_attention_2 cannot let queries and text see each other in part"):
            model(image, input_ids=torch.ones(2, 3, dtype=torch.long), causal_text=True)
        padded = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
        with pytest.raises(ValueError, match="flash_attention_2 cannot leave out an image's padding"):
            model(image, encoder_attention_mask=padded)

    def test_neither_image_nor_text_and_a_mask_without_text(self):
        with pytest.raises(ValueError, match="neither image features"):
            text_qformer("sdpa")()
        with pytest.raises(ValueError, match="causal_text and no input_ids"):
            text_qformer("sdpa")(torch.randn(1, 7, 24), causal_text=True)


class TestLosses:
    def test_they_are_those_of_a_plain_loop(self):
        model, inputs = retriever(), batch()
        with torch.no_grad():
            out = model(**inputs)
            features = model.get_vision_features(inputs["pixel_values"]).last_hidden_state
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            queries = model.qformer(features).last_hidden_state
            image_embeds = torch.nn.functional.normalize(model.vision_projection(queries), dim=-1)
            cls = model.qformer(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
            text_embeds = torch.nn.functional.normalize(model.text_projection(cls), dim=-1)
            cosines = similarities(image_embeds, text_embeds)
            differ = torch.tensor([[a != b for b in CAPTIONS] for a in CAPTIONS])
            own, scale = torch.eye(4, dtype=torch.bool), torch.tensor(1 / 0.07)
            itc = (contrastive_loss(cosines, own, differ, scale) + contrastive_loss(cosines.T, own, differ, scale)) / 2

            generator = torch.Generator().manual_seed(0)
            has_text, texts = draw_negatives(cosines * scale, differ, generator)
            has_image, images = draw_negatives(cosines.T * scale, differ.T, generator)
            pairs = [(n, n, 1) for n in range(4)]
            pairs += [(i, int(t), 0) for i, t in enumerate(texts) if has_text[i]]
            pairs += [(int(i), t, 0) for t, i in enumerate(images) if has_image[t]]
            logits = []
            for i, t, _ in pairs:
                length = int(mask[t].sum())
                both = model.qformer(features[i : i + 1], input_ids=ids[t : t + 1, :length]).last_hidden_state
                logits.append(model.itm_head(both[0, :NUM_QUERY_TOKENS]).mean(dim=0))
            itm = matching_loss(torch.stack(logits), torch.tensor([match for _, _, match in pairs]))

            states, targets = [], []
            for n in range(4):
                length = int(mask[n].sum())
                written = ids[n : n + 1, :length].clone()
                written[:, 0] = WORDS  # [DEC]
                for position in range(length - 1):  # token by token, as it would be generated
                    prefix = written[:, : position + 1]
                    read = model.qformer(features[n : n + 1], input_ids=prefix, causal_text=True).last_hidden_state
                    states.append(read[0, -1])
                    targets.append(ids[n, position + 1])
            table = model.get_input_embeddings().weight
            itg = generation_loss(model.text_head(torch.stack(states), table), torch.stack(targets))
        for actual, expected in ((out.loss_itc, itc), (out.loss_itm, itm), (out.loss_itg, itg)):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.loss, itc + itm + itg)
        torch.testing.assert_close(out.logits_per_image, cosines)

    @pytest.mark.parametrize("captions", [["a cat", "a dog", "a car"], CAPTIONS], ids=["without padding", "padded"])
    def test_few_numbers_of_tokens_are_predicted(self, captions: list[str]):
        """Each other number of rows costs what oneDNN keeps of it; those that fill up have no part in the loss."""
        model, inputs, recorded = retriever(), batch(captions), []
        model.text_head.register_forward_hook(lambda head, args, logits: recorded.append(logits))
        with torch.no_grad():
            out = model(**inputs)
        targets = inputs["input_ids"][:, 1:][inputs["attention_mask"][:, 1:] == 1]
        (logits,) = recorded
        assert 0 < len(targets) < len(logits) < len(targets) + POSITIONS_MULTIPLE
        assert len(logits) % POSITIONS_MULTIPLE == 0
        torch.testing.assert_close(out.loss_itg, generation_loss(logits[: len(targets)], targets))

    def test_weights(self):
        inputs = batch()
        plain = retriever()(**inputs)
        weighted = retriever(itc_weight=0.5, itm_weight=2.0, itg_weight=3.0)(**inputs)
        torch.testing.assert_close(
            weighted.loss, 0.5 * plain.loss_itc + 2 * plain.loss_itm + 3 * plain.loss_itg, atol=1e-5, rtol=1e-5
        )

    def test_eval_repeats_and_training_draws_anew(self):
        model, inputs = retriever(), batch(["the cat", "a dog", "a bird", "the picture", "a car", "a road"])
        assert torch.equal(model(**inputs).loss, model(**inputs).loss)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.qformer_config.attention_probs_dropout_prob = 0.0
        assert len({model(**inputs).loss_itm.item() for _ in range(8)}) > 1
        assert len({model(**inputs).loss_itc.item() for _ in range(3)}) == 1

    def test_features_stand_in_for_pixels(self):
        model, inputs = retriever(), batch()
        features = model.get_vision_features(inputs["pixel_values"])
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        assert torch.equal(model(**inputs).loss, model(**text, vision_features=features.last_hidden_state).loss)

    def test_bfloat16_computes_its_losses_in_float32(self):
        out = retriever(dtype="bfloat16", processor=None)(**batch())
        assert {out.loss_itc.dtype, out.loss_itm.dtype, out.loss_itg.dtype} == {torch.float32}
        assert out.logits_per_image.dtype == torch.float32
        assert torch.isfinite(out.loss)

    def test_checkpointed_gradients_are_the_same(self):
        def gradients(model):
            torch.manual_seed(0)
            model(**batch()).loss.backward()
            return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

        plain, checkpointed = retriever().train(), retriever().train()
        checkpointed.gradient_checkpointing_enable()
        expected, found = gradients(plain), gradients(checkpointed)
        assert len(found) == sum(weight.requires_grad for weight in plain.parameters())
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())

    def test_a_tuple_on_request(self):
        model, inputs = retriever(), batch()
        assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).loss)

    def test_the_vocabulary_is_not_resized(self):
        with pytest.raises(NotImplementedError, match="resize the BERT"):
            retriever().resize_token_embeddings(100)

    def test_mixed_precision_compares_in_float32(self):
        model, inputs = retriever(), batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(**inputs)
        assert {out.loss_itc.dtype, out.loss_itm.dtype, out.loss_itg.dtype} == {torch.float32}
        cosines = out.logits_per_image
        assert cosines.dtype == torch.float32
        assert not torch.equal(cosines, cosines.bfloat16().float())  # not rounded either

    def test_weights_that_are_not_finite_make_a_loss_that_is_not(self):
        model = retriever()
        with torch.no_grad():
            model.qformer.query_tokens.weight[0, 0] = torch.nan
        assert model(**batch()).loss.isnan()

    def test_siglip2_of_variable_resolution_masks_its_padding(self):
        """In all three losses and in retrieval: what lies in the padding is nothing that anybody sees."""
        model_class, config = SIGLIP2
        torch.manual_seed(0)
        model = LorgnetteForImageTextRetrieval.from_backbones(
            model_class(config), qformer=bert(vocab_size=WORDS), processor=processor(), image_text_hidden_size=8
        ).eval()
        text = {name: tensor for name, tensor in batch().items() if name != "pixel_values"}
        features, mask = torch.randn(4, NUM_PATCHES, 24), torch.ones(4, NUM_PATCHES)
        mask[1, 9:] = mask[3, 4:] = 0
        recorded = {"pixel_attention_mask": mask, "vision_features": features}
        plain = model(**text, **recorded)
        elsewhere = model(**text, **recorded | {"vision_features": features + (1 - mask)[..., None] * 5})
        for name in ("loss_itc", "loss_itm", "loss_itg", "logits_per_image"):
            torch.testing.assert_close(plain[name], elsewhere[name], atol=1e-5, rtol=0)
        unmasked = model(**text, vision_features=features + (1 - mask)[..., None] * 5)
        assert (plain.logits_per_image - unmasked.logits_per_image).abs().max() > 1e-4


def test_equals_blip2_with_the_same_weights():
    """Both heads of `Blip2ForImageTextRetrieval`: the contrast's cosines and the matching's logits."""
    sizes = QFORMER | {"vocab_size": WORDS + 1, "encoder_hidden_size": 24, "max_position_embeddings": 40}
    vision = Blip2VisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    theirs = Blip2ForImageTextRetrieval(
        Blip2Config(
            vision_config=vision.to_dict(),
            qformer_config=Blip2QFormerConfig(**sizes, use_qformer_text_input=True).to_dict(),
            num_query_tokens=NUM_QUERY_TOKENS,
            image_text_hidden_size=8,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours = retriever()
    names = {
        name.replace("embeddings.", "qformer.embeddings.", 1) if name.startswith("embeddings.") else name: tensor
        for name, tensor in theirs.state_dict().items()
        if not name.startswith(("vision_model.", "query_tokens"))
    }
    keys = ours.load_state_dict(names | {"qformer.query_tokens.weight": theirs.query_tokens[0]}, strict=False)
    assert keys.unexpected_keys == []
    assert {name.split(".")[0] for name in keys.missing_keys} == {"vision_model", "logit_scale", "text_head"}

    inputs = batch()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        features = theirs.vision_model(inputs["pixel_values"]).last_hidden_state
        expected = theirs(**inputs, use_image_text_matching_head=False).logits_per_image
        actual = ours(**text, vision_features=features).logits_per_image
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        expected = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
        image = {"encoder_hidden_states": features, "encoder_attention_mask": None}
        torch.testing.assert_close(ours.match_logits(image, text), expected, atol=1e-5, rtol=1e-5)


class TestWhatTrains:
    @pytest.mark.parametrize("weights", [w for w in itertools.product((0.0, 1.0), repeat=3) if any(w)])
    @pytest.mark.parametrize("frequency", [1, 2])  # at 1 the last layer has cross-attention, too
    def test_every_trainable_parameter_gets_a_gradient_whatever_the_losses(self, weights, frequency):
        names = ("itc_weight", "itm_weight", "itg_weight")
        fields = dict(zip(names, weights, strict=True)) | {"qformer_config": {"cross_attention_frequency": frequency}}
        model = retriever(**fields).train()
        model(**batch()).loss.backward()
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trainable
        heads = {name for name, _ in model.named_children()} - {"qformer", "vision_model"}
        itc, itm, itg = weights
        expected = {"vision_projection": itc, "text_projection": itc, "itm_head": itm, "text_head": itg}
        assert heads == {name for name, weight in expected.items() if weight}
        assert hasattr(model, "logit_scale") == bool(itc)
        assert not any(parameter.requires_grad for parameter in model.vision_model.parameters())
        if all(weights):
            rest = {name for name, _ in model.named_parameters() if not name.startswith("vision_model.")}
            assert trainable == rest

    def test_a_row_without_a_candidate_adds_no_negative(self):
        model, recorded = retriever(), []
        model.itm_head.register_forward_hook(lambda module, args, output: recorded.append(output.mean(dim=1)))
        inputs = batch(["a dog", "a dog", "a dog", "a cat"])
        features = model.get_vision_features(inputs.pop("pixel_values")).last_hidden_state
        image = {"encoder_hidden_states": features, "encoder_attention_mask": None}
        candidates = torch.zeros(4, 4, dtype=torch.bool)
        candidates[0, 3] = True
        groups = group_texts(torch.arange(4), 4, True, [1, 1])
        loss, count = model._match(image, inputs, torch.zeros(4, 4), candidates, groups)
        # each pair and its picture with a wrong text, which the first has; four texts, the last with a wrong picture
        counted = recorded[0][[0, 1, 2, 4, 6, 11]]
        torch.testing.assert_close(loss, matching_loss(counted, torch.tensor([1, 0, 1, 1, 1, 0])))
        assert count == 6

    def test_all_losses_share_what_is_seen(self):
        """The ViT and the keys and values of its features: once a step, for each picture."""
        model, recorded = retriever(), []
        attention = model.qformer.encoder.layer[0].crossattention.attention
        for module in (model.vision_model, attention.key, attention.value):
            module.register_forward_hook(lambda *_: recorded.append(1) or None)
        attention.key.register_forward_pre_hook(lambda _, args: recorded.append(len(args[0])) or None)
        model(**batch(["a dog", "a red dog", "a cat", "the bird"])).loss.backward()
        assert recorded == [1, 4, 1, 1]

    def test_from_pretrained_does_not_thaw(self, tmp_path):
        model = retriever(itc_weight=0.0, itm_weight=0.0)
        model.save_pretrained(tmp_path)
        loaded = LorgnetteForImageTextRetrieval.from_pretrained(tmp_path)
        for (name, ours), (_, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
            assert ours.requires_grad == theirs.requires_grad, name
            assert torch.equal(ours, theirs)


def test_a_torch_that_was_built_without_other_processes(monkeypatch):
    expected = retriever()(**batch()).loss
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    torch.testing.assert_close(retriever()(**batch()).loss, expected, atol=0, rtol=0)
    words = torch.ones(1, 3, dtype=torch.int64)
    assert model().train()(input_ids=words, labels=words).loss.isfinite(), "stage 2, of words alone"


class TestWrongInput:
    def test_one_caption_for_all(self):
        with pytest.raises(ValueError, match=r"Row 7 of the data set and the 3 others of its batch have the same cap"):
            retriever()(**batch(["a dog"] * 4), row_index=torch.arange(7, 11))
        assert torch.isfinite(retriever(itc_weight=0.0, itm_weight=0.0)(**batch(["a dog"] * 4)).loss)

    def test_a_pair_by_itself(self):
        with pytest.raises(ValueError, match="Row 7 of the data set is alone in its batch"):
            retriever()(**batch(["a dog"]), row_index=torch.tensor([7]))
        assert torch.isfinite(retriever(itc_weight=0.0, itm_weight=0.0)(**batch(["a dog"])).loss)
        assert retriever()(**batch(["a dog"]), return_loss=False).logits_per_image.shape == (1, 1)

    def test_pictures_and_texts_that_do_not_pair(self):
        inputs = batch()
        with pytest.raises(ValueError, match="3 pictures and 4 texts"):
            retriever()(**inputs | {"pixel_values": inputs["pixel_values"][:3]})

    def test_texts_padded_on_the_left(self):
        inputs = batch()
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
        with pytest.raises(ValueError, match="Row 0 of the batch is padded on the left"):
            retriever()(**inputs)

    def test_a_lorgnette_model_in_the_berts_place(self, tmp_path):
        retriever().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is a lorgnette_retrieval model: the Q-Former starts from a BERT"):
            LorgnetteForImageTextRetrieval.from_backbones(vision_model(), qformer=tmp_path)

    def test_neither_pictures_nor_features(self):
        inputs = batch()
        del inputs["pixel_values"]
        with pytest.raises(ValueError, match="either pixel_values or vision_features"):
            retriever()(**inputs)

    def test_pixels_that_are_not_finite_name_the_row(self):
        inputs = batch()
        inputs["pixel_values"][2, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="Row 2 of the batch: image 2"):
            retriever()(**inputs)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"itc_weight": -1.0}, "itc_weight is -1"),
            ({"itc_weight": 0, "itm_weight": 0, "itg_weight": 0}, "all 0"),
            ({"qformer_config": {"use_qformer_text_input": False}}, "needs the text half"),
            ({"qformer_config": {"use_qformer_text_input": True}}, "dec_token_id is not set"),
            ({"image_text_hidden_size": 0}, "image_text_hidden_size is 0"),
        ],
    )
    def test_a_config_that_contradicts_itself(self, fields: dict, message: str):
        with pytest.raises(ValueError, match=message):
            LorgnetteRetrievalConfig(**fields)

    def test_a_processor_that_does_not_fit(self):
        with pytest.raises(ValueError, match="num_query_tokens is 4, the processor's 5"):
            retriever(num_query_tokens=4, processor=processor(num_query_tokens=5))
        with pytest.raises(ValueError, match="room for 60 tokens"):
            retriever(qformer=bert(vocab_size=60))

    def test_a_stage2_folder_is_not_loaded_as_stage1_nor_the_reverse(self, tmp_path):
        retriever().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match='"lorgnette_retrieval" checkpoint, not a "lorgnette" one'):
            LorgnetteForConditionalGeneration.from_pretrained(tmp_path)
        model().save_pretrained(tmp_path / "stage2")
        with pytest.raises(ValueError, match='"lorgnette" checkpoint, not a "lorgnette_retrieval" one'):
            LorgnetteForImageTextRetrieval.from_pretrained(tmp_path / "stage2")
