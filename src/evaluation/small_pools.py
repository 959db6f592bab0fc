"""Scores of small test sets, such as the twelve targets of NSD-Imagery: what chance is there.

Among a dozen images the share of right two-way decisions spreads widely around .5 by chance, and
one set of a few images may be told from another by a single property. `permute_two_way` therefore
compares a score with all, or many, ways to assign the reconstructions to the images of the same
group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from src.utils import PerceptError

MAX_EXACT = 50_000  # assignments up to this number are all counted


@dataclass(frozen=True)
class PermutedScore:
    """A score and what it would be by chance.

    Attributes:
        value: two-way identification, in [0, 1].
        benchmark_value: the same as the benchmark of NSD-Imagery (MedARC-AI/MIRAGE) reports it.
        chance: mean over the assignments.
        low, high: bounds of the middle 95 % of the assignments.
        p: share of the assignments that score at least as high, counting the right one.
        n_assignments: number of them.
    """

    value: float
    benchmark_value: float
    chance: float
    low: float
    high: float
    p: float
    n_assignments: int


def to_benchmark_two_way(score: float, n_images: int) -> float:
    """Two-way identification as the benchmark of NSD-Imagery (MedARC-AI/MIRAGE) counts it.

    Its code takes the own image out of the count once more although a strict comparison has left it
    out already: it is lower by 1 / (n - 1), so that a perfect score among twelve is 10/11.

    Args:
        score: two-way identification, as `src.metrics.two_way_identification` gives it.
        n_images: among how many images.

    Raises:
        PerceptError: for fewer than two images.
    """
    if n_images < 2:
        raise PerceptError("Two-way identification needs at least two images.")
    return score - 1 / (n_images - 1)


def permute_two_way(
    similarity: Any, groups: Any = None, n_draws: int = 10_000, seed: int = 0
) -> PermutedScore:
    """Two-way identification, and its distribution over assignments within groups.

    Args:
        similarity: (n, n), row: true image, column: reconstruction, e.g. Pearson correlations of
            features.
        groups: (n,) label of each image, such as its set; reconstructions are exchanged within a
            group only. None for a single group.
        n_draws: random assignments, where there are more than 50,000 in all.
        seed: of these.

    Raises:
        PerceptError: for another shape, values that are not finite, or groups that allow no other
            assignment.
    """
    matrix = np.asarray(similarity, np.float64)
    n_images = len(matrix)
    if matrix.shape != (n_images, n_images) or n_images < 2 or not np.isfinite(matrix).all():
        raise PerceptError(
            f"Similarities have the shape {matrix.shape}: they must be finite, (images, images),"
            " of at least two."
        )
    labels = np.zeros(n_images, int) if groups is None else np.asarray(groups)
    members = [np.flatnonzero(labels == label) for label in pd.unique(labels)]
    if labels.shape != (n_images,) or max(map(len, members)) < 2:
        raise PerceptError(
            f"groups has the shape {labels.shape}: give a label to each of {n_images} images, and"
            " one label to at least two of them."
        )
    # share of the true images that resemble reconstruction j less than image i does
    beaten = (matrix[None] < matrix[:, None]).sum(axis=1) / (n_images - 1)
    columns = np.arange(n_images)
    value = float(beaten[columns, columns].mean())
    scores = np.array(
        [beaten[rows, columns].mean() for rows in _iterate_assignments(members, n_draws, seed)]
    )
    low, high = np.quantile(scores, [0.025, 0.975])
    is_exact = _count_assignments(members) <= MAX_EXACT
    n_reaching = int((scores >= value - 1e-12).sum())
    p = n_reaching / len(scores) if is_exact else (n_reaching + 1) / (len(scores) + 1)
    return PermutedScore(
        value=value,
        benchmark_value=to_benchmark_two_way(value, n_images),
        chance=float(scores.mean()),
        low=float(low),
        high=float(high),
        p=p,
        n_assignments=len(scores),
    )


def _count_assignments(members: list[np.ndarray]) -> int:
    return math.prod(math.factorial(len(group)) for group in members)


def _iterate_assignments(
    members: list[np.ndarray], n_draws: int, seed: int
) -> Iterator[np.ndarray]:
    """The true image (n,) that each reconstruction is assigned to: all ways, or some at random."""
    rows = np.empty(sum(map(len, members)), int)
    if _count_assignments(members) <= MAX_EXACT:
        for orders in itertools.product(*(itertools.permutations(group) for group in members)):
            for group, order in zip(members, orders, strict=True):
                rows[group] = order
            yield rows
        return
    rng = np.random.default_rng(seed)
    for _ in range(n_draws):
        for group in members:
            rows[group] = rng.permutation(group)
        yield rows
