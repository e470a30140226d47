"""Trainer's own FSDP, a process for each CUDA device; see test_gpu.py. On CPUs Trainer runs DDP in its place, unasked.

torchrun --nproc_per_node N fsdp_worker.py FOLDER
"""

from pathlib import Path
from typing import Any

from tiny_training import joined, run_process, trainer
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


class Sharded(TrainerCallback):
    """Looks whether frozen and trainable weights are split, once a step was taken with them."""

    def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
        whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        assert not whole, f"{len(whole)} parameters are not split ({whole[0]}, …)"
        assert {parameter.requires_grad for parameter in model.parameters()} == {True, False}


def main(folder: Path) -> None:
    model, processor = joined((str(folder / "vit"), str(folder / "llama")))
    run = trainer(model, processor, folder / "out", use_cpu=False, fsdp=True, save_strategy="steps", save_steps=1)
    run.add_callback(Sharded())
    run.train()
    run.save_model()


if __name__ == "__main__":
    run_process(main)
