"""Figures of regions of interest: their voxels, reliability and share of what is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from src.figures.base import COLOURS, INK, SOFT, Look, draw_in_style, list_unique
from src.utils import PerceptError

LEVEL_COLOURS = {"low_level": COLOURS[0], "high_level": COLOURS[1]}


def _get_region_masks(voxels: pd.DataFrame, rois: Sequence[str]) -> dict[str, np.ndarray]:
    """Boolean masks (voxels,) of all voxels and of each region, by name."""
    masks = {"all voxels": np.ones(len(voxels), bool)}
    return masks | {roi: voxels[roi].to_numpy(bool) for roi in rois}


@draw_in_style
def plot_roi_sets(voxels: pd.DataFrame, sets: dict[str, Any]) -> Figure:
    """Which share of each region's voxels each model is given.

    A column chosen by mistake shows at once.

    Args:
        voxels: one row a voxel, with Boolean columns of regions.
        sets: by name of the model the positions of its voxels (selected,), or None for all of them.
    """
    regions = voxels.select_dtypes("bool")
    rois = [str(name) for name in regions.columns if regions[name].any()]
    masks = _get_region_masks(voxels, rois)
    shares = np.empty((len(sets), len(masks)))
    for row, positions in enumerate(sets.values()):
        selected = np.ones(len(voxels), bool)
        if positions is not None:
            selected = np.isin(np.arange(len(voxels)), positions)
        shares[row] = [selected[mask].mean() for mask in masks.values()]
    size = (1.6 + 0.62 * len(masks), 0.9 + 0.42 * len(sets))
    fig, ax = plt.subplots(figsize=size, layout="constrained")
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    place: Look = {"ha": "center", "va": "center", "fontsize": 8}
    for (row, column), share in np.ndenumerate(shares):
        colour = "white" if share > 0.6 else INK
        ax.text(column, row, f"{share:.0%}", color=colour, **place)
    names = [f"{name}\n{mask.sum():,}" for name, mask in masks.items()]
    rotation = 40 if len(masks) > 14 else 0
    ax.set_xticks(range(len(masks)), names, fontsize=8, rotation=rotation)
    ax.set_yticks(range(len(sets)), list(sets))
    ax.set_title("share of each region's voxels that a model is given")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return fig


@draw_in_style
def plot_roi_reliability(
    voxels: pd.DataFrame, noise_ceiling: str = "noise_ceiling", rois: Sequence[str] | None = None
) -> Figure:
    """Size and reliability of each region.

    Number of voxels, median noise ceiling, and its histogram on a common axis.

    Args:
        voxels: one row a voxel: Boolean columns of regions, and the noise ceiling (share of
            variance a model could explain).
        noise_ceiling: column of the noise ceiling.
        rois: columns of the regions; every Boolean column by default.

    Raises:
        PerceptError: without regions or noise ceiling.
    """
    rois = list(voxels.select_dtypes("bool").columns) if rois is None else list(rois)
    if not rois or noise_ceiling not in voxels:
        raise PerceptError(
            f"voxels needs Boolean region columns and a column {noise_ceiling!r}; it has "
            f"{', '.join(map(str, voxels.columns))}."
        )
    ceilings = voxels[noise_ceiling].to_numpy(float)
    high = max(float(np.nanquantile(ceilings, 0.995)), 1e-6)
    low = min(0.0, float(np.nanmin(ceilings)))
    bins = np.linspace(low, high, 41)
    masks = _get_region_masks(voxels, rois)
    height = 0.7 + 0.52 * len(masks)
    size = (7, height)
    fig, axes = plt.subplots(
        len(masks),
        1,
        figsize=size,
        sharex=True,
        squeeze=False,
    )
    top, bottom = 1 - 0.32 / height, 0.48 / height
    fig.subplots_adjust(left=0.36, right=0.97, top=top, bottom=bottom, hspace=0.12)
    for ax, (name, mask) in zip(axes[:, 0], masks.items(), strict=True):
        values = ceilings[mask & np.isfinite(ceilings)]
        colour = SOFT if ax is axes[0, 0] else COLOURS[0]
        ax.hist(
            np.clip(values, low, high),
            bins,
            color=colour,
            alpha=0.85,
        )
        median = "-"
        if len(values):
            median = f"{np.median(values):.2f}"
            ax.axvline(np.median(values), color=INK, lw=1.5)
        _write_cells(ax, 0.35, (name, f"{mask.sum():,}", median), fontsize=9)
        ax.set(yticks=[])
        ax.spines["left"].set_visible(False)
    headings = ("region", "voxels", "median")
    _write_cells(axes[0, 0], 1.12, headings, fontsize=8, color=SOFT)
    axes[-1, 0].set_xlabel(f"{noise_ceiling.replace('_', ' ')} (line: median)")
    return fig


def _write_cells(
    ax: Any,
    y: float,
    texts: Sequence[str],
    **look: Any,
) -> None:
    """Three cells of a table, left of a panel: name, number of voxels, median."""
    name, *numbers = texts
    look["transform"] = ax.transAxes
    ax.text(-0.52, y, name, ha="left", fontweight="bold", **look)
    for x, number in zip((-0.16, -0.03), numbers, strict=True):
        ax.text(x, y, number, ha="right", fontweight="normal", **look)


@draw_in_style
def plot_region_bars(
    table: pd.DataFrame, joint_sets: Sequence[str] = ("early areas", "higher areas")
) -> Figure:
    """How much the decoder relies on each region.

    Its share of the attribution of both levels, and by how much each score falls when it is
    permuted.

    Args:
        table: rows of `attribution.attribution_table` and `importance_table`: [level, measure,
            score, region, voxels, value, low, high].
        joint_sets: sets of regions that are permuted jointly, drawn below the others.

    Raises:
        PerceptError: for a table without such rows.
    """
    drops = table[(table["measure"] == "drop") & (table["region"] != "all")]
    shares = table[table["measure"] == "attribution"]
    names = list_unique([*shares["region"], *drops["region"]])
    regions = [name for name in names if name not in joint_sets]
    regions += [name for name in joint_sets if (drops["region"] == name).any()]
    panels = []  # level and score of each panel of drops
    for level in LEVEL_COLOURS:
        scores = list_unique(drops.loc[drops["level"] == level, "score"])
        panels += [(level, score) for score in scores]
    if not regions or not panels:
        raise PerceptError("There are no drops of regions to draw.")
    n_panels = 1 + len(panels)
    size = (2.6 + 1.85 * n_panels, 1.5 + 0.34 * len(regions))
    fig, axes = plt.subplots(1, n_panels, figsize=size, sharey=True, layout="constrained")
    for level, shift in (("low_level", -0.2), ("high_level", 0.2)):
        rows = shares[shares["level"] == level]
        _draw_bars(axes[0], rows, regions, shift, 0.36, LEVEL_COLOURS[level])
    axes[0].set_title("share of the\nattribution", fontsize=10)
    axes[0].xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for ax, (level, score) in zip(axes[1:], panels, strict=True):
        rows = drops[(drops["level"] == level) & (drops["score"] == score)]
        _draw_bars(ax, rows, regions, 0.0, 0.66, LEVEL_COLOURS[level])
        ax.set_title(f"drop in\n{score}", fontsize=10)
    n_voxels = table.drop_duplicates("region").set_index("region")["voxels"]
    labels = [f"{name}  {int(n_voxels[name]):,}" for name in regions]
    axes[0].set_yticks(range(len(regions)), labels, fontsize=9)
    for ax in axes:
        ax.set_ylim(len(regions) - 0.4, -0.6)
        ax.axvline(0, color=INK, lw=0.8)
        ax.tick_params(axis="y", length=0)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        if joint_sets and joint_sets[0] in regions:
            y = regions.index(joint_sets[0]) - 0.5
            ax.axhline(y, color=SOFT, lw=0.8, ls=":")
    _add_levels_legend(fig)
    return fig


def _draw_bars(
    ax: Any,
    rows: pd.DataFrame,
    regions: Sequence[str],
    shift: float,
    height: float,
    colour: str,
) -> None:
    """Horizontal bars of some regions with their intervals.

    Args:
        ax: the panel.
        rows: [region, value, low, high].
        regions: all regions of the figure, from top to bottom.
        shift: of the bars from the middle of their line.
        height: of the bars.
        colour: of the bars.
    """
    positions = {name: y for y, name in enumerate(regions)}
    y = rows["region"].map(positions).to_numpy(float) + shift
    value, low, high = rows[["value", "low", "high"]].to_numpy(float).T
    ax.barh(y, value, height, color=colour, alpha=0.85)
    ax.hlines(y, low, high, color=INK, lw=1.3)


def _add_levels_legend(fig: Figure) -> None:
    """Colours of the two levels, and what the bars are."""
    handles = []
    for level, colour in LEVEL_COLOURS.items():
        label = level.replace("_", " ")
        handles.append(
            Rectangle(
                (0, 0),
                1,
                1,
                color=colour,
                label=label,
            )
        )
    look: Look = {"ncols": 2, "fontsize": 9, "title_fontsize": 9, "alignment": "left"}
    title = "region and its voxels; bars with 95 % intervals over images"
    fig.legend(handles=handles, loc="outside upper left", title=title, **look)
