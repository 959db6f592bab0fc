"""Figures of voxels: their responses at each presentation, and values at their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from src.figures.base import FAINT, SOFT, Look, apply_style, draw_in_style
from src.figures.canvas import choose_tile_side, make_tiles
from src.utils import PerceptError, require_extra


@draw_in_style
def plot_trials(images: Any, responses: Sequence[np.ndarray], max_voxels: int = 200) -> Figure:
    """A few images and the responses of the voxels at each of their presentations.

    Rows that look the same are a reliable measurement.

    Args:
        images: (n, 3, height, width) in [0, 1].
        responses: for each image the z-scores of its presentations (repeats, voxels), voxels in the
            order in which they are to be drawn.
        max_voxels: voxels drawn, the first ones.
    """
    n = len(responses)
    options: Look = {"width_ratios": (1, 8), "layout": "constrained", "squeeze": False}
    options["figsize"] = (8, 0.95 * n + 0.5)
    fig, axes = plt.subplots(n, 2, **options)
    tiles = make_tiles(images, choose_tile_side(images), "bicubic")
    for (left, right), tile, betas in zip(axes, tiles, responses, strict=True):
        left.imshow(tile)
        left.axis("off")
        look: Look = {"cmap": "RdBu_r", "vmin": -3, "vmax": 3}
        look |= {"aspect": "auto", "interpolation": "nearest"}
        heatmap = right.imshow(betas[:, :max_voxels], **look)
        n_repeats = len(betas)
        numbers = [str(i + 1) for i in range(n_repeats)]
        right.set(xticks=[], yticks=range(n_repeats), yticklabels=numbers)
        right.set_ylabel(_describe_reliability(betas), fontsize=8)
    n_voxels = min(max_voxels, responses[0].shape[1])
    title = (
        f"the {n_voxels} most reliable voxels, a row a presentation; r:"
        " mean correlation of the rows"
    )
    axes[0, 1].set_title(title, fontsize=9)
    fig.colorbar(heatmap, ax=axes[:, 1], shrink=0.6, label="z-score")
    return fig


def _describe_reliability(betas: np.ndarray) -> str:
    """Mean correlation between the presentations (repeats, voxels) of one image, as a label."""
    if len(betas) < 2:
        return "once"
    pairs = np.corrcoef(betas)[np.triu_indices(len(betas), 1)]
    return f"r = {pairs.mean():.2f}"


VIEWS = {  # axes across and up
    "from behind": ("x", "z"),
    "from above": ("x", "y"),
    "from the right": ("y", "z"),
}

AXIS_LABELS = {"x": "left - right (mm)", "y": "back - front (mm)", "z": "down - up (mm)"}


@draw_in_style
def plot_voxel_map(
    voxels: pd.DataFrame,
    values: dict[str, Any],
    rois: Sequence[str] | None = None,
    label: str = "mean attribution",
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Voxels at their places, seen from three sides, each a dot in the colour of its value.

    Red is above 0, blue below.

    Args:
        voxels: one row a voxel: x, y, z (mm; right, front and up positive) and Boolean columns of
            regions.
        values: by what they are, e.g. "low level": (voxels,), NaN where a voxel was not used: a
            small grey dot. A row each, with its own symmetric scale.
        rois: regions whose names are written at their places; every Boolean column by default.
        label: what the values are, beside the colour scale.
        limits: of one colour scale for all rows, from dark to bright, for values that have no sign.

    Raises:
        PerceptError: without coordinates.
    """
    if not {"x", "y", "z"} <= set(voxels):
        raise PerceptError(
            "These voxels have no x, y and z (mm), so that there is no place to draw them at: look"
            " at regions."
        )
    rois = list(voxels.select_dtypes("bool").columns) if rois is None else list(rois)
    margin = 4  # mm, room for a dot
    spans = {axis: float(np.ptp(voxels[axis])) + margin for axis in AXIS_LABELS}
    widths = [spans[across] for across, _ in VIEWS.values()]
    tallest = max(spans[up] for _, up in VIEWS.values())
    row_height = 0.9 + 8.6 * tallest / sum(widths)  # inches; one scale for all views
    options: Look = {"width_ratios": widths, "squeeze": False, "layout": "constrained"}
    size = (12, row_height * len(values))
    fig, axes = plt.subplots(
        len(values),
        len(VIEWS),
        figsize=size,
        **options,
    )
    for row, (name, row_values) in zip(axes, values.items(), strict=True):
        row_values = np.asarray(row_values, float)
        for ax, view in zip(row, VIEWS, strict=True):
            across, up = VIEWS[view]
            dots = _scatter_voxels(ax, voxels[across], voxels[up], row_values, limits)
            title = f"{name}, {view}" if ax is row[0] else view
            ax.set(xlabel=AXIS_LABELS[across], ylabel=AXIS_LABELS[up])
            ax.set(aspect="equal", title=title)
            _name_regions(ax, voxels, rois, across, up)
        fig.colorbar(dots, ax=row, shrink=0.8, label=label, extend="both")
    return fig


