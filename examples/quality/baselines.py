"""Baselines on the same frozen features: a linear probe, and the nearest neighbour's text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from tqdm import tqdm


STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C
Split = tuple[np.ndarray, Sequence[str]]  # features (N, L, D) and texts (N)


def views(features: np.ndarray) -> dict[str, np.ndarray]:
    """The ViT's features (N, 1 + patches, D), CLS first, as float32 vectors: (N, D), (N, D) and (N, 2 D)."""
    cls, patches = features[:, 0].astype(np.float32), features[:, 1:].mean(axis=1, dtype=np.float32)
    return {"CLS": cls, "patch mean": patches, "both": np.concatenate([cls, patches], axis=1)}


def probe(train: Split, validation: Split, test: Split) -> dict[str, dict[str, Any]]:
    """For each view, logistic regression's accuracy on the test pictures, with the C that is best on validation.

    Features are standardised by the training pictures' mean and deviation. Of equally good Cs it takes the smallest.
    """
    inputs = [views(features) for features, _ in (train, validation, test)]
    labels = [texts for _, texts in (train, validation, test)]
    found = {}
    with tqdm(total=len(inputs[0]) * len(STRENGTHS), desc="logistic regression", unit="fit") as progress:
        for view in inputs[0]:
            best = {"validation": -1.0}
            for strength in STRENGTHS:
                classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
                classifier.fit(inputs[0][view], labels[0])
                validation_accuracy, accuracy = (classifier.score(inputs[i][view], labels[i]) for i in (1, 2))
                if validation_accuracy > best["validation"]:
                    best = {"exact_match": accuracy, "validation": validation_accuracy, "C": strength}
                progress.update()
            found[view] = best
    return found


def nearest_texts(train: Split, features: np.ndarray) -> dict[str, list[str]]:
    """For each view, the text of the training picture with the greatest cosine similarity to each of `features`."""
    queries, keys = views(features), views(train[0])
    return {
        view: [train[1][i] for i in (normalize(queries[view]) @ normalize(keys[view]).T).argmax(axis=1)]
        for view in keys
    }
