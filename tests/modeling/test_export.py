"""`torch.export` of whole models: the program has torch's own operators alone, and is loaded without lorgnette."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import bert_tokenizer, image_processor, picture
from tiny_models import NUM_QUERY_TOKENS, bert, inputs, model, vision_model

from lorgnette import LorgnetteForImageTextRetrieval, LorgnetteModel, LorgnetteProcessor


_RUN = """
import json, sys, torch
program, batch, answer = sys.argv[1:]
result = torch.export.load(program).module()(**torch.load(batch))
assert not {"lorgnette", "transformers"} & set(sys.modules)
difference = (result - torch.load(answer)).abs().max().item()
print(json.dumps(difference))
"""


class _Alone(torch.nn.Module):
    """A model's one output of this name, as exporters like it."""

    def __init__(self, whole: torch.nn.Module, name: str, **settings):
        super().__init__()
        self.whole, self.name, self.settings = whole, name, settings

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return getattr(self.whole(**batch, **self.settings), self.name)


def in_a_fresh_process(program: torch.export.ExportedProgram, batch: dict, answer: torch.Tensor, folder: Path) -> float:
    """The largest difference from `answer` that a process without lorgnette gets."""
    torch.export.save(program, folder / "program.pt2")
    torch.save(batch, folder / "batch.pt")
    torch.save(answer, folder / "answer.pt")
    paths = [str(folder / name) for name in ("program.pt2", "batch.pt", "answer.pt")]
    run = subprocess.run(
        [sys.executable, "-c", _RUN, *paths], capture_output=True, text=True, timeout=300, check=False, cwd=folder
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@torch.no_grad()
@pytest.mark.parametrize(
    ("vision", "text", "strict"),
    [("vit", "llama", False), ("vit", "llama", True), ("clip", "gpt2", False), ("siglip", "gemma3_text", False)],
)
def test_the_whole_forward_is_saved_and_gives_equal_logits_elsewhere(tmp_path, vision, text, strict):
    whole, batch = _Alone(model(vision, text), "logits", use_cache=False), inputs()
    program = torch.export.export(whole, (), batch, strict=strict)
    assert in_a_fresh_process(program, batch, whole(**batch), tmp_path) < 1e-5


@torch.no_grad()
def test_a_tuple_needs_no_wrapper():
    whole, batch = model(), inputs()
    settings = {"use_cache": False, "return_dict": False}
    program = torch.export.export(whole, (), batch | settings)
    assert torch.allclose(program.module()(**batch, **settings)[0], whole(**batch).logits, atol=1e-5)


@torch.no_grad()
def test_rows_and_widths_may_be_left_open():
    class Named(_Alone):
        def forward(self, input_ids, attention_mask, pixel_values) -> torch.Tensor:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)

    whole, batch = Named(model(), "logits", use_cache=False), inputs()
    auto = torch.export.Dim.AUTO
    shapes = {"input_ids": {0: auto, 1: auto}, "attention_mask": {0: auto, 1: auto}, "pixel_values": {0: auto}}
    program = torch.export.export(whole, (), batch, dynamic_shapes=shapes)
    other = inputs(rows=3, text_tokens=7)
    assert torch.allclose(program.module()(**other), whole(**other), atol=1e-5)


@torch.no_grad()
def test_features_and_words_alone_are_exported_too(tmp_path):
    whole, batch = model(), inputs()
    features = whole.get_vision_features(batch.pop("pixel_values")).last_hidden_state
    alone = _Alone(whole, "logits", use_cache=False)
    shown = batch | {"vision_features": features}
    assert in_a_fresh_process(torch.export.export(alone, (), shown), shown, alone(**shown), tmp_path) < 1e-5
    words = {name: values[:, :5] for name, values in batch.items()}
    assert in_a_fresh_process(torch.export.export(alone, (), words), words, alone(**words), tmp_path) < 1e-5


@torch.no_grad()
def test_the_model_without_its_head(tmp_path):
    built, batch = model(), inputs()
    headless = _Alone(built.base_model, "last_hidden_state", use_cache=False)
    assert isinstance(built.base_model, LorgnetteModel)
    program = torch.export.export(headless, (), batch)
    assert in_a_fresh_process(program, batch, headless(**batch), tmp_path) < 1e-5


@torch.no_grad()
def test_stage_1(tmp_path):
    processor = LorgnetteProcessor.from_backbones(
        image_processor(), None, qformer=bert_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS
    )
    built = LorgnetteForImageTextRetrieval.from_backbones(
        vision_model(), qformer=bert(vocab_size=len(processor.qformer_tokenizer)), processor=processor
    ).eval()
    batch = dict(
        processor(images=[picture(0), picture(1)], text=["the cat", "a dog"], padding=True, return_tensors="pt")
    )
    scores = _Alone(built, "logits_per_image", return_loss=False)
    assert in_a_fresh_process(torch.export.export(scores, (), batch), batch, scores(**batch), tmp_path) < 1e-5


@torch.no_grad()
def test_the_checks_are_there_again_after_an_export():
    whole, batch = model(), inputs()
    torch.export.export(_Alone(whole, "logits", use_cache=False), (), batch)
    with pytest.raises(ValueError, match="image placeholders"):
        whole(**batch | {"pixel_values": batch["pixel_values"][:1]})


@torch.no_grad()
def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    whole, batch = _Alone(model(), "logits", use_cache=False), inputs()
    program = torch.onnx.export(whole, (), kwargs=batch, dynamo=True)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    feed = {entry.name: batch[entry.name].numpy() for entry in session.get_inputs()}
    assert torch.allclose(torch.tensor(session.run(None, feed)[0]), whole(**batch), atol=1e-4)
