"""What two processes make of their shares, for one process to be compared with; see test_ddp.py.

torchrun --nproc_per_node 2 ddp_equal_worker.py FOLDER
"""

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_training import joined, pairs, run_process, trainer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lorgnette import LorgnetteForConditionalGeneration
from lorgnette.trainer.arguments import TRAINING_DEFAULTS, DataArguments
from lorgnette.trainer.checkpoints import train_from
from lorgnette.trainer.data import load_pairs


EQUAL = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "optim": "sgd",
    "learning_rate": 1e-1,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "seed": 3,
    "ddp_find_unused_parameters": False,
}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    backbones = (str(folder / "vit"), str(folder / "llama"))
    torch.manual_seed(0)
    run = trainer(*joined(backbones, dropout=0.0), folder / "two", **EQUAL)
    run.train()
    run.save_model(str(folder / "two"))

    # a checkpoint of two processes, for them and for one to go on from
    settings = EQUAL | {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    saved = []
    for checkpoint in (None, str(folder / "saved" / "checkpoint-2")):
        torch.manual_seed(len(saved) + 1)
        run = trainer(*joined(backbones), folder / "saved", **settings)
        train_from(run, checkpoint)
        saved.append(load_file(folder / "saved" / "checkpoint-4" / "model.safetensors"))
        dist.barrier()  # before the first process saves once more
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items()), "going on is another run"

    # a stream: each row goes to one process
    arguments = DataArguments(dataset=str(folder / "pictures"), streaming=True, shuffle_buffer_size=0)
    rows, _ = load_pairs(arguments, evaluate=False, seed=0)
    seen: list[int] = []
    each_its_own = {"accelerator_config": TRAINING_DEFAULTS["accelerator_config"]}
    run = trainer(*joined(backbones), folder / "stream", rows=rows, **EQUAL, **each_its_own)
    collate = run.data_collator
    run.data_collator = lambda batch: seen.extend(row["index"] for row in batch) or collate(batch)
    run.train()
    gathered = [None, None]
    dist.all_gather_object(gathered, seen)
    trained = [index for one in gathered for index in one[:6]]  # 3 steps of 2; another batch was fetched ahead
    assert sorted(trained) == list(range(12)), gathered

    sharded(folder, backbones)


def sharded(folder: Path, backbones: tuple[str, str]) -> None:
    """FSDP2 by torch's own function: frozen and trainable weights are split, and saved whole."""
    torch.manual_seed(0)
    model, processor = joined(backbones, dropout=0.0)
    whole = copy.deepcopy(model)
    layers = [*model.language_model.get_decoder().layers, *model.vision_model.layers, *model.qformer.encoder.layer]
    for part in (*layers, model):
        fully_shard(part)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert {parameter.requires_grad for parameter in model.parameters()} == {True, False}
    batch = trainer(model, processor, folder / "x").data_collator(pairs(4))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    model.train()
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "sharded", state_dict=state)
        optimizer = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=1e-1)
        expected = whole.train()(**batch).loss
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss.detach(), expected.detach())
        loaded = LorgnetteForConditionalGeneration.from_pretrained(folder / "sharded")
        with torch.no_grad():
            logits = [one.eval()(**batch).logits for one in (loaded, whole)]
        torch.testing.assert_close(*logits)
    dist.barrier()


if __name__ == "__main__":
    run_process(main)
