"""Read the records of training and evaluation for a model's card; missing records are left out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..trainer.metrics import METRICS, Recall, figures_of
from ..trainer.provenance import TRAINING_DATA
from .json_object import read_json_object


@dataclass(frozen=True)
class Result:
    """One measured figure."""

    metric: str  # the metric's short name: cider, bleu …
    figure: str  # the figure's name: cider, bleu_4 …
    value: float
    scale: str
    dataset: str
    dataset_id: str | None  # on the Hub
    dataset_config: str | None
    dataset_revision: str | None
    split: str
    how: str  # decoding, or the ranking method


def training_of(source: str | Path) -> dict[str, Any]:
    """A run's data, length, settings and losses, by their labels in the card.

    Args:
        source: a run's folder or a checkpoint of it, as Trainer saved it.
    """
    source, facts = Path(source), {}
    data = _training_data(source)
    if data.get("dataset_id"):
        parts = (data["dataset_id"], data["dataset_config"], data["split"])
        facts["data"] = ", ".join(filter(None, parts))
    if data.get("rows"):
        facts["rows"] = f"{data['rows']:,}"
    state = _object_if_exists(source / TRAINER_STATE_NAME)
    if state:
        facts["steps"] = f"{state['global_step']:,}"
        facts["epochs"] = f"{state['epoch']:.4g}"
    if (source / TRAINING_ARGS_NAME).is_file():
        arguments = vars(_opaque(source / TRAINING_ARGS_NAME))
        facts |= _settings(arguments)
        if arguments.get("load_best_model_at_end") and state.get("best_global_step"):
            facts["the weights are those of step"] = f"{state['best_global_step']:,}"
    for name, label in (("loss", "last training loss"), ("eval_loss", "last evaluation loss")):
        logged = [(entry["step"], entry[name]) for entry in state.get("log_history", ()) if name in entry]
        if logged:
            facts[label] = f"{logged[-1][1]:.4f} (step {logged[-1][0]:,})"
    return facts


def datasets_of(source: str | Path) -> list[str]:
    """Hub ids of a run's training data."""
    dataset = _training_data(Path(source)).get("dataset_id")
    return [dataset] if dataset else []


def results_of(metrics: str | Path, source: str | Path) -> list[Result]:
    """The figures in a `metrics.json` that `lorgnette.trainer evaluate` or `retrieval` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not such a report, is about another model than `source`, or is older than the weights.
    """
    path, source = Path(metrics), Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}")
    report = read_json_object(path)
    lacking = {"model", "dataset", "metrics"} - set(report)
    if lacking:
        raise ValueError(f"{path} is not a metrics.json of an evaluation: it has no {', '.join(sorted(lacking))}")
    if Path(report["model"]).resolve() != source.resolve():
        raise ValueError(f"{path} is about the model {report['model']}, not about {source}")
    newest = max((file.stat().st_mtime for file in source.glob("*.safetensors")), default=0.0)
    if path.stat().st_mtime < newest:
        raise ValueError(f"{path} is older than the weights in {source}: measure them again")
    shared = {
        "dataset": report.get("dataset_id") or Path(report["dataset"]).name or "a folder",
        "dataset_id": report.get("dataset_id"),
        **{name: report.get(name) for name in ("dataset_config", "dataset_revision", "split")},
    }
    return [
        Result(
            metric=name if name in METRICS else "recall",
            figure=figure,
            value=value,
            scale=METRICS.get(name, Recall).scale,
            how=_how(report, name),
            **shared,
        )
        for name, result in report["metrics"].items()
        for figure, value in figures_of(result).items()
    ]


def _how(report: dict[str, Any], name: str) -> str:
    if "decoding" not in report:
        return name.replace("_", " ").replace("itc", "ITC").replace("itm", "ITM")
    decoding = dict(report["decoding"])
    return f"{decoding.pop('preset')}: " + ", ".join(f"{field} {value}" for field, value in decoding.items())


def _settings(arguments: dict[str, Any]) -> dict[str, str]:
    """The main training arguments."""
    facts = {}
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "seed"):
        if name in arguments:
            value = arguments[name]
            facts[name.replace("_", " ")] = f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(schedule := arguments.get("lr_scheduler_type"), _Opaque):
        facts["learning rate schedule"] = schedule.values[0]
    facts["mixed precision"] = "bf16" if arguments.get("bf16") else "fp16" if arguments.get("fp16") else "none"
    return facts


class _Opaque:
    """Replaces objects of any class in a pickle: it keeps their values and runs no code of their class."""

    def __init__(self, *values: Any):
        self.values = values


def _opaque(path: Path) -> _Opaque:
    """Trainer's pickled arguments, as plain values."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(_Opaque, name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _training_data(source: Path) -> dict[str, Any]:
    """A run's record of its data, in the parent folder of its checkpoints."""
    of_checkpoint = source.resolve().name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
    return _object_if_exists((source.resolve().parent if of_checkpoint else source) / TRAINING_DATA)


def _object_if_exists(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}
