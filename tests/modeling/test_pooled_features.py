"""Pooled image features in the Q-Former: for the queries' start, and past its layers."""

import pytest
import torch
from tiny_models import NUM_QUERY_TOKENS, QFORMER, bert, model
from tiny_retrieval import batch, retriever

from lorgnette import LorgnetteQFormerConfig, LorgnetteQFormerModel
from lorgnette.modeling.modeling_qformer import pool


POOLED = {"qformer_config": QFORMER | {"use_pooled_features": True}}


def qformer(seed: int = 0, **fields) -> LorgnetteQFormerModel:
    torch.manual_seed(seed)
    fields = QFORMER | {"encoder_hidden_size": 24, "num_query_tokens": 6, "use_pooled_features": True} | fields
    return LorgnetteQFormerModel(LorgnetteQFormerConfig(**fields)).eval()


@pytest.mark.parametrize(("tokens", "count"), [(7, 1), (7, 3), (17, 8), (4, 6), (1, 5), (9, 9)])
def test_pool_is_torchs_adaptive_pooling(tokens, count):
    features = torch.randn(2, tokens, 5)
    expected = torch.nn.functional.adaptive_avg_pool1d(features.mT, count).mT
    torch.testing.assert_close(pool(features, None, count), expected)
    padded = torch.cat([features, torch.full((2, 3, 5), 1e4)], dim=1)
    mask = torch.tensor([[1] * tokens + [0] * 3] * 2)
    torch.testing.assert_close(pool(padded, mask, count), expected)
    torch.testing.assert_close(pool(padded, mask.bool(), count), expected)


def test_queries_start_as_the_pooled_features_and_end_with_them():
    """Against a plain computation: the Q-Former without pooling, given the queries, plus the MLP."""
    pooled, plain = qformer(), qformer(use_pooled_features=False)
    plain.load_state_dict({name: t for name, t in pooled.state_dict().items() if not name.startswith("pooling")})
    with torch.no_grad():
        pooled.pooling.to_outputs[-1].weight.normal_()
        features = torch.randn(2, 9, 24)
        normed = torch.nn.functional.layer_norm(features, (24,))
        stretches = torch.nn.functional.adaptive_avg_pool1d(normed.mT, 6).mT
        seen = torch.cat([normed[:, :1].expand(-1, 6, -1), normed.mean(1, True).expand(-1, 6, -1), stretches], dim=-1)
        queries = pooled.query_tokens.weight + pooled.pooling.to_queries(seen)
        expected = plain(normed, query_embeds=queries).last_hidden_state + pooled.pooling.to_outputs(seen)
        torch.testing.assert_close(pooled(features).last_hidden_state, expected)


def test_padding_of_an_image_changes_nothing():
    model, features = qformer(), torch.randn(2, 9, 24)
    mask = torch.tensor([[1] * 6 + [0] * 3] * 2)
    with torch.no_grad():
        found = model(features, encoder_attention_mask=mask).last_hidden_state
        torch.testing.assert_close(found, model(features[:, :6]).last_hidden_state, atol=1e-5, rtol=0)


def test_shared_keys_and_rows_that_look_at_one_image_give_the_same():
    model, features, rows = qformer(), torch.randn(2, 9, 24), torch.tensor([1, 0, 1])
    with torch.no_grad():
        expected = model(features[rows]).last_hidden_state
        for source in (features, model.project_image(features)):
            torch.testing.assert_close(model(source, image_rows=rows).last_hidden_state, expected)


def test_all_of_it_trains_in_both_stages():
    for built, inputs in ((model(**POOLED), None), (retriever(**POOLED), batch())):
        built.train()
        if inputs is None:
            ids = torch.tensor([[built.config.image_token_id] * NUM_QUERY_TOKENS + [5, 6, 7]])
            labels = ids.masked_fill(ids == built.config.image_token_id, -100)
            inputs = {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(1, 3, 32, 32)}
        for _ in range(2):  # the MLP ends in zeros: what is before them has no gradient in the first step
            built(**inputs).loss.backward()
            with torch.no_grad():
                built.qformer.pooling.to_outputs[-1].weight.add_(0.1)
        without = [name for name, p in built.named_parameters() if p.requires_grad and not p.grad.any()]
        assert [name for name in without if "pooling" in name] == []


def test_generation_alone_leaves_the_last_outputs_out():
    built = retriever(**POOLED, itc_weight=0.0, itm_weight=0.0).train()
    built(**batch()).loss.backward()
    assert {n for n, p in built.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert not any(p.requires_grad for p in built.qformer.pooling.to_outputs.parameters())


def test_a_bert_and_stage_1_are_starts_for_it():
    stage1 = retriever(**POOLED)
    whole = model(qformer=stage1, **POOLED)
    for name, tensor in whole.qformer.pooling.state_dict().items():
        assert torch.equal(tensor, stage1.qformer.pooling.state_dict()[name])
    from_bert = model(qformer=bert(), **POOLED).qformer
    assert from_bert.pooling.to_outputs[-1].weight.shape == (16, 16)
    assert not qformer().pooling.to_outputs[-1].weight.any()
    with pytest.raises(ValueError, match="use_pooled_features"):
        model(qformer=retriever(), **POOLED)


def test_old_configs_have_none():
    assert LorgnetteQFormerConfig().use_pooled_features is False
    assert qformer(use_pooled_features=False).pooling is None


def test_without_layers_it_is_a_bridge_of_pooling_and_an_mlp():
    """The baseline of DeCo: average pooling to as many tokens, and an MLP."""
    bridge = {"qformer_config": POOLED["qformer_config"] | {"num_hidden_layers": 0}}
    built = model(**bridge)
    features = torch.randn(2, 17, built.config.vision_config.hidden_size)
    with torch.no_grad():
        pooled = built.qformer.pooling(built.qformer.pooling.norm(features), None, NUM_QUERY_TOKENS)
        queries = built.qformer.layernorm(built.qformer.query_tokens.weight + built.qformer.pooling.to_queries(pooled))
        expected = built.projector(queries + built.qformer.pooling.to_outputs(pooled))
        torch.testing.assert_close(built.get_image_features(vision_features=features).pooler_output, expected)
    assert len(model(qformer=bert(), **bridge).qformer.encoder.layer) == 0
    for refused in ({"num_hidden_layers": 0}, {"num_hidden_layers": -1, "use_pooled_features": True}):
        with pytest.raises(ValueError, match="num_hidden_layers is"):
            model(qformer_config=QFORMER | refused)
    with pytest.raises(ValueError, match="num_hidden_layers is 0"):
        retriever(**bridge)
