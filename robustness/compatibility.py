"""Test every causal LM and every ViT of the installed transformers with a tiny random model.

    python -m robustness.compatibility
    python -m robustness.compatibility --only llama,mamba,dinov2

Each model is joined, trained for two steps, used for generation, packed, saved in all formats, and each save is loaded
again. Writes which models work, which `from_backbones` refuses and why, and which fail, to `docs/compatibility.md`.
Exits with status 1 if a model fails: `from_backbones` accepts it, and a later step raises or gives other numbers.
"""

import multiprocessing
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path

import peft  # noqa: F401 (imported once, before processes fork)
import torch
from tqdm import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from .compatibility_steps import LMS, VITS, Outcome, try_language_model, try_vision_model


SECONDS = 60  # limit for one model


@dataclass
class Running:
    """A model that is tested in its own process, so that a crash does not stop the others."""

    kind: str
    model_type: str
    process: multiprocessing.Process
    receiver: Connection
    started_at: float = field(default_factory=time.monotonic)


def main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="python -m robustness.compatibility", description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="model types, with commas between them; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time, each on one thread")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one model, before it is given up")
    parser.add_argument("--output", type=Path, default=Path("docs/compatibility.md"), help="the table")
    args = parser.parse_args(argv)
    wanted = None if args.only is None else set(args.only.split(","))
    cases = [case for case in [*language_models(), *vision_models()] if wanted is None or case[1] in wanted]
    if wanted is not None and (unknown := sorted(wanted - {model_type for _, model_type, _ in cases})):
        parser.error(f"transformers {version('transformers')} has no causal LM and no ViT of the type {unknown[0]!r}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started_at = time.monotonic()
    outcomes = sorted(
        try_models(cases, args.jobs, args.seconds), key=lambda outcome: (outcome.kind, outcome.model_type)
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(table(outcomes), encoding="utf-8")
    failed = [outcome for outcome in outcomes if outcome.verdict == "fails"]
    sys.stdout.write(f"{args.output}: {counts(outcomes)}, in {time.monotonic() - started_at:.0f} s\n")
    return 1 if failed else 0


def language_models() -> Iterator[tuple[str, str, type[PreTrainedConfig]]]:
    """All model types of `AutoModelForCausalLM`."""
    for model_type, config_class in sorted(CONFIG_MAPPING.items()):
        if config_class in MODEL_FOR_CAUSAL_LM_MAPPING and config_class.model_type == model_type:
            yield LMS, model_type, config_class


def vision_models() -> Iterator[tuple[str, str, type[PreTrainedConfig]]]:
    """All model types of `AutoModel` that read `pixel_values`; some are not ViTs."""
    for model_type, config_class in sorted(CONFIG_MAPPING.items()):
        try:
            model_class = MODEL_MAPPING[config_class]
        except (KeyError, ValueError):  # the list names classes that do not exist
            continue
        if not isinstance(model_class, tuple) and config_class.model_type == model_type and _reads_pixels(model_class):
            yield VITS, model_type, config_class


def _reads_pixels(model_class: type[PreTrainedModel]) -> bool:
    # not getattr: a class whose requirements are not installed raises on every attribute
    named = (vars(base)["main_input_name"] for base in model_class.__mro__ if "main_input_name" in vars(base))
    return next(named, None) == "pixel_values"


def try_models(cases: list[tuple[str, str, type[PreTrainedConfig]]], jobs: int, seconds: float) -> Iterator[Outcome]:
    """Yield the result of each model, in the order of completion."""
    waiting, running = list(reversed(cases)), {}
    with tqdm(total=len(cases), unit="model") as progress:
        while waiting or running:
            while waiting and len(running) < jobs:
                one = _begin(*waiting.pop())
                running[one.process.sentinel] = one
            wait([*running, *(one.receiver for one in running.values())], timeout=0.5)
            for sentinel, one in list(running.items()):
                outcome = _ended(one, seconds)
                if outcome is not None:
                    del running[sentinel]
                    progress.set_postfix_str(one.model_type, refresh=False)
                    progress.update()
                    if outcome.verdict == "fails":
                        progress.write(f"FAILED: {outcome.model_type}: {outcome.reason}")
                    yield outcome


def _begin(kind: str, model_type: str, config_class: type[PreTrainedConfig]) -> Running:
    context = multiprocessing.get_context("fork")  # transformers is imported once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try, args=(sender, kind, model_type, config_class))
    process.start()
    sender.close()
    return Running(kind, model_type, process, receiver)


def _try(sender: Connection, kind: str, model_type: str, config_class: type[PreTrainedConfig]) -> None:
    torch.set_num_threads(1)
    attempt = try_language_model if kind == LMS else try_vision_model
    sender.send(attempt(model_type, config_class))


def _ended(one: Running, seconds: float) -> Outcome | None:
    """The process's result, or that it was killed or died; None while it runs."""
    outcome = None
    if one.receiver.poll():
        try:
            outcome = one.receiver.recv()
        except EOFError:
            one.process.join()
            reason = f"the process ended with status {one.process.exitcode}"
            outcome = Outcome(one.kind, one.model_type, "fails", reason)
    elif time.monotonic() - one.started_at > seconds:
        one.process.kill()
        outcome = Outcome(one.kind, one.model_type, "fails", f"not done after {seconds:.0f} s")
    if outcome is not None:
        one.process.join()
        one.receiver.close()
    return outcome


def counts(outcomes: list[Outcome]) -> str:
    verdicts = [outcome.verdict for outcome in outcomes]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("works", "refused", "fails", "not tried"))


def table(outcomes: list[Outcome]) -> str:
    """The Markdown table: a line for each model type."""
    lines = [
        "# Compatible language models and ViTs",
        "",
        f"Written by `python -m robustness.compatibility`, with transformers {version('transformers')}, peft "
        f"{version('peft')} and torch {version('torch')}. Each is built tiny and random, joined, trained for two steps "
        "with LoRA, used for generation, saved merged, full and thin, and each save loaded to the same logits. "
        "`from_backbones` raises the refusals.",
    ]
    for kind in (LMS, VITS):
        ours = [outcome for outcome in outcomes if outcome.kind == kind]
        if not ours:
            continue
        lines += ["", f"## {kind}", "", f"{counts(ours)}.", ""]
        lines += ["| model type | | packed | why |", "|---|---|---|---|"] if kind == LMS else []
        lines += ["| model type | | why |", "|---|---|---|"] if kind == VITS else []
        for outcome in ours:
            verdict = outcome.verdict if outcome.verdict != "fails" else "**fails**"
            packed = f" {outcome.packed} |" if kind == LMS else ""
            why = outcome.reason.replace("|", "\\|")
            lines.append(f"| `{outcome.model_type}` | {verdict} |{packed} {why} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
