"""Test that answers depend on the picture: exact match, and a permutation test against shuffled pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Verdict:
    """`exact_match` is the share of right answers, `shuffled` the mean share when the pictures are shuffled.

    `p_value` is the probability of at least `exact_match` with shuffled pictures, from `permutations` shuffles.
    """

    pictures: int
    exact_match: float
    shuffled: float
    p_value: float
    permutations: int

    @property
    def depends_on_picture(self) -> bool:
        """At least 200 pictures, at least twice as good as with shuffled pictures, and p < 0.001."""
        return self.pictures >= 200 and self.exact_match >= 2 * self.shuffled and self.p_value < 0.001

    def __str__(self) -> str:
        return (
            f"exact match on {self.pictures} held-out pictures: {self.exact_match:.1%}; with the pictures shuffled: "
            f"{self.shuffled:.1%}; permutation p = {self.p_value:.1g} ({self.permutations:,} permutations)"
        )


def permutation_test(
    answers: Sequence[str], truths: Sequence[str], permutations: int = 10_000, seed: int = 0
) -> Verdict:
    """Compare `answers` with `truths`, both in the pictures' order, ignoring surrounding white space.

    An answer depends only on the picture (same prompt, greedy decoding), so shuffling pictures equals shuffling
    answers. The p-value counts the identity among the permutations (Phipson & Smyth 2010, eq. 2), so it
    is never 0.

    Raises ValueError when there are no answers, or not as many as truths.
    """
    if not answers or len(answers) != len(truths):
        raise ValueError(f"as many answers as truths are needed, at least one: got {len(answers)} and {len(truths)}")
    texts = [text.strip() for text in (*answers, *truths)]
    _, ids = np.unique(texts, return_inverse=True)
    given, wanted = ids[: len(answers)], ids[len(answers) :]
    right = int((given == wanted).sum())

    rng = np.random.default_rng(seed)
    by_chance = np.array([(rng.permutation(given) == wanted).sum() for _ in range(permutations)])
    return Verdict(
        pictures=len(answers),
        exact_match=right / len(answers),
        shuffled=float(by_chance.mean()) / len(answers),
        p_value=(1 + int((by_chance >= right).sum())) / (1 + permutations),
        permutations=permutations,
    )


def share_right(answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """Exact match for each distinct truth, in the order of their first appearance."""
    return {
        name: float(np.mean([a.strip() == t for a, t in zip(answers, truths, strict=True) if t == name]))
        for name in dict.fromkeys(truths)
    }
