"""The voxels of NSD: the mask that selects them, the labels of the ROI files, their table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from src.files.foreign import read_errors
from src.readers.common import (
    check_rois,
    list_files,
    make_roi_columns,
    parse_name_list,
    to_integers,
)
from src.readers.nsd_files import NsdFolders
from src.readers.volumes import load_anat_roi, load_nifti
from src.utils import PerceptError, require_extra

LABEL_NAMES = {  # documented labels, for where the .ctab is absent
    "prf-visualrois": ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4"),
    "streams": (
        "early",
        "midventral",
        "midlateral",
        "midparietal",
        "ventral",
        "lateral",
        "parietal",
    ),
}


@dataclass(frozen=True)
class Mask:
    """The voxels of a functional grid.

    Attributes:
        voxels: bool (x, y, z).
        affine: (4, 4), voxel indices -> mm.
    """

    voxels: np.ndarray
    affine: np.ndarray


def load_mask(folders: NsdFolders, roi: str) -> Mask:
    """Load the mask of a ROI.

    Args:
        folders: of the subject.
        roi: name of a file in the roi folder, "anat:<name>", or the path of a NIfTI file.

    Raises:
        PerceptError: for an unknown or empty ROI.
    """
    if roi.startswith("anat:"):
        name = roi.removeprefix("anat:")
        values = load_anat_roi(folders.root, folders.subj, name, folders.space)
        affine = _centred_affine(values.shape, folders.space)
    elif roi.endswith((".nii", ".nii.gz")):
        values, affine = load_nifti(Path(roi).expanduser(), "a mask of your own")
    else:
        path = folders.rois / f"{roi}.nii.gz"
        files = list_files(folders.rois, "*.nii.gz")
        names = [file.name.removesuffix(".nii.gz") for file in files]
        if names and roi not in names:
            raise PerceptError(f"There is no ROI file {path}: choose one of {', '.join(names)}.")
        values, affine = load_nifti(path, "the ROI that selects the voxels")
    if values.ndim != 3 or not (values > 0).any():
        raise PerceptError(
            f"ROI {roi} of subject {folders.subj} has shape {values.shape} and"
            f" {int((values > 0).sum())} voxels: it must be (x, y, z) with some > 0."
        )
    return Mask(values > 0, affine)


def _centred_affine(grid: tuple[int, ...], space: str) -> np.ndarray:
    """The affine of NSD's own tool: the origin is the centre of the grid."""
    size = 1.8 if space == "func1pt8mm" else 1.0
    affine = np.diag([size, size, size, 1.0])
    affine[:3, 3] = -size * (np.array(grid) - 1) / 2
    return affine


def select_voxels(folders: NsdFolders, mask: Mask, rois: str) -> tuple[pd.DataFrame, Mask]:
    """The table of voxels, and the mask narrowed to the labels in `rois` ("" keeps all).

    Raises:
        PerceptError: for an unknown label, labels without voxels, or a file on another grid.
    """
    nibabel = require_extra("nibabel", "nsd")
    labels = _load_labels(folders, mask.voxels)
    names = parse_name_list(rois)
    check_rois(names, labels, f"Subject {folders.subj} of NSD")
    is_selected = np.ones(int(mask.voxels.sum()), bool)
    if names:
        is_selected = np.any([labels[name] for name in names], axis=0)
    if not is_selected.any():
        raise PerceptError(
            f"No voxel of the ROI is in {rois} of subject {folders.subj}: choose other rois."
        )
    places = np.argwhere(mask.voxels)[is_selected]
    narrowed = np.zeros_like(mask.voxels)
    narrowed[tuple(places.T)] = True
    regions = {name: member[is_selected] for name, member in labels.items()}
    table = make_roi_columns(regions, len(places))
    table[["i", "j", "k"]] = places
    table[["x", "y", "z"]] = nibabel.affines.apply_affine(mask.affine, places)
    path = folders.betas / "ncsnr.nii.gz"
    if path.exists():
        values = load_nifti(path, "the noise ceiling's signal-to-noise ratio")[0]
        if values.shape != narrowed.shape:
            raise PerceptError(
                f"{path} has shape {values.shape}, the mask {narrowed.shape}: it must be of this"
                " very subject."
            )
        ncsnr = values[narrowed].astype(np.float64)
        is_valid = np.isfinite(ncsnr) & (ncsnr >= 0)  # NaN where a voxel has no valid data
        table["ncsnr"] = np.where(is_valid, ncsnr, 0.0)
        table["noise_ceiling"] = table["ncsnr"] ** 2 / (table["ncsnr"] ** 2 + 1)
    table["flat_sessions"] = 0
    return table, Mask(narrowed, mask.affine)


