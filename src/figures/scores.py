"""Figures of scores: baselines, retrieval, comparisons, UMAP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from src.figures.base import (
    COLOURS,
    CONTROL_MARKS,
    FAINT,
    INK,
    MARKERS,
    SOFT,
    _controls_legend,
    _grid,
    _mark,
    _means,
    _panels,
    _shape,
    _styled,
    _titled,
    _wrapped,
)
from src.utils import PerceptError


@_styled
def plot_score_dots(records: Sequence[dict[str, Any]], title: str = "") -> Figure:
    """Scores with their intervals between their floors and their ceiling, one strip a metric.

    Right is better everywhere.

    Args:
        records: those of metrics.json (`metrics.make_records`).
        title: of the figure.
    """
    records = list(records)
    if not records:
        raise PerceptError("There are no scores to draw.")
    fig, axes = plt.subplots(
        len(records), 1, figsize=(8.8, 0.95 + 0.62 * len(records)), squeeze=False
    )
    top = 0.95 if not title else 1.2
    height = fig.get_figheight()
    fig.subplots_adjust(
        left=0.185, right=0.805, top=1 - (top - 0.3) / height, bottom=0.32 / height, hspace=0.85
    )
    for ax, record in zip(axes[:, 0], records, strict=True):
        _strip(ax, record)
    shown = {name for r in records for name in r["floors"]} | {
        "ceiling" for r in records if "value" in r["ceiling"]
    }
    handles = [
        Line2D([], [], color=COLOURS[0], marker="o", ms=8, lw=3, label="this system, 95 % interval")
    ]
    for name in [*CONTROL_MARKS, *sorted(shown - set(CONTROL_MARKS))]:
        if name in shown:
            _, colour, label = _mark(name)
            handles.append(
                Line2D([], [], color=colour, ls="none", label=label, **{**_shape(name), "ms": 9})
            )
    y = 1 - (0.02 if not title else 0.3) / height
    fig.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, y),
        ncols=5,
        fontsize=8,
        columnspacing=1.3,
        handletextpad=0.5,
    )
    if title:
        fig.text(0.012, 1 - 0.07 / height, title, va="top", fontweight="bold", fontsize=11)
    return fig


def _strip(ax: Any, record: dict[str, Any]) -> None:
    """One metric: floors and ceiling as marks, the score as a dot with its interval, its value
    written at the right.
    """
    rows = {
        **record["floors"],
        **({"ceiling": record["ceiling"]} if "value" in record["ceiling"] else {}),
    }
    for name, row in rows.items():
        colour = _mark(name)[1]
        ax.plot([row["low"], row["high"]], [0, 0], color=colour, lw=1.5, alpha=0.7)
        ax.plot(row["value"], 0, color=colour, **_shape(name))
    ax.plot(
        [record["low"], record["high"]],
        [0, 0],
        color=COLOURS[0],
        lw=4,
        solid_capstyle="butt",
        zorder=4,
    )
    ax.plot(record["value"], 0, marker="o", ms=9, color=COLOURS[0], mec="white", mew=1, zorder=5)
    ends = [
        record["low"],
        record["high"],
        *(row[k] for row in rows.values() for k in ("low", "high")),
    ]
    pad = 0.06 * ((max(ends) - min(ends)) or 1.0)
    lower = record["better"] == "lower"
    ax.set(xlim=(min(ends) - pad, max(ends) + pad)[:: -1 if lower else 1], ylim=(-1, 1), yticks=[])
    ax.axhline(0, color=FAINT, lw=1, zorder=0)
    ax.spines["left"].set_visible(False)
    ax.spines["bottom"].set_color(FAINT)
    ax.tick_params(axis="x", labelsize=8, length=2, pad=1.5)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    arrow = " (lower is better)" if lower else ""
    ax.text(
        -0.02,
        0.5,
        _wrapped(record["name"].replace("_", " ") + arrow, 20),
        transform=ax.transAxes,
        ha="right",
        va="center",
        fontsize=9,
    )
    value = f"{record['value']:.3f}  [{record['low']:.3f}, {record['high']:.3f}]"
    ax.text(1.02, 0.5, value, transform=ax.transAxes, va="center", fontsize=8.5)


@_styled
def plot_score_by_distance(
    distance: Any,
    scores: dict[str, Any],
    xlabel: str = "distance to the nearest training image",
    bins: int = 5,
) -> Figure:
    """Scores of test images against how far each is from its nearest training image: dots, and the
    mean of equally large groups.

    Args:
        distance: (n,) of the seen images.
        scores: (n,) by name, at most four are drawn.
        xlabel: what the distance is.
        bins: groups of equal size.
    """
    distance = np.asarray(distance, np.float64)
    parts = np.array_split(np.argsort(distance, kind="stable"), bins)
    fig, axes = _panels(min(4, len(scores)))
    for ax, (name, values) in zip(axes, scores.items(), strict=False):
        values = np.asarray(values, np.float64)
        ax.plot(distance, values, ".", ms=4, color=SOFT, alpha=0.35, label="one image")
        means = _means([values[part] for part in parts])
        at = [float(distance[part].mean()) for part in parts]
        ax.errorbar(
            at,
            means[:, 0],
            yerr=np.abs(means[:, 1:] - means[:, :1]).T,
            color=COLOURS[0],
            marker="o",
            ms=6,
            capsize=3,
            label="mean of a fifth, 95 %",
        )
        ax.set(title=name.replace("_", " "), xlabel=xlabel)
        ax.grid(axis="y")
    axes[0].legend(fontsize=8)
    return fig


@_styled
def plot_abstention_curve(
    spread: Any, scores: dict[str, Any], better: dict[str, str] | None = None
) -> Figure:
    """Mean score of the images that are kept when those whose samples differ most are left out.

    The line should rise to the left (for scores of which higher is better) if the spread of the
    samples knows what the decoder does not.

    Args:
        spread: (n,) how far apart the samples of an image are (`reconstruct.compute_sample_spread`);
            nothing that was shown enters.
        scores: (n,) by name, at most four are drawn.
        better: "higher" or "lower" by name.
    """
    order = np.argsort(np.asarray(spread, np.float64), kind="stable")
    shares = np.linspace(0.1, 1.0, 10)
    fig, axes = _panels(min(4, len(scores)))
    for ax, (name, values) in zip(axes, scores.items(), strict=False):
        ranked = np.asarray(values, np.float64)[order]
        means = _means([ranked[: max(2, round(share * len(ranked)))] for share in shares])
        ax.fill_between(shares, means[:, 1], means[:, 2], color=COLOURS[0], alpha=0.15, lw=0)
        ax.plot(
            shares, means[:, 0], marker="o", ms=4, color=COLOURS[0], label="the surest images, 95 %"
        )
        ax.axhline(ranked.mean(), color=SOFT, ls="--", lw=1.2, label="all images")
        arrow = " (lower is better)" if (better or {}).get(name) == "lower" else ""
        ax.set(title=name.replace("_", " ") + arrow, xlabel="share of the images that is answered")
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        ax.ticklabel_format(axis="y", useOffset=False)
        ax.grid(axis="y")
    axes[0].legend(fontsize=8)
    return fig


@_styled
def plot_retrieval_curve(table: pd.DataFrame) -> Figure:
    """Top-1 by pool size, both directions, with chance.

    Args:
        table: that of `retrieval.compute_retrieval_by_pool_size`.
    """
    fig, ax = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for i, (direction, part) in enumerate(table.groupby("direction", sort=False)):
        part = part.sort_values("pool")
        spread = [part["value"] - part["low"], part["high"] - part["value"]]
        name = str(direction).replace("_", " ")
        ax.errorbar(
            part["pool"],
            part["value"],
            yerr=spread,
            marker=MARKERS[i],
            ls=["-", "--"][i % 2],
            capsize=3,
            label=name,
        )
    chance = table.drop_duplicates("pool").sort_values("pool")
    ax.plot(chance["pool"], chance["chance"], color=SOFT, ls=":", label="chance")
    pools = chance["pool"].tolist()
    ax.set(
        xscale="log",
        ylim=(0, 1.03),
        xlabel="candidates",
        ylabel="top-1",
        title="Retrieval by pool size",
        xticks=pools,
    )
    ax.set_xticklabels([str(pool) for pool in pools])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(axis="y")
    ax.legend(fontsize=8)
    return fig


@_styled
def plot_comparison(table: pd.DataFrame, condition: str = "system", baseline: str = "") -> Figure:
    """Runs on the same test images: a panel a metric, a line a run, its score as a dot with its
    interval; right is better everywhere.

    Floors and the ceiling stand in the lowest line, each from the run where it is strongest, and a
    thin line rises from each.

    Args:
        table: [run, row, metric, value, low, high, better]; rows named in `CONTROL_MARKS` (and
            "chance") are floors and ceiling.
        condition: the row that is drawn as the score of its run.
        baseline: run whose interval is drawn as a band over all lines, "" for none.
    """
    known = {*CONTROL_MARKS, "chance"} - {condition}
    scores, controls = table[table["row"] == condition], table[table["row"].isin(known)]
    if scores.empty:
        raise PerceptError(f"There are no scores of {condition!r} to draw.")
    runs, metrics = list(dict.fromkeys(scores["run"])), list(dict.fromkeys(scores["metric"]))
    margin, head, line = 0.3 + 0.072 * max(map(len, runs)), 0.85, 0.21
    columns = -(-len(metrics) // -(-len(metrics) // 4))
    height = line * (len(runs) + 1.6)
    fig, axes = _grid(len(metrics), 2.2, height + 0.75, sharey=True)
    width, tall = fig.get_figwidth() + margin, fig.get_figheight() + head
    fig.set_size_inches(max(width, 7.6), tall)
    width = fig.get_figwidth()
    fig.subplots_adjust(
        left=margin / width,
        right=1 - 0.15 / width,
        top=1 - (head + 0.32) / tall,
        bottom=0.36 / tall,
        hspace=0.75 / height,
        wspace=0.1,
    )
    for i, (ax, metric) in enumerate(zip(axes, metrics, strict=True)):
        mine, beneath = (
            scores[scores["metric"] == metric].set_index("run"),
            controls[controls["metric"] == metric],
        )
        _titled(ax, metric, mine["better"].iloc[0])
        _lines_of_runs(ax, runs, mine, beneath, baseline)
        if i % columns == 0:
            ax.set_yticks(
                [*range(len(runs)), len(runs) + 0.3], [*runs, "floors and ceiling"], fontsize=8
            )
    told = [Line2D([], [], color=COLOURS[0], marker="o", ms=7, lw=2.5, label="run, 95 % interval")]
    told += (
        [Line2D([], [], color=COLOURS[0], alpha=0.25, lw=7, label="interval of the baseline")]
        if baseline in runs
        else []
    )
    _controls_legend(fig, list(dict.fromkeys(controls["row"])), told, 1 - 0.03 / tall)
    return fig


def _lines_of_runs(
    ax: Any, runs: Sequence[str], mine: pd.DataFrame, beneath: pd.DataFrame, baseline: str
) -> None:
    """One panel of `plot_comparison`."""
    lower = mine["better"].iloc[0] == "lower"
    ends = [mine["low"].min(), mine["high"].max()]
    for name, part in beneath.groupby("row", sort=False):
        value = part["value"].min() if lower else part["value"].max()
        ax.axvline(value, ymin=0, color=_mark(str(name))[1], lw=0.9, ls=":", zorder=1)
        ax.plot(
            value,
            len(runs) + 0.3,
            color=_mark(str(name))[1],
            zorder=3,
            clip_on=False,
            **(_shape(str(name)) | ({"ms": 12} if name == "ceiling" else {})),
        )
        ends += [value]
    if baseline in mine.index:
        ax.axvspan(
            mine.loc[baseline, "low"],
            mine.loc[baseline, "high"],
            color=COLOURS[0],
            alpha=0.15,
            lw=0,
            zorder=0,
        )
    for y, run in enumerate(runs):
        ax.axhline(y, color=FAINT, lw=0.8, zorder=0)
        if run in mine.index:
            ax.plot(
                mine.loc[run, ["low", "high"]].to_numpy(float),
                [y, y],
                color=COLOURS[0],
                lw=2.5,
                solid_capstyle="butt",
                zorder=4,
            )
            ax.plot(
                mine.loc[run, "value"],
                y,
                marker="o",
                ms=6,
                color=COLOURS[0],
                mec="white",
                mew=0.8,
                zorder=5,
            )
    ax.axhline(len(runs) - 0.35, color=SOFT, lw=0.6, zorder=0)
    pad = 0.07 * ((max(ends) - min(ends)) or 1.0)
    ax.set(
        xlim=(min(ends) - pad, max(ends) + pad)[:: -1 if lower else 1], ylim=(len(runs) + 0.8, -0.6)
    )
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


@_styled
def plot_curves_over(table: pd.DataFrame, by: str, words: str) -> Figure:
    """Scores by how much a training was given, all of it at the right end, between floors and
    ceiling: by the number of voxel components (Mayo et al., arXiv 2411.02783), or of training
    sessions.

    Up is better everywhere, also for distances.

    Args:
        table: [curve, row, metric, `by`, value, low, high, better], 0 being all; the row "system"
            is drawn with its interval, rows named in `CONTROL_MARKS` as thin lines, those of the
            first curve.
        by: column of the numbers.
        words: what they are of, in words.
    """
    system = table[table["row"] == "system"]
    if system.empty:
        raise PerceptError(f"There are no scores by number of {words} to draw.")
    metrics, curves, largest = (
        list(dict.fromkeys(system["metric"])),
        list(dict.fromkeys(system["curve"])),
        system[by].max(),
    )
    place = {
        k: k or 3.2 * largest for k in sorted(set(system[by]), key=lambda k: k or np.inf)
    }  # all at the right end
    controls = table[(table["row"] != "system") & (table["curve"] == curves[0])]
    fig, axes = _grid(len(metrics), 2.9, 2.45)
    width = max(fig.get_figwidth(), 7.6)
    columns = max(
        1,
        int(
            width
            / (0.55 + 0.06 * len(max([f"{curve}, 95 % interval" for curve in curves], key=len)))
        ),
    )
    head = 0.12 + 0.2 * -(-(len(curves) + controls["row"].nunique()) // columns)  # of the legend
    tall = fig.get_figheight() + head
    fig.set_size_inches(width, tall)
    grey: dict[str, Any] = (
        {"color": "0.55"} if len(curves) > 1 else {}
    )  # colours are for the curves
    for ax, metric in zip(axes, metrics, strict=True):
        for name, part in controls[controls["metric"] == metric].groupby("row", sort=False):
            part, look = (
                part.sort_values(by, key=lambda k: k.map(place)),
                {"color": _mark(str(name))[1]} | grey,
            )
            ax.plot(
                part[by].map(place),
                part["value"],
                lw=1,
                marker=_mark(str(name))[0],
                ms=4,
                alpha=0.85,
                zorder=2,
                **look,
            )
            if len(part) == 1:
                ax.axhline(part["value"].iloc[0], lw=1, zorder=1, **look)
        for i, curve in enumerate(curves):
            part = system[(system["metric"] == metric) & (system["curve"] == curve)].sort_values(
                by, key=lambda k: k.map(place)
            )
            at = part[by].map(place)
            ax.fill_between(
                at, part["low"], part["high"], color=COLOURS[i], alpha=0.22, lw=0, zorder=3
            )
            ax.plot(
                at,
                part["value"],
                color=COLOURS[i],
                marker=MARKERS[i],
                ms=6,
                mec="white",
                mew=0.8,
                ls=["-", "--", "-."][i % 3],
                lw=2.2,
                zorder=4,
            )
        _titled(ax, metric, system[system["metric"] == metric]["better"].iloc[0])
        if system[system["metric"] == metric]["better"].iloc[0] == "lower":
            ax.invert_yaxis()  # up is better everywhere
        ax.set_xscale("log")
        ax.set_xticks(list(place.values()), [str(k) if k else "all" for k in place])
        ax.minorticks_off()
        ax.grid(axis="y")
    rows = [ax.get_subplotspec().rowspan.start for ax in axes]
    for ax, r in zip(axes, rows, strict=True):
        if r == max(rows):
            ax.set_xlabel(words, fontsize=8)
    fig.tight_layout(rect=(0, 0, 1, 1 - head / tall), h_pad=1.2, w_pad=1.2)
    told = [
        Line2D(
            [],
            [],
            color=COLOURS[i],
            marker=MARKERS[i],
            ms=6,
            lw=2.2,
            ls=["-", "--", "-."][i % 3],
            label=f"{curve}, 95 % interval",
        )
        for i, curve in enumerate(curves)
    ]
    _controls_legend(
        fig,
        list(dict.fromkeys(controls["row"])),
        told,
        1 - 0.03 / tall,
        columns,
        ls="-",
        ms=5,
        lw=1,
        **grey,
    )
    return fig


@_styled
def plot_held_out_effect(table: pd.DataFrame, title: str = "") -> Figure:
    """What training without some clusters changes: on test images of these clusters (filled) and of
    the others (hollow), a strip a metric.

    Left of 0 is a loss. What the filled mark loses beyond the hollow one is written at the right,
    with its interval.

    Args:
        table: that of `compare.held_out_effect`: [metric, images, value, low, high, n].
        title: of the figure, e.g. the two runs.
    """
    if table.empty:
        raise PerceptError("There are no changes on held-out clusters to draw.")
    metrics, line = list(dict.fromkeys(table["metric"])), 0.36
    tall = 1.25 + line * len(metrics)
    fig, ax = plt.subplots(figsize=(8.8, tall))
    fig.subplots_adjust(left=0.25, right=0.7, top=1 - 0.72 / tall, bottom=0.45 / tall)
    for y, metric in enumerate(metrics):
        mine = table[table["metric"] == metric].set_index("images")
        ax.axhline(y, color=FAINT, lw=0.8, zorder=0)
        looks: dict[str, dict[str, Any]] = {
            "kept clusters": {"mfc": "white", "mec": SOFT, "color": SOFT},
            "held-out clusters": {"color": COLOURS[1], "mec": "white"},
        }
        for (kind, look), shift in zip(looks.items(), (0.14, -0.14), strict=True):
            ax.plot(
                mine.loc[kind, ["low", "high"]].to_numpy(float),
                [y + shift] * 2,
                color=look["color"],
                lw=2.2,
                solid_capstyle="butt",
                zorder=3,
            )
            ax.plot(
                mine.loc[kind, "value"],
                y + shift,
                marker="o" if kind == "kept clusters" else "s",
                ms=6.5,
                mew=1.2,
                zorder=4,
                **look,
            )
        found = mine.loc["effect"]
        clear = found["low"] > 0 or found["high"] < 0
        text = f"{found['value']:+.3f}  [{found['low']:+.3f}, {found['high']:+.3f}]"
        ax.text(
            1.03,
            y,
            text,
            transform=ax.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
            fontweight="bold" if clear else "normal",
        )
    ax.axvline(0, color=INK, lw=1)
    ax.set(
        ylim=(len(metrics) - 0.5, -0.5),
        xlabel="change in score by training without the clusters (negative: a loss)",
    )
    ax.set_yticks(range(len(metrics)), [metric.replace("_", " ") for metric in metrics], fontsize=9)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.text(
        1.03,
        1 + 0.06 / (line * len(metrics)),
        "beyond the others [95 %]",
        transform=ax.transAxes,
        va="bottom",
        fontsize=8,
        color=SOFT,
    )
    counts = table.groupby("images")["n"].max()
    handles = [
        Line2D(
            [],
            [],
            color=COLOURS[1],
            marker="s",
            mec="white",
            ms=7,
            lw=2.2,
            label=f"{counts['held-out clusters']} images of held-out clusters",
        ),
        Line2D(
            [],
            [],
            color=SOFT,
            marker="o",
            mfc="white",
            ms=7,
            lw=2.2,
            label=f"{counts['kept clusters']} images of the others",
        ),
    ]
    fig.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.245, 1 - 0.3 / tall),
        ncols=2,
        fontsize=8,
    )
    fig.text(0.012, 1 - 0.07 / tall, title, va="top", fontweight="bold", fontsize=10)
    return fig


def _umap_points(brain: Any, clip: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Both embeddings (n, ...) in one UMAP plane: (n, 2) and (n, 2)."""
    from umap import UMAP  # compiles for seconds when imported: only where it is used

    rows = torch.cat([torch.as_tensor(x).detach().float().cpu().flatten(1) for x in (brain, clip)])
    neighbours = min(15, len(rows) - 1)
    reducer = UMAP(
        metric="cosine", n_neighbors=neighbours, min_dist=0.3, random_state=seed, n_jobs=1
    )
    points = reducer.fit_transform(rows.numpy())  # (2n, 2)
    return points[: len(rows) // 2], points[len(rows) // 2 :]


@_styled
def plot_umap(
    brain: Any, clip: Any, categories: Sequence[Any], seed: int = 0, max_categories: int = 8
) -> Figure:
    """Brain and image embeddings in one UMAP plane (McInnes et al. 2018), by category.

    Filled marks are brains, open ones images.

    Args:
        brain: embeddings predicted from the brain (n, dim) or (n, tokens, dim).
        clip: embeddings of the same images, same shape.
        categories: label of every image (n,).
        seed: of UMAP.
        max_categories: categories drawn in their own mark, the most frequent ones; the others are grey dots.
    """
    if not len(brain) == len(clip) == len(categories):
        raise PerceptError(
            f"{len(brain)} brain and {len(clip)} image embeddings and {len(categories)} categories"
            " were given; they must pair up."
        )
    brains, images = _umap_points(brain, clip, seed)
    labels = pd.Series(list(categories)).astype(str)
    names = labels.value_counts().index[:max_categories]
    fig, ax = plt.subplots(figsize=(7.2, 5.2))
    fig.subplots_adjust(left=0.02, right=0.77, bottom=0.02, top=0.93)
    for i, name in enumerate([*names, "other"]):
        mask = (labels == name if i < len(names) else ~labels.isin(names)).to_numpy()
        if not mask.any():
            continue
        colour, marker = (COLOURS[i % 8], MARKERS[i % 8]) if i < len(names) else (SOFT, ".")
        x, y = brains[mask].T
        ax.scatter(x, y, s=26, c=colour, marker=marker, lw=0, alpha=0.85, label=name)
        x, y = images[mask].T
        hollow = "o" if marker == "." else marker
        ax.scatter(x, y, s=26, facecolors="none", edgecolors=colour, marker=hollow, lw=0.9)
    fills = (("from the brain", INK), ("of the image", "none"))
    kinds = [
        Line2D([], [], color=INK, marker="o", ls="none", mfc=fill, label=kind)
        for kind, fill in fills
    ]
    place: dict[str, Any] = {"loc": "upper left", "alignment": "left", "fontsize": 9}
    ax.add_artist(ax.legend(handles=kinds, title="embedding", bbox_to_anchor=(1, 1), **place))
    ax.legend(title="category", bbox_to_anchor=(1, 0.82), **place)
    ax.set(xticks=[], yticks=[], title="UMAP of brain and image embeddings (cosine)")
    ax.spines[["left", "bottom"]].set_color(FAINT)
    return fig
