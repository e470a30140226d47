"""Figures of answers to scenes, and what a linear probe finds of their objects."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from .scene_captions import CONCEPTS, Scene, parse


STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)


def scenes_of(rows: Mapping[str, Sequence[Any]]) -> list[Scene]:
    """The truth about each picture, from the columns `objects` and `relations`."""
    return [
        Scene({each["name"]: each["count"] for each in objects}, frozenset(map(tuple, relations)))
        for objects, relations in zip(rows["objects"], rows["relations"], strict=True)
    ]


def score_scenes(answers: Sequence[str], truths: Sequence[Scene]) -> dict[str, float]:
    """Figures of all pictures together, from 0 to 1; 0 as well where there is nothing to count.

    A caption has one relation of every two objects: two or three objects, one or three pairs.

    - `objects_f1`: F1 of the names, without counts; see `f1`.
    - `counts`: of the objects that the answer names, the fraction whose count it gives.
    - `pairs_named`: the fraction of pairs of objects of which the answer names both.
    - `relations`: of these pairs, the fraction whose relation it states, in either order ("a left of b" and "b right of
      a"), without stating another one as well.
    - `axes`: of these pairs, the fraction of which it states one relation, and that along the right axis.
    - `orders`: of those, the fraction in the right order; a guess has half.
    """
    said = [parse(answer) for answer in answers]
    named = [
        (truth.objects[name], found.objects[name])
        for found, truth in zip(said, truths, strict=True)
        for name in truth.objects.keys() & found.objects.keys()
    ]
    pairs = [
        (relation, found)
        for found, truth in zip(said, truths, strict=True)
        for relation in truth.relations
        if {relation[0], relation[2]} <= found.objects.keys()
    ]
    stated = [{each for each in found.relations if {*of} == {*each}} for of, found in pairs]
    right = [found == {of} for (of, _), found in zip(pairs, stated, strict=True)]
    along = [[kind for _, kind, _ in found] == [of[1]] for (of, _), found in zip(pairs, stated, strict=True)]
    return {
        "objects_f1": f1([found.objects for found in said], [truth.objects for truth in truths]),
        "counts": _share(wanted == count for wanted, count in named),
        "pairs_named": len(pairs) / max(1, sum(len(truth.relations) for truth in truths)),
        "relations": _share(right),
        "axes": _share(along),
        "orders": _share(order for order, axis in zip(right, along, strict=True) if axis),
    }


def f1(found: Sequence[Iterable[str]], wanted: Sequence[Iterable[str]]) -> float:
    """Micro-averaged F1 of sets of names: 2 x right / (named + wanted), each summed over the pictures."""
    right = sum(len({*names} & {*truth}) for names, truth in zip(found, wanted, strict=True))
    return 2 * right / max(1, sum(len({*names}) for names in (*found, *wanted)))


def probe_objects(
    train: tuple[np.ndarray, Sequence[Scene]],
    validation: tuple[np.ndarray, Sequence[Scene]],
    tests: Mapping[str, tuple[np.ndarray, Sequence[Scene]]],
) -> dict[str, dict[str, float]]:
    """For each test split, `objects_f1` of a linear probe on the ViT's features (N, 1 + patches, D).

    One binary logistic regression for each concept, on (CLS, mean of the patches, maximum of the patches), (N, 3 D),
    standardised by the training pictures. A concept is named if its probability is above a threshold. C and the
    threshold, the same for all concepts, are those with the best F1 on validation.
    """
    inputs, wanted = pooled(train[0]), np.array([[name in truth.objects for name in CONCEPTS] for truth in train[1]])
    constant = wanted.all(axis=0) | ~wanted.any(axis=0)  # in a small data set: no classifier, never named
    best: dict[str, Any] = {"validation": -1.0}
    for strength in tqdm(STRENGTHS, desc="logistic regression", unit="fit"):
        each = MultiOutputClassifier(LogisticRegression(C=strength, max_iter=2000))
        classifier = make_pipeline(StandardScaler(), each).fit(inputs, wanted[:, ~constant])
        found = _probabilities(classifier, validation[0], constant)
        for threshold in THRESHOLDS:
            value = f1(_names(found, threshold), [truth.objects for truth in validation[1]])
            if value > best["validation"]:
                best = {"validation": value, "C": strength, "threshold": threshold, "classifier": classifier}
    classifier = best.pop("classifier")
    return {
        split: {
            "objects_f1": f1(
                _names(_probabilities(classifier, features, constant), best["threshold"]),
                [truth.objects for truth in truths],
            ),
            **best,
        }
        for split, (features, truths) in tests.items()
    }


def pooled(features: np.ndarray) -> np.ndarray:
    """(N, 1 + patches, D), CLS first -> (N, 3 D) float32: CLS, mean and maximum of the patches."""
    patches = features[:, 1:]
    parts = [features[:, 0], patches.mean(axis=1, dtype=np.float32), patches.max(axis=1)]
    return np.concatenate([part.astype(np.float32) for part in parts], axis=1)


def _probabilities(classifier: Any, features: np.ndarray, constant: np.ndarray) -> np.ndarray:
    """(N, concepts); 0 for a concept without a classifier."""
    found = np.zeros((len(features), len(constant)))
    found[:, ~constant] = np.stack([each[:, 1] for each in classifier.predict_proba(pooled(features))], axis=1)
    return found


def _names(probabilities: np.ndarray, threshold: float) -> list[list[str]]:
    return [[CONCEPTS[number] for number in np.flatnonzero(row > threshold)] for row in probabilities]


def _share(right: Iterable[bool]) -> float:
    right = list(right)
    return sum(right) / max(1, len(right))
