"""What NSD-synthetic and NSD-Imagery share: one session of betas, all of it test data.

Both have neither training trials nor training statistics, so betas are z-scored here, with the
statistics of the very trials that are tested (`zscore`), and the attribute normalisation says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd

from src.readers.nsd_betas import SessionBetas, iterate_betas
from src.readers.nsd_files import FORMATS, VOLUMES, NsdFolders, check_options
from src.readers.nsd_voxels import load_mask, select_voxels
from src.utils import PerceptError

ZSCORES = ("run", "session", "none")


@dataclass(frozen=True)
class EvaluationBetas:
    """The betas of one session.

    Attributes:
        values: float32 (trials, voxels), percent signal change.
        voxels: table of the voxels.
        attributes: that say what they are.
    """

    values: np.ndarray
    voxels: pd.DataFrame
    attributes: dict[str, str]

    def select(self, rows: np.ndarray, run: np.ndarray, zscore: str) -> np.ndarray:
        """Betas of some trials, z-scored by voxel over all trials of a run or of the session.

        Args:
            rows: int, of the trials.
            run: (all trials,) run of each.
            zscore: run, session or none.
        """
        if zscore == "none":
            return self.values[rows]
        group = run if zscore == "run" else np.zeros_like(run)
        scored = np.empty_like(self.values)
        for number in np.unique(group):
            is_member = group == number
            part = self.values[is_member].astype(np.float64)
            sd = part.std(axis=0)
            centred = part - part.mean(axis=0)
            scored[is_member] = centred / np.where(sd > 0, sd, 1)
        return scored[rows]


def check_evaluation_options(
    subj: int, space: str, version: str, zscore: str, image_size: int
) -> None:
    """Refuse options that these data sets do not have.

    Raises:
        PerceptError: naming those they have.
    """
    if space not in VOLUMES:
        raise PerceptError(f"space is {space!r}: choose {' or '.join(VOLUMES)}.")
    if zscore not in ZSCORES or image_size < 0:
        raise PerceptError(
            f"zscore is {zscore!r} and image_size {image_size}: choose one of {', '.join(ZSCORES)}"
            " and a side in pixels, or 0."
        )
    check_options(subj, space, version, "auto")


def load_evaluation_betas(
    folders: NsdFolders, name: str, n_trials: int, roi: str, rois: str
) -> EvaluationBetas:
    """Load the betas of a session within a region.

    Args:
        folders: whose version is that of the experiment.
        name: of the file, such as betas_nsdsynthetic.
        n_trials: that the design has.
        roi, rois: as for `src.readers.nsd.read`.

    Raises:
        PerceptError: for a missing or damaged file, or one of another number of trials.
    """
    paths = [folders.betas / f"{name}.{suffix}" for suffix in FORMATS]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise PerceptError(
            f"{paths[0]} is missing (and so is the .nii.gz): fetch it, or choose another"
            " betas_version or space."
        )
    file = SessionBetas.open(path, 1)
    voxels, mask = select_voxels(folders, load_mask(folders, roi), rois)
    file.settle_axes(mask.voxels.shape)
    if file.n_trials != n_trials:
        raise PerceptError(
            f"{path} has {file.n_trials} trials, the design has {n_trials}: fetch it again."
        )
    values = np.concatenate(list(iterate_betas([file], mask.voxels, voxels)))
    attributes = {
        "space_kind": "volume",
        "grid": json.dumps(mask.voxels.shape),
        "affine": json.dumps(np.asarray(mask.affine, float).tolist()),
        "space": folders.space,
        "betas_version": folders.version,
        "roi": roi,
        "rois": rois,
    }
    return EvaluationBetas(values, voxels, attributes)


def describe_zscore(zscore: str) -> str:
    """What the attribute normalisation says."""
    if zscore == "none":
        return "none"
    return f"z-score by voxel within each {zscore}, statistics of these test data themselves"