def _find_colour_limit(values: np.ndarray) -> float:
    """Limit of a symmetric colour scale: the 99th percentile of the absolute values."""
    return max(float(np.nanquantile(np.abs(values), 0.99)), 1e-12)


def _scatter_voxels(
    ax: Any,
    across: pd.Series,
    up: pd.Series,
    values: np.ndarray,
    limits: tuple[float, float] | None,
) -> Any:
    """Draw one view of the voxels, the strongest on top; returns the dots that have a value."""
    x, y = across.to_numpy(float), up.to_numpy(float)
    unused = np.isnan(values)
    ax.scatter(x[unused], y[unused], s=3, c=FAINT)
    order = np.argsort(np.nan_to_num(np.abs(values), nan=-1.0))
    limit = _find_colour_limit(values)
    look: Look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    if limits is not None:
        look = {"cmap": "viridis", "vmin": limits[0], "vmax": limits[1]}
    look |= {"s": 11, "lw": 0.15, "edgecolors": SOFT}
    return ax.scatter(
        x[order],
        y[order],
        c=values[order],
        **look,
    )


def _name_regions(
    ax: Any,
    voxels: pd.DataFrame,
    rois: Sequence[str],
    across: str,
    up: str,
) -> None:
    """Write the names of regions at the middle of their voxels.

    In the right hemisphere where both have some; names that would overlap are moved up.

    Args:
        ax: the panel.
        voxels: one row a voxel, with coordinates and Boolean columns of regions.
        rois: the regions.
        across: coordinate of the horizontal axis.
        up: coordinate of the vertical axis.
    """
    centres = {}
    for roi in rois:
        members = voxels[voxels[roi].to_numpy(bool)]
        right = members[members["x"] > 0]
        if len(right):
            members = right
        if len(members):
            centres[roi] = members[[across, up]].median().to_numpy(float)
    width = 0.02 * float(np.ptp(voxels[across]))
    height = 0.02 * float(np.ptp(voxels[up]))
    placed: list[tuple[float, float, int]] = []  # x, y and letters of the names so far

    def overlaps(x: float, y: float, letters: int) -> bool:
        for other_x, other_y, other_letters in placed:
            reach = 2.4 * width * max(letters, other_letters) / 2
            if abs(x - other_x) < reach and abs(y - other_y) < 4 * height:
                return True
        return False

    edge = [withStroke(linewidth=2.5, foreground="white")]
    look: Look = {"fontsize": 8.5, "fontweight": "bold", "path_effects": edge}
    for roi in sorted(centres, key=lambda roi: centres[roi][1]):
        x, y = centres[roi]
        while overlaps(x, y, len(roi)):
            y += height
        placed.append((x, y, len(roi)))
        ax.text(
            x,
            y,
            roi,
            ha="center",
            va="center",
            zorder=5,
            **look,
        )


def plot_glass_brain(
    voxels: pd.DataFrame,
    values: Any,
    affine: Any,
    title: str = "",
) -> Figure:
    """Values of voxels in a glass brain: the largest along each line of sight.

    The outline is that of the MNI template. Where the affine is of a subject's own space, it is
    for orientation only: say so in the title.

    Args:
        voxels: one row a voxel: its indices i, j, k in the volume.
        values: (voxels,), NaN where there is none.
        affine: (4, 4), voxel indices -> mm.
        title: of the figure.

    Raises:
        PerceptError: without indices, or if nilearn or nibabel is not installed.
    """
    if not {"i", "j", "k"} <= set(voxels):
        raise PerceptError(
            "These voxels have no indices i, j, k into a volume, so that no brain can be drawn:"
            " look at the flat chart."
        )
    plotting = require_extra("nilearn.plotting", "attribution")  # takes seconds to import
    nibabel = require_extra("nibabel", "nsd")
    indices = voxels[["i", "j", "k"]].to_numpy(int)
    volume = np.zeros(indices.max(0) + 2, np.float32)
    values = np.asarray(values)
    volume[tuple(indices.T)] = np.nan_to_num(values.astype(np.float32))
    limit = _find_colour_limit(values.astype(float))
    with apply_style():
        fig = plt.figure(figsize=(10, 4.2))
        image = nibabel.Nifti1Image(volume, np.asarray(affine, float))
        look: Look = {
            "cmap": "RdBu_r",
            "vmin": -limit,
            "vmax": limit,
            "threshold": 1e-3 * limit,
            "plot_abs": False,
            "colorbar": True,
        }
        axes = (0.0, 0.0, 0.97, 0.88)
        plotting.plot_glass_brain(image, figure=fig, axes=axes, display_mode="lyrz", **look)
        fig.text(0.012, 0.985, title, va="top", fontweight="bold", fontsize=11)
        fig.canvas.draw()
    plt.close(fig)
    return fig
