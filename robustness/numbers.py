"""Measure the deviation of bf16 from fp32 in a model's loss and logits.

    python -m robustness.numbers
    python -m robustness.numbers --model out/demo/model --dataset out/demo/pictures --split test

Without `--model` it measures a tiny random model on noise. Prints a table and writes it to `results/numbers.md`, and
the figures to `numbers.json` beside it. Exits with status 1 if a deviation exceeds [`TOLERANCE`].
"""

import copy
import json
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tiny_training import joined, pairs, write_backbones

from examples.quality.steps import say
from lorgnette import LorgnetteCollator, LorgnetteForConditionalGeneration, LorgnetteProcessor
from lorgnette.assembly.backbones import cast_parameters
from lorgnette.trainer.arguments import DataArguments
from lorgnette.trainer.data import load_pairs


@dataclass(frozen=True)
class Deviation:
    """Deviation from fp32 at the labelled positions.

    Args:
        loss: relative difference.
        logits: root mean square difference, relative to the standard deviation of fp32's logits at a position.
        choices: fraction of positions with another argmax.
    """

    loss: float
    logits: float
    choices: float

    def __le__(self, other: "Deviation") -> bool:
        return all(ours <= theirs for ours, theirs in zip(asdict(self).values(), asdict(other).values(), strict=True))


# bf16 has 8 significant bits: a product is off by up to 0.4 %, and some hundred follow each other.
TOLERANCE = Deviation(loss=0.02, logits=0.05, choices=0.05)
WAYS = {"mixed": "fp32 weights, bf16 products (`bf16: true`)", "all": "bf16 weights as well (`dtype='bfloat16'`)"}


def main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="python -m robustness.numbers", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a saved model of stage 2: a folder")
    parser.add_argument("--dataset", help="pictures and texts for it, in any form that training takes")
    parser.add_argument("--split", default="test")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--results", type=Path, default=Path("results"), help="where table and figures go")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.dataset is None):
        parser.error("--model and --dataset belong together")
    if args.model is None:
        with tempfile.TemporaryDirectory() as scratch:
            model, processor = joined(write_backbones(Path(scratch)), dropout=0.0)
        rows: Iterable[dict[str, Any]] = pairs()
    else:
        model = LorgnetteForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
        processor = LorgnetteProcessor.from_pretrained(args.model)
        data = DataArguments(dataset=args.dataset, train_split=args.split, text_column=args.text_column)
        rows, _ = load_pairs(data, evaluate=False, seed=0)
    rows = list(islice(rows, args.rows))
    collator = LorgnetteCollator(processor, text_column=args.text_column)
    batches = [collator(rows[start : start + args.batch_size]) for start in range(0, len(rows), args.batch_size)]
    loss, found = compare(model.eval(), batches)
    text = table(args.model, len(rows), loss, found)
    args.results.mkdir(parents=True, exist_ok=True)
    figures = {"rows": len(rows), "loss": loss, "apart": {way: asdict(apart) for way, apart in found.items()}}
    (args.results / "numbers.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (args.results / "numbers.md").write_text(text, encoding="utf-8")
    say(text)
    wrong = [way for way, apart in found.items() if not apart <= TOLERANCE]
    if wrong:
        say(f"FAILED: {', '.join(wrong)}: further apart than {TOLERANCE}")
    return 1 if wrong else 0


def compare(
    model: LorgnetteForConditionalGeneration, batches: Iterable[Mapping[str, torch.Tensor]]
) -> tuple[float, dict[str, Deviation]]:
    """The loss in fp32, and the deviations of both kinds of bf16.

    Args:
        model: in float32 and eval mode.
        batches: with `labels`, as the collator makes them.
    """
    whole = copy.deepcopy(model)
    cast_parameters(whole, torch.bfloat16)
    ways = {"fp32": (model, nullcontext()), "all": (whole, nullcontext())}
    ways["mixed"] = (model, torch.autocast(model.device.type, torch.bfloat16))
    seen: dict[str, list[torch.Tensor]] = {way: [] for way in ways}
    wanted = []
    for batch in batches:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        learned = batch["labels"][:, 1:] != -100
        wanted.append(batch["labels"][:, 1:][learned])  # (K,)
        for way, (of, context) in ways.items():
            with torch.no_grad(), context:
                logits = of(**{name: value for name, value in batch.items() if name != "labels"}).logits
            seen[way].append(logits[:, :-1][learned].double())  # (K, vocabulary)
    targets, logits = torch.cat(wanted), {way: torch.cat(parts) for way, parts in seen.items()}
    losses = {way: torch.nn.functional.cross_entropy(value, targets).item() for way, value in logits.items()}
    reference = logits["fp32"]
    return losses["fp32"], {
        way: Deviation(
            loss=abs(losses[way] - losses["fp32"]) / losses["fp32"],
            logits=((logits[way] - reference).square().mean(-1).sqrt() / reference.std(-1)).mean().item(),
            choices=(logits[way].argmax(-1) != reference.argmax(-1)).double().mean().item(),
        )
        for way in WAYS
    }


def table(model: str | None, rows: int, loss: float, found: dict[str, Deviation]) -> str:
    what = "A tiny random model on noise" if model is None else f"`{model}`"
    lines = [f"{what}, {rows} rows; loss in fp32: {loss:.4f}; torch {version('torch')}", ""]
    lines += ["| against fp32 | loss | logits | another likeliest token |", "|---|---|---|---|"]
    for way, apart in (*found.items(), ("tolerance", TOLERANCE)):
        lines.append(f"| {WAYS.get(way, way)} | {apart.loss:.2%} | {apart.logits:.2%} | {apart.choices:.2%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
