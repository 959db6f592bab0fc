"""Decoders in closed form for a hundred images or a thousand: ridge, kernel, Bayesian linear.

Each is a function of a problem (training images, voxels of test images) and of a setting, and gives
the targets of the test images. Settings are chosen within the training images (`nested`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import pdist
from scipy.special import softmax
from sklearn.cluster import KMeans
from sklearn.linear_model import Ridge

from src.networks.kernels import compute_arc_cosine_kernel, compute_rbf_kernel
from src.small_data.examples import Problem

Setting = Mapping[str, Any]
Decoder = Callable[[Problem, Setting], np.ndarray]

MEDIAN_ROWS = 500  # training images whose distances set the width of the RBF kernel, at most


def predict_ridge(problem: Problem, setting: Setting) -> np.ndarray:
    """Ridge regression from voxels to targets.

    Args:
        problem: what to learn from, and what to decode.
        setting: `voxels`, how many of the ranked ones are read; `alpha`, the penalty.

    Returns:
        (test images, targets).

    Source: Hoerl & Kennard 1970.
    """
    count = setting["voxels"]
    model = Ridge(alpha=setting["alpha"])
    model.fit(problem.train.voxels[:, :count], problem.train.targets)
    predicted: np.ndarray = model.predict(problem.test_voxels[:, :count])
    return predicted.reshape(len(predicted), -1)


def predict_kernel(problem: Problem, setting: Setting) -> np.ndarray:
    """Kernel ridge regression: every prediction is a weighted sum of the training targets.

    Args:
        problem: what to learn from, and what to decode.
        setting: `kernel`, "rbf" or "arc-cosine"; `voxels`; `alpha`, the penalty in units of the
            mean diagonal of the kernel. The width of "rbf" is half the median squared distance of
            training images.

    Returns:
        (test images, targets).

    Source: Saunders et al. 1998; arc-cosine kernel of order 1: Cho & Saul 2009.
    """
    train = torch.from_numpy(problem.train.voxels[:, : setting["voxels"]]).double()
    test = torch.from_numpy(problem.test_voxels[:, : setting["voxels"]]).double()
    if setting["kernel"] == "rbf":
        step = -(-len(train) // MEDIAN_ROWS)
        distance = float(np.median(pdist(train[::step].numpy(), "sqeuclidean")))
        gamma = 2 / max(distance, 1e-12)
        gram = compute_rbf_kernel(train, train, gamma).numpy()
        similarity = compute_rbf_kernel(test, train, gamma).numpy()
    else:
        gram = compute_arc_cosine_kernel(train, train).numpy()
        similarity = compute_arc_cosine_kernel(test, train).numpy()
    penalty = setting["alpha"] * gram.diagonal().mean()
    factor = cho_factor(gram + penalty * np.eye(len(gram)))
    mean = problem.train.targets.mean(0)
    weights = cho_solve(factor, similarity.T).T  # (test images, training images)
    predicted: np.ndarray = mean + weights.astype(np.float32) @ (problem.train.targets - mean)
    return predicted


def predict_bayesian(problem: Problem, setting: Setting) -> np.ndarray:
    """Posterior mean of the image under a linear encoding model and a prior of images.

    Images are coordinates z on the principal axes of the prior's images, of unit variance there.
    The prior is a mixture of Gaussians with centres m_k, shares p_k and one covariance C (of one
    Gaussian: 0, 1 and I). An encoder predicts the voxels, a = z W + e; its noise e has the
    covariance S of leave-one-out residuals, shrunk towards its diagonal. With b a share of the
    evidence that is believed, M = b W S^-1 W' and t = b W S^-1 a, the posterior of Gaussian k has

        mean      z_k = (C^-1 + M)^-1 (C^-1 m_k + t)
        log share     = log p_k + (z_k (C^-1 m_k + t) - m_k C^-1 m_k) / 2 + constant,

    and the means are weighted by the shares.

    Args:
        problem: what to learn from, and what to decode. The prior is that of the variants of its
            training images where there are some, else of these images.
        setting: `voxels`; `strength` of the movements of the prior's variants; `clusters`, number
            of Gaussians; `penalty` of the encoder, per ten images; `shrinkage` of the noise
            covariance towards its diagonal, more than 0 and at most 1; `evidence`, b.

    Returns:
        (test images, targets).

    Source: Naselaris et al. 2009 (Neuron); mixture: Schoenmakers et al. 2015 (Front. Comput.
        Neurosci.).
    """
    strength = setting["strength"] if problem.train.variants else None
    prior = problem.fit_axes(strength)
    scales = np.sqrt(prior.explained_variance_)
    key = ("evidence", strength, *(setting[k] for k in ("voxels", "penalty", "shrinkage")))
    gram, fit = problem.remember(key, lambda: _gather_evidence(problem, strength, setting))
    clusters = setting["clusters"]
    mixture = problem.remember(
        ("mixture", strength, clusters), lambda: _fit_mixture(problem, strength, clusters)
    )
    z = mixture.compute_posterior(setting["evidence"] * gram, setting["evidence"] * fit)
    predicted: np.ndarray = prior.inverse_transform(z * scales).astype(np.float32)
    return predicted


@dataclass(frozen=True)
class Mixture:
    """Gaussians with one covariance.

    Attributes:
        centres: (clusters, components).
        shares: (clusters,), which sum to one.
        precision: (components, components), inverse of the covariance.
    """

    centres: np.ndarray
    shares: np.ndarray
    precision: np.ndarray

    def compute_posterior(self, gram: np.ndarray, fit: np.ndarray) -> np.ndarray:
        """Posterior mean, where the log-likelihood of z is z t - z M z / 2.

        Args:
            gram: M (components, components).
            fit: t (components, test images).

        Returns:
            (test images, components).
        """
        factor = cho_factor(self.precision + gram)
        weighted = self.centres @ self.precision  # (clusters, components)
        means, log_shares = [], []
        for centre, pull, share in zip(self.centres, weighted, self.shares, strict=True):
            right = pull[:, None] + fit  # (components, test images)
            mean = cho_solve(factor, right)
            means.append(mean)
            log_shares.append(np.log(share) + ((mean * right).sum(0) - centre @ pull) / 2)
        posterior_shares = softmax(np.stack(log_shares), axis=0)  # (clusters, test images)
        z: np.ndarray = np.einsum("km,kcm->mc", posterior_shares, np.stack(means))
        return z


def _fit_mixture(problem: Problem, strength: float | None, clusters: int) -> Mixture:
    """The prior of coordinates: clusters of the images (k-means), and the covariance in them."""
    axes = problem.fit_axes(strength)
    n_components = len(axes.components_)
    coordinates = axes.transform(problem.get_images(strength))  # (images, components)
    clusters = min(clusters, len(np.unique(coordinates[:, 0])))
    if clusters == 1:
        return Mixture(np.zeros((1, n_components)), np.ones(1), np.eye(n_components))
    z = coordinates / np.sqrt(axes.explained_variance_)
    kmeans = KMeans(clusters, n_init=4, random_state=0).fit(coordinates)
    members = [z[kmeans.labels_ == k] for k in np.unique(kmeans.labels_)]
    centres = np.stack([part.mean(0) for part in members])
    deviations = np.concatenate([part - part.mean(0) for part in members])
    covariance = deviations.T @ deviations / len(z)
    shrunk = 0.95 * covariance + 0.05 * np.eye(n_components)  # never singular
    shares = np.array([len(part) for part in members]) / len(z)
    return Mixture(centres, shares, np.linalg.inv(shrunk))


def _gather_evidence(
    problem: Problem, strength: float | None, setting: Setting
) -> tuple[np.ndarray, np.ndarray]:
    """W S^-1 W' (components, components) and W S^-1 a' (components, test images)."""
    axes = problem.fit_axes(strength)
    z = axes.transform(problem.train.targets) / np.sqrt(axes.explained_variance_)
    a = problem.train.voxels[:, : setting["voxels"]].astype(np.float64)  # (images, voxels)
    tests = problem.test_voxels[:, : setting["voxels"]].astype(np.float64)
    encoder, residuals = fit_encoder(z, a, setting["penalty"] * len(z) / 10)
    right = np.concatenate([encoder, tests]).T  # (voxels, components + test images)
    evidence = encoder @ solve_noise(residuals, setting["shrinkage"], right)
    return evidence[:, : len(encoder)], evidence[:, len(encoder) :]


def fit_encoder(z: np.ndarray, a: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Ridge from coordinates to voxels.

    Args:
        z: (images, components).
        a: (images, voxels).
        penalty: of the squared weights.

    Returns:
        Weights (components, voxels), and leave-one-out residuals (images, voxels).
    """
    inverse = np.linalg.inv(z.T @ z + penalty * np.eye(z.shape[1]))
    weights = inverse @ (z.T @ a)
    leverage = (z @ inverse * z).sum(1)
    residuals = (a - z @ weights) / (1 - leverage.clip(max=1 - 1e-6))[:, None]
    return weights, residuals


def solve_noise(residuals: np.ndarray, shrinkage: float, right: np.ndarray) -> np.ndarray:
    """S^-1 B for the shrunk covariance S of residuals.

    S = shrinkage diag(R'R / n) + (1 - shrinkage) R'R / n, inverted through a matrix of images by
    images where there are fewer of these than of voxels (Woodbury).

    Args:
        residuals: R (images, voxels).
        shrinkage: towards the diagonal, more than 0 and at most 1.
        right: B (voxels, columns).

    Returns:
        (voxels, columns).
    """
    n, n_voxels = residuals.shape
    variances = np.square(residuals).mean(0)
    diagonal = shrinkage * variances.clip(min=1e-12)  # (voxels,)
    factor = residuals * np.sqrt((1 - shrinkage) / n)  # (images, voxels)
    if n_voxels <= n:
        solved: np.ndarray = np.linalg.solve(np.diag(diagonal) + factor.T @ factor, right)
        return solved
    scaled = right / diagonal[:, None]
    small = np.eye(n) + (factor / diagonal) @ factor.T  # (images, images)
    correction = factor.T @ np.linalg.solve(small, factor @ scaled)
    solved = scaled - correction / diagonal[:, None]
    return solved
