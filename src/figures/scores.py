"""Figures of scores: between baselines and ceiling, by distance, by spread, by size of the pool.

In `plot_score_dots` right is always better, also for distances, so that a row is read the same way
everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from src.figures.base import (
    COLOURS,
    FAINT,
    MARKERS,
    SOFT,
    Look,
    add_controls_legend,
    add_title,
    bootstrap_means,
    describe_metric,
    draw_dot,
    draw_in_style,
    draw_interval,
    get_control_mark,
    get_marker_options,
    make_handle,
    make_panel_row,
    wrap_text,
)
from src.utils import PerceptError


@draw_in_style
def plot_score_dots(records: Sequence[dict[str, Any]], title: str = "") -> Figure:
    """Scores with their intervals between their baselines and their ceiling, one strip a metric.

    Right is better everywhere.

    Args:
        records: those of metrics.json.
        title: of the figure.

    Raises:
        PerceptError: if there are no records.
    """
    records = list(records)
    if not records:
        raise PerceptError("There are no scores to draw.")
    size = (8.8, 0.95 + 0.62 * len(records))
    fig, axes = plt.subplots(len(records), 1, figsize=size, squeeze=False)
    height = fig.get_figheight()
    top = 1.2 if title else 0.95  # inches above the strips
    upper, lower = 1 - (top - 0.3) / height, 0.32 / height
    fig.subplots_adjust(left=0.185, right=0.805, top=upper, bottom=lower, hspace=0.85)
    for ax, record in zip(axes[:, 0], records, strict=True):
        _draw_strip(ax, record)
    conditions = {condition for record in records for condition in _get_controls(record)}
    dot: Look = {"color": COLOURS[0], "marker": "o", "ms": 8, "lw": 3}
    first = [make_handle("this system, 95 % interval", **dot)]
    y = 1 - (0.3 if title else 0.02) / height
    add_controls_legend(fig, conditions, first, y, ncols=5)
    if title:
        add_title(fig, 1 - 0.07 / height, title, fontsize=11)
    return fig


def _get_controls(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Scores of the baselines of a record, and of its ceiling if it has one, by condition."""
    if "value" in record["ceiling"]:
        return {**record["floors"], "ceiling": record["ceiling"]}
    return dict(record["floors"])


def _draw_strip(ax: Any, record: dict[str, Any]) -> None:
    """One metric: controls as marks, the score as a dot with its interval, its value at the right.

    Args:
        ax: the panel.
        record: one of metrics.json.
    """
    controls = _get_controls(record)
    ends = [record["low"], record["high"]]
    for condition, score in controls.items():
        colour = get_control_mark(condition).colour
        interval = [score["low"], score["high"]]
        ax.plot(interval, [0, 0], color=colour, lw=1.5, alpha=0.7)
        ax.plot(score["value"], 0, color=colour, **get_marker_options(condition))
        ends += interval
    draw_interval(
        ax,
        ends[:2],
        [0, 0],
        COLOURS[0],
        width=4,
    )
    draw_dot(ax, record["value"], 0, COLOURS[0], size=9)
    pad = 0.06 * ((max(ends) - min(ends)) or 1.0)
    ax.set_xlim(min(ends) - pad, max(ends) + pad)
    ax.set(ylim=(-1, 1), yticks=[])
    if record["better"] == "lower":
        ax.invert_xaxis()
    ax.axhline(0, color=FAINT, lw=1, zorder=0)
    ax.spines["left"].set_visible(False)
    ax.spines["bottom"].set_color(FAINT)
    ax.tick_params(axis="x", labelsize=8, length=2, pad=1.5)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    place: Look = {"transform": ax.transAxes, "va": "center"}
    name = wrap_text(describe_metric(record["name"], record["better"]), 20)
    ax.text(-0.02, 0.5, name, ha="right", fontsize=9, **place)
    value = f"{record['value']:.3f}  [{record['low']:.3f}, {record['high']:.3f}]"
    ax.text(1.02, 0.5, value, fontsize=8.5, **place)


