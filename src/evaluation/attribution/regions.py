"""Disjoint regions of the voxels that a decoder sees, and groups of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from src.utils import PerceptError

# names that early visual cortex has in the data sets known here
EARLY_AREAS = "V1,V2,V3,V4,hV4,V1v,V1d,V2v,V2d,V3v,V3d,LHEarlyVis,RHEarlyVis,early"

HALVES = {"left", "right"}  # Boolean columns that are no regions

NO_REGION = "no region"

EARLY_GROUP = "early areas"
HIGHER_GROUP = "higher areas"
GROUPS = (EARLY_GROUP, HIGHER_GROUP)


def partition_voxels(
    table: pd.DataFrame, columns: np.ndarray, names: str = ""
) -> dict[str, np.ndarray]:
    """Disjoint regions of the voxels that a decoder sees: a voxel of several regions belongs to the
    first of them.

    Args:
        table: `Subject.voxels`, one row a voxel of the subject.
        columns: int64 (selected,), which of these the decoder sees, in its order.
        names: regions separated by commas, first come first served; by default every Boolean
            column, in the order of the table.

    Returns:
        By region the positions among the selected voxels, int64; voxels of none under "no region".
        Regions without a voxel are left out.

    Raises:
        PerceptError: for a name that is no region, columns beyond the table, or a table without
            regions.
    """
    available = [str(name) for name in table.select_dtypes("bool").columns if name not in HALVES]
    regions = [name.strip() for name in names.split(",") if name.strip()] or available
    unknown = [name for name in regions if name not in available]
    if not available or unknown:
        problem = "no Boolean column, so no region"
        if available:
            problem = f"no region {', '.join(unknown)}: it has {', '.join(available)}"
        raise PerceptError(
            f"The table of voxels has {problem}; name regions that were prepared (notebook 00)."
        )
    if len(columns) and columns.max() >= len(table):
        raise PerceptError(
            f"The decoder reads voxel {columns.max()} and the table ends at {len(table) - 1}: they"
            " are of different subjects."
        )
    is_member = table[regions].to_numpy()[columns]  # (selected, regions)
    owner = np.where(is_member.any(1), is_member.argmax(1), len(regions))
    parts = {}
    for i, name in enumerate([*regions, NO_REGION]):
        positions = np.flatnonzero(owner == i)
        if len(positions):
            parts[name] = positions
    return parts


def group_regions(
    regions: Mapping[str, np.ndarray], early: str = EARLY_AREAS
) -> dict[str, list[str]]:
    """Names of the regions that are early visual areas, and of the other named ones, by `GROUPS`; a
    group without a region is left out.

    Args:
        regions: of `partition_voxels`.
        early: names of the early visual areas, separated by commas.
    """
    early_names = {name.strip() for name in early.split(",")}
    named = [name for name in regions if name != NO_REGION]
    groups = {
        EARLY_GROUP: [name for name in named if name in early_names],
        HIGHER_GROUP: [name for name in named if name not in early_names],
    }
    return {group: members for group, members in groups.items() if members}
