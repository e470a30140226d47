"""Recall@k of retrieval, from images to texts and back, from one matrix of scores."""

from collections.abc import Sequence

import numpy as np


def recall_at_k(
    scores: np.ndarray, right_texts: Sequence[Sequence[int]], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Shares of images with a right text, and of texts with a right image, among the k that score highest.

    A wrong candidate with the same score as the best right one is ranked before it, so that constant scores give a
    recall of 0. A text without an image counts as a wrong candidate, and is not a query.

    Args:
        scores: `(I, T)`, higher is better.
        right_texts: for each image the columns of its texts, one or more.
        ks: numbers of candidates; with k or fewer candidates, recall is 1.

    Returns:
        `image_to_text_recall@k` and `text_to_image_recall@k` for each k, from 0 to 1.

    Raises:
        ValueError: not a matrix, NaN in it, not one list of right texts per image, an empty list, a column that does
            not exist, a k below 1; with the numbers.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"the scores have the shape {scores.shape}; (images, texts) is needed, at least one each")
    if np.isnan(scores).any():
        image, text = np.argwhere(np.isnan(scores))[0]
        raise ValueError(f"{np.isnan(scores).sum()} scores are NaN, first that of image {image} and text {text}")
    if len(right_texts) != len(scores):
        raise ValueError(f"{len(right_texts)} lists of right texts for {len(scores)} images")
    if wrong := [k for k in ks if k < 1]:
        raise ValueError(f"recall@{wrong[0]}: k has to be at least 1")
    is_right = np.zeros(scores.shape, dtype=bool)
    for image, texts in enumerate(right_texts):
        if not len(texts):
            raise ValueError(f"image {image} has no right text")
        if missing := [text for text in texts if not 0 <= text < scores.shape[1]]:
            raise ValueError(f"image {image}: there is no text {missing[0]}, only {scores.shape[1]}")
        is_right[image, list(texts)] = True

    asked = is_right.any(axis=0)  # (T,)
    ranks = {
        "image_to_text": _wrong_ones_before(scores, is_right),
        "text_to_image": _wrong_ones_before(scores.T[asked], is_right.T[asked]),
    }
    return {f"{way}_recall@{k}": float((before < k).mean()) for way, before in ranks.items() for k in ks}


def _wrong_ones_before(scores: np.ndarray, is_right: np.ndarray) -> np.ndarray:
    """For each row the number of wrong candidates that score no less than the best right one."""
    best = np.where(is_right, scores, -np.inf).max(axis=1, keepdims=True)
    return ((scores >= best) & ~is_right).sum(axis=1)
