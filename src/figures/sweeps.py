"""Figures of a sweep: losses of its runs, levels of a factor, regions alone and left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from src.figures.base import (
    COLOURS,
    CONTROL_MARKS,
    INK,
    MARKERS,
    SOFT,
    Look,
    add_top_legend,
    draw_dot,
    draw_in_style,
    draw_interval,
    list_unique,
    make_handle,
    set_metric_title,
    wrap_text,
)
from src.utils import PerceptError

LINE_STYLES = ["-", "--", "-.", ":"]

Panel = dict[str, Any]  # scores of a sweep, see `plot_sweep_levels`

LOSS_TITLES = {"train/loss": "training loss", "val/loss": "validation loss"}


def _assign_colours(levels: Sequence[str]) -> dict[Any, str]:
    """Colour of each level, in order; past the eighth they repeat, and places tell them apart."""
    return {level: COLOURS[i % len(COLOURS)] for i, level in enumerate(levels)}


def _shade(
    ax: Any,
    low: float,
    high: float,
    colour: str,
    alpha: float,
) -> None:
    """Shade a panel between two values, behind everything."""
    ax.axhspan(low, high, color=colour, alpha=alpha, lw=0, zorder=0)


def _slant_tick_labels(ax: Any, labels: Sequence[str]) -> None:
    look: Look = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(labels)), labels, fontsize=8, **look)


# -------------------------------------------------------------------------------- losses of runs
@draw_in_style
def plot_sweep_curves(histories: pd.DataFrame, factor: str) -> Figure:
    """Training and validation loss by epoch of all runs of a sweep, a row a kind of model.

    Thin lines are runs, thick ones the mean of a level.

    Args:
        histories: [label, kind, model, epoch, train/loss, val/loss, `factor`].
        factor: column whose levels have colours.

    Raises:
        PerceptError: for histories without losses.
    """
    columns = [name for name in LOSS_TITLES if _has_values(histories, name)]
    if not columns:
        raise PerceptError("The histories have no column train/loss or val/loss to draw.")
    kinds = list_unique(histories["kind"])
    colours = _assign_colours(list_unique(histories[factor]))
    height = 0.6 + 2.7 * len(kinds)
    size = (8.8, height)
    fig, axes = plt.subplots(
        len(kinds),
        len(columns),
        figsize=size,
        squeeze=False,
    )
    fig.subplots_adjust(left=0.08, right=0.98, hspace=0.55, wspace=0.16)
    fig.subplots_adjust(top=1 - 0.72 / height, bottom=0.5 / height)
    for row, kind in zip(axes, kinds, strict=True):
        for ax, column in zip(row, columns, strict=True):
            rows = histories[(histories["kind"] == kind) & histories[column].notna()]
            _draw_losses(ax, rows, column, factor, colours)
            title = LOSS_TITLES[column]
            if len(kinds) > 1:
                title += f" ({kind.replace('_', ' ')})"
            ax.set(title=title, xlabel="epoch")
    handles = []
    for i, (level, colour) in enumerate(colours.items()):
        line = LINE_STYLES[i % 4]
        handles.append(make_handle(level, color=colour, lw=2.4, ls=line))
    y, ncols = 1 - 0.02 / height, min(6, len(handles))
    add_top_legend(fig, handles, y, ncols=ncols, handlelength=3.2)
    return fig


def _has_values(table: pd.DataFrame, column: str) -> bool:
    return column in table and bool(table[column].notna().any())


def _draw_losses(
    ax: Any,
    rows: pd.DataFrame,
    column: str,
    factor: str,
    colours: dict[Any, str],
) -> None:
    """One panel of `plot_sweep_curves`: a loss of all runs, and the mean of each level."""
    runs = rows.groupby(["label", "model", factor], sort=False)
    for (_, _, level), part in runs:
        look: Look = {"color": colours[level], "lw": 0.7, "alpha": 0.4}
        ax.plot(part["epoch"], part[column], **look)
    for i, (level, part) in enumerate(rows.groupby(factor, sort=False)):
        mean = part.groupby("epoch")[column].mean()
        look = {"color": colours[level], "lw": 2.4, "ls": LINE_STYLES[i % 4]}
        ax.plot(mean.index, mean, zorder=4, **look)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.grid(axis="y")


# --------------------------------------------------------------------------- levels of a factor
@draw_in_style
def plot_sweep_levels(
    panels: Sequence[Panel],
    factor: str,
    second_factor: str = "",
    title: str = "",
    gaps: Sequence[Any] = (),
) -> Figure:
    """Which level of a factor is best, and whether by more than the luck of a seed.

    A panel a score, the first the one that decides. Small marks are runs (their shape the second
    factor), the large dot is the mean of a level with its 95 % interval over seeds; the bar at the
    right is as long as two standard deviations over seeds. Up is better everywhere. Floor and
    ceiling are shaded or drawn where they are close enough to be seen. The second panel shows the
    distance of the others to the best level of the first, paired: an interval that is clear of the
    line is more than the luck of a seed.

    Args:
        panels: one dict a score: name; better ("higher" or "lower"); runs, a table [factor, value]
            and the column `second_factor` if there is one; levels, a table [factor, value, low,
            high]; sd, of a level's mean over seeds (NaN with one seed); optionally floor and
            ceiling, as (value, its name).
        factor: column of the levels.
        second_factor: column that the shape of the marks stands for, "" for none.
        title: the verdict.
        gaps: differences to the best level in the score of the first panel (best, other, value,
            low, high, clear); none where no level is named the best.

    Raises:
        PerceptError: if there are no panels.
    """
    if not panels:
        raise PerceptError("There are no scores of the sweep to draw.")
    levels = list(panels[0]["levels"][factor])
    groups = [""]
    if second_factor:
        groups = list_unique(panels[0]["runs"][second_factor])
    if len(groups) < 2:
        second_factor, groups = "", [""]
    longest = max(map(len, levels))
    slanted = longest * len(levels) > 26
    n_panels = len(panels) + bool(gaps)
    panel_width = max(2.9, 0.22 * len(levels) + 1.1)
    width = max(8.2, panel_width * n_panels + 0.4)
    lines = wrap_text(title, int(width * 11.5))
    head = 0.6 + 0.19 * (lines.count("\n") + 1)
    height = 3.5 + head
    fig, axes = plt.subplots(1, n_panels, figsize=(width, height), squeeze=False)
    foot = 0.42 + (0.062 * longest if slanted else 0.0)
    fig.subplots_adjust(left=0.65 / width, right=1 - 0.1 / width, wspace=0.72 / panel_width)
    fig.subplots_adjust(top=1 - (head + 0.42) / height, bottom=foot / height)
    score_axes = list(axes[0])
    if gaps:
        _draw_gaps(score_axes.pop(1), gaps, levels, panels[0]["sd"])
    for ax, panel in zip(score_axes, panels, strict=True):
        _draw_runs(ax, panel["runs"], factor, second_factor, levels, groups)
        _draw_level_scores(ax, panel, factor, levels)
    for ax in axes[0]:
        if slanted:
            _slant_tick_labels(ax, levels)
        else:
            ax.set_xticks(range(len(levels)), levels, fontsize=8)
    handles = _make_level_handles(second_factor, groups)
    place: Look = {"loc": "upper left", "ncols": 6, "fontsize": 8}
    place["bbox_to_anchor"] = (0.3 / width, 1 - (head - 0.33) / height)
    fig.legend(handles=handles, columnspacing=1.6, handletextpad=0.9, **place)
    look: Look = {"va": "top", "fontweight": "bold", "fontsize": 10}
    fig.text(0.14 / width, 1 - 0.09 / height, lines, **look)
    return fig


def _make_level_handles(second_factor: str, groups: Sequence[str]) -> list[Line2D]:
    """Entries of the legend of `plot_sweep_levels`."""
    handles = [
        make_handle("mean, 95 % over seeds", color=SOFT, marker="o", ms=8, lw=2.5),
        make_handle("2 sd of seeds", color=INK, lw=5, alpha=0.45),
    ]
    if second_factor:
        hollow: Look = {"color": SOFT, "ls": "none", "ms": 4.5, "mfc": "none"}
        for i, group in enumerate(groups):
            label = f"{second_factor} {group}"
            handles.append(make_handle(label, **hollow, marker=MARKERS[i % 8]))
    return handles


def _draw_gaps(
    ax: Any,
    gaps: Sequence[Any],
    levels: Sequence[str],
    sd: float,
) -> None:
    """The panel of paired differences to the best level, with the spread of seeds as a band.

    Args:
        ax: the panel.
        gaps: differences to the best level.
        levels: all levels, from left to right.
        sd: of a level's mean over seeds, NaN with one seed.
    """
    colours = _assign_colours(levels)
    if np.isfinite(sd):
        _shade(ax, -sd, sd, INK, 0.12)
    ax.axhline(0, color=INK, lw=1)
    best = gaps[0].best
    draw_dot(
        ax,
        levels.index(best),
        0,
        colours[best],
        size=13,
        marker="*",
    )
    for gap in gaps:
        x, colour = levels.index(gap.other), colours[gap.other]
        draw_interval(ax, [x, x], [gap.low, gap.high], colour)
        look: Look = {"color": "white", "mec": colour}
        if gap.clear:
            look = {"color": colour, "mec": "white"}
        look |= {"marker": "o", "ms": 6, "mew": 1.4}
        ax.plot(x, gap.value, zorder=5, **look)
    ax.set(xlim=(-0.5, len(levels) - 0.5))
    ax.invert_yaxis()
    ax.set_title(f"behind {best}, paired\n(band: ± sd of seeds)", fontsize=9)
    ax.tick_params(axis="both", labelsize=8, length=2)
    ax.grid(axis="y")


def _draw_runs(
    ax: Any,
    runs: pd.DataFrame,
    factor: str,
    second_factor: str,
    levels: Sequence[str],
    groups: Sequence[str],
) -> None:
    """Small hollow marks of the runs, left of each level; their shape is the second factor."""
    colours = _assign_colours(levels)
    look: Look = {"ls": "none", "ms": 4.5, "mfc": "none"}
    look |= {"mew": 1, "alpha": 0.85}
    for level, part in runs.groupby(factor, sort=False):
        x = levels.index(str(level))
        for i, group in enumerate(groups):
            members = part[part[second_factor] == group] if second_factor else part
            centre = x - 0.24 + 0.2 * (i / max(1, len(groups) - 1))
            places = centre + np.linspace(-0.02, 0.02, len(members))
            mark = {"color": colours[str(level)], "marker": MARKERS[i % 8]}
            ax.plot(places, members["value"], **mark, **look)


def _draw_level_scores(ax: Any, panel: Panel, factor: str, levels: Sequence[str]) -> None:
    """One panel of `plot_sweep_levels` but for the runs: means, floor, ceiling, spread, limits."""
    colours, table = _assign_colours(levels), panel["levels"].set_index(factor)
    for x, level in enumerate(levels):
        if level in table.index:
            score, colour = table.loc[level], colours[level]
            place, interval = x + 0.2, [score["low"], score["high"]]
            draw_interval(ax, [place, place], interval, colour)
            draw_dot(ax, place, score["value"], colour, size=8)
    ends = list(panel["runs"]["value"])
    ends += list(table[["low", "high"]].stack().dropna())
    low, high = _draw_references(ax, panel, min(ends), max(ends))
    span = high - low or abs(high) * 0.1 or 1.0
    if np.isfinite(panel["sd"]) and panel["sd"] > 0:
        middle, sd = table["value"].mean(), panel["sd"]
        look: Look = {"color": INK, "lw": 5, "alpha": 0.45}
        look |= {"solid_capstyle": "butt", "zorder": 3}
        right = len(levels) - 0.42
        ax.plot([right, right], [middle - sd, middle + sd], **look)
    ax.set_xlim(-0.5, len(levels) - 0.3)
    ax.set_ylim(low - 0.08 * span, high + 0.08 * span)
    if panel["better"] == "lower":
        ax.invert_yaxis()
    set_metric_title(ax, panel["name"], panel["better"])
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y")


REFERENCE_LOOKS: dict[str, Look] = {
    "floor": {"color": SOFT, "ls": ":"},
    "ceiling": {"color": CONTROL_MARKS["ceiling"].colour, "ls": "-"},
}


def _draw_references(
    ax: Any,
    panel: Panel,
    low: float,
    high: float,
) -> tuple[float, float]:
    """Draw floor and ceiling where they are close enough to the scores to be seen.

    Args:
        ax: the panel.
        panel: its scores, see `plot_sweep_levels`.
        low: lowest score.
        high: highest score.

    Returns:
        Lowest and highest value with what was drawn.
    """
    span = (high - low) or abs(high) * 0.1 or 1.0
    for key, look in REFERENCE_LOOKS.items():
        value, name = panel.get(key) or (np.nan, "")
        if not low - 1.5 * span <= value <= high + 1.5 * span:
            continue
        low, high = min(low, value), max(high, value)
        if key == "floor":  # everything that is worse is shaded
            worst = -1e9 if panel["better"] == "higher" else 1e9
            _shade(ax, value, worst, SOFT, 0.13)
        ax.axhline(value, lw=1.1, zorder=1, **look)
        place: Look = {
            "xycoords": ("axes fraction", "data"),
            "textcoords": "offset points",
            "xytext": (0, -9 if key == "floor" else 2),
        }
        place |= {"fontsize": 7.5, "color": look["color"]}
        ax.annotate(name, (0.01, value), **place)
    return low, high


# --------------------------------------------------------------------------------------- regions
REGION_LOOKS: dict[str, Look] = {  # by the column "kind"
    "alone": {"color": COLOURS[0], "marker": "o", "ls": "-", "ms": 6},
    "left out": {"color": COLOURS[1], "marker": "s", "ls": "--", "ms": 6},
}


@draw_in_style
def plot_region_curves(table: pd.DataFrame) -> Figure:
    """Scores from each region alone and from all voxels but it, a panel a score.

    Those of all voxels and of the shuffled pairing stand as lines. Up is better.

    Args:
        table: [metric, region, kind, value, low, high, better, shuffled]; "kind" is one of "alone",
            "left out" and "all".

    Raises:
        PerceptError: for an empty table.
    """
    if table.empty:
        raise PerceptError("There are no regions, alone and left out, to draw.")
    metrics = list_unique(table["metric"])
    regions = [region for region in dict.fromkeys(table["region"]) if region]
    width = max(8.2, (0.28 * len(regions) + 1.3) * len(metrics))
    size = (width, 3.9)
    fig, axes = plt.subplots(1, len(metrics), figsize=size, squeeze=False)
    fig.subplots_adjust(left=0.65 / width, right=0.985, wspace=0.24)
    fig.subplots_adjust(top=0.79, bottom=0.17)
    for ax, metric in zip(axes[0], metrics, strict=True):
        rows = table[table["metric"] == metric]
        _draw_region_scores(ax, rows, regions)
        better = rows["better"].iloc[0]
        set_metric_title(ax, metric, better)
        if better == "lower":
            ax.invert_yaxis()
        _slant_tick_labels(ax, regions)
        ax.grid(axis="y")
    labels = {"alone": "the region alone", "left out": "all voxels but the region"}
    handles = []
    for kind, look in REGION_LOOKS.items():
        handles.append(make_handle(labels[kind], **look))
    handles += [
        make_handle("all voxels", color=INK, lw=1.3),
        make_handle("shuffled pairing", color=SOFT, lw=1.3, ls=":"),
    ]
    fig.legend(handles=handles, loc="upper center", ncols=4, fontsize=8)
    return fig


def _draw_region_scores(ax: Any, rows: pd.DataFrame, regions: Sequence[str]) -> None:
    """One panel of `plot_region_curves`.

    Args:
        ax: the panel.
        rows: of one metric.
        regions: from left to right.
    """
    for kind, look in REGION_LOOKS.items():
        part = rows[rows["kind"] == kind].set_index("region").reindex(list(regions))
        spread = part[["low", "high"]].sub(part["value"], axis=0).abs()
        look = look | {"yerr": spread.fillna(0).to_numpy().T, "capsize": 2}
        look |= {"mec": "white", "mew": 0.8, "zorder": 4}
        ax.errorbar(range(len(regions)), part["value"], **look)
    all_voxels = rows[rows["kind"] == "all"]
    if len(all_voxels):
        value = all_voxels["value"].iloc[0]
        low, high = all_voxels[["low", "high"]].fillna(value).iloc[0]
        ax.axhspan(low, high, color=INK, alpha=0.12, lw=0)
        ax.axhline(value, color=INK, lw=1.3)
    if rows["shuffled"].notna().any():
        ax.axhline(
            rows["shuffled"].mean(),
            color=SOFT,
            lw=1.3,
            ls=":",
        )
