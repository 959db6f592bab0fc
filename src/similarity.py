"""How alike brain responses and images are: three measures, and what corrects or joins them.

Each gives a matrix (brains, images), larger the more alike, which `src.retrieval` ranks both ways.

- `compute_centred_cosine`: of predicted and true embeddings, the mean of training images taken off.
- `BrainLikelihood`: how likely the measured voxels are, given what an encoding model predicts for
  an image.
- `combine_similarities`: the sum of several, each in its own standard deviations.
- `correct_hubs` (CSLS): a candidate that resembles everything is worth less.

All that is estimated here (means, deviations, hubs) comes from training images or held-out images
that are passed in. None of it depends on the other queries of a test set, so a query is answered
alike whether it comes alone or among others. `center="queries"` of `BrainLikelihood.compare` is the
exception: it is transductive, and its scores are to be reported apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src.utils import PerceptError

DIAGONAL_SHARE = 0.6  # of a residual covariance that is kept as variances alone
NEIGHBOURS = 10  # whose mean similarity says how much of a hub a candidate is


def compute_centred_cosine(brain: Any, images: Any, center: Any) -> Tensor:
    """Cosine of embeddings from which the mean of training images was taken off: (n, m).

    Embeddings of images share most of their direction, which a plain cosine counts as likeness.

    Args:
        brain: embeddings predicted from the brain (n, ...); further axes are flattened.
        images: embeddings of the candidates (m, ...).
        center: mean embedding of training images, (...).

    Raises:
        PerceptError: if they do not have the same features, or hold values that are not finite.
    """
    brain, images = _flatten(brain, "brain embeddings"), _flatten(images, "image embeddings")
    mean = _flatten(torch.as_tensor(center)[None], "mean embedding")
    _check_width(brain, images, "embeddings")
    _check_width(brain, mean, "embeddings and their mean")
    return F.normalize(brain - mean, dim=1) @ F.normalize(images - mean, dim=1).T


@dataclass(frozen=True)
class BrainLikelihood:
    """How likely measured voxels are, given the responses that an encoding model predicts.

    Attributes:
        factor: Cholesky factor (voxels, voxels) of the shrunk residual covariance, whose inverse
            whitens what the encoding model leaves unexplained.
        measured_mean: mean response to training images (voxels,).
        predicted_mean: mean predicted response to them (voxels,).
    """

    factor: Tensor
    measured_mean: Tensor
    predicted_mean: Tensor

    @classmethod
    def from_covariance(
        cls,
        covariance: Any,
        measured_mean: Any,
        predicted_mean: Any,
        diagonal_share: float = DIAGONAL_SHARE,
    ) -> BrainLikelihood:
        """Whiten by (1 - diagonal_share) C + diagonal_share diag(C).

        Args:
            covariance: C, (voxels, voxels), of out-of-fold residuals of the encoding model.
            measured_mean: mean response to training images (voxels,).
            predicted_mean: mean predicted response to them (voxels,).
            diagonal_share: how far the covariance is shrunk towards its diagonal, 0 to 1.

        Raises:
            PerceptError: if the sizes do not match, or the covariance is not positive definite once
                shrunk.
        """
        matrix = torch.as_tensor(covariance).float()
        means = [
            torch.as_tensor(mean).float().to(matrix) for mean in (measured_mean, predicted_mean)
        ]
        n = len(matrix)
        if matrix.shape != (n, n) or any(mean.shape != (n,) for mean in means):
            raise PerceptError(
                f"A covariance {tuple(matrix.shape)} and means {[tuple(m.shape) for m in means]} do"
                " not belong together: pass (voxels, voxels) and (voxels,) of the same voxels."
            )
        shrunk = (1 - diagonal_share) * matrix + diagonal_share * matrix.diagonal().diag()
        factor, failed = torch.linalg.cholesky_ex(shrunk)
        if failed or not torch.isfinite(factor).all():
            raise PerceptError(
                "The residual covariance of the encoding model is not positive definite: leave"
                " voxels without variance out (rois), or fit the encoding model again."
            )
        return cls(factor, *means)

    def compare(self, measured: Any, predicted: Any, center: str = "training") -> Tensor:
        """Correlation of whitened measured and predicted responses: (n, m).

        Args:
            measured: voxels (n, voxels).
            predicted: response that the encoding model predicts to each candidate (m, voxels).
            center: "training": both less their mean over training images. "queries": less their
                mean over these very rows, which is transductive.

        Raises:
            PerceptError: for another center, other voxels, or values that are not finite.
        """
        measured, predicted = self._read(measured), self._read(predicted)
        centers = {
            "training": (self.measured_mean, self.predicted_mean),
            "queries": (measured.mean(0), predicted.mean(0)),
        }
        if center not in centers:
            raise PerceptError(f"center is '{center}': choose one of {', '.join(centers)}.")
        measured_mean, predicted_mean = centers[center]
        brain = self._whiten(measured - measured_mean)
        images = self._whiten(predicted - predicted_mean)
        return F.normalize(brain, dim=1) @ F.normalize(images, dim=1).T

    def score_samples(self, measured: Any, predicted: Any) -> Tensor:
        """Gaussian log-likelihood of each brain for candidates of its own: (n, candidates).

        -1/2 (x - f)' C^-1 (x - f), up to a constant, with x less the mean measured and f less the
        mean predicted response to training images.

        Args:
            measured: x, (n, voxels).
            predicted: f, responses that the encoding model predicts (n, candidates, voxels).

        Raises:
            PerceptError: as `compare`.
        """
        responses = torch.as_tensor(predicted)
        n, candidates = responses.shape[:2]
        flat = self._read(responses.flatten(0, 1)) - self.predicted_mean
        x = self._read(measured) - self.measured_mean
        if len(x) != n:
            raise PerceptError(
                f"There are candidates of {n} images and voxels of {len(x)}: pass the same images."
            )
        differences = x.repeat_interleave(candidates, 0) - flat
        return -0.5 * self._whiten(differences).square().sum(1).view(n, candidates)

    def _read(self, responses: Any) -> Tensor:
        """Responses float32 (n, voxels), checked."""
        rows = _flatten(responses, "responses").to(self.factor.device)
        _check_width(rows, self.factor, "responses and residuals")
        return rows

    def _whiten(self, rows: Tensor) -> Tensor:
        """Rows (n, voxels) such that residuals have the identity as covariance."""
        return torch.linalg.solve_triangular(self.factor, rows.T, upper=False).T


def combine_similarities(similarities: Sequence[Any], references: Sequence[Any]) -> Tensor:
    """Sum of similarities (n, m), each z-scored by its own mean and deviation over held-out pairs.

    Args:
        similarities: several (n, m), of the same brains and images.
        references: the same measures over all pairs of held-out brains and images, of any number.

    Raises:
        PerceptError: if there is not one reference a similarity, or one has no spread.
    """
    if len(similarities) != len(references) or not similarities:
        raise PerceptError(
            f"{len(similarities)} similarities came with {len(references)} references: give one"
            " each."
        )
    total = torch.zeros(())
    for similarity, reference in zip(similarities, references, strict=True):
        held_out = torch.as_tensor(reference).float()
        spread = held_out.std()
        if not spread > 0:
            raise PerceptError(
                "A similarity is the same for all held-out pairs, so it cannot be joined with"
                " another one: leave it out, or give other held-out images."
            )
        total = total + (torch.as_tensor(similarity).float() - held_out.mean()) / spread
    return total


def correct_hubs(
    similarity: Any, reference: Any, k: int = NEIGHBOURS, share: float = 0.5
) -> Tensor:
    """Subtract from each candidate half of its mean similarity to the k nearest held-out queries.

    Args:
        similarity: (queries, candidates).
        reference: (held-out queries, candidates), of queries that are not asked here: predictions
            for training images that were left out of the fit, or for validation images.
        k: neighbours, at most as many as there are held-out queries.
        share: of that mean which is subtracted. One half orders candidates as CSLS does,
            2 s - r(query) - r(candidate), whose term of the query is the same for all of them.

    Returns:
        (queries, candidates).

    Raises:
        PerceptError: if the two are not of the same candidates, or there are not k references.

    Source: Conneau et al. 2018 (arXiv 1710.04087), equation 3.
    """
    rows, held_out = torch.as_tensor(similarity).float(), torch.as_tensor(reference).float()
    if rows.shape[1:] != held_out.shape[1:]:
        raise PerceptError(
            f"Similarities {tuple(rows.shape)} and references {tuple(held_out.shape)} are not of"
            " the same candidates: columns must match."
        )
    if not 1 <= k <= len(held_out):
        raise PerceptError(
            f"{k} neighbours were asked for among {len(held_out)} held-out queries: give k up to"
            " their number."
        )
    return rows - share * held_out.topk(k, dim=0).values.mean(0)


def _flatten(values: Any, name: str) -> Tensor:
    """Rows float32 (n, features), refused if a value is not finite."""
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values)
    rows = values.detach().flatten(1).float()
    if not torch.isfinite(rows).all():
        raise PerceptError(
            f"The {name} hold NaN or infinite values: see what made them, and make them again."
        )
    return rows


def _check_width(rows: Tensor, references: Tensor, name: str) -> None:
    if rows.shape[1] != references.shape[1]:
        raise PerceptError(
            f"The {name} have {rows.shape[1]} and {references.shape[1]} features: both must be of"
            " the same model and voxels."
        )
