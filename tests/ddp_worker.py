"""Two steps of the stock Trainer on this process's share of the rows; see test_ddp.py.

torchrun --nproc_per_node 2 ddp_worker.py FOLDER
"""

from pathlib import Path

import torch.distributed as dist
from tiny_training import joined, pairs, run_process, trainer

from lorgnette.trainer.callbacks import GenerateMetricsCallback


def main(folder: Path) -> None:
    model, processor = joined((str(folder / "vit"), str(folder / "llama")))
    words = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    # every other row has no image: the second process has nothing for its Q-Former to look at
    rows = [row if row["index"] % 2 == 0 else {"index": row["index"], "messages": words} for row in pairs(8)]
    run = trainer(
        model,
        processor,
        folder / "out",
        rows=rows,
        per_device_train_batch_size=1,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
        max_grad_norm=0.0,
    )
    assert run.args.world_size == 2
    rows = [{**row, "text": ["a cat", "the dog"]} for row in pairs(3)]  # the first process has two of them
    run.add_callback(GenerateMetricsCallback(processor, rows, batch_size=1))
    run.train()
    gathered = [None, None]
    dist.all_gather_object(gathered, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    first, second = gathered
    assert all((first[name] == second[name]).all() for name in first), "the processes have drifted apart"
    dist.all_gather_object(gathered, run.evaluate()["eval_cider"])
    assert gathered[0] == gathered[1], "the processes would choose different best models"


if __name__ == "__main__":
    run_process(main)
