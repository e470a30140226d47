"""float16 is for use, and for mixed precision over float32 weights; weights that train are refused in it."""

import pytest
import tiny
import torch
from tiny_models import NUM_QUERY_TOKENS, bert, inputs, model, vision_model
from tiny_training import joined, pairs, trainer, write_backbones

from lorgnette import LorgnetteForImageTextRetrieval, LorgnetteProcessor
from lorgnette.assembly.backbones import cast_parameters


def stage1():
    words = tiny.bert_tokenizer()
    processor = LorgnetteProcessor.from_backbones(
        tiny.image_processor(), None, qformer=words, num_query_tokens=NUM_QUERY_TOKENS
    )
    built = LorgnetteForImageTextRetrieval.from_backbones(
        vision_model(), qformer=bert(vocab_size=len(words)), processor=processor, image_text_hidden_size=8
    )
    return built, processor


@pytest.fixture(params=["stage 1", "stage 2"])
def parts(request, tmp_path):
    return stage1() if request.param == "stage 1" else joined(write_backbones(tmp_path))


def test_training_is_refused_before_a_weight_moves(parts, tmp_path):
    built, processor = parts
    cast_parameters(built, torch.float16)
    before = {name: value.clone() for name, value in built.state_dict().items()}
    run = trainer(built, processor, tmp_path / "out", rows=pairs(4))
    with pytest.raises(ValueError, match=r"weights that train are float16 \(.*epsilon.*dtype='float32'.*bfloat16"):
        run.train()
    assert run.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())


def test_one_weight_is_enough(parts, tmp_path):
    built, processor = parts
    built.qformer.layernorm.half()
    with pytest.raises(ValueError, match=r"2 weights that train are float16 \(qformer\.layernorm\.weight"):
        trainer(built, processor, tmp_path / "out", rows=pairs(4)).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_may_train(parts, tmp_path, dtype):
    built, processor = parts
    cast_parameters(built, dtype)
    run = trainer(built, processor, tmp_path / "out", rows=pairs(4))
    run.train()
    assert run.state.global_step == 2


def test_float32_weights_may_train_with_float16_products():
    """Trainer's fp16=True, which it allows on a GPU alone."""
    built = model().train()
    batch = inputs()
    with torch.autocast("cpu", torch.float16):
        loss = built(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == 320, -100)).loss
    loss.backward()
    assert {value.grad.dtype for value in built.parameters() if value.requires_grad} == {torch.float32}


def test_a_frozen_float16_language_model_may_stay():
    """What does not train may be in any dtype."""
    built = model().train()
    for name, value in built.named_parameters():
        if not value.requires_grad and name.startswith("language_model."):
            value.data = value.data.half()
    built.check_trainable()


def test_use_is_not_refused():
    built = model().half()
    batch = {name: value.half() if value.is_floating_point() else value for name, value in inputs().items()}
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == 320, -100)
    assert built.eval()(**batch, labels=labels).loss.isfinite()
    assert built.generate(**batch, max_new_tokens=2).shape[0] == len(labels)
    with torch.no_grad():
        assert built.train()(**batch, labels=labels).loss.isfinite()
