"""Decoders in closed form for a hundred images or a thousand: ridge, kernel, Bayesian linear.

Each is a function of a problem (training images, voxels of test images) and of a setting, and gives
the targets of the test images. Settings are chosen within the training images (`nested`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import pdist
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
    """Posterior mean of the image under a linear encoding model and a Gaussian prior of images.

    Images are coordinates z on the principal axes of the prior's images, of unit variance there. An
    encoder predicts the voxels, a = z W + e; its noise e has the covariance of leave-one-out
    residuals, shrunk towards its diagonal. With b a share of the evidence that is believed,

        E[z | a] = (I + b W S^-1 W')^-1 b W S^-1 a.

    Args:
        problem: what to learn from, and what to decode. The prior is that of the variants of its
            training images where there are some, else of these images.
        setting: `voxels`; `strength` of the movements of the prior's variants; `penalty` of the
            encoder, per ten images; `shrinkage` of the noise covariance towards its diagonal, more
            than 0 and at most 1; `evidence`, b.

    Returns:
        (test images, targets).

    Source: Schoenmakers et al. 2013 (NeuroImage), Naselaris et al. 2009.
    """
    strengths = problem.train.variants
    prior = problem.fit_axes(setting["strength"] if strengths else None)
    scales = np.sqrt(prior.explained_variance_)
    z = prior.transform(problem.train.targets) / scales  # (images, components)
    a = problem.train.voxels[:, : setting["voxels"]].astype(np.float64)  # (images, voxels)
    tests = problem.test_voxels[:, : setting["voxels"]].astype(np.float64)
    encoder, residuals = fit_encoder(z, a, setting["penalty"] * len(z) / 10)
    right = np.concatenate([encoder, tests]).T  # (voxels, components + test images)
    whitened = solve_noise(residuals, setting["shrinkage"], right)  # S^-1 [W', a']
    evidence = setting["evidence"] * encoder @ whitened  # (components, components + test images)
    n = len(encoder)
    posterior = np.linalg.solve(np.eye(n) + evidence[:, :n], evidence[:, n:])
    predicted: np.ndarray = prior.inverse_transform(posterior.T * scales).astype(np.float32)
    return predicted


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
    images (Woodbury).

    Args:
        residuals: R (images, voxels).
        shrinkage: towards the diagonal, more than 0 and at most 1.
        right: B (voxels, columns).

    Returns:
        (voxels, columns).
    """
    n = len(residuals)
    variances = np.square(residuals).mean(0)
    diagonal = shrinkage * variances.clip(min=1e-12)  # (voxels,)
    factor = residuals * np.sqrt((1 - shrinkage) / n)  # (images, voxels)
    scaled = right / diagonal[:, None]
    small = np.eye(n) + (factor / diagonal) @ factor.T  # (images, images)
    correction = factor.T @ np.linalg.solve(small, factor @ scaled)
    solved: np.ndarray = scaled - correction / diagonal[:, None]
    return solved
