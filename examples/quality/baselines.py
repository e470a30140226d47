"""What plain methods make of the very same frozen features: a linear classifier, and the nearest neighbour's text."""

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize


STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C
Split = tuple[np.ndarray, Sequence[str]]  # features (N, L, D), texts (N)


def views(features: np.ndarray) -> dict[str, np.ndarray]:
    """The ViT's features (N, 1 + patches, D), CLS first, as float32 vectors: (N, D), (N, D) and (N, 2 D)."""
    cls, patches = features[:, 0].astype(np.float32), features[:, 1:].mean(axis=1, dtype=np.float32)
    return {"CLS": cls, "patch mean": patches, "CLS and patch mean": np.concatenate([cls, patches], axis=1)}


def probe(train: Split, validation: Split, test: Split) -> dict[str, dict[str, float]]:
    """For each view, logistic regression's accuracy on the test pictures, and the C that did best on the validation ones.

    Features are standardised by the training pictures' mean and deviation. Of equal Cs the smallest is taken.
    """
    parts, texts = [views(part[0]) for part in (train, validation, test)], [part[1] for part in (train, validation, test)]
    found = {}
    for view in parts[0]:
        fitted = []
        for strength in STRENGTHS:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
            fitted.append(model.fit(parts[0][view], texts[0]))
        on_validation = [model.score(parts[1][view], texts[1]) for model in fitted]
        best = int(np.argmax(on_validation))
        accuracy = fitted[best].score(parts[2][view], texts[2])
        found[view] = {"accuracy": accuracy, "validation_accuracy": on_validation[best], "C": STRENGTHS[best]}
    return found


def nearest_texts(train: Split, features: np.ndarray) -> Mapping[str, list[str]]:
    """For each view, the text of the training picture with the greatest cosine similarity to each of `features`."""
    queries, keys = views(features), views(train[0])
    return {
        view: [train[1][i] for i in (normalize(queries[view]) @ normalize(keys[view]).T).argmax(axis=1)]
        for view in keys
    }
