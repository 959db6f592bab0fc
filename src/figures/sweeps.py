"""Figures of a sweep: levels of a factor, regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from src.figures.base import COLOURS, INK, MARKERS, SOFT, _styled, _titled, _wrapped
from src.utils import PerceptError


def _levels(names: Sequence[str]) -> dict[str, str]:
    """Colour of each level, in order; past the eighth they begin again, and places tell them apart."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


@_styled
def plot_sweep_curves(histories: pd.DataFrame, factor: str) -> Figure:
    """Training and validation loss by epoch of all runs of a sweep, a row a kind of model: thin
    lines a run, thick ones the mean of a level.

    Args:
        histories: [label, kind, model, epoch, train/loss, val/loss, `factor`].
        factor: column whose levels have colours.
    """
    shown = [
        column
        for column in ("train/loss", "val/loss")
        if column in histories and histories[column].notna().any()
    ]
    if not shown:
        raise PerceptError("The histories have no column train/loss or val/loss to draw.")
    kinds, colours = (
        list(dict.fromkeys(histories["kind"])),
        _levels(list(dict.fromkeys(histories[factor]))),
    )
    fig, axes = plt.subplots(
        len(kinds), len(shown), figsize=(8.8, 0.6 + 2.7 * len(kinds)), squeeze=False
    )
    tall = fig.get_figheight()
    fig.subplots_adjust(
        left=0.08, right=0.98, top=1 - 0.72 / tall, bottom=0.5 / tall, hspace=0.55, wspace=0.16
    )
    for row, kind in zip(axes, kinds, strict=True):
        for ax, column in zip(row, shown, strict=True):
            mine = histories[(histories["kind"] == kind) & histories[column].notna()]
            for (_, _, level), part in mine.groupby(["label", "model", factor], sort=False):
                ax.plot(part["epoch"], part[column], color=colours[level], lw=0.7, alpha=0.4)
            for i, (level, part) in enumerate(mine.groupby(factor, sort=False)):
                mean = part.groupby("epoch")[column].mean()
                ax.plot(
                    mean.index,
                    mean,
                    color=colours[level],
                    lw=2.4,
                    ls=["-", "--", "-.", ":"][i % 4],
                    zorder=4,
                )
            words = {"train/loss": "training loss", "val/loss": "validation loss"}[column]
            ax.set(
                title=words + (f" ({kind.replace('_', ' ')})" if len(kinds) > 1 else ""),
                xlabel="epoch",
            )
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            ax.grid(axis="y")
    handles = [
        Line2D([], [], color=colour, lw=2.4, ls=["-", "--", "-.", ":"][i % 4], label=level)
        for i, (level, colour) in enumerate(colours.items())
    ]
    fig.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - 0.02 / tall),
        ncols=min(6, len(handles)),
        fontsize=8,
        handlelength=3.2,
    )
    return fig


@_styled
def plot_sweep_levels(
    panels: Sequence[dict[str, Any]],
    factor: str,
    second: str = "",
    title: str = "",
    gaps: Sequence[Any] = (),
) -> Figure:
    """Which level of a factor is best, and whether by more than the luck of a seed: a panel a
    score, the first the one that decides.

    Small marks are runs (their shape the second factor), the large dot is the mean of a level with
    its 95 % interval over seeds; the bar at the right is as long as two standard deviations over
    seeds. Up is better everywhere. Floor and ceiling are shaded or drawn where they are near enough
    to be seen. The second panel shows what the others lack to the best level of the first, paired:
    an interval that is clear of the line is more than the luck of a seed.

    Args:
        panels: one dict a score: name; better ("higher" or "lower"); runs, a table [factor, value]
            and the column `second` if there is one; levels, that of `sweep.level_table`; sd, of a
            level's mean over seeds (NaN with one seed); floor and ceiling where known, as (value,
            what it is).
        factor: column of the levels.
        second: column that the shape of the marks stands for, "" for none.
        title: the verdict.
        gaps: of `sweep.gaps_to_best`, in the score of the first panel; none where no level is named
            the best.
    """
    if not panels:
        raise PerceptError("There are no scores of the sweep to draw.")
    levels = list(panels[0]["levels"][factor])
    kinds = list(dict.fromkeys(panels[0]["runs"][second])) if second else [""]
    second = second if len(kinds) > 1 else ""
    slant, count = max(map(len, levels)) * len(levels) > 26, len(panels) + bool(gaps)
    wide = max(2.9, 0.22 * len(levels) + 1.1)
    width = max(8.2, wide * count + 0.4)
    lines = _wrapped(title, int(width * 11.5))
    head = 0.6 + 0.19 * (lines.count("\n") + 1)
    fig, axes = plt.subplots(1, count, figsize=(width, 3.5 + head), squeeze=False)
    tall, order = fig.get_figheight(), list(axes[0])
    under = 0.42 + (0.062 * max(map(len, levels)) if slant else 0.0)
    fig.subplots_adjust(
        left=0.65 / width,
        right=1 - 0.1 / width,
        top=1 - (head + 0.42) / tall,
        bottom=under / tall,
        wspace=0.72 / wide,
    )
    if gaps:
        _behind(order.pop(1), gaps, levels, panels[0])
    for ax, panel in zip(order, panels, strict=True):
        _look(ax, panel, factor, second, levels, kinds if second else [""])
    for ax in axes[0]:
        ax.set_xticks(
            range(len(levels)),
            levels,
            fontsize=8,
            rotation=40 if slant else 0,
            ha="right" if slant else "center",
            rotation_mode="anchor",
        )
    handles = [
        Line2D([], [], color=SOFT, marker="o", ms=8, lw=2.5, label="mean, 95 % over seeds"),
        Line2D([], [], color=INK, lw=5, alpha=0.45, label="2 sd of seeds"),
    ]
    handles += [
        Line2D(
            [],
            [],
            color=SOFT,
            marker=MARKERS[i % 8],
            ls="none",
            ms=4.5,
            mfc="none",
            label=f"{second} {kind}",
        )
        for i, kind in enumerate(kinds)
        if second
    ]
    y = 1 - (head - 0.33) / tall
    fig.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.3 / width, y),
        ncols=6,
        fontsize=8,
        columnspacing=1.6,
        handletextpad=0.9,
    )
    fig.text(0.14 / width, 1 - 0.09 / tall, lines, va="top", fontweight="bold", fontsize=10)
    return fig


