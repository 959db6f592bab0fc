"""What a decoder of a small data set is given: voxels and targets of one fold."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from sklearn.decomposition import PCA

from src.utils import PerceptError

N_AXES = 40  # principal axes of images that decoders work in, at least
MAX_AXES = 300
VARIANCE_HELD = 0.9  # of the images, by more axes than N_AXES where it must be
RANKING_AXES = 100  # principal axes of the targets by which voxels are ranked, at most


T = TypeVar("T")


@dataclass(frozen=True)
class Examples:
    """Images of a data set, or some of them.

    Attributes:
        voxels: float32 (images, voxels).
        targets: float32 (images, targets), e.g. pixels in [0, 1] or an embedding.
        variants: targets that each image could have had as well, such as the pixels of slightly
            moved copies, float32 (images, copies, targets) by how strongly they were moved; empty
            where there are none.
    """

    voxels: np.ndarray
    targets: np.ndarray
    variants: Mapping[float, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse rows that do not match.

        Raises:
            PerceptError: for another number of targets than of voxels.
        """
        if len(self.voxels) != len(self.targets):
            raise PerceptError(
                f"There are voxels of {len(self.voxels)} images and targets of"
                f" {len(self.targets)}: give one row each, in the same order."
            )

    def __len__(self) -> int:
        return len(self.voxels)

    def select(self, rows: np.ndarray) -> Examples:
        """The examples of some rows (n,)."""
        variants = {strength: copies[rows] for strength, copies in self.variants.items()}
        return replace(
            self, voxels=self.voxels[rows], targets=self.targets[rows], variants=variants
        )


@dataclass(frozen=True)
class Problem:
    """Training images and the voxels of test images, ready for decoders.

    Voxels are z-scored by the training images and ordered: those that covary most with the targets
    of the training images come first, so that `[:, :400]` are the best 400.

    Attributes:
        train: the training images, voxels float32 (images, ranked voxels).
        test_voxels: float32 (test images, ranked voxels).
        cache: what decoders have computed for this problem and need for other settings again.
    """

    train: Examples
    test_voxels: np.ndarray
    cache: dict[Hashable, Any] = field(default_factory=dict)

    def remember(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The result of `compute`, which is called once for each key."""
        if key not in self.cache:
            self.cache[key] = compute()
        result: T = self.cache[key]
        return result

    def get_images(self, strength: float | None = None) -> np.ndarray:
        """Targets of the training images, or of their variants of some strength: (n, targets)."""
        if strength is None:
            return self.train.targets
        return self.train.variants[strength].reshape(-1, self.train.targets.shape[1])

    def fit_axes(self, strength: float | None = None) -> PCA:
        """Principal axes of `get_images`.

        There are N_AXES of them, and more, up to MAX_AXES, where those hold less of the variance
        than VARIANCE_HELD.
        """
        return self.remember(("axes", strength), lambda: _fit_axes(self.get_images(strength)))


def _fit_axes(images: np.ndarray) -> PCA:
    """Principal axes of images (n, targets), those of no variance left out."""
    limit = max(1, min(MAX_AXES, len(images) - 1, images.shape[1]))
    solver = "covariance_eigh" if images.shape[1] <= 1024 else "randomized"
    if len(images) <= MAX_AXES:
        solver = "full"
    axes = PCA(limit, svd_solver=solver, random_state=0).fit(images)
    variances = axes.explained_variance_
    cumulative = np.cumsum(axes.explained_variance_ratio_)
    n_axes = max(N_AXES, int((cumulative < VARIANCE_HELD).sum()) + 1)
    n_axes = max(1, min(n_axes, int((variances > 1e-6 * variances[0]).sum())))
    axes.components_ = axes.components_[:n_axes]
    axes.explained_variance_ = variances[:n_axes].clip(min=1e-12)
    return axes


def pose_problem(train: Examples, test_voxels: np.ndarray, max_voxels: int) -> Problem:
    """Scale and rank voxels by the training images alone.

    Args:
        train: training images.
        test_voxels: (test images, voxels).
        max_voxels: number of ranked voxels that are kept.

    Returns:
        The problem; voxels that are constant over the training images come last, as zeros.
    """
    mean, sd = train.voxels.mean(0), train.voxels.std(0)
    is_constant = sd <= 1e-6 * np.abs(mean)
    sd[is_constant] = np.inf
    scaled = (train.voxels - mean) / sd
    order = np.argsort(-rank_voxels(scaled, train.targets), kind="stable")[:max_voxels]
    test_scaled = (test_voxels[:, order] - mean[order]) / sd[order]
    return Problem(replace(train, voxels=scaled[:, order]), test_scaled.astype(np.float32))


def rank_voxels(voxels: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Relevance of each voxel: its squared covariance with the targets, summed over these.

    Args:
        voxels: (images, voxels), z-scored.
        targets: (images, targets); of more than RANKING_AXES dimensions, those of most variance
            count.

    Returns:
        (voxels,).
    """
    centred = targets - targets.mean(0)
    if min(centred.shape) > RANKING_AXES:
        centred = reduce_targets(centred, RANKING_AXES)
    covariance = voxels.T @ centred / len(voxels)  # (voxels, axes)
    relevance: np.ndarray = np.square(covariance).sum(1)
    return relevance


def reduce_targets(centred: np.ndarray, n_axes: int) -> np.ndarray:
    """Coordinates (images, axes) of centred targets (images, targets) on their principal axes.

    Inner products between images are kept, as far as these axes hold them.
    """
    if centred.shape[1] < centred.shape[0]:
        _, axes = np.linalg.eigh(centred.T @ centred)
        coordinates: np.ndarray = centred @ axes[:, ::-1][:, :n_axes]
        return coordinates
    variances, axes = np.linalg.eigh(centred @ centred.T)
    scales = np.sqrt(variances.clip(min=0))[::-1][:n_axes]
    coordinates = axes[:, ::-1][:, :n_axes] * scales
    return coordinates
