"""Figures of encoding models: accuracy against the noise ceiling, and who explains what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from src.figures.base import (
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    SOFT,
    Look,
    add_top_legend,
    bootstrap_means,
    draw_in_style,
    make_handle,
)
from src.utils import PerceptError

SHARED_COLOUR = SOFT


@draw_in_style
def plot_prediction_accuracy(
    regions: Mapping[str, np.ndarray], score: Any, ceiling: Any = None
) -> Figure:
    """Explained variance of each voxel, against its noise ceiling and by region.

    Left: a dot a voxel; on the diagonal nothing is left to be explained. Right: the mean of each
    region with its 95 % interval over voxels, and the mean noise ceiling as a bar.

    Args:
        regions: by name which voxels belong to it, bool (voxels,).
        score: share of variance that is predicted, (voxels,).
        ceiling: share that could be, (voxels,); None where nothing was repeated: the left panel is
            then a histogram.

    Raises:
        PerceptError: without regions.
    """
    if not regions:
        raise PerceptError("There is no region to draw the accuracy of: give at least one.")
    scores = np.asarray(score, float)
    size = (10, max(3.6, 1.3 + 0.34 * len(regions)))
    fig, axes = plt.subplots(1, 2, figsize=size, layout="constrained")
    if ceiling is None:
        axes[0].hist(scores, 40, color=COLOURS[0], alpha=0.85)
        axes[0].set(xlabel="explained variance, out of fold", ylabel="voxels")
    else:
        _scatter_against_ceiling(axes[0], scores, np.asarray(ceiling, float))
    names = list(regions)
    rows = bootstrap_means([scores[regions[name]] for name in names])
    y = np.arange(len(names))
    axes[1].hlines(y, rows[:, 1], rows[:, 2], color=COLOURS[0], lw=2.5)
    axes[1].plot(rows[:, 0], y, "o", color=COLOURS[0], ms=7, mec="white")
    handles = [make_handle("explained, 95 % interval", color=COLOURS[0], marker="o", lw=2.5)]
    if ceiling is not None:
        means = [np.mean(np.asarray(ceiling, float)[regions[name]]) for name in names]
        axes[1].plot(means, y, "|", color=COLOURS[6], ms=16, mew=2.2)
        look: Look = {"marker": "|", "ms": 12, "mew": 2.2, "ls": "none"}
        handles.append(make_handle("noise ceiling", color=COLOURS[6], **look))
    labels = [f"{name}  {int(regions[name].sum()):,}" for name in names]
    axes[1].set_yticks(y, labels, fontsize=9)
    axes[1].set(ylim=(len(names) - 0.4, -0.6), xlabel="mean share of variance", title="by region")
    axes[1].set_xlim(left=min(0.0, float(rows.min())))
    place: Look = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2}
    axes[1].legend(handles=handles, fontsize=8, **place)
    axes[1].grid(axis="x")
    return fig


def _scatter_against_ceiling(ax: Any, scores: np.ndarray, ceiling: np.ndarray) -> None:
    """A dot a voxel, with the line on which all that can be explained is explained."""
    ax.scatter(ceiling, scores, s=6, color=COLOURS[0], alpha=0.35, lw=0)
    top = 1.03 * max(float(np.nanmax(ceiling)), float(np.nanmax(scores)))
    bottom = min(0.0, float(np.nanmin(scores)))
    ax.plot([0, top], [0, top], color=COLOURS[6], lw=1.5)
    ax.axhline(0, color=FAINT, lw=1)
    ax.set(xlim=(0, top), ylim=(bottom, top), title="each voxel")
    ax.set(xlabel="noise ceiling (share of variance)", ylabel="explained variance, out of fold")


@draw_in_style
def plot_variance_partition(
    regions: Mapping[str, np.ndarray], table: pd.DataFrame, ceiling: Any = None
) -> Figure:
    """What each feature space explains alone, and what several could explain, by region.

    Args:
        regions: by name which voxels belong to it, bool (voxels,).
        table: of `partition_variance`, a row a voxel: columns "<space> unique", "shared", "all".
        ceiling: (voxels,), drawn as a bar; None for none.

    Raises:
        PerceptError: for a table without such columns.
    """
    parts = [name for name in table.columns if str(name).endswith(" unique")]
    if not parts or "shared" not in table:
        raise PerceptError("There is no variance to draw: give the table of partition_variance.")
    names = list(regions)
    y = np.arange(len(names))
    height = 1.1 + 0.42 * len(names)
    fig, ax = plt.subplots(figsize=(8.2, height))
    fig.subplots_adjust(left=0.2, right=0.97, top=1 - 0.4 / height, bottom=0.55 / height)
    left = np.zeros(len(names))
    handles: list[Any] = []
    columns = [*parts[:1], "shared", *parts[1:]]
    for column in columns:
        colour = SHARED_COLOUR if column == "shared" else COLOURS[parts.index(column)]
        values = np.array([table[column].to_numpy()[regions[name]].mean() for name in names])
        widths = np.maximum(values, 0)
        hatch = "//" if column == "shared" else None
        look: Look = {"color": colour, "alpha": 0.85, "hatch": hatch, "edgecolor": "white"}
        bars = ax.barh(y, widths, 0.66, left=left, label=str(column), **look)
        handles.append(bars)
        left += widths
    if ceiling is not None:
        means = [np.mean(np.asarray(ceiling, float)[regions[name]]) for name in names]
        handles.extend(ax.plot(means, y, "|", color=INK, ms=18, mew=2.2, label="noise ceiling"))
    labels = [f"{name}  {int(regions[name].sum()):,}" for name in names]
    ax.set_yticks(y, labels, fontsize=9)
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel="mean share of variance over the region's voxels")
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.grid(axis="x")
    add_top_legend(fig, handles, 1.0, ncols=len(handles))
    return fig


@draw_in_style
def plot_spectra(covariances: Mapping[str, Any], n_dimensions: int = 100) -> Figure:
    """Eigenvalues of covariance matrices of voxels, from the largest, on logarithmic axes.

    A spectrum that falls fast means that few patterns hold most of the variance.

    Args:
        covariances: by what they are of, (voxels, voxels).
        n_dimensions: eigenvalues that are drawn, at most.
    """
    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for number, (name, matrix) in enumerate(covariances.items()):
        values = np.linalg.eigvalsh(np.asarray(matrix, float))[::-1]
        values = values[: min(n_dimensions, len(values))]
        values = values[values > 1e-9 * values[0]]
        ranks = np.arange(1, len(values) + 1)
        look: Look = {"marker": MARKERS[number], "ms": 4, "markevery": 0.15}
        ax.loglog(ranks, values, color=COLOURS[number], label=name, **look)
    ax.set(xlabel="axis, from the largest variance", ylabel="variance along the axis")
    for axis in (ax.xaxis, ax.yaxis):  # powers of ten would be formulas, which figures do not have
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    ax.legend(fontsize=8)
    ax.grid()
    return fig


def choose_regions(voxels: pd.DataFrame, names: Sequence[str] | None = None) -> dict[str, Any]:
    """All voxels, and those of each region: bool (voxels,) by name.

    Args:
        voxels: one row a voxel, with a Boolean column a region.
        names: of the regions; by default every one that has at least two voxels.
    """
    flags = voxels.select_dtypes("bool")
    chosen = [str(name) for name in flags.columns if voxels[name].sum() > 1]
    if names is not None:
        chosen = list(names)
    masks = {"all voxels": np.ones(len(voxels), bool)}
    return masks | {name: voxels[name].to_numpy(bool) for name in chosen}
