"""One of two processes gets SIGTERM; both stop after the same step, and their save is complete; see test_robustness.py.

torchrun --nproc_per_node 2 sigterm_worker.py FOLDER
"""

import signal
from pathlib import Path

import pytest
import torch.distributed as dist
from tiny_training import joined, pairs, run_process, trainer
from transformers import TrainerCallback

from lorgnette.trainer.checkpoints import train_from


class Tell(TrainerCallback):
    """Does to the second process in its second step what SIGTERM does."""

    def __init__(self):
        self.manager = signal.getsignal(signal.SIGTERM).__self__  # transformers'

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == 1:
            self.manager._enable_checkpoint()


def main(folder: Path) -> None:
    run = trainer(
        *joined((str(folder / "vit"), str(folder / "llama"))),
        folder / "out",
        rows=pairs(8),
        max_steps=4,
        per_device_train_batch_size=1,
        save_strategy="steps",
        save_steps=4,
        enable_jit_checkpoint=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
    )
    run.add_callback(Tell())
    with pytest.raises(SystemExit):
        train_from(run, None)
    assert run.state.global_step == 2
    assert (folder / "out" / "checkpoint-2" / f"rng_state_{dist.get_rank()}.pth").is_file()


if __name__ == "__main__":
    run_process(main)
