"""Both ways to train, on a CUDA device in bf16: the entry point and the example; then generate from what they saved.

Run by `make test-gpu`; skipped where there is no such device.
"""

import json
import runpy
from pathlib import Path

import datasets
import pytest
import tiny
import tiny_models
import torch
from processes import run_processes
from repository import ROOT
from tiny_packs import documents, side_by_side
from tiny_training import write_backbones, write_pairs
from transformers import BitsAndBytesConfig

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteForImageTextRetrieval, LorgnetteProcessor
from lorgnette.modeling import modeling_loss
from lorgnette.modeling.modeling_lora import lora_layers
from lorgnette.trainer.__main__ import main


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
EXAMPLE = ROOT / "examples" / "finetune.py"


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Paths of the ViT, the LM, the BERT and the pictures."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_models.bert().save_pretrained(tmp_path / "bert")
    vision, text = write_backbones(tmp_path)
    return {
        "vision": vision,
        "text": text,
        "qformer": tmp_path / "bert",
        "dataset": write_pairs(tmp_path / "pictures"),
    }


def options(parts, **more):
    return [word for name, value in (parts | more).items() for word in (f"--{name}", str(value))]


def answers_on_gpu(folder, dtype=torch.bfloat16):
    processor = LorgnetteProcessor.from_pretrained(folder)
    model = LorgnetteForConditionalGeneration.from_pretrained(folder, dtype=dtype).to("cuda").eval()
    pictures = [tiny.picture(number) for number in range(3)]
    batch = processor(images=pictures, padding=True, return_tensors="pt").to("cuda", dtype)
    generated = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert generated.device.type == "cuda"
    assert generated.shape == (3, batch["input_ids"].shape[1] + 5)
    assert torch.equal(generated[:, :-5], batch["input_ids"])
    return generated


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_entry_point_trains_in_bf16_resumes_and_generates(parts, tmp_path, gradient_checkpointing):
    folder = tmp_path / "out"
    arguments = options(
        parts,
        num_query_tokens=4,
        lora='{"r": 2}',
        output_dir=folder,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate="1e-3",
        bf16=True,
        gradient_checkpointing=gradient_checkpointing,
        eval_fraction=0.25,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        report_to="none",
    )
    main(["stage2", *arguments])
    whole = losses(folder)
    assert len(whole) == 6
    answers_on_gpu(folder)
    main(["stage2", *arguments, "--resume_from_checkpoint", str(folder / "checkpoint-3")])
    assert losses(folder) == pytest.approx(whole, abs=1e-3)  # kernels need not add up in the same order


def test_both_stages_train_in_bf16_on_cached_features(parts, tmp_path):
    for part in (tiny_models.bert(vocab_size=len(tiny.bert_tokenizer())), tiny.bert_tokenizer()):
        part.save_pretrained(tmp_path / "bert-with-words")
    features, stage1, stage2 = (str(tmp_path / name) for name in ("features", "stage1", "stage2"))
    vision, pictures = ["--vision", parts["vision"]], ["--dataset", str(parts["dataset"])]
    run = ["--dataset", features, "--max_steps", "4", "--logging_steps", "1", "--bf16", "true", "--report_to", "none"]
    main(["cache", *vision, *pictures, "--output_dir", features, "--dtype", "bfloat16"])
    qformer = ["--qformer", str(tmp_path / "bert-with-words"), "--num_query_tokens", "4"]
    together = ["--per_device_train_batch_size", "6", "--dataloader_drop_last", "true"]
    main(["stage1", *vision, *qformer, *run, *together, "--output_dir", stage1])
    main(["stage2", *vision, "--text", parts["text"], "--qformer", stage1, *run, "--output_dir", stage2])
    assert len(losses(Path(stage1))) == len(losses(Path(stage2))) == 4
    answers_on_gpu(stage2)
    model = LorgnetteForImageTextRetrieval.from_pretrained(stage1).eval()
    asked = [tiny.picture(number) for number in range(3)], ["a cat", "the dog"]
    on_cpu = model.retrieve(*asked, rerank=True)
    torch.testing.assert_close(model.to("cuda").retrieve(*asked, rerank=True), on_cpu, atol=1e-3, rtol=1e-3)


def test_the_example_trains_in_bf16(parts, tmp_path, monkeypatch):
    words = options(parts, text_column="text", output_dir=tmp_path / "out", max_steps=2, bf16=True)
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *words])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    answers_on_gpu(tmp_path / "out")


