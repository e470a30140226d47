"""Evaluate a saved model: generate texts for a data set's pictures and compare them with the references.

Writes `metrics.json`, `metrics.md` and `predictions.jsonl` into `output_dir`.
"""

import json
import logging
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from tqdm.auto import tqdm

from .arguments import RowArguments, Stage2Arguments
from .collator import LorgnetteCollator
from .data import load_rows_of_model
from .decoding import DECODING, decoding_of
from .feature_cache import check_cache, is_cache
from .formats import readable_stream
from .generation import generate_texts, references_of
from .metrics import METRICS, figures_of, text_metrics
from .precision import autocast, launched_mixed_precision
from .process import start_process
from .provenance import hub_dataset
from .recipe import parse_recipe
from .stage2 import model_and_processor
from .texts import pairs_of_rows
from .unreadable import leave_out_unreadable


logger = logging.getLogger(__name__)

_PACKAGES = ("lorgnette", "torch", "transformers", "peft", "accelerate", "datasets", "sacrebleu", "rouge_score")
_REPORTED = ("model", "model_revision", "num_query_tokens", "dataset", "split",
             "image_column", "text_column", "query_column", "messages_column", "batch_size")  # fmt: skip


@dataclass
class EvaluateArguments(RowArguments):
    """The model, the rows and the metrics."""

    model: str | None = field(default=None, metadata={"help": "A saved lorgnette model: a folder or a Hub id."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of `model`."})
    num_query_tokens: int | None = field(
        default=None,
        metadata={"help": "Fewer visual tokens a picture, where the model has learned elastic_queries."},
    )
    split: str | None = field(
        default=None,
        metadata={
            "help": "By default test or, if there is none, the rows that the model's training held out. Slices such as "
            "test[:500] work, except in streams, caches and what save_to_disk wrote."
        },
    )
    metrics: list[str] = field(
        default_factory=lambda: ["cider", "bleu"],
        metadata={"help": "One or more of cider, bleu, rouge_l, exact_match, vqa_accuracy."},
    )
    decoding: str = field(default="caption", metadata={"help": f"Decoding preset: {', '.join(DECODING)}."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Replaces the preset's limit."})
    batch_size: int = field(default=16, metadata={"help": "Rows in a batch of each process."})
    output_dir: str = field(default="out/evaluate", metadata={"help": "Folder for the results; overwritten."})

    def __post_init__(self):
        if self.model is None:
            raise ValueError("model not given: name a saved lorgnette model")
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it has to be at least 1")
        text_metrics(self.metrics)
        decoding_of(self.decoding, self.max_new_tokens)


def main(argv: list[str], prog: str = "python -m lorgnette.trainer evaluate") -> None:
    """Evaluate from the command line or a YAML file."""
    (args,) = parse_recipe((EvaluateArguments,), argv, prog=prog, description=__doc__)
    evaluate(args)


def evaluate(args: EvaluateArguments) -> dict[str, Any] | None:
    """Generate texts, compute metrics, write results; with several processes each generates for its share.

    Returns:
        the contents of `metrics.json`; None in processes other than the first.

    Raises:
        ValueError: the data do not match the arguments, a row's references are missing or unusable for a metric, no
            row can be read, a feature cache of another model, an unknown mixed precision. OSError,
            TypeError, ValueError: a picture that cannot be read, with its row, unless `skip_unreadable`.
    """
    started = time.perf_counter()
    process, precision = start_process(), launched_mixed_precision() or "no"
    casting = autocast(precision, process.device)
    metrics, decoding = text_metrics(args.metrics), decoding_of(args.decoding, args.max_new_tokens)
    with process.main_process_first():
        dataset, split = load_rows_of_model(args, args.split, args.model)
    column = args.text_name
    if not args.skip_unreadable:
        _check_references(dataset, column, metrics)
    source = Stage2Arguments(model=args.model, model_revision=args.model_revision)
    model, processor = model_and_processor(source, num_query_tokens=args.num_query_tokens)
    model.to(process.device)
    context = model.max_text_length or processor.tokenizer.model_max_length
    collator = LorgnetteCollator(
        processor,
        image_column=args.image_column,
        query_column=args.query_column,
        max_length=context - decoding["max_new_tokens"],
    )

    if is_cache(args.dataset):
        check_cache(args.dataset, model, processor.image_processor)
    rows_in_all = len(dataset) if isinstance(dataset, Dataset) else None
    if args.skip_unreadable:
        splits = {split: dataset}
        load = processor.load_image
        dataset = leave_out_unreadable(splits, args.image_column, load, args.output_dir, column)[split]
        _check_references(dataset, column, metrics)

    share = split_dataset_by_node(dataset, rank=process.process_index, world_size=process.num_processes)
    read = tqdm(share, desc="generating", disable=not process.is_main_process)
    rows = pairs_of_rows(read, column, args.query_column)
    generating = time.perf_counter()
    with casting, readable_stream(args):
        results = [
            {"index": row["index"], "prediction": text, "references": references_of(row, column)}
            for row, text in generate_texts(model, collator, rows, decoding=decoding, batch_size=args.batch_size)
        ]
    results = sorted(gather_object(results), key=itemgetter("index"))
    generated = time.perf_counter()
    report = None
    if process.is_main_process:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(result, ensure_ascii=False) + "\n" for result in results]
        (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
        predictions, references = ([result[name] for result in results] for name in ("prediction", "references"))
        report = {
            "metrics": {
                name: metric.compute(predictions=predictions, references=references) for name, metric in metrics.items()
            },
            "rows": len(results),
            "skipped": 0 if rows_in_all is None else rows_in_all - len(results),
            **{name: getattr(args, name) for name in _REPORTED},
            "split": split,
            **hub_dataset(args),
            "decoding": {"preset": args.decoding, **decoding},
            "device": str(process.device),
            "processes": process.num_processes,
            "dtype": str(model.dtype).removeprefix("torch."),
            "mixed_precision": precision,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
            "seconds": {
                "generating": round(generated - generating, 2),
                "in all": round(time.perf_counter() - started, 2),
            },
        }
        _write(report, folder)
    return report


def _check_references(rows: Any, column: str, metrics: Mapping[str, Any]) -> None:
    """Raise what a metric would raise after hours of generation; a stream is checked while it is read."""
    if isinstance(rows, Dataset):
        references = [references_of(row, column) for row in rows.select_columns(["index", column])]
        for metric in metrics.values():
            metric.check_references(references)


def _write(report: dict[str, Any], folder: Path) -> None:
    (folder / "metrics.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "metrics.md").write_text(_as_markdown(report), encoding="utf-8")
    for result in report["metrics"].values():
        logger.info("%s", ", ".join(f"{name} {value:.4f}" for name, value in figures_of(result).items()))
    logger.info("%s holds metrics.json, metrics.md and predictions.jsonl", folder)


def _as_markdown(report: dict[str, Any]) -> str:
    decoding = dict(report["decoding"])
    preset = decoding.pop("preset")
    lines = [f"# {report['model']} on {report['dataset']}, {report['split']}", ""]
    lines += ["| metric | figure | scale | tokenization |", "|---|---|---|---|"]
    for name, result in report["metrics"].items():
        for figure, value in figures_of(result).items():
            lines.append(f"| {figure} | {value:.4f} | {METRICS[name].scale} | {result['tokenization']} |")
    settings = ", ".join(f"{name} {value}" for name, value in decoding.items())
    lines += ["", f"{report['rows']} pictures, {report['skipped']} skipped as unreadable."]
    lines += [f"Decoding `{preset}`: {settings}.", f"{report['seconds']['in all']} s on {report['device']}."]
    return "\n".join(lines) + "\n"
