"""Noise of measurements: drawn from residuals, and told from signal by repeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.utils import PerceptError


class NoiseModel:
    """Gaussian noise with the covariance of the residuals of an encoding model.

    Out-of-fold residuals hold what the encoder does not know of the signal and the noise of the
    measurement, as they are correlated between voxels. A draw is

        g' E / sqrt(n),   g ~ N(0, identity of n)

    whose covariance is exactly E' E / n, that of the residuals, without a matrix of voxels by
    voxels and however few images there are.

    Args:
        residuals: E, (images, voxels): measured less predicted responses, out of fold. Their mean
            over images is taken away.

    Raises:
        PerceptError: for fewer than two images, or values that are not finite.
    """

    def __init__(self, residuals: Any):
        values = torch.as_tensor(np.asarray(residuals, np.float32))
        if values.ndim != 2 or len(values) < 2 or not torch.isfinite(values).all():
            raise PerceptError(
                f"Residuals {tuple(values.shape)} make no noise model: give finite values (images,"
                " voxels) of at least 2 images."
            )
        self.residuals = values - values.mean(0)

    @property
    def n_voxels(self) -> int:
        """Voxels that a draw has."""
        return self.residuals.shape[1]

    def to(self, device: str | torch.device) -> NoiseModel:
        """This model on another device, where it then draws."""
        self.residuals = self.residuals.to(device)
        return self

    def covariance(self) -> Tensor:
        """Covariance of the noise, float32 (voxels, voxels)."""
        return self.residuals.T @ self.residuals / len(self.residuals)

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise of `count` measurements, float32 (count, voxels).

        Args:
            count: number of draws.
            generator: of random numbers, on the CPU, so that draws are the same on every device.
        """
        n = len(self.residuals)
        weights = torch.randn(count, n, generator=generator).to(self.residuals.device)
        return weights @ self.residuals / n**0.5


@dataclass(frozen=True)
class SignalAndNoise:
    """Covariances of signal and noise of single trials.

    Attributes:
        signal: float64 (voxels, voxels), of the responses to images without noise.
        noise: float64 (voxels, voxels), of one trial.
        mean: float64 (voxels,), mean response.
        degrees: degrees of freedom of the noise covariance, before it was shrunk.
    """

    signal: np.ndarray
    noise: np.ndarray
    mean: np.ndarray
    degrees: int

    def noise_ceiling(self, repeats: int = 1) -> np.ndarray:
        """Share of the variance of the mean of `repeats` trials that is signal, (voxels,)."""
        signal = np.diagonal(self.signal)
        total = signal + np.diagonal(self.noise) / repeats
        return np.divide(signal, total, out=np.zeros_like(total), where=total > 0)


def estimate_signal_and_noise(
    single_trials: np.ndarray, image_ids: np.ndarray, shrinkage: float = 0.0
) -> SignalAndNoise:
    """Signal and noise covariance from repeats of images.

    A trial is x = signal(image) + noise, both multivariate Gaussian and independent. With R_i
    trials of image i and their mean m_i, the pooled covariance within images has the expectation
    `noise`, and the covariance of the means has the expectation

        signal + noise * mean over images of 1 / R_i.

    The difference is brought to the nearest matrix without negative eigenvalues.

    Args:
        single_trials: (trials, voxels).
        image_ids: (trials,); any order, any number of repeats, some images may have one.
        shrinkage: of the noise covariance to its diagonal, 0 for none to 1 for the diagonal alone.

    Raises:
        PerceptError: for a shrinkage out of [0, 1], fewer than two images, or if no image was
            repeated.

    Source: the model of generative modelling of signal and noise (GSN), Kay et al. 2024; in closed
        form, where GSN iterates between both covariances.
    """
    trials = np.asarray(single_trials)
    ids, codes, counts = np.unique(image_ids, return_inverse=True, return_counts=True)
    degrees = len(trials) - len(ids)
    if not 0 <= shrinkage <= 1:
        raise PerceptError(f"shrinkage is {shrinkage}: choose it between 0 and 1.")
    if len(ids) < 2 or degrees < 1:
        raise PerceptError(
            f"{len(trials)} trials of {len(ids)} images tell no signal from noise: some images must"
            " have repeats; without them use the residuals of an encoding model (NoiseModel)."
        )
    order = np.argsort(codes, kind="stable")
    sums = np.add.reduceat(trials[order], np.cumsum(counts) - counts, axis=0, dtype=np.float64)
    means = sums / counts[:, None]
    deviations = trials - means[codes]
    noise = deviations.T @ deviations / degrees
    noise = (1 - shrinkage) * noise + shrinkage * np.diag(np.diagonal(noise))
    mean = means.mean(0)
    spread = np.cov(means, rowvar=False)
    signal = _drop_negative_eigenvalues(spread - noise * (1 / counts).mean())
    return SignalAndNoise(signal, noise, mean, degrees)


def _drop_negative_eigenvalues(matrix: np.ndarray) -> np.ndarray:
    """The nearest symmetric matrix without negative eigenvalues, in the Frobenius norm."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.clip(values, 0, None)) @ vectors.T
