"""Figures that compare runs: on the same test images, by amount of data, on held-out clusters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from src.figures.base import (
    COLOURS,
    CONTROL_MARKS,
    FAINT,
    INK,
    MARKERS,
    SOFT,
    Look,
    add_controls_legend,
    add_title,
    draw_dot,
    draw_in_style,
    draw_interval,
    get_control_mark,
    get_marker_options,
    list_unique,
    make_handle,
    make_panel_grid,
    set_metric_title,
)
from src.utils import PerceptError

LINE_STYLES = ["-", "--", "-."]

Positions = dict[Any, float]  # place of each amount of data on the axis


# ----------------------------------------------------------------------- runs on the same images
@draw_in_style
def plot_comparison(table: pd.DataFrame, condition: str = "system", baseline: str = "") -> Figure:
    """Runs on the same test images: a panel a metric, a line a run, its score as a dot.

    Right is better everywhere; a bar is a 95 % interval. Baselines and the ceiling stand in the
    lowest line, each from the run where it is strongest, and a thin line rises from each.

    Args:
        table: [run, row, metric, value, low, high, better]; the column "row" is the condition;
            conditions named in `CONTROL_MARKS` (and "chance") are baselines and ceiling.
        condition: the one that is drawn as the score of its run.
        baseline: run whose interval is drawn as a band over all lines, "" for none.

    Raises:
        PerceptError: if the table has no scores of the condition.
    """
    control_names = {*CONTROL_MARKS, "chance"} - {condition}
    scores = table[table["row"] == condition]
    controls = table[table["row"].isin(control_names)]
    if scores.empty:
        raise PerceptError(f"There are no scores of {condition!r} to draw.")
    runs, metrics = list_unique(scores["run"]), list_unique(scores["metric"])
    line_height, head = 0.21, 0.85  # inches
    panel_height = line_height * (len(runs) + 1.6)
    margin = 0.3 + 0.072 * max(map(len, runs))  # inches, for the names of the runs
    fig, axes = make_panel_grid(len(metrics), 2.2, panel_height + 0.75, sharey=True)
    width = max(fig.get_figwidth() + margin, 7.6)
    height = fig.get_figheight() + head
    fig.set_size_inches(width, height)
    fig.subplots_adjust(left=margin / width, right=1 - 0.15 / width)
    fig.subplots_adjust(top=1 - (head + 0.32) / height, bottom=0.36 / height)
    fig.subplots_adjust(hspace=0.75 / panel_height, wspace=0.1)
    for ax, metric in zip(axes, metrics, strict=True):
        run_scores = scores[scores["metric"] == metric].set_index("run")
        set_metric_title(ax, metric, run_scores["better"].iloc[0])
        metric_controls = controls[controls["metric"] == metric]
        _draw_run_lines(ax, runs, run_scores, metric_controls, baseline)
        if ax.get_subplotspec().is_first_col():
            names = [*runs, "floors and ceiling"]
            places = [*range(len(runs)), len(runs) + 0.3]
            ax.set_yticks(places, names, fontsize=8)
    dot: Look = {"color": COLOURS[0], "marker": "o", "ms": 7, "lw": 2.5}
    first = [make_handle("run, 95 % interval", **dot)]
    if baseline in runs:
        band: Look = {"color": COLOURS[0], "alpha": 0.25, "lw": 7}
        first.append(make_handle("interval of the baseline", **band))
    add_controls_legend(fig, list_unique(controls["row"]), first, 1 - 0.03 / height)
    return fig


def _draw_run_lines(
    ax: Any,
    runs: Sequence[str],
    scores: pd.DataFrame,
    controls: pd.DataFrame,
    baseline: str,
) -> None:
    """One panel of `plot_comparison`.

    Args:
        ax: the panel.
        runs: all runs, from top to bottom.
        scores: those of one metric, by run: [value, low, high, better].
        controls: those of the metric: [row, value].
        baseline: run whose interval is a band.
    """
    lower_is_better = scores["better"].iloc[0] == "lower"
    ends = [scores["low"].min(), scores["high"].max()]
    for name, part in controls.groupby("row", sort=False):
        condition = str(name)
        strongest = part["value"].min() if lower_is_better else part["value"].max()
        look: Look = {"color": get_control_mark(condition).colour}
        ax.axvline(strongest, lw=0.9, ls=":", zorder=1, **look)
        look |= get_marker_options(condition)
        if condition == "ceiling":
            look["ms"] = 12
        ax.plot(strongest, len(runs) + 0.3, zorder=3, clip_on=False, **look)
        ends.append(strongest)
    if baseline in scores.index:
        low, high = scores.loc[baseline, "low"], scores.loc[baseline, "high"]
        look = {"color": COLOURS[0], "alpha": 0.15, "lw": 0}
        ax.axvspan(low, high, zorder=0, **look)
    for y, run in enumerate(runs):
        ax.axhline(y, color=FAINT, lw=0.8, zorder=0)
        if run in scores.index:
            interval = scores.loc[run, ["low", "high"]].to_numpy(float)
            draw_interval(ax, interval, [y, y], COLOURS[0])
            value = scores.loc[run, "value"]
            draw_dot(ax, value, y, COLOURS[0], size=6, edge_width=0.8)
    ax.axhline(len(runs) - 0.35, color=SOFT, lw=0.6, zorder=0)
    pad = 0.07 * ((max(ends) - min(ends)) or 1.0)
    ax.set_xlim(min(ends) - pad, max(ends) + pad)
    ax.set_ylim(len(runs) + 0.8, -0.6)
    if lower_is_better:
        ax.invert_xaxis()
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


# ------------------------------------------------------------------------- by the amount of data
@draw_in_style
def plot_curves_over(table: pd.DataFrame, by: str, xlabel: str) -> Figure:
    """Scores by the amount of data of a training, between baselines and ceiling.

    By the number of voxel components (Mayo et al., arXiv 2411.02783), or of training sessions; all
    of them stand at the right end. Up is better everywhere, also for distances.

    Args:
        table: [curve, row, metric, `by`, value, low, high, better], 0 in `by` for all of the data;
            rows of the condition (column "row") "system" are drawn with their interval, those named
            in `CONTROL_MARKS` as thin lines, of the first curve only.
        by: column of the amounts.
        xlabel: what the amounts are of.

    Raises:
        PerceptError: if the table has no scores of the system.
    """
    system = table[table["row"] == "system"]
    if system.empty:
        raise PerceptError(f"There are no scores by number of {xlabel} to draw.")
    metrics, curves = list_unique(system["metric"]), list_unique(system["curve"])
    first_curve = table[table["curve"] == curves[0]]
    controls = first_curve[first_curve["row"] != "system"]
    positions = _place_amounts(system[by])
    fig, axes = make_panel_grid(len(metrics), 2.9, 2.45)
    width = max(fig.get_figwidth(), 7.6)
    labels = [f"{curve}, 95 % interval" for curve in curves]
    entry_width = 0.55 + 0.06 * max(map(len, labels))  # inches, of the legend
    n_columns = max(1, int(width / entry_width))
    n_entries = len(curves) + controls["row"].nunique()
    head = 0.12 + 0.2 * -(-n_entries // n_columns)
    height = fig.get_figheight() + head
    fig.set_size_inches(width, height)
    grey: Look = {}
    if len(curves) > 1:  # colours are for the curves
        grey = {"color": "0.55"}
    for ax, metric in zip(axes, metrics, strict=True):
        metric_controls = controls[controls["metric"] == metric]
        _draw_control_curves(ax, metric_controls, by, positions, grey)
        scores = system[system["metric"] == metric]
        for i, curve in enumerate(curves):
            _draw_curve(ax, scores[scores["curve"] == curve], by, positions, i)
        better = scores["better"].iloc[0]
        set_metric_title(ax, metric, better)
        if better == "lower":
            ax.invert_yaxis()
        ax.set_xscale("log")
        ticks = [str(amount) if amount else "all" for amount in positions]
        ax.set_xticks(list(positions.values()), ticks)
        ax.minorticks_off()
        ax.grid(axis="y")
    rows = [ax.get_subplotspec().rowspan.start for ax in axes]
    for ax, row in zip(axes, rows, strict=True):
        if row == max(rows):
            ax.set_xlabel(xlabel, fontsize=8)
    rect = (0, 0, 1, 1 - head / height)
    fig.tight_layout(rect=rect, h_pad=1.2, w_pad=1.2)
    first = []
    for i, label in enumerate(labels):
        first.append(make_handle(label, **_get_curve_look(i)))
    conditions = list_unique(controls["row"])
    look: Look = {"ls": "-", "ms": 5, "lw": 1} | grey
    add_controls_legend(fig, conditions, first, 1 - 0.03 / height, n_columns, **look)
    return fig


def _place_amounts(amounts: pd.Series) -> Positions:
    """Position of each amount on the axis, in order; 0 (all of the data) at the right end."""
    right_end = 3.2 * amounts.max()
    ordered = sorted(set(amounts), key=lambda amount: amount or np.inf)
    return {amount: amount or right_end for amount in ordered}


def _get_curve_look(index: int) -> dict[str, Any]:
    """Colour, marker and line of a curve, by its place."""
    line = LINE_STYLES[index % len(LINE_STYLES)]
    look: Look = {"color": COLOURS[index], "marker": MARKERS[index], "ms": 6}
    return look | {"ls": line, "lw": 2.2}


def _sort_by_position(part: pd.DataFrame, by: str, positions: Positions) -> pd.DataFrame:
    return part.sort_values(by, key=lambda amounts: amounts.map(positions))


def _draw_curve(
    ax: Any,
    part: pd.DataFrame,
    by: str,
    positions: Positions,
    index: int,
) -> None:
    """One curve of `plot_curves_over` with its band."""
    part = _sort_by_position(part, by, positions)
    x = part[by].map(positions)
    band: Look = {"color": COLOURS[index], "alpha": 0.22, "lw": 0}
    ax.fill_between(x, part["low"], part["high"], zorder=3, **band)
    look = _get_curve_look(index) | {"mec": "white", "mew": 0.8}
    ax.plot(x, part["value"], zorder=4, **look)


def _draw_control_curves(
    ax: Any,
    controls: pd.DataFrame,
    by: str,
    positions: Positions,
    grey: dict[str, Any],
) -> None:
    """Baselines and ceiling of `plot_curves_over` as thin lines; one with one value goes across."""
    for name, part in controls.groupby("row", sort=False):
        part = _sort_by_position(part, by, positions)
        mark = get_control_mark(str(name))
        look: Look = {"color": mark.colour, "lw": 1} | grey
        dots: Look = {"marker": mark.marker, "ms": 4, "alpha": 0.85} | look
        ax.plot(
            part[by].map(positions),
            part["value"],
            zorder=2,
            **dots,
        )
        if len(part) == 1:
            ax.axhline(part["value"].iloc[0], zorder=1, **look)


# ------------------------------------------------------------------------------ held-out clusters
EFFECT_LOOKS: dict[str, Look] = {  # by the column "images"
    "kept clusters": {"color": SOFT, "marker": "o", "mfc": "white", "mec": SOFT},
    "held-out clusters": {"color": COLOURS[1], "marker": "s", "mec": "white"},
}


@draw_in_style
def plot_held_out_effect(table: pd.DataFrame, title: str = "") -> Figure:
    """Change in score by training without some clusters, a strip a metric.

    On test images of these clusters (filled) and of the others (hollow); left of 0 is a loss. The
    extra drop of the filled mark is written at the right, with its interval.

    Args:
        table: [metric, images, value, low, high, n]; "images" is one of "held-out clusters", "kept
            clusters" and "effect", the difference of the two.
        title: of the figure, e.g. the two runs.

    Raises:
        PerceptError: for an empty table.
    """
    if table.empty:
        raise PerceptError("There are no changes on held-out clusters to draw.")
    metrics, line_height = list_unique(table["metric"]), 0.36
    height = 1.25 + line_height * len(metrics)
    fig, ax = plt.subplots(figsize=(8.8, height))
    fig.subplots_adjust(
        left=0.25,
        right=0.7,
        top=1 - 0.72 / height,
        bottom=0.45 / height,
    )
    for y, metric in enumerate(metrics):
        ax.axhline(y, color=FAINT, lw=0.8, zorder=0)
        _draw_effect(ax, y, table[table["metric"] == metric].set_index("images"))
    ax.axvline(0, color=INK, lw=1)
    xlabel = "change in score by training without the clusters (negative: a loss)"
    ax.set(ylim=(len(metrics) - 0.5, -0.5), xlabel=xlabel)
    names = [metric.replace("_", " ") for metric in metrics]
    ax.set_yticks(range(len(metrics)), names, fontsize=9)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    place: Look = {"transform": ax.transAxes, "va": "bottom"}
    top = 1 + 0.06 / (line_height * len(metrics))
    ax.text(1.03, top, "beyond the others [95 %]", fontsize=8, color=SOFT, **place)
    counts = table.groupby("images")["n"].max()
    labels = {
        "held-out clusters": f"{counts['held-out clusters']} images of held-out clusters",
        "kept clusters": f"{counts['kept clusters']} images of the others",
    }
    handles = []
    for images, label in labels.items():
        look = EFFECT_LOOKS[images]
        handles.append(make_handle(label, ms=7, lw=2.2, **look))
    place = {"loc": "upper left", "bbox_to_anchor": (0.245, 1 - 0.3 / height)}
    fig.legend(handles=handles, ncols=2, fontsize=8, **place)
    add_title(fig, 1 - 0.07 / height, title, fontsize=10)
    return fig


def _draw_effect(ax: Any, y: float, changes: pd.DataFrame) -> None:
    """One strip of `plot_held_out_effect`.

    Args:
        ax: the panel.
        y: of the strip.
        changes: of one metric, by "images": [value, low, high].
    """
    for images, shift in (("kept clusters", 0.14), ("held-out clusters", -0.14)):
        look = EFFECT_LOOKS[images]
        interval = changes.loc[images, ["low", "high"]].to_numpy(float)
        places, colour = [y + shift, y + shift], look["color"]
        draw_interval(ax, interval, places, colour, width=2.2, zorder=3)
        value = changes.loc[images, "value"]
        ax.plot(
            value,
            y + shift,
            ms=6.5,
            mew=1.2,
            zorder=4,
            **look,
        )
    effect = changes.loc["effect"]
    excludes_zero = effect["low"] > 0 or effect["high"] < 0
    weight = "bold" if excludes_zero else "normal"
    text = f"{effect['value']:+.3f}  [{effect['low']:+.3f}, {effect['high']:+.3f}]"
    place: Look = {"transform": ax.get_yaxis_transform(), "va": "center"}
    ax.text(1.03, y, text, fontsize=8.5, fontweight=weight, **place)
