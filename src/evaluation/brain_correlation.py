"""Brain correlation: responses that an encoding model predicts from reconstructions, against
measured ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from src.utils import PerceptError

REGION_COLUMNS = {  # the published regions, by the columns that readers give them
    "V1": ("V1", "V1v", "V1d"),
    "V2": ("V2", "V2v", "V2d"),
    "V3": ("V3", "V3v", "V3d"),
    "V4": ("V4", "hV4"),
}


def roi_masks(voxels: pd.DataFrame) -> dict[str, np.ndarray]:
    """The published regions of a subject, from the Boolean columns of its table of voxels.

    nsd_general is every voxel; V1 to V4 are the columns of that name, or those of their parts (V1v,
    V1d, ..., hV4); higher_vis is what is in none of these, as in the published masks. Regions
    without a voxel are left out, and where none of V1 to V4 is known, so is higher_vis.

    Args:
        voxels: `Subject.voxels`, one row a voxel.

    Returns:
        {"nsd_general", "V1", "V2", "V3", "V4", "higher_vis": bool (voxels,)}, in this order.
    """
    flags = set(map(str, voxels.select_dtypes("bool").columns))
    masks = {"nsd_general": np.ones(len(voxels), bool)}
    early = np.zeros(len(voxels), bool)
    for name, columns in REGION_COLUMNS.items():
        available = [column for column in columns if column in flags]
        mask = voxels[available].any(axis=1).to_numpy(bool)
        if mask.any():
            masks[name] = mask
            early |= mask
    if early.any() and not early.all():
        masks["higher_vis"] = ~early
    return masks


def brain_correlation(
    predicted: Any, measured: Any, masks: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Pearson's correlation of predicted and measured responses across the voxels of each region,
    for each image, as published (MindEye2, Table 1).

    Show beside it the same for the seen images (the upper bound), for `predicted` in another order
    and for the mean image (baselines).

    Example:
        encoder = load_gnet("mini", subj)
        scores = brain_correlation(
            encoder.predict(reconstructions), measured, roi_masks(subject.voxels)
        )  # region -> (images,)

    Args:
        predicted: (n, voxels), responses to each reconstruction (`GNetEncoder.predict`).
        measured: (n, voxels), what was measured while the subject saw the images, in the same
            order, the mean over repeats, z-scored.
        masks: region -> bool (voxels,), e.g. of `roi_masks`.

    Returns:
        region -> float64 (n,); 0 where predicted or measured is the same in all of its voxels.

    Raises:
        PerceptError: for shapes that do not fit each other, regions of fewer than two voxels, and
            values that are not finite.
    """
    predicted = _to_float64(predicted)
    measured = _to_float64(measured)
    _check_responses(predicted, measured, masks)
    scores = {}
    for name, region in masks.items():
        mask = np.asarray(region)
        scores[name] = _pearson(predicted[:, mask], measured[:, mask])
    return scores


def brain_correlation_centred(
    predicted: Any, measured: Any, masks: Mapping[str, Any], predicted_mean: Any, measured_mean: Any
) -> dict[str, np.ndarray]:
    """`brain_correlation` without what all images have in common: the mean over training images is
    subtracted from either side first.

    The published score is high for any image at all where both sides have a pattern in common
    (betas that are not z-scored, and an encoder of such). Responses that are z-scored with training
    trials have none, and both scores agree (in the mini world to .001); this one is near 0 for a
    shuffled pairing.

    Args:
        predicted, measured, masks: as for `brain_correlation`.
        predicted_mean: (voxels,), mean of `GNetEncoder.predict` over training images (some hundreds
            will do).
        measured_mean: (voxels,), mean of the measured responses over training images.

    Returns:
        region -> float64 (n,).

    Raises:
        PerceptError: as `brain_correlation`, and for a mean that is not (voxels,).
    """
    predicted = _subtract_mean(predicted, predicted_mean, "predicted")
    measured = _subtract_mean(measured, measured_mean, "measured")
    return brain_correlation(predicted, measured, masks)


def _subtract_mean(values: Any, mean: Any, name: str) -> np.ndarray:
    """Responses (n, voxels) less their mean over training images (voxels,)."""
    values = _to_float64(values)
    mean = _to_float64(mean)
    if mean.shape != values.shape[1:]:
        raise PerceptError(
            f"The mean of the {name} responses is {mean.shape} and they are {values.shape}:"
            " give its mean over training images, (voxels,)."
        )
    return values - mean


def _to_float64(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
    return np.asarray(values, np.float64)


def _check_responses(predicted: np.ndarray, measured: np.ndarray, masks: Mapping[str, Any]) -> None:
    if predicted.ndim != 2 or predicted.shape != measured.shape:
        raise PerceptError(
            f"Predicted responses are {predicted.shape} and measured ones {measured.shape}, both"
            " must be the same (images, voxels): take the encoder of this very subject, and all of"
            " its voxels in their order."
        )
    if not (np.isfinite(predicted).all() and np.isfinite(measured).all()):
        raise PerceptError(
            "Predicted or measured responses hold NaN or infinite values: find out why before they"
            " are correlated."
        )
    for name, region in masks.items():
        mask = np.asarray(region)
        if mask.dtype != bool or mask.shape != predicted.shape[1:] or mask.sum() < 2:
            raise PerceptError(
                f"The mask of region '{name}' must be Boolean ({predicted.shape[1]},) with at least"
                f" 2 voxels: it is {mask.dtype} {mask.shape}."
            )


def _pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of each row of a (n, voxels) with that of b; 0 for a row without variance."""
    a = a - a.mean(1, keepdims=True)
    b = b - b.mean(1, keepdims=True)
    norm = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    correlation = np.zeros(len(a))
    return np.divide((a * b).sum(1), norm, out=correlation, where=norm > 0)
