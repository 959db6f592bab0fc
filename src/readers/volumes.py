"""NSD's maps between grids: a volume in one space, resampled onto the grid of another.

NSD ships, for each pair of spaces, `transforms/<source>-to-<target>.nii.gz`: (x, y, z, 3) on the
grid of the target, whose last axis holds coordinates into the volume of the source, counted from 1;
9999 stands for "nowhere". `map_volume` does with it what NSD's own tool does from volume to volume.
The check of the range is on the true range, 0 to size - 1 counted from 0: the published Python port
compares coordinates counted from 0 with 1 to size, so that it loses whatever lies in the first slab
of each axis, which is not reproduced here.

The names of the transforms to the 1 mm functional grid (func1pt0) are inferred.
"""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from scipy.ndimage import map_coordinates

from src.utils import PerceptError, require_file

NOWHERE = 9999
ORDERS = {"nearest": 0, "linear": 1, "cubic": 3}
TRANSFORM_SPACES = {"func1pt8mm": "func1pt8", "func1mm": "func1pt0"}


def load_nifti(path: str | Path, what: str) -> tuple[np.ndarray, np.ndarray]:
    """The array of a NIfTI file, in the dtype that its header leads to, and its affine (4, 4),
    voxel indices -> mm.

    Raises:
        PerceptError: if it is missing or damaged; `what` says what it holds.
    """
    try:
        image = nibabel.load(require_file(path, what))
        return np.asanyarray(image.dataobj), image.affine  # type: ignore[attr-defined]
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        raise PerceptError(
            f"{path} ({what}) cannot be read, it is damaged or no NIfTI file ({error}): fetch it"
            " again."
        ) from error


def map_volume(
    volume: np.ndarray, transform: np.ndarray, interpolation: str = "nearest", bad: float = 0
) -> np.ndarray:
    """Resample a volume onto the grid of a transform.

    Args:
        volume: (X, Y, Z) on the grid of the source.
        transform: (x, y, z, 3) on the grid of the target: coordinates into `volume`, counted from
            1; 9999 or NaN where there is none.
        interpolation: "nearest", "linear", "cubic", or "wta" for labels: each label's indicator is
            interpolated linearly and the largest wins (of equal ones the smallest label).
        bad: value where the coordinates are missing or outside the volume.

    Returns:
        (x, y, z), of the dtype of `volume` for "nearest" and "wta", else float32.

    Raises:
        PerceptError: for other shapes, or an unknown interpolation.
    """
    if volume.ndim != 3 or transform.ndim != 4 or transform.shape[-1] != 3:
        raise PerceptError(
            f"A volume (X, Y, Z) and a transform (x, y, z, 3) are needed, these are {volume.shape}"
            f" and {transform.shape}."
        )
    if interpolation != "wta" and interpolation not in ORDERS:
        raise PerceptError(
            f"interpolation is {interpolation!r}: choose one of {', '.join([*ORDERS, 'wta'])}."
        )
    target, kept = (
        transform.shape[:3],
        volume.dtype if interpolation in ("nearest", "wta") else np.dtype(np.float32),
    )
    points = transform.reshape(-1, 3).T.astype(np.float64)  # (3, target voxels)
    given = np.isfinite(points).all(0) & (points != NOWHERE).all(0)
    points -= 1
    inside = given & (points >= 0).all(0) & (points <= np.array(volume.shape)[:, None] - 1).all(0)
    mapped = np.full(len(inside), bad, kept)
    if interpolation == "wta":
        mapped[inside] = _winners(volume, points[:, inside])
    else:
        source = volume if interpolation == "nearest" else volume.astype(np.float32)
        mapped[inside] = map_coordinates(
            source, points[:, inside], order=ORDERS[interpolation], mode="nearest"
        )
    return mapped.reshape(target)


def _winners(volume: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The label (n,) with the largest linearly interpolated indicator at points (3, n), one label
    in memory at a time.
    """
    best, winner = (
        np.full(points.shape[1], -np.inf, np.float32),
        np.zeros(points.shape[1], volume.dtype),
    )
    for label in np.unique(volume):
        share = map_coordinates(
            (volume == label).astype(np.float32), points, order=1, mode="nearest"
        )
        better = share > best + 1e-6  # an equal share, but for rounding, leaves the smaller label
        best[better], winner[better] = share[better], label
    return winner


def load_anat_roi(
    source: str | Path,
    subj: int,
    roi: str = "prf-visualrois",
    space: str = "func1pt8mm",
    interpolation: str = "nearest",
) -> np.ndarray:
    """A ROI drawn on NSD's anatomical grid (0.8 mm), on the functional grid.

    Args:
        source: NSD root, with nsddata/.
        subj: 1 to 8.
        roi: name of a file in nsddata/ppdata/subjAA/anat/roi/, without .nii.gz.
        space: func1pt8mm or func1mm.
        interpolation: as for `map_volume`; FMRI2IMG takes "nearest", "wta" gives labels with
            smoother borders.

    Returns:
        (x, y, z) labels on the functional grid, 0 where there is none.

    Raises:
        PerceptError: for an unknown space, or a missing file (naming it).
    """
    if space not in TRANSFORM_SPACES:
        raise PerceptError(f"space is {space!r}: choose one of {', '.join(TRANSFORM_SPACES)}.")
    folder = Path(source) / "nsddata" / "ppdata" / f"subj{subj:02d}"
    labels, _ = load_nifti(
        folder / "anat" / "roi" / f"{roi}.nii.gz", "the ROI on the anatomical grid"
    )
    transform, _ = load_nifti(
        folder / "transforms" / f"anat0pt8-to-{TRANSFORM_SPACES[space]}.nii.gz",
        "the transform from the anatomical to the functional grid",
    )
    return map_volume(labels, transform, interpolation)
