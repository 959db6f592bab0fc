"""Intervals, paired differences and permutation tests over images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from src.utils import PerceptError

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean over images and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """A mean paired difference, its 95 % bootstrap interval and its two-sided p."""

    value: float
    low: float
    high: float
    p: float


def check_values(values: Any) -> np.ndarray:
    """Per-image values as float64 (n,).

    Raises:
        PerceptError: there are none, they have another shape, or some are not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise PerceptError(
            f"Statistics are taken over images: expected values (n,), got shape {values.shape}."
        )
    if not np.isfinite(values).all():
        raise PerceptError(
            f"{(~np.isfinite(values)).sum()} of {len(values)} per-image values are NaN or infinite;"
            " no mean is given."
        )
    return values


def percentile_interval(draws: Any) -> tuple[float, float]:
    """Ends of the 95 % percentile interval of bootstrap draws (n_boot,)."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _draw_means(values: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """Means (n_boot,) of resamples of the images."""
    n = len(values)
    picks = np.random.default_rng(seed).integers(0, n, (n_boot, n))
    return values[picks].mean(1)


def bootstrap_mean(values: Any, n_boot: int = 2000, seed: int = 0) -> Interval:
    """Mean of per-image values (n,) with its 95 % percentile interval over resamples of the images
    (Efron & Tibshirani 1993).
    """
    values = check_values(values)
    low, high = percentile_interval(_draw_means(values, n_boot, seed))
    return Interval(float(values.mean()), low, high)


def paired_bootstrap(a: Any, b: Any, n_boot: int = 2000, seed: int = 0) -> Difference:
    """Mean of a - b over the same images, (n,) and (n,), with its interval and the two-sided
    bootstrap p of no difference.

    The p is twice the smaller share of resampled means on either side of 0, counting the observed
    one, so it is never 0.

    Raises:
        PerceptError: the two sides have different numbers of values.
    """
    a = check_values(a)
    b = check_values(b)
    if a.shape != b.shape:
        raise PerceptError(
            f"A paired difference needs the same images on both sides; got {len(a)} and {len(b)}"
            " values."
        )
    means = _draw_means(a - b, n_boot, seed)
    low, high = percentile_interval(means)
    n_below = (means <= 0).sum()
    n_above = (means >= 0).sum()
    p = 2 * (1 + min(n_below, n_above)) / (1 + n_boot)
    value = (a - b).mean()
    return Difference(float(value), low, high, float(min(p, 1.0)))


def permutation_p(
    matched: Any, mismatched: Any, better: str = "higher", n_permutations: int = 2000, seed: int = 0
) -> float:
    """One-sided p that reconstructions fit their own images better than other ones.

    If the pairing carried nothing, the own image would be exchangeable with the others,
    reconstruction by reconstruction: the null distribution takes, for each, one of its 1 + draws
    scores at random. The smallest p is 1 / (1 + n_permutations).

    Args:
        matched: (n,) scores against the own image.
        mismatched: (n, draws) scores of the same reconstructions against other images.
        better: "higher" or "lower".
        n_permutations: random draws from the null.
        seed: of these draws.

    Raises:
        PerceptError: the mismatched scores are not (n, draws).
    """
    sign = {"higher": 1.0, "lower": -1.0}[better]
    matched = sign * check_values(matched)
    mismatched = sign * np.asarray(mismatched, dtype=np.float64)
    n = len(matched)
    if mismatched.ndim != 2 or len(mismatched) != n:
        raise PerceptError(
            f"Expected shuffled scores (n, draws) for n = {n} images, got shape {mismatched.shape}."
        )
    scores = np.column_stack([matched, mismatched])  # (n, 1 + draws)
    rng = np.random.default_rng(seed)
    pick = rng.integers(0, scores.shape[1], (n_permutations, n))
    null = scores[np.arange(n), pick].mean(1)  # (n_permutations,)
    n_as_good = (null >= matched.mean() - 1e-12).sum()
    return float((1 + n_as_good) / (1 + n_permutations))


def derangements(n: int, draws: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield `draws` random permutations (n,) in which nothing stays in its place."""
    if n < 2:
        raise PerceptError("A shuffled pairing needs at least two images.")
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        order = rng.permutation(n)
        while (order == np.arange(n)).any():  # about e tries
            order = rng.permutation(n)
        yield order


def noise_ceiling(
    between_repeats: Any, repeats: int, n_boot: int = 2000, seed: int = 0
) -> Interval:
    """The most that a prediction from the mean of some repeats can correlate with the truth, from
    how well single repeats agree with each other.

    With r the correlation of predictions from two single repeats, the mean of k has reliability k r
    / (1 + (k - 1) r) (Spearman 1910, Brown 1910), and its correlation with anything is at most the
    square root of that.

    Args:
        between_repeats: (n,) per test image, the mean correlation of its predictions from pairs of
            single repeats.
        repeats: k.
        n_boot: resamples of the images.
        seed: of these.
    """
    values = check_values(between_repeats)

    def ceiling(r: Any) -> np.ndarray:
        r = np.clip(r, 0, 1)
        return np.sqrt(repeats * r / (1 + (repeats - 1) * r))

    low, high = percentile_interval(ceiling(_draw_means(values, n_boot, seed)))
    return Interval(float(ceiling(values.mean())), low, high)
