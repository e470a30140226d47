"""What the stock Trainer offers that changes the loss: it is right, or refused before a weight has moved."""

import pytest
import torch
from tiny import bert_tokenizer, image_processor
from tiny_models import NUM_QUERY_TOKENS, bert, inputs, language_model, model, vision_model
from tiny_training import joined, pairs, trainer, write_backbones
from torch.nn.functional import cross_entropy
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from lorgnette import LorgnetteCollator, LorgnetteForImageTextRetrieval, LorgnetteProcessor
from lorgnette.modeling.modeling_headless import IMAGE_INPUTS


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> tuple[str, str]:
    return write_backbones(tmp_path_factory.mktemp("backbones"))


def stage1() -> tuple[LorgnetteForImageTextRetrieval, LorgnetteProcessor]:
    processor = LorgnetteProcessor.from_backbones(
        image_processor(), None, qformer=bert_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS
    )
    built = LorgnetteForImageTextRetrieval.from_backbones(
        vision_model(), qformer=bert(vocab_size=len(processor.qformer_tokenizer)), processor=processor
    )
    return built, processor


def smoothed(logits: torch.Tensor, labels: torch.Tensor, **settings) -> torch.Tensor:
    """A causal LM's loss: each token predicts the next."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), **settings)


def first_loss(run: Trainer) -> float:
    run.train()
    return run.state.log_history[0]["loss"]


@pytest.mark.parametrize("settings", [{}, {"pad_to_multiple_of": 16}, {"pack_to": 128}])
def test_smoothed_labels_are_the_next_tokens(backbones, tmp_path, settings):
    built, processor = joined(backbones, dropout=0.0)
    collator = LorgnetteCollator(processor, **settings)
    batch = LorgnetteCollator(processor)(pairs(4))
    with torch.no_grad():
        logits = built.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits
    expected = smoothed(logits, batch["labels"], label_smoothing=0.1)
    run = trainer(built, processor, tmp_path, rows=pairs(4), label_smoothing_factor=0.1, max_steps=1)
    run.data_collator = collator
    assert run.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert first_loss(run) == pytest.approx(expected.item(), rel=1e-5)


class Wrapped(torch.nn.Module):
    """A script's own, around the model."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **batch):
        return self.model(**batch)


@pytest.mark.parametrize("how", ["torch_compile", "compiled before", "wrapped"])
def test_labels_that_would_not_be_shifted_are_not_smoothed(backbones, tmp_path, how):
    built, processor = joined(backbones, dropout=0.0)
    before = {name: value.clone() for name, value in built.state_dict().items()}
    settings = {"torch_compile": True, "torch_compile_backend": "eager"} if how == "torch_compile" else {}
    wrap = {"compiled before": lambda model: torch.compile(model, backend="eager"), "wrapped": Wrapped}
    wrapped = wrap.get(how, lambda model: model)(built)
    run = trainer(wrapped, processor, tmp_path, rows=pairs(4), label_smoothing_factor=0.2, max_steps=1, **settings)
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.2, and Trainer would not shift the labels"):
        run.train()
    assert all(torch.equal(before[name], value) for name, value in built.state_dict().items())


def test_seq2seq_trainer_would_not_shift_them_either(backbones, tmp_path):
    built, processor = joined(backbones, dropout=0.0)
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), label_smoothing_factor=0.2, predict_with_generate=True, generation_max_length=4, use_cpu=True,
        report_to="none", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    run = Seq2SeqTrainer(built, arguments, data_collator=LorgnetteCollator(processor))
    with pytest.raises(ValueError, match="Seq2SeqTrainer's predict_with_generate never does"):
        run.predict(pairs(2), max_new_tokens=2)


def test_smoothing_refuses_labels_past_the_vocabulary(backbones, tmp_path):
    """As a collator of others gives them, which labels placeholders too; a GPU would fail without a name."""
    built, processor = joined(backbones, dropout=0.0)
    collator = LorgnetteCollator(processor)
    assert processor.image_token_id >= built.config.text_config.vocab_size

    def collate(rows):
        batch = collator(rows)
        placeholders = batch["input_ids"] == processor.image_token_id
        return batch | {"labels": torch.where(placeholders, batch["input_ids"], batch["labels"])}

    run = trainer(built, processor, tmp_path, rows=pairs(4), label_smoothing_factor=0.1, max_steps=1)
    run.data_collator = collate
    with pytest.raises(
        ValueError, match=r"labels of the batch are on image placeholders \(id \d+, past the vocabulary"
    ):
        run.train()


def test_smoothing_counts_labels_over_accumulated_batches(backbones, tmp_path):
    losses = []
    for size in (4, 1):
        torch.manual_seed(0)
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        run = trainer(
            *joined(backbones, 0.0), tmp_path, rows=pairs(4), max_steps=1, label_smoothing_factor=0.2, **batches
        )
        losses.append(first_loss(run))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_models_own_name_is_shown():
    assert repr(model()).startswith("LorgnetteForConditionalGeneration(\n")


def test_stage_1_refuses_to_smooth_labels(tmp_path):
    built, processor = stage1()
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1, and has to stay 0 in stage 1"):
        Trainer(built, arguments, train_dataset=pairs(4), data_collator=LorgnetteCollator(processor))