def _behind(ax: Any, gaps: Sequence[Any], levels: Sequence[str], panel: dict[str, Any]) -> None:
    """The panel of `plot_sweep_levels` that decides: paired differences to the best level, and the spread
    of the seeds as a band around none.
    """
    colours = _levels(levels)
    if np.isfinite(panel["sd"]):
        ax.axhspan(-panel["sd"], panel["sd"], color=INK, alpha=0.12, lw=0, zorder=0)
    ax.axhline(0, color=INK, lw=1)
    ax.plot(
        levels.index(gaps[0].best),
        0,
        marker="*",
        ms=13,
        color=colours[gaps[0].best],
        mec="white",
        zorder=5,
    )
    for gap in gaps:
        x = levels.index(gap.other)
        ax.plot(
            [x, x],
            [gap.low, gap.high],
            color=colours[gap.other],
            lw=2.5,
            solid_capstyle="butt",
            zorder=4,
        )
        ax.plot(
            x,
            gap.value,
            marker="o",
            ms=6,
            color=colours[gap.other] if gap.clear else "white",
            mec="white" if gap.clear else colours[gap.other],
            mew=1.4,
            zorder=5,
        )
    ax.set(xlim=(-0.5, len(levels) - 0.5))
    ax.invert_yaxis()
    ax.set_title(f"behind {gaps[0].best}, paired\n(band: ± sd of seeds)", fontsize=9)
    ax.tick_params(axis="both", labelsize=8, length=2)
    ax.grid(axis="y")


