"""`retrieve` with and without re-ranking, and the way from stage 1 to stage 2."""

import pytest
import torch
from tiny import bert_tokenizer, chat_tokenizer, image_processor, picture
from tiny_models import NUM_QUERY_TOKENS, language_model, vision_model
from tiny_retrieval import CAPTIONS, batch, retriever
from transformers import AutoModel

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteForImageTextRetrieval, LorgnetteProcessor


class TestRetrieve:
    def test_scores_are_the_forwards_and_do_not_depend_on_the_batch(self):
        model, inputs = retriever(), batch()
        images = [picture(n) for n in range(4)]
        scores = model.retrieve(images, CAPTIONS)
        torch.testing.assert_close(scores, model(**inputs).logits_per_image.detach(), atol=1e-6, rtol=0)
        torch.testing.assert_close(model.retrieve(images, CAPTIONS, batch_size=1), scores, atol=1e-6, rtol=0)
        features = model.get_vision_features(inputs["pixel_values"]).last_hidden_state
        torch.testing.assert_close(model.retrieve(features, CAPTIONS), scores, atol=1e-6, rtol=0)
        assert model.retrieve(images[:1], CAPTIONS[:3]).shape == (1, 3)

    def test_reranked_pairs_come_first_in_the_order_of_both_heads(self):
        model, inputs = retriever(), batch(CAPTIONS[:3])
        images = [picture(n) for n in range(3)]
        plain, reranked = model.retrieve(images, CAPTIONS[:3]), model.retrieve(images, CAPTIONS[:3], rerank=1)
        best = torch.zeros(3, 3, dtype=torch.bool)
        for n in range(3):
            best[n, plain[n].argmax()] = best[plain[:, n].argmax(), n] = True
        assert torch.equal(reranked[~best], plain[~best])
        features = model.get_vision_features(inputs["pixel_values"]).last_hidden_state
        for image, text in best.nonzero().tolist():
            alone = {"encoder_hidden_states": features[image : image + 1], "encoder_attention_mask": None}
            words = {name: inputs[name][text : text + 1] for name in ("input_ids", "attention_mask")}
            probability = model.match_logits(alone, words).softmax(-1)[0, 1]
            torch.testing.assert_close(reranked[image, text], plain[image, text] + 2 + probability, atol=1e-5, rtol=0)
        assert (model.retrieve(images, CAPTIONS[:3], rerank=True) > 1).all()

    def test_what_it_cannot_do_is_said(self):
        images = [picture()]
        with pytest.raises(ValueError, match="trained with itm_weight 0: nothing can re-rank"):
            retriever(itm_weight=0.0).retrieve(images, ["a cat"], rerank=True)
        with pytest.raises(ValueError, match="trained with itc_weight 0"):
            retriever(itc_weight=0.0).retrieve(images, ["a cat"])
        with pytest.raises(ValueError, match="1 images and 0 texts"):
            retriever().retrieve(images, [])
        with pytest.raises(ValueError, match="No processor is known"):
            retriever(processor=None).retrieve(images, ["a cat"])
        with pytest.raises(TypeError, match="texts is one string"):
            retriever().retrieve(images, "a cat")
        with pytest.raises(TypeError, match="images is one string"):
            retriever().retrieve("cat.jpg", ["a cat"])
        of_stage2 = LorgnetteProcessor.from_backbones(image_processor(), chat_tokenizer(), num_query_tokens=4)
        with pytest.raises(ValueError, match="no stage-1 processor"):
            retriever().retrieve(images, ["a cat"], processor=of_stage2)

    def test_in_the_middle_of_training_nothing_drops_out(self):
        model, images = retriever(), [picture(n) for n in range(2)]
        expected = model.retrieve(images, CAPTIONS[:2], rerank=True)
        assert torch.equal(model.train().retrieve(images, CAPTIONS[:2], rerank=True), expected)
        assert model.qformer.training
        assert not model.vision_model.training

    def test_a_loaded_model_knows_its_processor(self, tmp_path):
        model, images = retriever(), [picture(n) for n in range(2)]
        model.save_pretrained(tmp_path)
        for auto_class in (LorgnetteForImageTextRetrieval, AutoModel):
            loaded = auto_class.from_pretrained(tmp_path)
            assert isinstance(loaded, LorgnetteForImageTextRetrieval)
            assert torch.equal(loaded.retrieve(images, CAPTIONS), model.retrieve(images, CAPTIONS))
            assert loaded._known_processor() is loaded._known_processor()  # its code is not run at each call


