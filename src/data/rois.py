"""Regions of interest: sets of them by name, and the voxels that they select."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import pandas as pd

from src.utils import PerceptError

# of the 2023 ROI project, by the names that its tables use (there 1, 2 and 3; "-" is no selection)
ROI_SETS = {
    "set1": ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4", "FFA-1", "FFA-2", "PPA"),
    "set2": (
        "EBA",
        "FBA-1",
        "FBA-2",
        "mTL-bodies",
        "OFA",
        "FFA-1",
        "FFA-2",
        "mTL-faces",
        "aTL-faces",
        "OPA",
        "PPA",
        "RSC",
    ),
    "set3": ("early", "midventral", "midlateral", "midparietal", "ventral", "lateral", "parietal"),
}

ALL_VOXELS = "-"


def select_voxels(
    voxels: pd.DataFrame, rois: str, owner: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Select the voxels of regions, see `Subject.select_rois`.

    Args:
        voxels: one row a voxel, with a Boolean column for each region.
        rois: terms separated by commas.
        owner: whose voxels these are, for messages.

    Returns:
        Positions of the voxels, ascending, int64 (selected,), and the terms that exist.
    """
    terms = _expand_sets(rois)
    flags = voxels.select_dtypes("bool").columns
    regions = [str(name) for name in flags if voxels[name].any()]
    existing = tuple(t for t in terms if _strip_sign(t) in (*regions, ALL_VOXELS))
    included, excluded = _split_by_sign(existing)
    to_include, to_exclude = _split_by_sign(terms)
    includes_none = bool(to_include) and not included
    excludes_none = bool(to_exclude) and not excluded
    if not existing or includes_none or excludes_none:
        raise PerceptError(
            f"{owner} has none of the regions '{rois}': it has"
            f" {', '.join(regions) or 'no named region'}."
        )
    missing = [_strip_sign(term) for term in terms if term not in existing]
    if missing:
        warnings.warn(
            f"{owner} has no region {', '.join(missing)}: '{','.join(existing)}' is what is taken.",
            stacklevel=3,
        )
    selected = np.ones(len(voxels), bool)
    if included and ALL_VOXELS not in included:
        selected = voxels[included].any(axis=1).to_numpy()
    if excluded:
        selected = selected & ~voxels[excluded].any(axis=1).to_numpy()
    columns = np.flatnonzero(selected)
    if not len(columns):
        raise PerceptError(
            f"{owner} has no voxel in '{rois}': every one of them is left out again."
        )
    return columns.astype(np.int64), existing


def _expand_sets(rois: str) -> list[str]:
    """Terms of a selection, each once, with published sets replaced by their regions."""
    terms: dict[str, None] = {}
    for part in rois.split(","):
        term = part.strip()
        if term:
            terms |= dict.fromkeys(ROI_SETS.get(term, (term,)))
    return list(terms)


def _strip_sign(term: str) -> str:
    return term.removeprefix("!")


def _split_by_sign(terms: Iterable[str]) -> tuple[list[str], list[str]]:
    """Regions to include, and regions to exclude, which begin with "!"."""
    included, excluded = [], []
    for term in terms:
        if term.startswith("!"):
            excluded.append(_strip_sign(term))
        else:
            included.append(term)
    return included, excluded
