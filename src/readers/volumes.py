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

import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import map_coordinates

from src.files.foreign import check_expansion, read_errors
from src.utils import PerceptError, require_extra, require_file

NOWHERE = 9999  # in a transform: no place in the source
ORDERS = {"nearest": 0, "linear": 1, "cubic": 3}
TRANSFORM_SPACES = {"func1pt8mm": "func1pt8", "func1mm": "func1pt0"}


def load_nifti(path: str | Path, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Load a NIfTI file.

    Args:
        path: the file.
        what: its content, for errors.

    Returns:
        The array, in the dtype that its header leads to, and its affine (4, 4), voxel indices ->
        mm.

    Raises:
        PerceptError: if it is missing or damaged.
    """
    image = open_nifti(path, what)
    with read_errors(path):
        return np.asanyarray(image.dataobj), image.affine


def open_nifti(path: str | Path, what: str) -> Any:
    """Open a NIfTI file for its header, whose size is compared with that of the file.

    Returns:
        nibabel's image: its affine, and the array proxy dataobj (shape, dtype, offset, slope,
        inter).

    Raises:
        PerceptError: if it is missing, damaged, or announces more than it can hold.
    """
    nibabel = require_extra("nibabel", "nsd")
    path = require_file(path, what)
    with read_errors(path):
        image = nibabel.load(path)
        proxy = image.dataobj
        n_bytes = math.prod(map(int, proxy.shape)) * proxy.dtype.itemsize
        n_stored = path.stat().st_size
    if proxy.dtype.kind not in "biuf":
        raise PerceptError(f"{path} ({what}) holds {proxy.dtype}, where numbers are expected.")
    check_expansion(path, what, n_bytes, n_stored)
    is_compressed = path.suffix in (".gz", ".mgz")
    if not is_compressed and proxy.offset + n_bytes > n_stored:
        raise PerceptError(
            f"{path} ({what}) is cut off: it announces {n_bytes:,} bytes of {proxy.shape} and has"
            f" {n_stored:,}, fetch it again."
        )
    return image


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
    points = transform.reshape(-1, 3).T.astype(np.float64)  # (3, target voxels)
    is_mapped = np.isfinite(points).all(0) & (points != NOWHERE).all(0)
    points -= 1
    last = np.array(volume.shape)[:, None] - 1
    inside = is_mapped & (points >= 0).all(0) & (points <= last).all(0)
    keeps_dtype = interpolation in ("nearest", "wta")
    mapped = np.full(len(inside), bad, volume.dtype if keeps_dtype else np.float32)
    if interpolation == "wta":
        mapped[inside] = _interpolate_labels(volume, points[:, inside])
    else:
        source = volume if interpolation == "nearest" else volume.astype(np.float32)
        order = ORDERS[interpolation]
        mapped[inside] = map_coordinates(source, points[:, inside], order=order, mode="nearest")
    return mapped.reshape(transform.shape[:3])


def _interpolate_labels(volume: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The label with the largest linearly interpolated indicator at each point.

    Args:
        volume: (X, Y, Z) labels; the indicator of one label is in memory at a time.
        points: (3, n) coordinates, counted from 0.

    Returns:
        (n,) of the dtype of the volume.
    """
    n_points = points.shape[1]
    largest_share = np.full(n_points, -np.inf, np.float32)
    winner = np.zeros(n_points, volume.dtype)
    for label in np.unique(volume):
        indicator = (volume == label).astype(np.float32)
        share = map_coordinates(indicator, points, order=1, mode="nearest")
        # an equal share, but for rounding, leaves the smaller label
        wins = share > largest_share + 1e-6
        largest_share[wins], winner[wins] = share[wins], label
    return winner


def load_anat_roi(
    source: str | Path,
    subj: int,
    roi: str = "prf-visualrois",
    space: str = "func1pt8mm",
    interpolation: str = "nearest",
) -> np.ndarray:
    """Load a ROI drawn on NSD's anatomical grid (0.8 mm), resampled onto the functional grid.

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
    labels_path = folder / "anat" / "roi" / f"{roi}.nii.gz"
    transform_path = folder / "transforms" / f"anat0pt8-to-{TRANSFORM_SPACES[space]}.nii.gz"
    labels, _ = load_nifti(labels_path, "the ROI on the anatomical grid")
    transform, _ = load_nifti(
        transform_path, "the transform from the anatomical to the functional grid"
    )
    return map_volume(labels, transform, interpolation)
