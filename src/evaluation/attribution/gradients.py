"""Integrated gradients of the similarity between a decoder's prediction and a target."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.evaluation.attribution.level import BATCH, SIMILARITIES, Level
from src.utils import PerceptError, progress, require_extra

# mean error of completeness, as a share of the mean change, beyond which steps are too few
TOLERATED = 0.05

IMAGES = 16  # that are attributed at a time


class Attribution(NamedTuple):
    """What each voxel adds to the similarity.

    Attributes:
        values: float32 (images, selected).
        change: (images,) similarity at the voxels less that at the baseline.
        error: (images,) sum of values less change.
    """

    values: np.ndarray
    change: np.ndarray
    error: np.ndarray

    @property
    def relative_error(self) -> float:
        """Mean absolute error of completeness as a share of the mean absolute change."""
        mean_change = np.abs(self.change).mean()
        return float(np.abs(self.error).mean() / max(mean_change, 1e-12))


def integrated_gradients(level: Level, target: str = "seen", steps: int = 32) -> Attribution:
    """Attribute the similarity of prediction and target to voxels, along the straight line from the
    baseline to what was measured.

    Completeness holds: over voxels, the values add up to the difference of the similarity between
    the two ends; by how much a sum of `steps` gradients misses it is returned.

    Args:
        level: from `open_level`.
        target: "seen": the true tokens or latent, so that the truth is part of what is explained;
            "predicted": the decoder's own prediction, which needs no truth: what makes the
            prediction the one that it is.
        steps: points on the line, by Gauss-Legendre.

    Raises:
        PerceptError: for an unknown target, fewer than 2 steps, or a similarity that is not finite.

    Warns:
        UserWarning: if the values miss the change by more than 5 %.

    Source: Sundararajan et al. 2017 (arXiv 1703.01365), equation 1 and proposition 1.
    """
    captum_attr = require_extra("captum.attr", "attribution")
    if target not in ("seen", "predicted") or steps < 2:
        raise PerceptError(
            f"Integrated gradients were asked for target '{target}' in {steps} steps: choose seen"
            " or predicted, and at least 2 steps."
        )
    targets = level.truth if target == "seen" else level.predict(level.voxels)
    targets = targets.flatten(1)
    similarity = SIMILARITIES[level.kind].compute

    def explained(x: Tensor, rows: Tensor) -> Tensor:
        return similarity(level.output(x), rows)

    method = captum_attr.IntegratedGradients(explained)
    start = torch.as_tensor(level.baseline, device=level.device)[None]
    values, changes = [], []
    n = len(level.voxels)
    batches = np.array_split(np.arange(n), -(-n // IMAGES))
    for batch in progress(batches, f"attributing the {level.title}"):
        x = torch.as_tensor(level.voxels[batch], device=level.device)
        rows = targets[batch].to(level.device)
        attributions = method.attribute(
            x,
            start,
            additional_forward_args=(rows,),
            n_steps=steps,
            internal_batch_size=BATCH,
        )
        values.append(attributions.detach().cpu())
        with torch.no_grad():
            change = explained(x, rows) - explained(start.expand_as(x), rows)
        changes.append(change.cpu())
    return _check_attribution(level, steps, torch.cat(values), torch.cat(changes))


def _check_attribution(level: Level, steps: int, values: Tensor, changes: Tensor) -> Attribution:
    """The attribution with its error of completeness; warns where that is large."""
    each_voxel = values.float().numpy()
    change = changes.double().numpy()
    error = each_voxel.sum(1, dtype=np.float64) - change
    attribution = Attribution(each_voxel, change, error)
    if not np.isfinite(error).all():
        raise PerceptError(
            f"The similarity of the {level.title} is not finite for some images,"
            " so that nothing can be attributed: check the decoder."
        )
    if attribution.relative_error > TOLERATED:
        warnings.warn(
            "Attributions miss the change of the similarity by"
            f" {attribution.relative_error:.1%}: take more than {steps} steps.",
            stacklevel=3,
        )
    return attribution
