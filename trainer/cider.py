"""CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726, section 4 and appendix): similarity of captions to references.

Captions are compared as vectors of n-gram counts, n = 1 … 4, each count weighted by how few images have the n-gram in
their references. D, the variant of COCO's server, clips counts and penalises a difference in length. Figures equal
those of `pycocoevalcap.cider` on the same tokens.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


MAX_N = 4  # n-grams of 1 … 4 words have equal weight
SIGMA = 6.0  # words; standard deviation of the Gaussian length penalty
SCALE = 10.0  # the score of a caption of four words or more that equals its only reference; papers: 100 times it

Words = Sequence[str]


def cider_d(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """The score of each of I images, from 0 to 10; the corpus' CIDEr-D is their mean.

    Document frequencies are counted over the I images' references: scores of different image sets are not comparable,
    and a single image always scores 0, since its n-grams occur in all images.

    Args:
        candidates: I captions, each a list of words, which may be empty.
        references: one or more captions for each image.

    Raises:
        ValueError: other than one list of references a candidate, no images, an image without references.
    """
    if len(candidates) != len(references) or not candidates:
        raise ValueError(f"{len(candidates)} candidates and {len(references)} lists of references: one each is needed")
    if empty := [image for image, texts in enumerate(references) if not len(texts)]:
        raise ValueError(f"image {empty[0]} has no references ({len(empty)} such images)")
    counts = [[_count_ngrams(words) for words in texts] for texts in references]
    images_with = Counter(ngram for texts in counts for ngram in set().union(*texts))
    log_images = math.log(len(references))

    def vector_of(ngrams: Counter) -> "_Vector":
        weights: list[dict] = [{} for _ in range(MAX_N)]
        for ngram, count in ngrams.items():
            weights[len(ngram) - 1][ngram] = count * (log_images - math.log(max(1, images_with[ngram])))
        norms = [math.sqrt(sum(weight**2 for weight in of_n.values())) for of_n in weights]
        # COCO's implementation uses the number of bigrams as the length
        return _Vector(weights, norms, sum(count for ngram, count in ngrams.items() if len(ngram) == 2))

    scores = []
    for words, texts in zip(candidates, counts, strict=True):
        candidate = vector_of(_count_ngrams(words))
        similarities = [_similarity(candidate, vector_of(ngrams)) for ngrams in texts]
        scores.append(SCALE * sum(similarities) / len(similarities))
    return scores


class _Vector(NamedTuple):
    """A caption's weights and their norm for n = 1 … 4, and its length."""

    weights: list[dict[tuple[str, ...], float]]
    norms: list[float]
    length: int


def _count_ngrams(words: Words) -> Counter:
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """The clipped cosine, averaged over n, times the Gaussian of the difference in length."""
    cosines = 0.0
    for n in range(MAX_N):
        norm = candidate.norms[n] * reference.norms[n]
        if norm:
            shared = candidate.weights[n].keys() & reference.weights[n].keys()
            pairs = ((candidate.weights[n][ngram], reference.weights[n][ngram]) for ngram in shared)
            cosines += sum(min(ours, theirs) * theirs for ours, theirs in pairs) / norm
    return cosines / MAX_N * math.exp(-((candidate.length - reference.length) ** 2) / (2 * SIGMA**2))