@draw_in_style
def plot_score_by_distance(
    distance: Any,
    scores: dict[str, Any],
    xlabel: str = "distance to the nearest training image",
    bins: int = 5,
) -> Figure:
    """Scores of test images against how far each is from its nearest training image.

    A dot an image, and the mean of equally large groups with its interval.

    Args:
        distance: (n,) of the seen images.
        scores: (n,) by name, at most four are drawn.
        xlabel: what the distance is.
        bins: groups of equal size.
    """
    distance = np.asarray(distance, np.float64)
    groups = np.array_split(np.argsort(distance, kind="stable"), bins)
    centres = [float(distance[group].mean()) for group in groups]
    fig, axes = make_panel_row(min(4, len(scores)))
    for ax, (name, values) in zip(axes, scores.items(), strict=False):
        values = np.asarray(values, np.float64)
        dots: Look = {"ms": 4, "color": SOFT, "alpha": 0.35}
        ax.plot(distance, values, ".", label="one image", **dots)
        means = bootstrap_means([values[group] for group in groups])
        spread = np.abs(means[:, 1:] - means[:, :1]).T
        look: Look = {"color": COLOURS[0], "marker": "o", "ms": 6, "capsize": 3}
        ax.errorbar(centres, means[:, 0], yerr=spread, label="mean of a fifth, 95 %", **look)
        ax.set(title=name.replace("_", " "), xlabel=xlabel)
        ax.grid(axis="y")
    axes[0].legend(fontsize=8)
    return fig


@draw_in_style
def plot_abstention_curve(
    spread: Any, scores: dict[str, Any], better: dict[str, str] | None = None
) -> Figure:
    """Mean score of the images that remain when those whose samples differ most are left out.

    The line should rise to the left (for scores of which higher is better) if the spread of the
    samples tells where the decoder errs.

    Args:
        spread: (n,) how far apart the samples of an image are; it does not depend on the seen
            image.
        scores: (n,) by name, at most four are drawn.
        better: "higher" or "lower" by name.
    """
    order = np.argsort(np.asarray(spread, np.float64), kind="stable")
    shares = np.linspace(0.1, 1.0, 10)
    better = better or {}
    fig, axes = make_panel_row(min(4, len(scores)))
    for ax, (name, values) in zip(axes, scores.items(), strict=False):
        ranked = np.asarray(values, np.float64)[order]
        counts = [max(2, round(share * len(ranked))) for share in shares]
        means = bootstrap_means([ranked[:count] for count in counts])
        look: Look = {"color": COLOURS[0], "marker": "o", "ms": 4}
        mean, low, high = means.T
        ax.fill_between(
            shares,
            low,
            high,
            color=COLOURS[0],
            alpha=0.15,
            lw=0,
        )
        ax.plot(shares, mean, label="the surest images, 95 %", **look)
        dashed: Look = {"color": SOFT, "ls": "--", "lw": 1.2}
        ax.axhline(ranked.mean(), label="all images", **dashed)
        title = describe_metric(name, better.get(name))
        ax.set(title=title, xlabel="share of the images that is answered")
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        ax.ticklabel_format(axis="y", useOffset=False)
        ax.grid(axis="y")
    axes[0].legend(fontsize=8)
    return fig


@draw_in_style
def plot_retrieval_curve(table: pd.DataFrame) -> Figure:
    """Top-1 by pool size, both directions, with chance.

    Args:
        table: that of `retrieval.retrieval_by_pool_size`: [direction, pool, value, low, high,
            chance].
    """
    fig, ax = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for i, (direction, part) in enumerate(table.groupby("direction", sort=False)):
        part = part.sort_values("pool")
        spread = [part["value"] - part["low"], part["high"] - part["value"]]
        line = "--" if i % 2 else "-"
        look: Look = {"marker": MARKERS[i], "ls": line, "capsize": 3}
        name = str(direction).replace("_", " ")
        look |= {"yerr": spread, "label": name}
        ax.errorbar(part["pool"], part["value"], **look)
    chance = table.drop_duplicates("pool").sort_values("pool")
    look = {"color": SOFT, "ls": ":"}
    ax.plot(chance["pool"], chance["chance"], label="chance", **look)
    pools = chance["pool"].tolist()
    ax.set(xlabel="candidates", ylabel="top-1", title="Retrieval by pool size")
    ax.set(xscale="log", ylim=(0, 1.03), xticks=pools)
    ax.set_xticklabels([str(pool) for pool in pools])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(axis="y")
    ax.legend(fontsize=8)
    return fig
