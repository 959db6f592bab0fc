"""Brain correlation: responses that an encoding model predicts from reconstructions, against measured ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from src.utils import PerceptError

EARLY = {  # the published regions, by the columns that readers give them
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
    known = set(map(str, voxels.select_dtypes("bool").columns))
    masks = {
        name: voxels[[c for c in columns if c in known]].any(axis=1).to_numpy(bool)
        for name, columns in EARLY.items()
        if known & set(columns)
    }
    masks = {name: mask for name, mask in masks.items() if mask.any()}
    rest = ~np.any(list(masks.values()), axis=0) if masks else np.zeros(len(voxels), bool)
    return {
        "nsd_general": np.ones(len(voxels), bool),
        **masks,
        **({"higher_vis": rest} if rest.any() else {}),
    }


def brain_correlation(
    predicted: Any, measured: Any, masks: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Pearson's correlation of predicted and measured responses across the voxels of each region,
    for each image, as published (MindEye2, Table 1).

    Use it as

        encoder = load_gnet("mini", subj) measured, image_ids = subject.averaged("test",
        normaliser=Normaliser.fit(subject))  # z-scores: mean over the repeats of each image scores
        = brain_correlation(encoder.predict(reconstructions), measured, roi_masks(subject.voxels)) #
        region -> (images,)

    and show beside it the same for the seen images (ceiling), for `predicted` in another order
    (floor) and for the mean image.

    Args:
        predicted: (n, voxels), what the encoder says of each reconstruction
            (`GNetEncoder.predict`).
        measured: (n, voxels), what was measured while the subject saw the images, in the same
            order, the mean over repeats, z-scored.
        masks: region -> bool (voxels,), e.g. of `roi_masks`.

    Returns:
        region -> float64 (n,); 0 where predicted or measured is the same in all of its voxels.

    Raises:
        PerceptError: for shapes that do not fit each other, regions of fewer than two voxels, and
            values that are not finite.
    """
    predicted, measured = (
        np.asarray(v.detach().cpu() if isinstance(v, Tensor) else v, np.float64)
        for v in (predicted, measured)
    )
    _check_responses(predicted, measured, masks)
    return {
        name: _pearson(predicted[:, mask], measured[:, mask])
        for name, mask in ((n, np.asarray(m)) for n, m in masks.items())
    }


def brain_correlation_centred(
    predicted: Any, measured: Any, masks: Mapping[str, Any], predicted_mean: Any, measured_mean: Any
) -> dict[str, np.ndarray]:
    """`brain_correlation` without what all images have in common: of either side, its mean over
    training images is taken off first.

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
    sides = []
    for name, values, mean in (
        ("predicted", predicted, predicted_mean),
        ("measured", measured, measured_mean),
    ):
        values, mean = (
            np.asarray(v.detach().cpu() if isinstance(v, Tensor) else v, np.float64)
            for v in (values, mean)
        )
        if mean.shape != values.shape[1:]:
            raise PerceptError(
                f"The mean of the {name} responses is {mean.shape} and they are {values.shape}:"
                " give its mean over training images, (voxels,)."
            )
        sides.append(values - mean)
    return brain_correlation(sides[0], sides[1], masks)


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
    for name, mask in masks.items():
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape != predicted.shape[1:] or mask.sum() < 2:
            raise PerceptError(
                f"The mask of region '{name}' must be Boolean ({predicted.shape[1]},) with at least"
                f" 2 voxels: it is {mask.dtype} {mask.shape}."
            )


def _pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of each row of a (n, voxels) with that of b; 0 for a row without variance."""
    a, b = (v - v.mean(1, keepdims=True) for v in (a, b))
    norm = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), norm, out=np.zeros(len(a)), where=norm > 0)
