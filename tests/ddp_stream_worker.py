"""A stock Trainer that reads a stream on two processes; see test_streams.py.

torchrun --nproc_per_node 2 ddp_stream_worker.py FOLDER
"""

from pathlib import Path

import torch.distributed as dist
from test_streams import Stream
from tiny_training import joined, pairs, run_process, trainer


def main(folder: Path) -> None:
    backbones = (str(folder / "vit"), str(folder / "llama"))
    settings = {"per_device_train_batch_size": 2, "ddp_backend": "gloo", "ddp_find_unused_parameters": False}

    if (folder / "dispatched").is_dir():  # accelerate's dispatcher: the first process reads for both
        rows = [row | {"text": "a cat"} for row in pairs(8)]  # of one width: accelerate itself refuses others
        run = trainer(*joined(backbones), folder / "dispatched", rows=Stream(rows), **settings)
        try:
            run.train()
        except ValueError as error:
            (folder / "dispatched" / "error.txt").write_text(f"step {run.state.global_step}: {error}")
            raise
        return

    for split in (False, True):
        settings["accelerator_config"] = {"dispatch_batches": False, "split_batches": split}
        run = trainer(*joined(backbones), folder / str(split), rows=Stream(pairs(8)), **settings)
        assert run.args.world_size == 2
        read = [batch["row_index"].tolist() for batch in run.get_train_dataloader()]
        gathered: list[list[list[int]]] = [[], []]
        dist.all_gather_object(gathered, read)
        assert sorted(index for share in gathered for batch in share for index in batch) == list(range(8)), gathered
        run.train()


if __name__ == "__main__":
    run_process(main)
