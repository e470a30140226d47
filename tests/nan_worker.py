"""One step in which one of two processes has a loss of NaN; each writes down what it was told; see test_nan_guard.py.

torchrun --nproc_per_node 2 nan_worker.py FOLDER
"""

from pathlib import Path

import pytest
import torch.distributed as dist
from test_nan_guard import spoil
from tiny_training import joined, pairs, run_process, trainer

from lorgnette.trainer.nan_guard import nan_guard


def main(folder: Path) -> None:
    settings = {"per_device_train_batch_size": 1, "max_steps": 1, "ddp_backend": "gloo"}
    model, processor = joined((str(folder / "vit"), str(folder / "llama")))
    # two rows, one for each process
    run = trainer(model, processor, folder / "out", rows=pairs(4)[2:], ddp_find_unused_parameters=False, **settings)
    spoil(model, lambda rows: 3 in rows, float("nan"))
    with pytest.raises(FloatingPointError) as caught, nan_guard(run):
        run.train()
    (folder / f"{dist.get_rank()}.txt").write_text(str(caught.value))


if __name__ == "__main__":
    run_process(main)
