"""Evaluate a stage-1 model by retrieval: recall of texts for pictures, and of pictures for texts.

Writes `metrics.json` and `metrics.md` into `output_dir`: recall@1, 5 and 10, by ITC alone and re-ranked by ITM.
"""

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from .arguments import RowArguments, Stage1Arguments
from .data import load_rows
from .feature_cache import COLUMN, check_cache, is_cache
from .generation import references_of
from .metrics import Recall, figures_of
from .process import start_process
from .provenance import hub_dataset
from .recipe import parse_recipe
from .stage1 import build
from .unreadable import leave_out_unreadable


logger = logging.getLogger(__name__)

_REPORTED = ("model", "model_revision", "dataset", "split", "image_column", "text_column", "rerank")


@dataclass
class RetrievalArguments(RowArguments):
    """The stage-1 model, and the pictures and texts."""

    model: str | None = field(default=None, metadata={"help": "A saved stage-1 model: a folder or a Hub id."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of `model`."})
    split: str = field(
        default="test",
        metadata={"help": "Slices such as test[:500] work, except in caches and save_to_disk's output."},
    )
    rerank: int = field(
        default=128, metadata={"help": "Candidates of each picture and text that ITM re-ranks; 0 for ITC alone."}
    )
    batch_size: int = field(default=32, metadata={"help": "Pictures, texts or pairs in a batch."})
    output_dir: str = field(default="out/retrieval", metadata={"help": "Folder for the results; overwritten."})

    def __post_init__(self):
        if self.model is None:
            raise ValueError("model not given: name a saved stage-1 model")
        super().__post_init__()
        if self.streaming or self.messages_column or self.query_column:
            raise ValueError("retrieval does not support streaming, messages_column and query_column: leave them out")
        for name, least in (("batch_size", 1), ("rerank", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be at least {least}")


def main(argv: list[str], prog: str = "python -m lorgnette.trainer retrieval") -> None:
    """Evaluate from the command line or a YAML file."""
    (args,) = parse_recipe((RetrievalArguments,), argv, prog=prog, description=__doc__)
    measure(args)


def measure(args: RetrievalArguments) -> dict[str, Any]:
    """Score all pictures against all texts, and write the recall.

    A text of several pictures counts once, and is right for each of them. The same holds for texts with equal token
    ids, such as "A cat" and "a cat".

    Returns:
        the contents of `metrics.json`.

    Raises:
        ValueError: the data do not match the arguments, the model lacks ITC or, to re-rank, ITM, a feature cache is
            another model's, a row has a list of pictures, there are several processes. OSError, TypeError, ValueError:
            a picture that cannot be read, unless `skip_unreadable`.
    """
    started, process = time.perf_counter(), start_process()
    if process.num_processes > 1:
        raise ValueError(f"retrieval ranks all pictures against all texts in one process, not {process.num_processes}")
    rows = load_rows(args, args.split)
    if args.messages_column:  # found when the rows were loaded
        raise ValueError(
            f"{args.dataset} has chats in {args.messages_column!r}: name the column with texts in text_column"
        )
    model, processor = build(Stage1Arguments(model=args.model, model_revision=args.model_revision))
    model.to(process.device).eval()
    if args.rerank and not model.config.itm_weight:
        raise ValueError(f"{args.model} was trained with itm_weight 0, and matching re-ranks: set rerank to 0")
    if is_cache(args.dataset):
        check_cache(args.dataset, model, processor.image_processor)
    rows_in_all = len(rows)
    if args.skip_unreadable:
        splits = {args.split: rows}
        load = processor.load_image
        (rows,) = leave_out_unreadable(splits, args.image_column, load, args.output_dir, args.text_name).values()

    references = [references_of(row, args.text_name) for row in rows.select_columns(["index", args.text_name])]
    different = list(dict.fromkeys(text for texts in references for text in texts))
    ids = dict(zip(different, map(tuple, processor.encode_for_qformer(different)["input_ids"]), strict=True))
    distinct = {ids[text]: text for text in different}  # one text for each sequence of ids
    column = {key: number for number, key in enumerate(distinct)}
    right = [sorted({column[ids[text]] for text in texts}) for texts in references]
    images = _features(rows) if COLUMN in rows.column_names else _Pictures(rows, args.image_column)
    figures, keywords = {}, {"processor": processor, "batch_size": args.batch_size}
    for name, rerank in {"itc": 0, "itc_and_itm": args.rerank}.items():
        if name == "itc" or rerank:
            scores = model.retrieve(images, list(distinct.values()), rerank=rerank, **keywords)
            figures[name] = figures_of(Recall().compute(predictions=scores, references=right))
    report = {
        "metrics": figures,
        "pictures": len(rows),
        "texts": len(distinct),
        "skipped": rows_in_all - len(rows),
        **{name: getattr(args, name) for name in _REPORTED},
        **hub_dataset(args),
        "device": str(process.device),
        "seconds": round(time.perf_counter() - started, 2),
    }
    _write(report, Path(args.output_dir))
    return report


class _Pictures:
    """The pictures of a data set's rows, read lazily."""

    def __init__(self, rows: Dataset, column: str):
        self.rows, self.column = rows, column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int | torch.Tensor) -> Any:
        row = self.rows[int(position)]
        if isinstance(row[self.column], list):
            raise _several_pictures(row["index"], len(row[self.column]))
        return row[self.column]


def _features(rows: Dataset) -> torch.Tensor:
    features = []
    for row in rows:
        if row[COLUMN].ndim != 2:
            raise _several_pictures(row["index"], len(row[COLUMN]))
        features.append(row[COLUMN])
    return torch.stack(features)


def _several_pictures(index: int, count: int) -> ValueError:
    return ValueError(f"row {index} has a list of pictures ({count}); retrieval compares one with its texts")


def _write(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    ways = list(report["metrics"])
    lines = [f"# {report['model']} on {report['dataset']}, {report['split']}", ""]
    lines += [f"| figure | {' | '.join(ways)} |", f"|---|{'---|' * len(ways)}"]
    for figure in report["metrics"][ways[0]]:
        values = " | ".join(f"{report['metrics'][way][figure]:.4f}" for way in ways)
        lines.append(f"| {figure} | {values} |")
        logger.info("%s", lines[-1])
    lines += ["", f"{report['pictures']} pictures, {report['texts']} different texts; {report['skipped']} skipped."]
    (folder / "metrics.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