def _look(
    ax: Any,
    panel: dict[str, Any],
    factor: str,
    second: str,
    levels: Sequence[str],
    kinds: Sequence[str],
) -> None:
    """One panel of `plot_sweep_levels`."""
    colours, table = _levels(levels), panel["levels"].set_index(factor)
    for level, part in panel["runs"].groupby(factor, sort=False):
        x = levels.index(str(level))
        for i, kind in enumerate(kinds):
            mine = part[part[second] == kind] if second else part
            at = x - 0.24 + 0.2 * (i / max(1, len(kinds) - 1)) + np.linspace(-0.02, 0.02, len(mine))
            ax.plot(
                at,
                mine["value"],
                color=colours[str(level)],
                marker=MARKERS[i % 8],
                ls="none",
                ms=4.5,
                mfc="none",
                mew=1,
                alpha=0.85,
            )
    for x, level in enumerate(levels):
        if level in table.index:
            found = table.loc[level]
            ax.plot(
                [x + 0.2] * 2,
                [found["low"], found["high"]],
                color=colours[level],
                lw=2.5,
                solid_capstyle="butt",
                zorder=4,
            )
            ax.plot(
                x + 0.2,
                found["value"],
                marker="o",
                ms=8,
                color=colours[level],
                mec="white",
                mew=1,
                zorder=5,
            )
    ends = [*panel["runs"]["value"], *table[["low", "high"]].stack().dropna()]
    low, high = min(ends), max(ends)
    span = (high - low) or abs(high) * 0.1 or 1.0
    for key, look in (
        ("floor", {"color": SOFT, "ls": ":"}),
        ("ceiling", {"color": "#7A5195", "ls": "-"}),
    ):
        value, words = panel.get(key) or (np.nan, "")
        if low - 1.5 * span <= value <= high + 1.5 * span:
            low, high = min(low, value), max(high, value)
            worse = (-1e9 if panel["better"] == "higher" else 1e9) if key == "floor" else value
            ax.axhspan(value, worse, color=SOFT, alpha=0.13, lw=0, zorder=0)
            ax.axhline(value, lw=1.1, zorder=1, **look)
            place: dict[str, Any] = {
                "xycoords": ("axes fraction", "data"),
                "textcoords": "offset points",
                "xytext": (0, -9 if key == "floor" else 2),
            }
            ax.annotate(words, (0.01, value), fontsize=7.5, color=look["color"], **place)
    span = high - low or span
    limits = (low - 0.08 * span, high + 0.08 * span)
    if np.isfinite(panel["sd"]) and panel["sd"] > 0:
        middle = table["value"].mean()
        ax.plot(
            [len(levels) - 0.42] * 2,
            [middle - panel["sd"], middle + panel["sd"]],
            color=INK,
            lw=5,
            alpha=0.45,
            solid_capstyle="butt",
            zorder=3,
        )
    ax.set(
        xlim=(-0.5, len(levels) - 0.3), ylim=limits if panel["better"] == "higher" else limits[::-1]
    )
    _titled(ax, panel["name"], panel["better"])
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y")


@_styled
def plot_region_curves(table: pd.DataFrame) -> Figure:
    """Scores from each region alone and from all voxels but it, between those of all voxels and the
    shuffled floor; a panel a score, up is better.

    Args:
        table: that of `sweep.region_table`.
    """
    if table.empty:
        raise PerceptError("There are no regions, alone and left out, to draw.")
    metrics, regions = (
        list(dict.fromkeys(table["metric"])),
        [region for region in dict.fromkeys(table["region"]) if region],
    )
    fig, axes = plt.subplots(
        1,
        len(metrics),
        figsize=(max(8.2, (0.28 * len(regions) + 1.3) * len(metrics)), 3.9),
        squeeze=False,
    )
    fig.subplots_adjust(
        left=0.65 / fig.get_figwidth(), right=0.985, top=0.79, bottom=0.17, wspace=0.24
    )
    looks = {"alone": (COLOURS[0], "o", "-"), "left out": (COLOURS[1], "s", "--")}
    for ax, metric in zip(axes[0], metrics, strict=True):
        mine = table[table["metric"] == metric]
        for kind, (colour, marker, line) in looks.items():
            part = mine[mine["kind"] == kind].set_index("region").reindex(regions)
            spread = np.abs(part[["low", "high"]].sub(part["value"], axis=0)).fillna(0).to_numpy().T
            ax.errorbar(
                range(len(regions)),
                part["value"],
                yerr=spread,
                color=colour,
                marker=marker,
                ls=line,
                ms=6,
                mec="white",
                mew=0.8,
                capsize=2,
                zorder=4,
            )
        whole = mine[mine["kind"] == "all"]
        if len(whole):
            ax.axhspan(
                *whole[["low", "high"]].fillna(whole["value"].iloc[0]).iloc[0],
                color=INK,
                alpha=0.12,
                lw=0,
            )
            ax.axhline(whole["value"].iloc[0], color=INK, lw=1.3)
        if mine["shuffled"].notna().any():
            ax.axhline(mine["shuffled"].mean(), color=SOFT, lw=1.3, ls=":")
        _titled(ax, metric, mine["better"].iloc[0])
        if mine["better"].iloc[0] == "lower":
            ax.invert_yaxis()
        ax.set_xticks(
            range(len(regions)),
            regions,
            fontsize=8,
            rotation=40,
            ha="right",
            rotation_mode="anchor",
        )
        ax.grid(axis="y")
    words = {"alone": "the region alone", "left out": "all voxels but the region"}
    handles = [
        Line2D([], [], color=c, marker=m, ls=line, ms=6, label=words[kind])
        for kind, (c, m, line) in looks.items()
    ]
    handles += [
        Line2D([], [], color=INK, lw=1.3, label="all voxels"),
        Line2D([], [], color=SOFT, lw=1.3, ls=":", label="shuffled pairing"),
    ]
    fig.legend(handles=handles, loc="upper center", ncols=4, fontsize=8)
    return fig
