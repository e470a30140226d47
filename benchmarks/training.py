"""Time the stock Trainer's steps for several models, alternately on the same rows."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.floor import wait
from benchmarks.sides import Side


LONG = 30.0  # seconds


class CachedRows:
    """Rows with cached features in place of pictures, in the feature cache's format: bytes, in float16."""

    def __init__(self, side: Side, rows: Sequence[dict[str, Any]], folder: Path):
        self.dtype, kept = torch.float16, []
        for row in rows:
            pixels = side.collator([row])["pixel_values"].to(side.model.device)
            with torch.no_grad():
                features = side.model.get_vision_features(pixels).last_hidden_state[0].to(self.dtype).cpu()
            self.shape = tuple(features.shape)
            kept.append({"text": row["text"], "vision_features": features.numpy().tobytes()})
        Dataset.from_list(kept).save_to_disk(folder)
        self._rows = load_from_disk(folder)  # memory-mapped

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self._rows[number]
        features = torch.frombuffer(bytearray(row["vision_features"]), dtype=self.dtype)
        return row | {"vision_features": features.view(self.shape)}


class _Clock(TrainerCallback):
    def __init__(self, device: str):
        self.device, self.times = device, []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._record_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._record_time()

    def _record_time(self) -> None:
        wait(self.device)
        self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds of each step, including data loading."""
        return [end - start for start, end in zip(self.times, self.times[1:], strict=False)]


def train(
    side: Side, rows: Any, *, batch_size: int, steps: int, seed: int, device: str, bf16: bool, folder: Path
) -> list[float]:
    """Seconds of `steps` steps.

    On a GPU after one uncounted step, which loads kernels. On a CPU the first step counts; creating the optimizer's
    state takes little time, and the same on both sides.
    """
    clock, uncounted = _Clock(device), int(device == "cuda")
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps + uncounted,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-5,
        bf16=bf16,
        use_cpu=device == "cpu",
        seed=seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
    )
    trainer = Trainer(
        model=side.model, args=arguments, train_dataset=rows, data_collator=side.collator, callbacks=[clock]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    side.model.zero_grad()
    return clock.seconds()[uncounted:]


def in_turn(
    runs: Mapping[str, Callable[[int], list[float]]], rounds: int, least: int = 2, warm: bool = False
) -> dict[str, list[float]]:
    """Call the runs repeatedly, in alternating order; returns the results by round.

    Args:
        runs: by name; each gets the number of the round.
        rounds: maximum.
        least: after so many, none starts once `LONG` seconds have passed.
        warm: call each run once more before it counts. A CPU's library compiles a kernel for each new shape, and the
            batches of a round have their own; training meets few new ones after its first epoch.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= least and time.perf_counter() - start > LONG:
            break
        for name in list(runs)[:: -1 if number % 2 else 1]:
            if warm:
                runs[name](number)
            found[name] += runs[name](number)
            gc.collect()
    return found


def step_of(side: Side, rows: Sequence[dict[str, Any]], device: str, bf16: bool) -> Callable[[], torch.Tensor]:
    """A function that runs forward and backward over the same batch as Trainer does, accumulating gradients.

    The function returns the loss.
    """
    batch = {name: tensor.to(device) for name, tensor in side.collator(list(rows)).items()}
    side.model.train()

    def step() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            output = side.model(**batch)
        output["loss"].backward()
        return output["loss"].detach()

    return step