def test_trainers_own_fsdp_splits_all_weights_and_saves_them_whole(parts, tmp_path):
    """Not run yet; torch's `fully_shard` by itself is run in test_ddp.py, on CPUs."""
    run_processes("fsdp_worker.py", tmp_path, torch.cuda.device_count())
    answers_on_gpu(tmp_path / "out")


def test_lora_is_folded_while_generating_and_put_back():
    built = tiny_models.model().to("cuda").eval()
    ids = torch.arange(3, 15, device="cuda").view(2, 6)
    pointers = [parameter.data_ptr() for parameter in built.language_model.parameters()]
    merged = []
    built.language_model.register_forward_pre_hook(
        lambda module, _: merged.append(any(layer.merged for layer in lora_layers(module).values()))
    )
    built.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert all(merged)
    assert [parameter.data_ptr() for parameter in built.language_model.parameters()] == pointers


def test_the_gpu_computes_what_the_cpu_does():
    model, batch = tiny_models.model(), tiny_models.inputs()
    with torch.no_grad():
        on_cpu = model(**batch).logits
        on_gpu = model.to("cuda")(**{name: value.to("cuda") for name, value in batch.items()}).logits
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-3, rtol=1e-3)


def test_all_parts_lie_beside_a_quantised_language_model(parts, tmp_path):
    """transformers puts it on the GPU without being asked."""
    pytest.importorskip("bitsandbytes")
    quantised = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    names = (parts["vision"], parts["text"])
    made = LorgnetteForConditionalGeneration.from_backbones(*names, lora={"r": 2}, **quantised)
    LorgnetteForConditionalGeneration.from_backbones(*names, lora={"r": 2}).save_pretrained(tmp_path / "full")
    for model in (made, LorgnetteForConditionalGeneration.from_pretrained(tmp_path / "full", **quantised)):
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}


def test_flash_attention_keeps_packed_pairs_apart():
    """It takes lengths in place of a mask: the loss of sdpa, and logits that another pair's words do not reach."""
    pytest.importorskip("flash_attn")
    losses = []
    for attention in ("sdpa", "flash_attention_2"):
        built = tiny_models.model(text="mistral").to("cuda", torch.bfloat16).train()
        built.language_model.set_attn_implementation(attention)
        batch = {name: value.to("cuda") for name, value in side_by_side(documents()).items()}
        losses.append(built.eval()(**batch).loss)
    torch.testing.assert_close(*losses, atol=2e-2, rtol=2e-2)
    changed = {name: value.clone() for name, value in batch.items()}
    changed["input_ids"][0, 9 + 2 + tiny_models.NUM_QUERY_TOKENS : 9 + 14] = 5
    with torch.no_grad():
        before, after = (built(**one).logits[0] for one in (batch, changed))  # all tokens in one row
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[9 + 14 :], after[9 + 14 :])
    assert not torch.equal(before[9 : 9 + 14], after[9 : 9 + 14])


def test_liger_gives_the_language_models_own_loss(monkeypatch):
    pytest.importorskip("liger_kernel")
    found = []
    for exists in (False, True):
        monkeypatch.setattr(modeling_loss, "is_liger_kernel_available", lambda exists=exists: exists)
        built, batch = tiny_models.model().to("cuda").train(), tiny_models.inputs()
        labels = batch["input_ids"].masked_fill(batch["input_ids"] == built.config.image_token_id, -100)
        torch.manual_seed(0)
        loss = built(**{name: value.to("cuda") for name, value in batch.items()}, labels=labels.to("cuda")).loss
        loss.backward()
        found.append((loss, [p.grad for p in built.parameters() if p.requires_grad]))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("room", ["60KB", "110KB"])
@pytest.mark.parametrize("cpu", ["1GB", "30KB"])
def test_a_language_model_that_does_not_fit_is_offloaded(room, cpu, tmp_path):
    built = tiny_models.model()
    built.save_pretrained(tmp_path / "saved")
    memory = {0: room, "cpu": cpu}
    folders = {"offload_folder": tmp_path / "off"}
    offloaded = LorgnetteForConditionalGeneration.from_pretrained(
        tmp_path / "saved", device_map="auto", max_memory=memory, **folders
    )
    assert any(value.is_meta for value in offloaded.language_model.parameters())
    assert offloaded.projector.weight.device.type == "cuda"
    batch = {name: value.to("cuda") for name, value in tiny_models.inputs().items()}
    with torch.no_grad():
        torch.testing.assert_close(offloaded(**batch).logits, built.to("cuda")(**batch).logits, atol=1e-3, rtol=1e-3)