class TestTheWayToStage2:
    def test_the_qformer_is_taken_over_without_its_text_half(self, tmp_path):
        stage1 = retriever(vision_feature_layer=-2)
        stage1.save_pretrained(tmp_path)
        for source in (tmp_path, stage1):
            built = LorgnetteForConditionalGeneration.from_backbones(vision_model(), language_model(), qformer=source)
            assert built.config.num_query_tokens == NUM_QUERY_TOKENS
            assert built.config.vision_feature_layer == -2
            assert not built.config.qformer_config.use_qformer_text_input
            own = built.qformer.state_dict()
            text_half = ("embeddings.", "encoder.layer.0.intermediate.", "encoder.layer.0.output.")
            assert not any(name.startswith(text_half) for name in own)
            assert all(torch.equal(tensor, stage1.qformer.state_dict()[name]) for name, tensor in own.items())

    def test_with_its_text_half_where_the_query_is_read(self, tmp_path):
        stage1 = retriever()
        stage1.save_pretrained(tmp_path)
        built = LorgnetteForConditionalGeneration.from_backbones(
            vision_model(), language_model(), qformer=tmp_path, qformer_config={"use_qformer_text_input": True}
        )
        own = built.qformer.state_dict()
        assert own.keys() == stage1.qformer.state_dict().keys()
        tokenizer = LorgnetteProcessor.from_backbones(image_processor(), None, qformer=tmp_path).qformer_tokenizer
        assert tokenizer.get_vocab() == bert_tokenizer().get_vocab()

    def test_what_stage1_has_settled_is_not_changed_in_silence(self):
        stage1 = retriever(vision_feature_layer=-2)
        for wished, message in (
            ({"num_query_tokens": 5}, "num_query_tokens is 5; the stage-1 Q-Former has learned with 4"),
            ({"vision_feature_layer": 1}, "vision_feature_layer is 1; the stage-1 Q-Former has learned with -2"),
            ({"qformer_config": {"num_hidden_layers": 1}}, "num_hidden_layers is 1; the stage-1 Q-Former's is 2"),
            # one that stage 1 has at its default
            ({"qformer_config": {"cross_attention_frequency": 1}}, "frequency is 1; the stage-1 Q-Former's is 2"),
        ):
            with pytest.raises(ValueError, match=message):
                LorgnetteForConditionalGeneration.from_backbones(
                    vision_model(), language_model(), qformer=stage1, **wished
                )

    @pytest.mark.parametrize("dtypes", [("bfloat16", None), (None, "bfloat16")])
    def test_the_same_vit_in_another_dtype(self, dtypes):
        stage1 = retriever(dtype=dtypes[0])
        built = LorgnetteForConditionalGeneration.from_backbones(
            vision_model(), language_model(), qformer=stage1, dtype=dtypes[1]
        )
        assert {p.dtype for p in built.qformer.parameters()} == {getattr(torch, dtypes[1] or "float32")}
        assert torch.equal(built.qformer.query_tokens.weight.bfloat16(), stage1.qformer.query_tokens.weight.bfloat16())
        with pytest.raises(ValueError, match="another ViT"):
            LorgnetteForConditionalGeneration.from_backbones(
                vision_model(seed=1), language_model(), qformer=stage1, dtype=dtypes[1]
            )

    def test_another_vit(self):
        with pytest.raises(ValueError, match=r"learned to read another ViT: '.*' differs"):
            LorgnetteForConditionalGeneration.from_backbones(
                vision_model(seed=1), language_model(), qformer=retriever()
            )
