"""Permutation importance of regions: how much scores fall when a region's voxels are those of other
test images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from src.evaluation.attribution.level import Level
from src.evaluation.statistics import derangements
from src.utils import PerceptError, progress

Score = Callable[[Tensor], np.ndarray]  # predictions (images, ...) -> (images,)


@dataclass(frozen=True)
class Importance:
    """Scores of each test image, with the brain as it is and with regions permuted (the mean over
    draws).

    Attributes:
        kind: of the level.
        sizes: voxels by region, the groups "early areas" and "higher areas" and "all" included.
        intact: by score (images,).
        permuted: by (score, region) (images,): this region permuted across images.
        isolated: by (score, region) (images,): every other region permuted, each by a permutation
            of its own.
    """

    kind: str
    sizes: dict[str, int]
    intact: dict[str, np.ndarray]
    permuted: dict[tuple[str, str], np.ndarray]
    isolated: dict[tuple[str, str], np.ndarray]

    def drop(self, score: str, region: str) -> np.ndarray:
        """By how much each image's score falls without a region, (images,)."""
        return self.intact[score] - self.permuted[score, region]


def permute_region(voxels: np.ndarray, positions: np.ndarray, order: np.ndarray) -> np.ndarray:
    """A copy of voxels (images, selected) in which those at `positions` are of the images in
    `order`, the same for all of them.
    """
    changed = voxels.copy()
    changed[:, positions] = voxels[np.ix_(order, positions)]
    return changed


class _Permutations:
    """Voxels with regions permuted across images, the same permutations for every region and score.

    Args:
        voxels: (images, selected).
        regions: positions by region.
        draws: permutations of each.
        seed: of these.
    """

    def __init__(
        self, voxels: np.ndarray, regions: Mapping[str, np.ndarray], draws: int, seed: int
    ):
        self.voxels = voxels
        self.regions = list(regions.values())
        self.orders = list(derangements(len(voxels), draws, seed))
        # for each draw one a region
        self.other_orders = list(derangements(len(voxels), draws * len(regions), seed + 1))

    def permute(self, positions: np.ndarray, draw: int) -> np.ndarray:
        """Voxels in which those at some positions are of other images."""
        return permute_region(self.voxels, positions, self.orders[draw])

    def isolate(self, positions: np.ndarray, draw: int) -> np.ndarray:
        """Voxels in which only those at some positions are of the right image."""
        changed = self.voxels.copy()
        orders = self.other_orders[draw * len(self.regions) :]
        for region, order in zip(self.regions, orders, strict=False):
            moved = np.setdiff1d(region, positions)
            changed[:, moved] = self.voxels[np.ix_(order, moved)]
        return changed


def permutation_importance(
    level: Level,
    regions: Mapping[str, np.ndarray],
    scores: Mapping[str, Score],
    groups: Mapping[str, Sequence[str]] | None = None,
    draws: int = 10,
    seed: int = 42,
    slow_draws: Mapping[str, int] | None = None,
) -> Importance:
    """How much scores fall when a region's voxels are those of other test images, and what is left
    when only this region's are right.

    All voxels of a region are moved by one permutation in which no image stays in its place, so
    that a region keeps its own pattern and loses its image. Draws are the same for every region,
    score and level of equally many images.

    Args:
        level: from `open_level`.
        regions: from `partition_voxels`.
        scores: by name, functions of the predictions (images, ...) that give a value an image.
        groups: further sets of regions by name, which are permuted jointly.
        draws: permutations, at least 1.
        seed: of these.
        slow_draws: draws of scores that are slow, by name, at least 1; the first of the others'
            draws.

    Raises:
        PerceptError: for fewer than one draw, or one image.

    Source: permutation importance, Breiman 2001, section 10.
    """
    n_draws = {score: min(draws, (slow_draws or {}).get(score, draws)) for score in scores}
    if min(n_draws.values()) < 1:
        raise PerceptError(f"draws are {n_draws}: permute at least once.")
    sets = dict(regions)
    for name, members in (groups or {}).items():
        sets[name] = np.concatenate([regions[member] for member in members])
    sets["all"] = np.arange(level.voxels.shape[1])
    permutations = _Permutations(level.voxels, regions, draws, seed)

    def average_scores(
        change: Callable[[np.ndarray, int], np.ndarray], positions: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Scores (images,), the mean over draws of changed voxels."""
        values: dict[str, list[np.ndarray]] = {score: [] for score in scores}
        for draw in range(draws):
            prediction = level.predict(change(positions, draw))
            for score, compute in scores.items():
                if draw < n_draws[score]:
                    values[score].append(compute(prediction))
        return {score: np.mean(by_draw, 0) for score, by_draw in values.items()}

    prediction = level.predict(level.voxels)
    sizes = {name: len(positions) for name, positions in sets.items()}
    intact = {score: compute(prediction) for score, compute in scores.items()}
    importance = Importance(level.kind, sizes, intact, {}, {})
    for name, positions in progress(
        sets.items(), f"permuting regions of the {level.title}", len(sets)
    ):
        for score, values in average_scores(permutations.permute, positions).items():
            importance.permuted[score, name] = values
        if name != "all":
            for score, values in average_scores(permutations.isolate, positions).items():
                importance.isolated[score, name] = values
    return importance