def _load_labels(folders: NsdFolders, mask: np.ndarray) -> dict[str, np.ndarray]:
    """For each label of each ROI file whether a voxel of the mask (voxels,) has it.

    prf-visualrois names its labels first; where two files share a name, the later file's label is
    called <file>:<label>.
    """
    labels: dict[str, np.ndarray] = {}
    for path in _list_roi_files(folders.rois):
        values, roi = load_nifti(path, "a ROI file")[0], path.name.removesuffix(".nii.gz")
        if values.shape != mask.shape:
            raise PerceptError(
                f"{path} has shape {values.shape}, the mask of the voxels {mask.shape}: they must"
                " be on the same grid, of this very subject."
            )
        # where nothing was measured there is no label
        label_of_voxel = to_integers(np.nan_to_num(values[mask], nan=0), f"A label in {path}")
        add_labels(labels, roi, label_of_voxel, load_label_names(folders, roi))
    return labels


def add_labels(
    labels: dict[str, np.ndarray], roi: str, label_of_voxel: np.ndarray, names: dict[int, str]
) -> None:
    """Add a mask (voxels,) for each label of a ROI file.

    Args:
        labels: masks by name, which are added to; a name that is taken is preceded by <roi>:.
        roi: name of the file.
        label_of_voxel: int (voxels,).
        names: of labels; also those without voxels become masks.
    """
    present_labels = np.unique(label_of_voxel[label_of_voxel > 0]).tolist()
    named_labels = [label for label in names if label > 0]
    for label in sorted({*present_labels, *named_labels}):
        default = roi if label == 1 and not names else f"{roi}-{label}"
        name = names.get(label, default)
        if name in labels:
            name = f"{roi}:{name}"
        labels[name] = label_of_voxel == label


def _list_roi_files(folder: Path) -> list[Path]:
    """The ROI files, prf-visualrois first, without the halves of a file that is there whole."""
    paths = sorted(
        list_files(folder, "*.nii.gz"),
        key=lambda path: (not path.name.startswith("prf-visualrois"), path.name),
    )
    names = {path.name for path in paths}
    return [path for path in paths if not _is_half_of(path.name, names)]


def _is_half_of(name: str, names: set[str]) -> bool:
    return name.startswith(("lh.", "rh.")) and name[3:] in names


def load_label_names(folders: NsdFolders, roi: str) -> dict[int, str]:
    """Names of the labels in a ROI file, with lh. or rh. before those of a half.

    They come from the lines "<number> <name> ..." of its .ctab, else they are the documented ones.
    """
    side, base = "", roi
    if roi.startswith(("lh.", "rh.")):
        side, base = roi[:3], roi[3:]
    for owner in (folders.subject, "fsaverage"):
        path = folders.label_names(owner, base)
        if path.exists():
            with read_errors(path):
                return _parse_label_names(path.read_text(encoding="utf-8"), side)
    documented = enumerate(LABEL_NAMES.get(base, ()), 1)
    return {label: side + name for label, name in documented}


def _parse_label_names(text: str, side: str) -> dict[int, str]:
    names = {}
    for parts in (line.split() for line in text.splitlines()):
        if len(parts) > 1 and re.fullmatch("-?[0-9]{1,9}", parts[0]):
            names[int(parts[0])] = side + parts[1]
    return names
