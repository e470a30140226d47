"""The Q-Former: equal to BLIP-2's in transformers, started from a BERT, in any dtype, with gradients everywhere."""

import pytest
import torch
from tiny_models import bert
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from lorgnette import LorgnetteQFormerConfig, LorgnetteQFormerModel
from lorgnette.assembly.qformer_init import load_bert_weights


SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "encoder_hidden_size": 24,
    "max_position_embeddings": 40,
}


def qformer(attention: str = "eager", **fields) -> LorgnetteQFormerModel:
    torch.manual_seed(0)
    config = LorgnetteQFormerConfig(**SIZES | {"num_query_tokens": 5} | fields)
    return LorgnetteQFormerModel._from_config(config, attn_implementation=attention).eval()


def image(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 7, 24, generator=torch.Generator().manual_seed(3))


def text() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(1, 60, (2, 6), generator=torch.Generator().manual_seed(4))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, 4:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("with_text", [False, True])
def test_equals_blip2_with_the_same_weights(attention: str, with_text: bool):
    config = Blip2QFormerConfig(**SIZES, use_qformer_text_input=with_text)
    theirs = Blip2QFormerModel._from_config(config, attn_implementation=attention).eval()
    ours = qformer(attention, use_qformer_text_input=with_text)
    weights = dict(theirs.state_dict())
    if with_text:
        embeddings = Blip2TextEmbeddings(config)
        weights |= {f"embeddings.{name}": tensor for name, tensor in embeddings.state_dict().items()}
    keys = ours.load_state_dict(weights, strict=False)
    assert keys.missing_keys == ["query_tokens.weight"]  # which BLIP-2 keeps on the model around the Q-Former
    assert keys.unexpected_keys == []

    queries = ours.query_tokens.weight.expand(2, -1, -1)
    with torch.no_grad():
        if with_text:
            mask = torch.cat([torch.ones(2, 5, dtype=torch.long), text()["attention_mask"]], dim=1)
            embedded = embeddings(text()["input_ids"], query_embeds=queries)
            expected = theirs(embedded, query_length=5, attention_mask=mask, encoder_hidden_states=image())
            actual = ours(image(), **text())
        else:
            mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
            expected = theirs(queries, encoder_hidden_states=image(), encoder_attention_mask=mask)
            actual = ours(image(), encoder_attention_mask=mask)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)


def test_padded_image_tokens_and_padded_text_change_nothing():
    model = qformer(use_qformer_text_input=True)
    mask = torch.tensor([[1] * 4 + [0] * 3] * 2)
    with torch.no_grad():
        masked = model(image(), encoder_attention_mask=mask, **text()).last_hidden_state
        torch.testing.assert_close(masked[:, :5], model(image()[:, :4], **text()).last_hidden_state[:, :5])
        other = text() | {"input_ids": text()["input_ids"].masked_fill(text()["attention_mask"] == 0, 9)}
        torch.testing.assert_close(
            masked[:, :9], model(image(), encoder_attention_mask=mask, **other).last_hidden_state[:, :9]
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_image_that_several_rows_look_at_is_projected_once(attention: str):
    model, rows = qformer(attention, use_qformer_text_input=True), torch.tensor([1, 0, 1, 1])
    words = {name: tensor[rows] for name, tensor in text().items()}
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    projected = []
    model.encoder.layer[0].crossattention.attention.key.register_forward_hook(
        lambda module, args, output: projected.append(len(output))
    )
    with torch.no_grad():
        shared = model(image(), encoder_attention_mask=mask, image_rows=rows, **words).last_hidden_state
        copied = model(image()[rows], encoder_attention_mask=mask[rows], **words).last_hidden_state
    torch.testing.assert_close(shared, copied, atol=1e-6, rtol=0)
    assert projected == [2, 4]


def test_queries_start_apart_and_every_parameter_gets_a_gradient():
    model = qformer(use_qformer_text_input=True).train()
    assert torch.pdist(model.query_tokens.weight).min() > 0
    model.gradient_checkpointing_enable()
    model(image(), **text()).last_hidden_state.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_without_a_text_half_every_parameter_gets_a_gradient():
    model = qformer().train()
    model(image()).last_hidden_state.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_attention_maps_on_request():
    outputs = qformer(cross_attention_frequency=2)(image(), output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 2, 5, 5)] * 3
    assert [tuple(weights.shape) for weights in outputs.cross_attentions] == [(2, 2, 5, 7)] * 2  # layers 0 and 2
    torch.testing.assert_close(outputs.cross_attentions[0].sum(-1), torch.ones(2, 2, 5))
    assert len(outputs.hidden_states) == 4


