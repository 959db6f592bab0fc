"""How reliable voxels are: the noise ceiling, from the repeats of training images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from src.data.normaliser import Normaliser
from src.data.subject import Subject
from src.utils import PerceptError


def estimate_noise_ceiling(
    subject: Subject, repeats: int = 1, normaliser: Normaliser | None = None
) -> pd.DataFrame:
    """How much of each voxel's variance is due to the image, from repeats of training images.

    Betas are z-scored (per session by default). The noise variance is the variance over the repeats
    of an image, pooled over images; what remains of the total variance is signal. ncsnr is signal
    sd / noise sd, rectified at 0. For the mean of n repeats the ceiling is
    ncsnr^2 / (ncsnr^2 + 1 / n) (Allen et al. 2022, Nature Neuroscience).

    Args:
        subject: a prepared subject.
        repeats: number of repeats that are averaged.
        normaliser: of the betas; by default one is fitted.

    Returns:
        One row a voxel (of a normaliser's regions, if it has some): ncsnr, noise_ceiling
        (fraction of variance, for the mean of `repeats` repeats), noise_ceiling_percent.

    Raises:
        PerceptError: if no training image was shown twice, or the normaliser gives components in
            place of voxels.
    """
    if normaliser is not None and normaliser.components is not None:
        raise PerceptError(
            "A noise ceiling is of voxels, and this normaliser gives components: fit one with"
            " n_components=0."
        )
    if repeats < 1:
        raise PerceptError(
            f"repeats is {repeats}: a noise ceiling is for the mean of at least 1 repeat."
        )
    groups = [rows for rows in subject.rows_by_image("train") if len(rows) > 1]
    if not groups:
        raise PerceptError(
            f"No training image of subject {subject.subj} was shown twice, so its noise ceiling"
            " cannot be known."
        )
    signal, noise = _compute_variances(subject, groups, normaliser or Normaliser.fit(subject))
    with np.errstate(divide="ignore", invalid="ignore"):
        ncsnr = np.where(signal > 0, np.sqrt(signal / noise), 0.0)
        ceiling = np.where(signal > 0, signal / (signal + noise / repeats), 0.0)
    return pd.DataFrame(
        {"ncsnr": ncsnr, "noise_ceiling": ceiling, "noise_ceiling_percent": 100 * ceiling}
    )


def _compute_variances(
    subject: Subject, groups: Sequence[np.ndarray], normaliser: Normaliser
) -> tuple[np.ndarray, np.ndarray]:
    """Variance of signal and of noise of each voxel, each float64 (voxels,).

    Args:
        subject: a prepared subject.
        groups: rows of the trials of each image.
        normaliser: of the betas.
    """
    total, square, residual = np.zeros((3, subject.n_features(normaliser)))
    for start in range(0, len(groups), 64):
        chunk = groups[start : start + 64]
        sizes = np.array([len(rows) for rows in chunk])
        starts = np.cumsum(sizes) - sizes
        betas = subject.get_betas(np.concatenate(chunk), normaliser).astype(np.float64)
        image_means = np.add.reduceat(betas, starts, axis=0) / sizes[:, None]
        total += betas.sum(0)
        square += (betas**2).sum(0)
        residual += ((betas - np.repeat(image_means, sizes, axis=0)) ** 2).sum(0)
    n_trials = sum(map(len, groups))
    noise = residual / (n_trials - len(groups))
    variance = square / n_trials - (total / n_trials) ** 2
    return np.maximum(variance - noise, 0.0), noise
