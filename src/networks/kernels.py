"""Kernel ridge regression from voxels to targets: nonlinear, and solved in closed form.

Two kernels, each with features of its own (fixed settings, measured on validation images of the
mini world; nothing is searched when it is fitted):

- "arc-cosine" on signal dimensions: voxels are whitened by the covariance of their noise, rotated
  to the axes of their signal, and each axis is shrunk by how reliable it is.
- "rbf" on reliability-weighted voxels: each voxel is multiplied by its noise-ceiling SNR.

Both estimates need images that were shown more than once. Without any, both kernels read the voxels
as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from src.networks.base import Network
from src.utils import PerceptError

KERNELS = ("arc-cosine", "rbf")
ARC_COSINE_BIAS = 0.1  # of the mean square of a feature
RBF_WIDTH = 2.0  # gamma times the median squared distance
PENALTY = 0.1  # of the mean diagonal of the kernel
NOISE_SHRINKAGE = 0.2  # of the noise covariance towards its diagonal
ROWS_AT_ONCE = 1000  # of training images, for their median distance and mean similarity
TARGETS_AT_ONCE = 16384  # which bounds the memory of a solution


# ----------------------------------------------------------------------------------------- kernels
def compute_arc_cosine_kernel(a: Tensor, b: Tensor, bias: float = ARC_COSINE_BIAS) -> Tensor:
    """Arc-cosine kernel of order 1 of a (n, features) and b (m, features): (n, m).

    k = |a||b| (sin t + (pi - t) cos t) / pi, where t is the angle between a and b, after `bias` x
    features was added to every inner product: it is what an infinitely wide layer of rectified
    linear units, with biases, computes.

    Source: Cho & Saul 2009, equation 6.
    """
    offset = bias * a.shape[1]
    norm_a = (a.square().sum(1) + offset).sqrt()  # (n,)
    norm_b = (b.square().sum(1) + offset).sqrt()  # (m,)
    norms = norm_a[:, None] * norm_b  # (n, m)
    cosine = ((a @ b.T + offset) / norms).clamp(-1, 1)
    angle = cosine.arccos()
    return norms * (angle.sin() + (math.pi - angle) * cosine) / math.pi


def compute_rbf_kernel(a: Tensor, b: Tensor, gamma: float | Tensor) -> Tensor:
    """exp(-gamma |a - b|^2) of a (n, features) and b (m, features): (n, m)."""
    return torch.exp(-gamma * compute_squared_distances(a, b))


def compute_squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances of a (n, features) and b (m, features): (n, m)."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    return (squares - 2 * a @ b.T).clamp(min=0)


# ---------------------------------------------------------------------------------------- features
@dataclass(frozen=True)
class RepeatNoise:
    """How much single trials of the same image differ.

    Attributes:
        covariance: (voxels, voxels) of a single trial about the mean of its image, pooled over
            images.
        averaged: its share that is left in the mean over the repeats of an image: the mean over
            images of 1 / number of repeats.
    """

    covariance: Tensor
    averaged: float

    def __post_init__(self) -> None:
        """Refuse voxels without noise, by which nothing can be divided.

        Raises:
            PerceptError: if a variance is zero, negative or not finite.
        """
        variances = self.covariance.diagonal()
        damaged = int((~(variances > 0) | ~torch.isfinite(variances)).sum())
        if damaged:
            raise PerceptError(
                f"{damaged} of {len(variances)} voxels have no noise between repeats of an image,"
                " so their reliability cannot be known: leave constant voxels out (rois)."
            )


def compute_signal_projection(mean_voxels: Tensor, noise: RepeatNoise) -> Tensor:
    """Map from voxels to signal dimensions: (voxels, dimensions), those without signal left out.

    Noise is whitened (its covariance first shrunk towards its diagonal). In that space the
    covariance of the signal is the covariance of the images' means, less what noise is left in
    them; its eigenvectors are the dimensions, and one whose signal variance is s is multiplied by
    s / (s + averaged noise), the Wiener filter of the mean.

    Args:
        mean_voxels: (images, voxels), the mean over the repeats of each image.
        noise: of single trials.

    Raises:
        PerceptError: if no dimension holds any signal.

    Source: generative modelling of signal and noise, Kay et al. 2024 (GSN), by the method of
        moments.
    """
    diagonal = noise.covariance.diagonal().diag()
    shrunk = (1 - NOISE_SHRINKAGE) * noise.covariance + NOISE_SHRINKAGE * diagonal
    factor = torch.linalg.cholesky(shrunk)  # its inverse whitens the noise
    covariance = torch.linalg.solve_triangular(factor, mean_voxels.T.cov(), upper=False)
    covariance = torch.linalg.solve_triangular(factor, covariance.T, upper=False)
    signal, rotation = torch.linalg.eigh(covariance)
    signal = signal - noise.averaged  # the noise's own covariance is the identity here
    has_signal = signal > 0
    if not has_signal.any():
        raise PerceptError(
            "Repeats of an image are no more alike than different images, so there is no signal to"
            " decode: check which trials belong to which image."
        )
    reliability = signal / (signal + noise.averaged)
    chosen = (rotation * reliability)[:, has_signal]
    return torch.linalg.solve_triangular(factor.T, chosen, upper=True)


def compute_reliability_weights(mean_voxels: Tensor, noise: RepeatNoise) -> Tensor:
    """Noise-ceiling SNR of each voxel, (voxels,): signal sd over noise sd of a single trial.

    Args:
        mean_voxels: (images, voxels), the mean over the repeats of each image.
        noise: of single trials.

    Raises:
        PerceptError: if no voxel holds any signal.

    Source: Allen et al. 2022 (Nature Neuroscience), ncsnr.
    """
    variances = noise.covariance.diagonal()
    signal = (mean_voxels.var(0) - noise.averaged * variances).clamp(min=0)
    if not signal.any():
        raise PerceptError(
            "Repeats of an image are no more alike than different images, so there is no signal to"
            " decode: check which trials belong to which image."
        )
    return (signal / variances).sqrt()


# ----------------------------------------------------------------------------------------- decoder
class KernelRidge(Network):
    """Kernel ridge regression from voxels to targets of any shape.

    Args:
        in_dim: number of voxels.
        n_features: what the kernel compares: signal dimensions, or weighted voxels.
        n_images: training images, all of which are kept.
        target_shape: shape of the target of one image.
        kernel: one of KERNELS.
        weighted: whether features are voxels times a weight each, not a projection of all voxels.

    Raises:
        PerceptError: for an unknown kernel.

    The state dict holds projection (voxels, features) or weights (voxels,), support (images,
    features), coefficients (images, targets), intercept (targets,), gamma (of the rbf kernel), and
    the penalty that was added to the diagonal of the kernel.

    Source: Saunders et al. 1998; kernels and features: this module.
    """

    projection: Tensor
    support: Tensor
    coefficients: Tensor
    intercept: Tensor
    gamma: Tensor
    penalty: Tensor

    def __init__(
        self,
        in_dim: int,
        n_features: int,
        n_images: int,
        target_shape: Sequence[int],
        kernel: str = "arc-cosine",
        weighted: bool = False,
    ):
        super().__init__()
        if kernel not in KERNELS:
            raise PerceptError(
                f"No kernel is called '{kernel}': choose one of {', '.join(KERNELS)}."
            )
        self.kernel, self.weighted = kernel, weighted
        self.target_shape = tuple(target_shape)
        size = math.prod(self.target_shape)
        shape = (in_dim,) if weighted else (in_dim, n_features)
        self.register_buffer("projection", torch.zeros(shape))
        self.register_buffer("support", torch.zeros(n_images, n_features))
        self.register_buffer("coefficients", torch.zeros(n_images, size))
        self.register_buffer("intercept", torch.zeros(size))
        self.register_buffer("gamma", torch.zeros(()))
        self.register_buffer("penalty", torch.zeros(()))

    def forward(self, voxels: Tensor) -> Tensor:
        """(batch, voxels), or (batch, trials, voxels), -> (batch, *target_shape)."""
        voxels = voxels.flatten(1)
        if voxels.shape[-1] != len(self.projection):
            raise PerceptError(
                f"The kernel decoder reads {len(self.projection)} voxels but was given"
                f" {voxels.shape[-1]}: use the subject that it was fitted on."
            )
        similarity = self._compare(self._project(voxels), self.support)  # (batch, images)
        targets = similarity @ self.coefficients + self.intercept
        return targets.view(len(voxels), *self.target_shape)

    def _project(self, voxels: Tensor) -> Tensor:
        """Features (n, features) of voxels (n, voxels)."""
        return voxels * self.projection if self.weighted else voxels @ self.projection

    def _compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Kernel (n, m) of features a (n, features) and b (m, features)."""
        if self.kernel == "rbf":
            return compute_rbf_kernel(a, b, self.gamma)
        return compute_arc_cosine_kernel(a, b)

    def _factorise(self) -> Tensor:
        """Cholesky factor of the kernel of the training images plus penalty, (images, images)."""
        gram = self._compare(self.support, self.support)
        gram.diagonal().add_(self.penalty)
        return torch.linalg.cholesky(gram)

    @torch.no_grad()
    def predict_left_out(self, targets: Tensor) -> Tensor:
        """What would be predicted of each training image by a fit to all others.

        Args:
            targets: those that it was fitted to, (images, ...), in the same order.

        Returns:
            (images, *target_shape). The intercept and the features are those of all images.

        Source: the closed form of leave-one-out, e.g. Rifkin & Lippert 2007.
        """
        inverse_diagonal = torch.cholesky_inverse(self._factorise()).diagonal()
        residuals = self.coefficients / inverse_diagonal[:, None]
        return (targets.flatten(1) - residuals).view(len(targets), *self.target_shape)

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        voxels: np.ndarray,
        targets: np.ndarray,
        noise: RepeatNoise | None = None,
        kernel: str = "arc-cosine",
        penalty: float = PENALTY,
        device: str = "auto",
        weights: np.ndarray | None = None,
    ) -> KernelRidge:
        """Fit on training images only.

        Args:
            voxels: (images, voxels), normalised, the mean over the repeats of each image.
            targets: (images, ...).
            noise: of single trials; None where no image was shown twice: then the kernel reads the
                voxels as they are.
            kernel: one of KERNELS.
            penalty: in units of the mean diagonal of the kernel.
            device: torch device; "auto": a GPU where there is one.
            weights: of the voxels (voxels,), in place of what `noise` would give.

        Returns:
            The fitted module, on the CPU.

        Raises:
            PerceptError: if voxels and targets do not match, hold non-finite values, are of fewer
                than two images, or hold no signal; if the kernel is unknown.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        x = np.asarray(voxels, np.float32).reshape(len(voxels), -1)  # (images, voxels)
        y = np.asarray(targets, np.float32).reshape(len(targets), -1)  # (images, targets)
        _check_rows(x, y)
        mean_voxels = torch.as_tensor(x, device=device)
        if weights is not None:
            projection = torch.as_tensor(weights, dtype=torch.float32, device=device)
        else:
            projection = _choose_projection(mean_voxels, noise, kernel)
        weighted = projection.ndim == 1
        n_features = projection.shape[-1]
        decoder = cls(x.shape[1], n_features, len(x), targets.shape[1:], kernel, weighted)
        decoder.to(device)
        decoder._set_features(mean_voxels, projection, penalty)
        decoder._solve(torch.from_numpy(y))
        return decoder.cpu().eval()

    def _set_features(self, mean_voxels: Tensor, projection: Tensor, penalty: float) -> None:
        """Features of the training images, scaled to a mean square of 1; width and penalty."""
        self.projection = projection
        features = self._project(mean_voxels)
        scale = features.square().mean().sqrt()
        self.projection, self.support = projection / scale, features / scale
        if self.kernel == "rbf":
            self.gamma = RBF_WIDTH / _compute_median_distance(self.support)
        blocks = self.support.split(ROWS_AT_ONCE)
        diagonal = [self._compare(block, block).diagonal() for block in blocks]
        self.penalty = penalty * torch.cat(diagonal).mean()

    def _solve(self, targets: Tensor) -> None:
        """Coefficients of targets (images, targets), a block of targets at a time."""
        factor = self._factorise()
        self.intercept = targets.mean(0).to(self.support.device)
        for start in range(0, targets.shape[1], TARGETS_AT_ONCE):
            columns = slice(start, start + TARGETS_AT_ONCE)
            block = targets[:, columns].to(self.support.device) - self.intercept[columns]
            self.coefficients[:, columns] = torch.cholesky_solve(block, factor)


def _choose_projection(mean_voxels: Tensor, noise: RepeatNoise | None, kernel: str) -> Tensor:
    """Projection (voxels, features) or weights (voxels,) that a kernel reads."""
    if noise is None:
        return mean_voxels.new_ones(mean_voxels.shape[1])
    noise = RepeatNoise(noise.covariance.to(mean_voxels), noise.averaged)
    if kernel == "rbf":
        return compute_reliability_weights(mean_voxels, noise)
    return compute_signal_projection(mean_voxels, noise)


def _compute_median_distance(features: Tensor) -> Tensor:
    """Median squared distance between training images, at most ROWS_AT_ONCE of them."""
    step = -(-len(features) // ROWS_AT_ONCE)
    chosen = features[::step]
    distances = compute_squared_distances(chosen, chosen)
    rows, columns = torch.triu_indices(len(chosen), len(chosen), 1, device=distances.device)
    return distances[rows, columns].median()


def _check_rows(x: np.ndarray, y: np.ndarray) -> None:
    """Refuse x (rows, voxels) and y (rows, targets) that do not match or are not finite."""
    if len(x) != len(y) or len(x) < 2:
        raise PerceptError(
            f"A kernel ridge needs one row of voxels a target, and at least two, but there are"
            f" {len(x)} and {len(y)}: pass matching rows."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise PerceptError(
            "Voxels or targets for the kernel ridge hold values that are not finite: clean or drop"
            " these rows first."
        )