def test_sdpa_equals_eager_and_bfloat16_stays_bfloat16():
    eager, sdpa = qformer("eager", use_qformer_text_input=True), qformer("sdpa", use_qformer_text_input=True)
    with torch.no_grad():
        expected = eager(image(), **text()).last_hidden_state
        torch.testing.assert_close(sdpa(image(), **text()).last_hidden_state, expected, atol=1e-5, rtol=0)
        half = sdpa.to(torch.bfloat16)(image(), **text()).last_hidden_state
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a CUDA device")
def test_flash_attention_equals_sdpa():
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    flash, sdpa = (qformer(name).to("cuda", torch.bfloat16) for name in ("flash_attention_2", "sdpa"))
    pictures = image().to("cuda", torch.bfloat16)
    torch.testing.assert_close(
        flash(pictures).last_hidden_state, sdpa(pictures).last_hidden_state, atol=2e-2, rtol=2e-2
    )


class TestStartFromBert:
    def test_self_attention_and_both_feed_forwards_are_taken(self):
        source, model = bert(num_hidden_layers=3), qformer(use_qformer_text_input=True)
        fresh = model.encoder.layer[0].crossattention.attention.key.weight.clone()
        load_bert_weights(model, source)
        theirs, ours = source.encoder.layer[1], model.encoder.layer[1]
        assert torch.equal(ours.attention.attention.query.weight, theirs.attention.self.query.weight)
        assert torch.equal(ours.intermediate.dense.weight, theirs.intermediate.dense.weight)
        assert torch.equal(ours.intermediate_query.dense.weight, theirs.intermediate.dense.weight)
        assert torch.equal(ours.output_query.LayerNorm.weight, theirs.output.LayerNorm.weight)
        assert torch.equal(model.encoder.layer[0].crossattention.attention.key.weight, fresh)

    def test_text_is_embedded_as_bert_does(self):
        source, model = bert(num_hidden_layers=3), qformer(use_qformer_text_input=True)
        load_bert_weights(model, source)
        ids = text()["input_ids"]
        torch.testing.assert_close(model.layernorm(model.embeddings(ids)), source.embeddings(ids), atol=1e-6, rtol=0)

    @pytest.mark.parametrize(
        ("fields", "fresh"),
        [
            ({"cross_attention_frequency": 2}, "query_tokens; crossattention of layers 0, 2"),
            ({"cross_attention_frequency": 1, "num_query_tokens": None}, "crossattention of layers 0, 1, 2"),
        ],
    )
    def test_what_is_fresh_is_logged_in_brief(self, caplog, fields, fresh):
        with caplog.at_level("INFO", "lorgnette.assembly.qformer_init"):
            load_bert_weights(qformer(**fields), bert(num_hidden_layers=3))
        assert caplog.messages[-1].endswith(f"tensors taken from BertModel; fresh: {fresh}")

    def test_another_shape_is_an_error_with_both(self):
        with pytest.raises(ValueError, match=r"\(32,\).*\(16,\)"):
            load_bert_weights(qformer(), bert(num_hidden_layers=3, hidden_size=32))

    def test_too_few_layers_is_an_error(self):
        with pytest.raises(ValueError, match="at least 3 layers"):
            load_bert_weights(qformer(), bert(num_hidden_layers=2))


@pytest.mark.parametrize(
    ("fields", "call", "message"),
    [
        ({"num_query_tokens": None}, {}, "owns no queries"),
        ({}, text(), "no text half"),
        ({"encoder_hidden_size": 12}, {}, "24 wide.*12"),
        (
            {"use_qformer_text_input": True, "max_position_embeddings": 4},
            {"input_ids": torch.ones(2, 6, dtype=torch.long)},
            "6 tokens; it has positions for 4",
        ),
    ],
)
def test_bad_input_names_the_numbers(fields: dict, call: dict, message: str):
    with pytest.raises(ValueError, match=message):
        qformer(**fields)(image(), **call)
