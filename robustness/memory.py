"""Test that memory does not grow, and that losses stay finite, over thousands of steps and captions.

    python -m robustness.memory

Trains both stages on tiny random backbones by `recipes/stage1.yaml` and `recipes/stage2.yaml`, in bf16, and captions
pictures one by one, each in its own process, since memory that one test frees would hide the next test's use. Prints a
table and writes it to `results/memory.md`, and the samples to `memory.json` beside it. Exits with status 1 if a loss, a
gradient or a weight is not finite, or if resident memory grows by more than [`BOUND`] after the warm-up.
"""

import gc
import json
import math
import multiprocessing
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tiny
import torch
from tiny_models import NUM_QUERY_TOKENS, QFORMER, bert
from tiny_training import joined, write_backbones
from transformers import Trainer, TrainerCallback

from examples.demo.report import machine
from examples.quality.steps import say
from lorgnette import LorgnetteImageToTextPipeline
from lorgnette.trainer import stage1, stage2
from lorgnette.trainer.arguments import Stage1Arguments, Stage2Arguments
from lorgnette.trainer.run import parse, train


BOUND = 2048  # bytes a step: 4 MB over 2,000 steps; Trainer's own log takes about 100
WARM_UP = 0.25  # fraction of the steps in which allocators and caches fill
ROWS = 128
RECIPES = Path(__file__).parents[1] / "recipes"
# recipe -> its arguments class, and the module that builds the model
STAGES = {"stage1": (Stage1Arguments, stage1), "stage2": (Stage2Arguments, stage2)}
BATCHES = {"stage1": 16, "stage2": 4}  # smaller than the recipes': minutes, not hours


def main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="python -m robustness.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--results", type=Path, default=Path("results"), help="where table and samples go")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        parts = write_parts(work)
        outcomes = {f"training, {stage}": run_in_process(trained, stage, args.steps, work, parts) for stage in STAGES}
        outcomes["captions"] = run_in_process(captioned, args.steps, parts)
    text = table(outcomes)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "memory.json").write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    (args.results / "memory.md").write_text(text, encoding="utf-8")
    say(text)
    wrong = failures(outcomes)
    for line in wrong:
        say(f"FAILED: {line}")
    return 1 if wrong else 0


def run_in_process(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def write_parts(work: Path) -> dict[str, str]:
    """Write backbones, a BERT and `ROWS` pictures of noise with different texts."""
    vision, text = write_backbones(work)
    words = tiny.bert_tokenizer()
    for part in (bert(vocab_size=len(words)), words):
        part.save_pretrained(work / "bert")
    pictures = work / "pictures"
    pictures.mkdir()
    with open(pictures / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for row in range(ROWS):
            tiny.picture(row).save(pictures / f"{row}.png")
            metadata.write(json.dumps({"file_name": f"{row}.png", "text": f"picture {row} of a cat"}) + "\n")
    return {"vision": vision, "text": text, "qformer": str(work / "bert"), "dataset": str(pictures)}


class Watch(TrainerCallback):
    """Resident memory after each step."""

    def __init__(self):
        self.bytes: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.bytes.append(resident())


def trained(stage: str, steps: int, work: Path, parts: dict[str, str]) -> dict[str, Any]:
    """Train with the shipped recipe on tiny backbones and fixed data, without saving or evaluation."""
    arguments, module = STAGES[stage]
    watch = Watch()
    options = {
        **{name: parts[name] for name in ("vision", "qformer", "dataset")},
        **({"text": parts["text"]} if stage == "stage2" else {}),
        "qformer_config": "{}" if stage == "stage1" else json.dumps(QFORMER),
        "num_query_tokens": NUM_QUERY_TOKENS,
        "text_column": "text",
        "output_dir": work / f"out-{stage}",
        "max_steps": steps,
        "per_device_train_batch_size": BATCHES[stage],
        "bf16": "true",
        "use_cpu": "true",
        "eval_strategy": "no",
        "eval_fraction": "null",
        "save_strategy": "no",
        "load_best_model_at_end": "false",
        "dataloader_num_workers": 0,
        "disable_tqdm": "true",
    }
    command = ["--config", str(RECIPES / f"{stage}.yaml")]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    model_args, data_args, training_args = parse(stage, arguments, command, None, module.check)
    trainer = train(
        partial(module.build, model_args), data_args, training_args, lambda trainer: trainer.add_callback(watch)
    )
    settings = {name: getattr(training_args, name) for name in ("learning_rate", "weight_decay", "warmup_steps")}
    return measured(watch.bytes) | {"finite": is_finite(trainer), "settings": settings}


def captioned(count: int, parts: dict[str, str]) -> dict[str, Any]:
    """Caption picture files one by one."""
    model, processor = joined((parts["vision"], parts["text"]))
    pipe = LorgnetteImageToTextPipeline(model=model.eval(), processor=processor, device="cpu")
    samples = []
    for number in range(count):
        pipe(f"{parts['dataset']}/{number % ROWS}.png", max_new_tokens=4)
        samples.append(resident())
    return measured(samples)


def is_finite(trainer: Trainer) -> bool:
    """Whether all logged losses and gradients and the trained weights are finite; nan_guard raises for a loss."""
    log = [
        value for entry in trainer.state.log_history for name, value in entry.items() if name in ("loss", "grad_norm")
    ]
    weights = (parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    return bool(log) and all(map(math.isfinite, log)) and all(torch.isfinite(weight).all() for weight in weights)


def resident() -> int:
    return psutil.Process().memory_info().rss


def measured(samples: list[int]) -> dict[str, Any]:
    """The least-squares slope of the samples after the warm-up."""
    gc.collect()
    start = int(len(samples) * WARM_UP)
    slope = float(np.polyfit(np.arange(start, len(samples)), samples[start:], 1)[0])
    every = max(1, len(samples) // 200)
    return {
        "steps": len(samples),
        "bytes_a_step": slope,
        "warm": samples[start],
        "end": samples[-1],
        "samples": samples[::every],
    }


def failures(outcomes: dict[str, dict[str, Any]]) -> list[str]:
    """The failures, a line each."""
    wrong = []
    for name, outcome in outcomes.items():
        if outcome["bytes_a_step"] > BOUND:
            wrong.append(f"{name}: memory grows by {outcome['bytes_a_step']:.0f} bytes a step, more than {BOUND}")
        if not outcome.get("finite", True):
            wrong.append(f"{name}: a loss, a gradient or a weight is not finite")
    return wrong


def table(outcomes: dict[str, dict[str, Any]]) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "peft"))
    lines = [f"{machine()}; {packages}; more than {BOUND:,} bytes a step would fail", ""]
    lines += [
        "| | steps | finite | resident when warm | at the end | slope, bytes a step |",
        "|---|---|---|---|---|---|",
    ]
    for name, outcome in outcomes.items():
        warm, end = (f"{outcome[key] / 2**20:.1f} MiB" for key in ("warm", "end"))
        finite = {True: "yes", False: "**no**", None: ""}[outcome.get("finite")]
        lines.append(f"| {name} | {outcome['steps']:,} | {finite} | {warm} | {end} | {outcome['bytes_a_step']:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
