"""Several processes: nothing that trains is without a gradient, and stage 1 takes its negatives from all of them."""

import json
import os
import subprocess
import sys
from unittest import mock

import datasets
import pytest
import torch
from ddp_equal_worker import EQUAL
from ddp_stage1_worker import TEXTS, next_of_its_process
from processes import run_processes
from safetensors.torch import load_file, save_file
from tiny import bert_tokenizer, image_processor, picture
from tiny_models import QFORMER, bert, vision_model
from tiny_training import joined, lists, pairs, trainer, write_backbones, write_pairs

from lorgnette import LorgnetteForImageTextRetrieval, LorgnetteProcessor
from lorgnette.modeling import modeling_retrieval
from lorgnette.trainer.__main__ import main
from lorgnette.trainer.checkpoints import train_from


pytestmark = pytest.mark.slow


def test_two_processes_without_looking_for_unused_parameters(tmp_path):
    """`ddp_find_unused_parameters=False` would wait for ever for a gradient that does not come."""
    write_backbones(tmp_path)
    run_processes("ddp_worker.py", tmp_path)


def test_two_processes_are_one_that_accumulates_and_their_checkpoint_is_anyones(tmp_path):
    """Stage 2, with several texts a picture too; resumed on two processes and on one; streams; FSDP2's shards."""
    backbones = write_backbones(tmp_path)
    write_pairs(tmp_path / "pictures")
    run_processes("ddp_equal_worker.py", tmp_path)

    for folder, rows in (("two", pairs()), ("texts", lists())):
        torch.manual_seed(0)
        settings = EQUAL | {"rows": rows, "gradient_accumulation_steps": 2}
        one = trainer(*joined(backbones, dropout=0.0), tmp_path / "one", **settings)
        one.train()
        two = load_file(tmp_path / folder / "model.safetensors")
        for name, parameter in one.model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(two[name], parameter.detach(), atol=1e-6, rtol=1e-6)

    checkpoint = tmp_path / "saved" / "checkpoint-2"
    torch.manual_seed(1)
    settings = EQUAL | {"optim": "adamw_torch", "max_steps": 2, "gradient_accumulation_steps": 2}
    resumed = trainer(*joined(backbones), tmp_path / "resumed", **settings)
    train_from(resumed, str(checkpoint))
    assert resumed.state.global_step == 2
    saved = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in resumed.model.state_dict().items() if name in saved)
    moments = torch.load(checkpoint / "optimizer.pt")["state"]
    for index, state in resumed.optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[name], value) for name, value in moments[index].items())


def test_accelerate_launch_runs_the_entry_point_on_two_processes(tmp_path, monkeypatch):
    """Its weights are those of one process that accumulates. With `--cpu` it would start one process."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    vision, text = write_backbones(tmp_path)
    qformer = QFORMER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    command = (
        f"stage2 --vision {vision} --text {text} --num_query_tokens 4 --dataset {write_pairs(tmp_path / 'pictures')} "
        "--max_steps 3 --save_steps 2 --per_device_train_batch_size 2 --optim sgd --learning_rate 0.1 "
        "--max_grad_norm 0 --report_to none --use_cpu true --bf16 false"
    ).split()
    command += ["--qformer_config", json.dumps(qformer), "--lora", '{"r": 2}']
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "lorgnette.trainer"]
    two = [*launch, *command, "--output_dir", str(tmp_path / "two"), "--ddp_backend", "gloo"]
    finished = subprocess.run(
        two, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=900, check=False
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert (tmp_path / "two" / "checkpoint-2" / "rng_state_1.pth").is_file()
    main([*command, "--output_dir", str(tmp_path / "one"), "--gradient_accumulation_steps", "2"])
    saved, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value, atol=1e-6, rtol=1e-6)


def test_stage_1_of_two_processes_is_that_of_one_with_the_whole_batch(tmp_path):
    """Loss and gradients, of pairs and of pictures with several texts. ITM's draw is fixed.

    One caption stands in both processes, and is a negative in neither. Of the lists the processes have unequal numbers
    of pictures, texts and tokens, and one picture, by its number, is in both.
    """
    processor = LorgnetteProcessor.from_backbones(image_processor(), None, qformer=bert_tokenizer(), num_query_tokens=4)
    texts = {
        "pairs": [
            "the cat",
            "a dog",
            "a very long text about a road",
            "a picture of a bird",
            "the cat",
            "a very red car on the road",
        ],
        "lists": [
            *("the cat", "a cat", "a dog", "a very long text about a road"),
            *("the cat", "a car", "a picture of a bird", "a red car on the road", "a road"),
        ],
    }
    pictures = {"pairs": range(6), "lists": [0, 1, 2, 0, 3]}
    batches = {
        kind: processor(
            images=[picture(n) for n in pictures[kind]], text=texts[kind], padding=True, return_tensors="pt"
        )
        for kind in texts
    }
    rows = {"image_rows": torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 4]), "image_ids": torch.tensor(pictures["lists"])}
    batches["lists"] = {**batches["lists"], **rows}
    for kind, batch in batches.items():
        save_file(dict(batch), tmp_path / f"{kind}.safetensors")
        lengths = [part.sum() for part in batch["attention_mask"].split(TEXTS[kind])]
        assert (lengths[0] == lengths[1]) == (kind == "pairs")
    for name, weight in (("all", 1.0), ("itc", 0.0)):
        torch.manual_seed(0)
        model = LorgnetteForImageTextRetrieval.from_backbones(
            vision_model(),
            qformer=bert(vocab_size=len(processor.qformer_tokenizer)),
            qformer_config={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            processor=processor,
            itm_weight=weight,
            itg_weight=weight,
        ).train()
        model.save_pretrained(tmp_path / name)
        for kind, batch in batches.items():
            with mock.patch.object(modeling_retrieval, "draw_negatives", next_of_its_process):
                loss = model(**batch).loss
            model.zero_grad()
            loss.backward()
            gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
            save_file({"loss": loss.detach()} | gradients, tmp_path / f"{kind}-{name}.safetensors")
    run_processes("ddp_stage1_worker.py", tmp_path)