def test_other_models_may_smooth_theirs(tmp_path):
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    Trainer(language_model(), arguments)


@pytest.mark.parametrize("settings", [{}, {"pad_to_multiple_of": 16}])
def test_a_loss_function_of_the_scripts_own_gets_logits_and_labels(backbones, tmp_path, settings):
    def compute_loss(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
        return smoothed(outputs.logits, labels, reduction="sum") / (labels[:, 1:] != -100).sum()

    losses = []
    for function in (None, compute_loss):
        torch.manual_seed(0)
        run = trainer(*joined(backbones, 0.0), tmp_path, max_steps=1, rows=pairs(4))
        run.data_collator = LorgnetteCollator(run.processing_class, **settings)
        run.compute_loss_func = function
        losses.append(first_loss(run))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_loss_function_learns_from_no_row_past_the_context(backbones, tmp_path):
    run = trainer(*joined(backbones, 0.0), tmp_path, rows=[{**row, "text": "a cat " * 300} for row in pairs(4)])
    run.data_collator = LorgnetteCollator(run.processing_class, max_length=10_000)
    run.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean()
    with pytest.raises(ValueError, match="the language model's context is 256"):
        run.train()


def test_nor_do_weights_in_float16(backbones, tmp_path):
    built, processor = joined(backbones, 0.0)
    run = trainer(built.half(), processor, tmp_path)
    run.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean()
    with pytest.raises(ValueError, match="float16"):
        run.train()


class OwnLoss(Trainer):
    """A script's, as transformers' documentation shows it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = smoothed(self.read(outputs), inputs["labels"])
        return (loss, outputs) if return_outputs else loss


READINGS = {
    "attribute": lambda outputs: outputs.logits,
    "key": lambda outputs: outputs["logits"],
    "get": lambda outputs: outputs.get("logits"),
    "number": lambda outputs: outputs[1],
    "slice": lambda outputs: outputs[:2][1],
    "slice from 1": lambda outputs: outputs[1:][0],
    "slice backwards": lambda outputs: outputs[::-1][-2],
}


@pytest.mark.parametrize("how", READINGS)
def test_logits_that_were_never_computed_say_how_to_get_them(backbones, tmp_path, how):
    built, processor = joined(backbones, 0.0)
    run = trainer(built, processor, tmp_path, rows=pairs(4), max_steps=1)
    run.__class__, run.read = OwnLoss, READINGS[how]
    before = {name: value.clone() for name, value in built.state_dict().items()}
    with pytest.raises((AttributeError, KeyError, IndexError), match="logits_to_keep=0"):
        run.train()
    assert all(torch.equal(before[name], value) for name, value in built.state_dict().items())
    assert run.evaluate()["eval_loss"] > 0  # in eval mode there are logits
    collator = run.data_collator
    run.data_collator = lambda rows: collator(rows) | {"logits_to_keep": 0}
    assert first_loss(run) > 0


def test_a_loss_without_logits_is_a_model_output_like_others():
    built, batch = model().train(), inputs()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == built.config.image_token_id, -100)
    outputs = built(**batch, labels=labels)
    assert "logits" not in outputs
    assert getattr(outputs, "logits", None) is None
    assert outputs.get("attentions") is None
    assert outputs.to_tuple()[0] is outputs[0] is outputs["loss"] is outputs.loss
    with pytest.raises(AttributeError, match="'LorgnetteLossOutput' object has no attribute 'logit'"):
        outputs.logit  # noqa: B018
    assert outputs[:1] == (outputs.loss,)
    assert outputs[2] is outputs.image_hidden_states
    assert outputs[2:] == outputs.to_tuple()[2:] == (outputs.image_hidden_states,)
    loss, logits, *_ = built(**batch, labels=labels, return_dict=False)
    assert loss.shape == ()
    assert logits is None
    assert built(**batch, labels=labels, output_hidden_states=True).hidden_states is not None


@pytest.mark.parametrize("stage", [1, 2])
def test_noise_is_added_to_words_alone_and_taken_off_again(backbones, tmp_path, stage):
    losses = []
    for alpha in (None, 5.0):
        torch.manual_seed(0)
        built, processor = stage1() if stage == 1 else joined(backbones, 0.0)
        run = trainer(built, processor, tmp_path, rows=pairs(4), neftune_noise_alpha=alpha, max_steps=1)
        losses.append(first_loss(run))
        assert not built.get_input_embeddings()._forward_hooks
    assert losses[0] != losses[1]


def test_noise_does_not_reach_placeholders():
    built, batch = model().train(), inputs()
    table = built.get_input_embeddings()
    table.register_forward_hook(lambda module, args, output: output + 1.0)
    images = dict.fromkeys(IMAGE_INPUTS) | {"pixel_values": batch["pixel_values"]}
    lm_inputs, features = built.base_model.lm_inputs(batch["input_ids"], None, None, None, None, images, None, None)
    embeds = lm_inputs["inputs_embeds"]
    mask = built.get_placeholder_mask(batch["input_ids"])
    assert torch.equal(embeds[mask], features.pooler_output.flatten(0, 1))
    assert torch.equal(embeds[~mask], table.weight[batch["input_ids"][~mask]] + 1.0)
