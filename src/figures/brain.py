"""Figures of trials, regions and voxels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter
from nibabel import Nifti1Image

from src.figures.base import COLOURS, FAINT, INK, SOFT, _side, _styled, _tiles, apply_style
from src.utils import PerceptError


@_styled
def plot_trials(images: Any, responses: Sequence[np.ndarray], max_voxels: int = 200) -> Figure:
    """A few images and what the voxels did at each presentation: rows that look alike are a
    reliable measurement.

    Args:
        images: (n, 3, height, width) in [0, 1].
        responses: for each image the z-scores of its presentations (repeats, voxels), voxels in the
            order in which they are to be drawn.
        max_voxels: voxels drawn, the first ones.
    """
    n = len(responses)
    fig, axes = plt.subplots(
        n, 2, figsize=(8, 0.95 * n + 0.5), width_ratios=(1, 8), layout="constrained", squeeze=False
    )
    for (left, right), tile, x in zip(
        axes, _tiles(images, _side(images), "bicubic"), responses, strict=True
    ):
        left.imshow(tile)
        left.axis("off")
        shown = right.imshow(
            x[:, :max_voxels],
            aspect="auto",
            cmap="RdBu_r",
            vmin=-3,
            vmax=3,
            interpolation="nearest",
        )
        pairs = np.corrcoef(x)[np.triu_indices(len(x), 1)] if len(x) > 1 else np.array([])
        right.set(xticks=[], yticks=range(len(x)), yticklabels=[f"{i + 1}" for i in range(len(x))])
        right.set_ylabel(f"r = {pairs.mean():.2f}" if len(pairs) else "once", fontsize=8)
    axes[0, 1].set_title(
        f"the {min(max_voxels, responses[0].shape[1])} most reliable voxels, a row a presentation; r:"
        " mean correlation of the rows",
        fontsize=9,
    )
    fig.colorbar(shown, ax=axes[:, 1], shrink=0.6, label="z-score")
    return fig


@_styled
def plot_roi_sets(voxels: pd.DataFrame, sets: dict[str, Any]) -> Figure:
    """Which share of each region's voxels each model is given: a column chosen by mistake shows at
    once.

    Args:
        voxels: one row a voxel, with Boolean columns of regions.
        sets: by name of the model the positions of its voxels (selected,), or None for all of them.
    """
    regions = [str(name) for name in voxels.select_dtypes("bool").columns if voxels[name].any()]
    groups = {
        "all voxels": np.ones(len(voxels), bool),
        **{name: voxels[name].to_numpy(bool) for name in regions},
    }
    chosen = {
        name: (
            np.isin(np.arange(len(voxels)), columns)
            if columns is not None
            else np.ones(len(voxels), bool)
        )
        for name, columns in sets.items()
    }
    share = np.array(
        [[mine[member].mean() for member in groups.values()] for mine in chosen.values()]
    )
    fig, ax = plt.subplots(
        figsize=(1.6 + 0.62 * len(groups), 0.9 + 0.42 * len(sets)), layout="constrained"
    )
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(share):
        ax.text(
            column,
            row,
            f"{value:.0%}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if value > 0.6 else INK,
        )
    ax.set_xticks(
        range(len(groups)),
        [f"{name}\n{member.sum():,}" for name, member in groups.items()],
        fontsize=8,
        rotation=40 if len(groups) > 14 else 0,
    )
    ax.set_yticks(range(len(sets)), list(sets))
    ax.set_title("share of each region's voxels that a model is given")
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    return fig


@_styled
def plot_roi_reliability(
    voxels: pd.DataFrame, ceiling: str = "noise_ceiling", rois: Sequence[str] | None = None
) -> Figure:
    """Size and reliability of each region.

    Number of voxels, median noise ceiling, and its histogram on a common axis.

    Args:
        voxels: one row a voxel: Boolean columns of regions, and the noise ceiling (share of
            variance a model could explain).
        ceiling: column of the noise ceiling.
        rois: columns of the regions; every Boolean column by default.
    """
    rois = list(voxels.select_dtypes("bool").columns) if rois is None else list(rois)
    if not rois or ceiling not in voxels:
        raise PerceptError(
            f"voxels needs Boolean region columns and a column {ceiling!r}; it has "
            f"{', '.join(map(str, voxels.columns))}."
        )
    values = voxels[ceiling].to_numpy(float)
    high = max(float(np.nanquantile(values, 0.995)), 1e-6)
    bins = np.linspace(min(0.0, float(np.nanmin(values))), high, 41)
    groups = {
        "all voxels": np.ones(len(voxels), bool),
        **{roi: voxels[roi].to_numpy(bool) for roi in rois},
    }
    height = 0.7 + 0.52 * len(groups)
    fig, axes = plt.subplots(len(groups), 1, figsize=(7, height), sharex=True, squeeze=False)
    fig.subplots_adjust(
        left=0.36, right=0.97, top=1 - 0.32 / height, bottom=0.48 / height, hspace=0.12
    )
    for i, (ax, (name, mask)) in enumerate(zip(axes[:, 0], groups.items(), strict=True)):
        mine = values[mask & np.isfinite(values)]
        ax.hist(
            np.clip(mine, bins[0], bins[-1]), bins, color=SOFT if i == 0 else COLOURS[0], alpha=0.85
        )
        median = f"{np.median(mine):.2f}" if len(mine) else "-"
        if len(mine):
            ax.axvline(np.median(mine), color=INK, lw=1.5)
        _cells(ax, 0.35, (name, f"{mask.sum():,}", median), fontsize=9)
        ax.set(yticks=[])
        ax.spines["left"].set_visible(False)
    _cells(axes[0, 0], 1.12, ("region", "voxels", "median"), fontsize=8, color=SOFT)
    axes[-1, 0].set_xlabel(f"{ceiling.replace('_', ' ')} (line: median)")
    return fig


def _cells(ax: Any, y: float, texts: tuple[str, str, str], **look: Any) -> None:
    """Three cells of a table, left of a panel."""
    for x, text, side in zip((-0.52, -0.16, -0.03), texts, ("left", "right", "right"), strict=True):
        weight = "bold" if side == "left" else "normal"
        ax.text(x, y, text, transform=ax.transAxes, ha=side, fontweight=weight, **look)


VIEWS = {"from behind": ("x", "z"), "from above": ("x", "y"), "from the right": ("y", "z")}

AXES = {"x": "left - right (mm)", "y": "back - front (mm)", "z": "down - up (mm)"}


@_styled
def plot_voxel_map(
    voxels: pd.DataFrame, values: dict[str, Any], rois: Sequence[str] | None = None
) -> Figure:
    """Voxels at their places, seen from three sides, each a dot in the colour of its value; red
    adds, blue takes away.

    Args:
        voxels: one row a voxel: x, y, z (mm; right, front and up positive) and Boolean columns of
            regions.
        values: by what they are, e.g. "low level": (voxels,), NaN where a voxel was not used: a
            small grey dot. A row each, with its own symmetric scale.
        rois: regions whose names are written at their places; every Boolean column by default.

    Raises:
        PerceptError: without coordinates.
    """
    if not {"x", "y", "z"} <= set(voxels):
        raise PerceptError(
            "These voxels have no x, y and z (mm), so that there is no place to draw them at: look"
            " at regions."
        )
    rois = list(voxels.select_dtypes("bool").columns) if rois is None else list(rois)
    spans = {
        axis: float(np.ptp(voxels[axis])) + 4 for axis in AXES
    }  # mm, with the margin that a dot needs
    widths = [spans[across] for across, _ in VIEWS.values()]
    size = (
        12,
        (0.9 + 8.6 * max(spans[up] for _, up in VIEWS.values()) / sum(widths)) * len(values),
    )  # one scale for all views
    fig, axes = plt.subplots(
        len(values),
        len(VIEWS),
        figsize=size,
        width_ratios=widths,
        squeeze=False,
        layout="constrained",
    )
    for row, (name, each) in zip(axes, values.items(), strict=True):
        each = np.asarray(each, float)
        order = np.argsort(np.nan_to_num(np.abs(each), nan=-1.0))  # the strongest on top
        limit = max(float(np.nanquantile(np.abs(each), 0.99)), 1e-12)
        for ax, (view, (across, up)) in zip(row, VIEWS.items(), strict=True):
            x, y = voxels[across].to_numpy(float), voxels[up].to_numpy(float)
            unused = np.isnan(each)
            ax.scatter(x[unused], y[unused], s=3, c=FAINT)
            shown = ax.scatter(
                x[order],
                y[order],
                s=11,
                c=each[order],
                cmap="RdBu_r",
                vmin=-limit,
                vmax=limit,
                lw=0.15,
                edgecolors=SOFT,
            )
            ax.set(
                aspect="equal",
                xlabel=AXES[across],
                ylabel=AXES[up],
                title=f"{name}, {view}" if ax is row[0] else view,
            )
            _name_regions(ax, voxels, rois, across, up)
        fig.colorbar(shown, ax=row, shrink=0.8, label="mean attribution", extend="both")
    return fig


def _name_regions(ax: Any, voxels: pd.DataFrame, rois: Sequence[str], across: str, up: str) -> None:
    """Names of regions at the middle of their voxels, in the right hemisphere where both have some;
    names that would overlap are moved up.
    """
    middles = {}
    for roi in rois:
        mine = voxels[voxels[roi].to_numpy(bool)]
        right = mine[mine["x"] > 0]
        if len(mine):
            middles[roi] = (right if len(right) else mine)[[across, up]].median().to_numpy(float)
    wide, high = (0.02 * float(np.ptp(voxels[axis])) for axis in (across, up))
    placed: list[tuple[float, float, int]] = []
    for roi, (x, y) in sorted(middles.items(), key=lambda item: item[1][1]):
        while any(
            abs(x - u) < 2.4 * wide * max(len(roi), n) / 2 and abs(y - v) < 4 * high
            for u, v, n in placed
        ):
            y += high
        placed.append((x, y, len(roi)))
        edge = [withStroke(linewidth=2.5, foreground="white")]
        ax.text(
            x,
            y,
            roi,
            ha="center",
            va="center",
            fontsize=8.5,
            fontweight="bold",
            path_effects=edge,
            zorder=5,
        )


@_styled
def plot_region_bars(
    table: pd.DataFrame, apart: Sequence[str] = ("early areas", "higher areas")
) -> Figure:
    """What each region is worth: its share of the attribution of both levels, and by how much each
    score falls when it is permuted.

    Args:
        table: rows of `attribution.attribution_table` and `importance_table`: [level, measure,
            score, region, voxels, value, low, high].
        apart: sets of regions that are permuted jointly, drawn below the others.

    Raises:
        PerceptError: for a table without such rows.
    """
    drops = table[(table["measure"] == "drop") & (table["region"] != "all")]
    shares = table[table["measure"] == "attribution"]
    regions = [
        r for r in dict.fromkeys([*shares["region"], *drops["region"]]) if r not in apart
    ] + [r for r in apart if (drops["region"] == r).any()]
    scores = [
        (level, score)
        for level in ("low_level", "high_level")
        for score in dict.fromkeys(drops.loc[drops["level"] == level, "score"])
    ]
    if not regions or not scores:
        raise PerceptError("There are no drops of regions to draw.")
    colour = {"low_level": COLOURS[0], "high_level": COLOURS[1]}
    tall = 1.5 + 0.34 * len(regions)
    fig, axes = plt.subplots(
        1,
        1 + len(scores),
        figsize=(2.6 + 1.85 * (1 + len(scores)), tall),
        sharey=True,
        layout="constrained",
    )
    rows = {name: y for y, name in enumerate(regions)}
    for shift, level in ((-0.2, "low_level"), (0.2, "high_level")):
        _bars(axes[0], shares[shares["level"] == level], rows, shift, 0.36, colour[level])
    axes[0].set_title("share of the\nattribution", fontsize=10)
    axes[0].xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for ax, (level, score) in zip(axes[1:], scores, strict=True):
        _bars(
            ax,
            drops[(drops["level"] == level) & (drops["score"] == score)],
            rows,
            0.0,
            0.66,
            colour[level],
        )
        ax.set_title(f"drop in\n{score}", fontsize=10)
    sizes = table.drop_duplicates("region").set_index("region")["voxels"]
    axes[0].set_yticks(
        range(len(regions)), [f"{name}  {int(sizes[name]):,}" for name in regions], fontsize=9
    )
    for ax in axes:
        ax.set_ylim(len(regions) - 0.4, -0.6)
        ax.axvline(0, color=INK, lw=0.8)
        ax.tick_params(axis="y", length=0)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        for y in (y - 0.5 for name, y in rows.items() if name in apart[:1]):
            ax.axhline(y, color=SOFT, lw=0.8, ls=":")
    handles = [
        Rectangle((0, 0), 1, 1, color=colour[level], label=label)
        for level, label in (("low_level", "low level"), ("high_level", "high level"))
    ]
    told = "region and its voxels; bars with 95 % intervals over images"
    fig.legend(
        handles=handles,
        loc="outside upper left",
        ncols=2,
        fontsize=9,
        title=told,
        title_fontsize=9,
        alignment="left",
    )
    return fig


def _bars(
    ax: Any, mine: pd.DataFrame, rows: dict[str, int], shift: float, height: float, colour: str
) -> None:
    """Horizontal bars of some regions with their intervals."""
    y = mine["region"].map(rows).to_numpy(float) + shift
    value, low, high = (mine[name].to_numpy(float) for name in ("value", "low", "high"))
    ax.barh(y, value, height, color=colour, alpha=0.85)
    ax.hlines(y, low, high, color=INK, lw=1.3)


def plot_glass_brain(voxels: pd.DataFrame, values: Any, affine: Any, title: str = "") -> Figure:
    """Values of voxels in a glass brain: the largest along each line of sight, in an outline of the
    MNI template.

    Where the affine is of a subject's own space, the outline is for orientation only: say so in the
    title.

    Args:
        voxels: one row a voxel: its indices i, j, k in the volume.
        values: (voxels,), NaN where there is none.
        affine: (4, 4), voxel indices -> mm.
        title: of the figure.

    Raises:
        PerceptError: without indices.
    """
    if not {"i", "j", "k"} <= set(voxels):
        raise PerceptError(
            "These voxels have no indices i, j, k into a volume, so that no brain can be drawn:"
            " look at the flat chart."
        )
    from nilearn import plotting  # takes seconds to import: only where it is used

    at = voxels[["i", "j", "k"]].to_numpy(int)
    volume = np.zeros(at.max(0) + 2, np.float32)
    volume[tuple(at.T)] = np.nan_to_num(np.asarray(values, np.float32))
    limit = max(float(np.nanquantile(np.abs(np.asarray(values, float)), 0.99)), 1e-12)
    with apply_style():
        fig = plt.figure(figsize=(10, 4.2))
        image = Nifti1Image(volume, np.asarray(affine, float))
        look: dict[str, Any] = {
            "cmap": "RdBu_r",
            "vmin": -limit,
            "vmax": limit,
            "threshold": 1e-3 * limit,
            "plot_abs": False,
            "colorbar": True,
        }
        plotting.plot_glass_brain(
            image, figure=fig, axes=(0.0, 0.0, 0.97, 0.88), display_mode="lyrz", **look
        )
        fig.text(0.012, 0.985, title, va="top", fontweight="bold", fontsize=11)
        fig.canvas.draw()
    plt.close(fig)
    return fig
