"""Stage 1 on this process's half of a batch, against what one process makes of the whole; see test_ddp.py.

torchrun --nproc_per_node 2 ddp_stage1_worker.py FOLDER
"""

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import bert_tokenizer, image_processor, picture
from tiny_training import run_process
from transformers import Trainer, TrainingArguments

from lorgnette import LorgnetteCollator, LorgnetteForImageTextRetrieval, LorgnetteProcessor
from lorgnette.modeling import modeling_retrieval


CLOSE = {"atol": 1e-6, "rtol": 1e-6}


def next_of_its_half(
    logits: torch.Tensor, candidates: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of a draw by chance: the next pair of the same three, in a batch of six as in a process' half of it."""
    rows = torch.arange(len(logits))
    return candidates.any(dim=1), rows // 3 * 3 + (rows + 1) % 3


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    batch = load_file(folder / "batch.safetensors")
    half = {name: tensor[rank * 3 : rank * 3 + 3] for name, tensor in batch.items()}
    half["input_ids"], half["attention_mask"] = (
        half[name][:, : half["attention_mask"].sum(1).max()] for name in ("input_ids", "attention_mask")
    )  # each process pads to a length of its own
    for name in ("all", "itc"):
        model = LorgnetteForImageTextRetrieval.from_pretrained(folder / name).train()
        with mock.patch.object(modeling_retrieval, "draw_negatives", next_of_its_half):
            loss = model(**half).loss
        loss.backward()
        dist.all_reduce(total := loss.detach().clone())
        expected = load_file(folder / f"{name}.safetensors")
        torch.testing.assert_close(total / 2, expected.pop("loss"), **CLOSE)
        for key, gradient in expected.items():
            own = model.get_parameter(key).grad
            dist.all_reduce(own)
            torch.testing.assert_close(own / 2, gradient, **CLOSE)

    with pytest.raises(ValueError, match=r"differ in size \(\[3, 2\]\)"):
        model(**{name: tensor[: 3 - rank] for name, tensor in half.items()})

    # all three losses, under the stock Trainer, with every parameter awaited
    model = LorgnetteForImageTextRetrieval.from_pretrained(folder / "all")
    processor = LorgnetteProcessor.from_backbones(image_processor(), None, qformer=bert_tokenizer(), num_query_tokens=4)
    words = ["a cat", "the dog", "a red car", "a bird", "the road", "a picture", "a cat", "a tree"]
    arguments = TrainingArguments(
        str(folder / "out"),
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=2,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"index": n, "image": picture(n), "text": text} for n, text in enumerate(words)]
    Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=LorgnetteCollator(processor),
        processing_class=processor,
    ).train()
    gathered = [None, None]
    dist.all_gather_object(gathered, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    first, second = gathered
    assert all((first[name] == second[name]).all() for name in first), "the processes have drifted apart"


if __name__ == "__main__":
    run_process(main)
