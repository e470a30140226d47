"""The figures of a row: the model's answers on held-out data, shuffled pictures, and baselines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorgnette.trainer.feature_cache import feature_opener, load_cache
from lorgnette.trainer.metrics import figures_of, text_metrics

from .baselines import Split, nearest_texts, probe
from .rows import Task
from .scene_captions import Scene
from .scene_figures import probe_objects, scenes_of, score_scenes


SHUFFLES = 10


def measure(task: Task, features: Path, evaluations: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """For each held-out split the figures of the `model`, of its answers to `shuffled` pictures, of the `nearest`
    neighbour's text for each view of the features, and of a `probe`: for each view if the texts are classes, one of
    objects for scenes.

    Args:
        features: a feature cache, which has the splits `train` and `validation` as well.
        evaluations: split -> what `lorgnette.trainer evaluate` wrote.
    """
    train = read(features, "train")
    tests = {split: read(features, split) for split in evaluations}
    scenes = {split: read_scenes(features, split) for split in ("train", "validation", *tests)} if task.scenes else {}
    found = {}
    for split, folder in evaluations.items():
        inputs, texts = tests[split]
        answers = read_answers(folder)
        truths = scenes.get(split)
        found[split] = {
            "pictures": len(answers),
            "model": score(task.metrics, answers, texts, truths),
            "shuffled": score_shuffled(task.metrics, answers, texts, truths),
            "nearest": {
                view: score(task.metrics, nearest, texts, truths)
                for view, nearest in nearest_texts(train, inputs).items()
            },
        }
        if task.probe:
            found[split]["probe"] = probe(train, read(features, "validation"), tests[split])
    if task.scenes:
        validation = (read(features, "validation")[0], scenes["validation"])
        asked = {split: (inputs, scenes[split]) for split, (inputs, _) in tests.items()}
        for split, figures in probe_objects((train[0], scenes["train"]), validation, asked).items():
            found[split]["probe"] = figures
    return found


def model_figures(task: Task, features: Path, evaluations: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """The model's figures alone, for each held-out split."""
    return {
        split: score(
            task.metrics,
            read_answers(folder),
            load_cache(features, split)["text"][:],
            read_scenes(features, split) if task.scenes else None,
        )
        for split, folder in evaluations.items()
    }


def read_answers(folder: Path) -> list[str]:
    """What `lorgnette.trainer evaluate` has written, in the split's order."""
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def score(
    metrics: Sequence[str], answers: Sequence[str], truths: Sequence[str], scenes: Sequence[Scene] | None = None
) -> dict[str, float]:
    """The figures of lorgnette's metrics by these names, as fractions of 1, except CIDEr, which goes up to 10.

    With the truth about `scenes` those of `score_scenes` as well.
    """
    found = {
        name: value
        for metric in text_metrics(metrics).values()
        for name, value in figures_of(metric.compute(predictions=list(answers), references=list(truths))).items()
    }
    return found if scenes is None else found | score_scenes(answers, scenes)


def score_shuffled(
    metrics: Sequence[str],
    answers: Sequence[str],
    truths: Sequence[str],
    scenes: Sequence[Scene] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """The mean figures of ten shuffles of the pictures.

    An answer depends only on the picture (same prompt, no sampling), so shuffling pictures equals shuffling answers.
    """
    rng = np.random.default_rng(seed)
    shuffled = [score(metrics, rng.permutation(answers).tolist(), truths, scenes) for _ in range(SHUFFLES)]
    return {name: float(np.mean([figures[name] for figures in shuffled])) for name in shuffled[0]}


def read(folder: Path, split: str) -> Split:
    """Features (N, L, D) and texts (N) of a split of a feature cache, without synthetic pairs (not for baselines)."""
    rows, open_features = load_cache(folder, split), feature_opener(folder)
    if "synthetic" in rows.column_names:
        rows = rows.select(np.flatnonzero(~np.array(rows["synthetic"][:])), keep_in_memory=True)
    features = [open_features(row, i).numpy() for i, row in enumerate(rows["vision_features"])]
    return np.stack(features), rows["text"][:]


def read_scenes(folder: Path, split: str) -> list[Scene]:
    """The truth about each picture of a split of a feature cache."""
    rows = load_cache(folder, split)
    return scenes_of({name: rows[name][:] for name in ("objects", "relations")})
