"""Figures of a run: plain matplotlib, one style, returned closed so that a notebook shows each
once.

- Every function returns a `Figure`; `save(fig, path)` writes the PNG and hands the figure back, so
  a cell can end with it.
- Nothing is told by colour alone: series also differ in marker, line or place, and carry their
  name.
- Pictures are the first of the test set, never a selection, enlarged by a whole factor to a size at
  which they can be read.
- In `score_dots` right is always better, also for distances, so that a row is read the same way
  everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.core.getipython import get_ipython
from IPython.display import Image as ShownImage
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter
from nibabel import Nifti1Image
from PIL import Image

from src.utils import PerceptError, atomic

DPI = 110
INK, SOFT, FAINT = "#1f2430", "#6b7280", "#e5e7eb"
COLOURS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7A5195",
    "#8C6D31",
]  # Okabe & Ito, extended
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
ENLARGEMENTS = {"nearest": Image.Resampling.NEAREST, "bicubic": Image.Resampling.BICUBIC}
CONTROL_MARKS = {  # row of a score table: (marker, colour, what it is)
    "shuffled": ("x", SOFT, "shuffled pairing"),
    "mean_image": ("s", "#E69F00", "mean image"),
    "mean_seen": ("s", "#E69F00", "mean seen image"),
    "other_recon": ("v", "#CC79A7", "most similar other reconstruction"),
    "untrained": ("P", "#56B4E9", "untrained network"),
    "nearest_train": ("D", "#009E73", "nearest training image"),
    "ceiling": ("|", "#7A5195", "ceiling"),
}


def style() -> Any:
    """The matplotlib settings of every figure here.

    In a notebook `plt.rcParams.update(style())` gives your own plots the same look.
    """
    return {
        "figure.dpi": DPI,
        "savefig.dpi": DPI,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": SOFT,
        "axes.labelcolor": INK,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.grid": False,
        "axes.axisbelow": True,
        "axes.prop_cycle": plt.cycler(color=COLOURS),
        "grid.color": FAINT,
        "grid.linewidth": 0.8,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
    }


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the common style, and close the figure so that a notebook does not show it twice."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        already = set(plt.get_fignums())
        try:
            with plt.rc_context(style()):
                fig = draw(*args, **kwargs)
                fig.canvas.draw()  # texts take their style now
        finally:
            for number in set(plt.get_fignums()) - already:
                plt.close(number)
        return fig

    return styled


def save(fig: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically; in a notebook also show it, wherever in a cell this is
    called.
    """
    with atomic(Path(path)) as temporary:
        fig.savefig(temporary, format="png", dpi=DPI)
    plt.close(fig)
    if getattr(get_ipython(), "kernel", None) is not None:
        display(ShownImage(filename=str(path)))  # the file itself, so that both look alike


def _tiles(images: Any, side: int, enlarge: str) -> np.ndarray:
    """Images (n, 3 or 1, height, width) in [0, 1] -> uint8 (n, side, side, 3)."""
    if enlarge not in ENLARGEMENTS:
        raise PerceptError(
            f"The enlargement {enlarge!r} is unknown; choose one of {', '.join(ENLARGEMENTS)}."
        )
    pixels = torch.as_tensor(images).detach().float().cpu()
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise PerceptError(
            f"Pictures of shape {tuple(pixels.shape)} were given; figures expect (n, 3 or 1,"
            " height, width) in [0, 1]."
        )
    pixels = (
        torch.nan_to_num(pixels).clamp(0, 1).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    )  # (n, height, width, 3)
    bytes_ = (pixels * 255).round().to(torch.uint8).numpy()
    shrinks = max(bytes_.shape[1:3]) > side
    method = Image.Resampling.LANCZOS if shrinks else ENLARGEMENTS[enlarge]
    return np.stack(
        [np.asarray(Image.fromarray(tile).resize((side, side), method)) for tile in bytes_]
    )


def _side(images: Any, wanted: int = 112) -> int:
    """Pixels at which pictures are shown.

    Small ones enlarged by a whole factor to about `wanted`, large ones shrunk to it.
    """
    height = torch.as_tensor(images).shape[2]
    return height * max(1, round(wanted / height)) if height <= wanted else wanted


class _Canvas:
    """A white page on which tiles and texts are put at pixel positions, so that pictures are shown
    pixel for pixel.
    """

    def __init__(self, width: int, height: int):
        self.pixels = np.full((height, width, 3), 255, np.uint8)
        self.fig = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        self.ax = self.fig.add_axes((0, 0, 1, 1))
        self.ax.set(xlim=(0, width), ylim=(height, 0))
        self.ax.axis("off")

    def tile(self, tile: np.ndarray, x: int, y: int) -> None:
        self.pixels[y : y + len(tile), x : x + tile.shape[1]] = tile

    def text(self, x: float, y: float, text: str, **kwargs: Any) -> None:
        self.ax.text(x, y, text, **{"va": "center", "ha": "center", **kwargs})

    def done(self) -> Figure:
        height, width = self.pixels.shape[:2]
        self.ax.imshow(
            self.pixels,
            extent=(0, width, height, 0),
            interpolation="nearest",
            aspect="auto",
            zorder=0,
        )
        return self.fig


@_styled
def contact_sheet(
    columns: dict[str, Any],
    n: int = 12,
    blocks: int = 2,
    labels: Sequence[Any] | None = None,
    enlarge: str = "bicubic",
    sentences: dict[str, Sequence[str]] | None = None,
) -> Figure:
    """The first n test images beside what was made of them.

    One row an image, one column a kind, rows folded into blocks.

    Args:
        columns: pictures (m, 3 or 1, height, width) in [0, 1] by title, in the order shown, e.g.
            {"seen": ..., "low level": ..., "reconstructed": ..., "nearest training image": ...,
            "ceiling": ...}; resolutions may differ.
        n: rows; the first n, unselected.
        blocks: side-by-side blocks the rows are folded into.
        labels: (m,) short names of the rows, e.g. image ids; their places in the test set by
            default.
        enlarge: "bicubic" or "nearest", for small pictures.
        sentences: (m,) sentences written beneath each row of pictures, by who says them.
    """
    lengths = {title: len(images) for title, images in columns.items()}
    if len(set(lengths.values())) != 1:
        raise PerceptError(
            f"The columns of a contact sheet differ in length: {lengths}; give the same images in"
            " each."
        )
    n = min(n, min(lengths.values()))
    labels = list(range(1, n + 1)) if labels is None else list(labels)
    blocks = min(blocks, n)
    rows, side = -(-n // blocks), max(_side(images) for images in columns.values())
    gap, head, between = 6, 40, 26
    margin = 14 + 7 * max(len(str(label)) for label in labels[:n])  # room for the longest label
    width = margin + len(columns) * (side + gap)  # of a block
    beneath = _beneath(sentences or {}, n, (width - margin) // 7)
    height = (
        side + gap + LINE * max((text.count("\n") + 1 for text in beneath if text), default=0)
    )  # of a row
    canvas = _Canvas(blocks * (width + between) - between + 8, head + rows * height)
    for i, text in enumerate(beneath):
        b, r = divmod(i, rows)
        canvas.text(
            b * (width + between) + margin,
            head + r * height + side + 2,
            text,
            va="top",
            ha="left",
            fontsize=7.5,
            linespacing=1.05,
        )
    for c, (title, images) in enumerate(columns.items()):
        for b in range(blocks):
            x = b * (width + between) + margin + c * (side + gap)
            weight = "bold" if c == 0 else "normal"
            canvas.text(
                x + side / 2,
                head - 6,
                _wrapped(title, 15),
                va="bottom",
                fontsize=9,
                fontweight=weight,
                linespacing=1.0,
            )
        for i, tile in enumerate(_tiles(images[:n], side, enlarge)):
            b, r = divmod(i, rows)
            x, y = b * (width + between) + margin, head + r * height
            canvas.tile(tile, x + c * (side + gap), y)
            if c == 0:
                canvas.text(x - 6, y + side / 2, str(labels[i]), ha="right", color=SOFT, fontsize=8)
    return canvas.done()


LINE = 13  # pixels a line of the sentences takes


def _beneath(sentences: dict[str, Sequence[str]], n: int, width: int) -> list[str]:
    """What is written beneath each of n rows of pictures: a sentence a speaker, in lines of about
    `width` characters.
    """
    told = [
        [_wrapped(f"{who}: {said[i]}", width) for who, said in sentences.items()] for i in range(n)
    ]
    return ["\n".join(lines) for lines in told]


@_styled
def image_grid(rows: dict[str, Any], n: int = 12, enlarge: str = "bicubic") -> Figure:
    """One row of pictures a kind, the first n of each: for a quick look.

    Args:
        rows: pictures (m, 3 or 1, height, width) in [0, 1] by title.
        n: pictures a row.
        enlarge: "bicubic" or "nearest", for small pictures.
    """
    n, side = (
        min(n, *(len(images) for images in rows.values())),
        min(88, max(_side(images) for images in rows.values())),
    )
    gap, margin = 6, 108
    canvas = _Canvas(margin + n * (side + gap), gap + len(rows) * (side + gap))
    for r, (title, images) in enumerate(rows.items()):
        y = gap + r * (side + gap)
        canvas.text(margin - 8, y + side / 2, _wrapped(title, 12), ha="right", fontsize=9)
        for i, tile in enumerate(_tiles(images[:n], side, enlarge)):
            canvas.tile(tile, margin + i * (side + gap), y)
    return canvas.done()


def _wrapped(title: str, width: int) -> str:
    """The title in lines of about `width` characters."""
    lines = [""]
    for word in title.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


@_styled
def hits_and_misses(
    queries: Any,
    gallery: Any,
    found: Any,
    right: Any,
    ranks: Any,
    n: int = 6,
    k: int = 6,
    title: str = "Image from brain",
    enlarge: str = "bicubic",
) -> Figure:
    """The first n queries whose right candidate came first, and the first n whose did not, in test
    order: nothing is chosen by hand.

    A row shows the place in the test set, the seen image, the best candidates, and the rank of the
    right one, which is framed.

    Args:
        queries: seen images (m, 3, height, width) in [0, 1].
        gallery: candidate images (c, 3, height, width) in [0, 1].
        found: rows of the gallery, best first (m, k or more).
        right: row of the gallery that is right for each query (m,).
        ranks: rank of the right candidate for each query (m,), 1 the best, e.g.
            `retrieval.rank_each`.
        n: rows of each kind.
        k: candidates shown.
        title: what was asked; how many hits and misses there are is added.
        enlarge: "bicubic" or "nearest".
    """
    found, right, ranks = np.asarray(found), np.asarray(right), np.asarray(ranks)
    if not len(queries) == len(found) == len(right) == len(ranks):
        raise PerceptError(
            f"{len(queries)} queries, {len(found)} rows of candidates, {len(right)} right ones and"
            f" {len(ranks)} ranks were given; they must pair up."
        )
    groups = {"hit": np.flatnonzero(ranks == 1), "miss": np.flatnonzero(ranks != 1)}
    k, side, gap, left, head, heading = min(k, found.shape[1]), _side(queries, 80), 12, 44, 46, 26
    rows_shown = sum(max(1, len(rows[:n])) for rows in groups.values())
    canvas = _Canvas(
        max(560, left + (k + 1) * (side + gap) + 124),
        head + 2 * heading + rows_shown * (side + gap) + 4,
    )
    counts = " and ".join(
        f"{len(rows)} {_plural(kind, len(rows))}" for kind, rows in groups.items()
    )
    canvas.text(
        gap,
        16,
        f"{title}: {counts} among {len(ranks)} test images",
        ha="left",
        fontsize=11,
        fontweight="bold",
    )
    canvas.text(
        gap,
        36,
        f"the first {n} of each, in the order of the test set; their numbers there stand at the"
        " left",
        ha="left",
        fontsize=8,
        color=SOFT,
    )
    y = head
    for kind, rows in groups.items():
        heads = {"hit": "Hits: the right one came first", "miss": "Misses: it did not"}
        canvas.text(
            gap,
            y + heading / 2,
            heads[kind] + ("" if len(rows) else " - there are none"),
            ha="left",
            fontsize=9,
            fontweight="bold",
        )
        y += heading
        for row in rows[:n]:
            tiles = _tiles(
                torch.cat(
                    [
                        torch.as_tensor(queries)[row, None],
                        torch.as_tensor(gallery)[torch.as_tensor(found[row, :k])],
                    ]
                ),
                side,
                enlarge,
            )
            _candidates(canvas, tiles, (left, y), gap, found[row, :k] == right[row])
            canvas.text(left - 6, y + side / 2, str(row + 1), ha="right", fontsize=8, color=SOFT)
            x = left + (k + 1) * (side + gap) + 22
            canvas.text(
                x,
                y + side / 2,
                f"rank {ranks[row]}\nof {len(gallery)}",
                ha="left",
                fontsize=9,
                fontweight="bold" if kind == "miss" else "normal",
            )
            y += side + gap
        y += 0 if len(rows) else side + gap
    return canvas.done()


def _plural(kind: str, count: int) -> str:
    return kind if count == 1 else {"hit": "hits", "miss": "misses"}[kind]


def _candidates(
    canvas: _Canvas, tiles: np.ndarray, corner: tuple[int, int], gap: int, right: np.ndarray
) -> None:
    """One row: the seen image, and after a space the candidates, the right one of them framed and
    marked.
    """
    (x0, y), side = corner, tiles.shape[1]
    for j, tile in enumerate(tiles):
        x = x0 + j * (side + gap) + (gap if j else 0)
        canvas.tile(tile, x, y)
        if j and right[j - 1]:
            canvas.ax.add_patch(
                Rectangle((x - 2, y - 2), side + 4, side + 4, fill=False, lw=3, ec=INK, zorder=2)
            )
            canvas.ax.add_patch(Rectangle((x, y), 20, 20, color=INK, zorder=2))
            canvas.text(x + 10, y + 10, "✓", color="white", fontsize=10, zorder=3)


# ---------------------------------------------------------------------------------------- training
@_styled
def training_curves(
    history: pd.DataFrame, quantities: Sequence[str] | None = None, x: str = "epoch"
) -> Figure:
    """Training (line) and validation (dashed, with dots) by epoch, one panel a quantity.

    The best validation loss is marked.

    Args:
        history: one row an epoch, columns such as "train/loss", "val/loss", "train/lr"; `x` may be
            a column or is the row number.
        quantities: what stands after the slash, in order; all numeric ones by default.
        x: name of the horizontal axis.
    """
    numeric = [c for c in history.select_dtypes("number").columns if "/" in c]
    if quantities is None:
        quantities = list(dict.fromkeys(c.split("/", 1)[1] for c in numeric))
    if not quantities:
        raise PerceptError("The history has no columns such as 'train/loss' to draw.")
    at = history[x].to_numpy() if x in history else np.arange(len(history))
    columns = min(3, len(quantities))
    rows = -(-len(quantities) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 2.6 * rows), squeeze=False, layout="constrained"
    )
    for ax, quantity in zip(axes.flat, quantities, strict=False):
        _curves(
            ax,
            at,
            {
                c.split("/", 1)[0]: history[c].to_numpy()
                for c in numeric
                if c.split("/", 1)[1] == quantity
            },
        )
        ax.set(title=quantity, xlabel=x)
    for ax in axes.flat[len(quantities) :]:
        ax.axis("off")
    val = history["val/loss"].to_numpy() if "val/loss" in history else np.array([])
    if "loss" in quantities and np.isfinite(val).any():
        best = int(np.nanargmin(val))
        ax = axes.flat[list(quantities).index("loss")]
        ax.plot(
            at[best],
            val[best],
            marker="*",
            ms=13,
            color=INK,
            ls="none",
            label=f"best, {x} {at[best]}",
        )
    for ax in axes.flat[: len(quantities)]:
        ax.legend(fontsize=8)
    return fig


def _curves(ax: Any, at: np.ndarray, series: dict[str, np.ndarray]) -> None:
    """Draw one panel: training as a line, validation dashed with dots where it was measured."""
    looks: dict[str, dict[str, Any]] = {
        "train": {"color": COLOURS[0]},
        "val": {"color": COLOURS[1], "ls": "--", "marker": "o", "ms": 3.5},
    }
    for i, (name, values) in enumerate(series.items()):
        keep = np.isfinite(values.astype(float))
        ax.plot(
            at[keep],
            values[keep],
            label=name,
            **looks.get(name, {"ls": ":", "marker": MARKERS[i], "ms": 3.5}),
        )
    ax.grid(axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


# ------------------------------------------------------------------------------------------ scores
@_styled
def score_dots(records: Sequence[dict[str, Any]], title: str = "") -> Figure:
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


def _mark(name: str) -> tuple[str, str, str]:
    return CONTROL_MARKS.get(name, ("v", COLOURS[5], name.replace("_", " ")))


def _shape(name: str) -> dict[str, Any]:
    """Marker of a control; crosses and bars have no face, so their line is the colour.

    The ceiling's bar shows even behind the dot.
    """
    marker, colour, _ = _mark(name)
    line = marker in "x|"
    return {
        "marker": marker,
        "ms": 18 if marker == "|" else 7,
        "mew": 2.2 if line else 0.8,
        "mec": colour if line else "white",
    }


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


def _panels(count: int) -> tuple[Figure, list[Any]]:
    """A row of panels, at most four."""
    fig, axes = plt.subplots(
        1, count, figsize=(3.3 * count, 3.0), squeeze=False, layout="constrained"
    )
    return fig, list(axes[0])


def _means(groups: Sequence[np.ndarray], seed: int = 0) -> np.ndarray:
    """Mean and 95 % bootstrap interval of each group of values, (groups, 3)."""
    rng, rows = np.random.default_rng(seed), []
    for values in groups:
        means = values[rng.integers(0, len(values), (1000, len(values)))].mean(1)
        rows.append((values.mean(), *np.quantile(means, [0.025, 0.975])))
    return np.array(rows)


@_styled
def score_by_distance(
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
def abstain_curve(
    spread: Any, scores: dict[str, Any], better: dict[str, str] | None = None
) -> Figure:
    """Mean score of the images that are kept when those whose samples differ most are left out.

    The line should rise to the left (for scores of which higher is better) if the spread of the
    samples knows what the decoder does not.

    Args:
        spread: (n,) how far apart the samples of an image are (`reconstruct.sample_spread`);
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
def retrieval_curve(table: pd.DataFrame) -> Figure:
    """Top-1 by pool size, both directions, with chance.

    Args:
        table: that of `retrieval.retrieval_by_pool_size`.
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


# ------------------------------------------------------------------------------------ several runs
def _grid(
    count: int, width: float, height: float, columns: int = 4, **options: Any
) -> tuple[Figure, list[Any]]:
    """Panels in rows of `columns`, as even as can be; those left over are hidden."""
    rows = -(-count // columns)
    columns = -(-count // rows)
    fig, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, **options
    )
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return fig, list(axes.flat[:count])


def _titled(ax: Any, metric: str, better: str) -> None:
    arrow = " (lower is better)" if better == "lower" else ""
    ax.set_title(_wrapped(metric.replace("_", " ") + arrow, 30), fontsize=9)
    ax.tick_params(axis="both", labelsize=8, length=2)


def _controls_legend(
    fig: Figure,
    shown: Sequence[str],
    first: Sequence[Line2D],
    y: float,
    ncols: int = 4,
    **look: Any,
) -> None:
    """Legend of floors and ceiling at the top of a figure."""
    handles = list(first)
    for name in [*CONTROL_MARKS, *sorted(set(shown) - set(CONTROL_MARKS))]:
        if name in shown:
            _, colour, label = _mark(name)
            handles.append(
                Line2D(
                    [],
                    [],
                    label=label,
                    **{"color": colour, "ls": "none", **_shape(name), "ms": 9, **look},
                )
            )
    fig.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, y),
        ncols=ncols,
        fontsize=8,
        columnspacing=1.3,
        handletextpad=0.5,
    )


@_styled
def compare_dots(table: pd.DataFrame, row: str = "system", baseline: str = "") -> Figure:
    """Runs on the same test images: a panel a metric, a line a run, its score as a dot with its
    interval; right is better everywhere.

    Floors and the ceiling stand in the lowest line, each from the run where it is strongest, and a
    thin line rises from each.

    Args:
        table: [run, row, metric, value, low, high, better]; rows named in `CONTROL_MARKS` (and
            "chance") are floors and ceiling.
        row: the row that is drawn as the score of its run.
        baseline: run whose interval is drawn as a band over all lines, "" for none.
    """
    known = {*CONTROL_MARKS, "chance"} - {row}
    scores, controls = table[table["row"] == row], table[table["row"].isin(known)]
    if scores.empty:
        raise PerceptError(f"There are no scores of {row!r} to draw.")
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
    """One panel of `compare_dots`."""
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
def curves_over(table: pd.DataFrame, by: str, words: str) -> Figure:
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
def held_out_effect(table: pd.DataFrame, title: str = "") -> Figure:
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


# ------------------------------------------------------------------------------ embeddings, voxels
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
def umap_scatter(
    brain: Any, clip: Any, categories: Sequence[Any], seed: int = 0, most: int = 8
) -> Figure:
    """Brain and image embeddings in one UMAP plane (McInnes et al. 2018), by category.

    Filled marks are brains, open ones images.

    Args:
        brain: embeddings predicted from the brain (n, dim) or (n, tokens, dim).
        clip: embeddings of the same images, same shape.
        categories: label of every image (n,).
        seed: of UMAP.
        most: categories drawn in their own mark, the most frequent ones; the others are grey dots.
    """
    if not len(brain) == len(clip) == len(categories):
        raise PerceptError(
            f"{len(brain)} brain and {len(clip)} image embeddings and {len(categories)} categories"
            " were given; they must pair up."
        )
    brains, images = _umap_points(brain, clip, seed)
    labels = pd.Series(list(categories)).astype(str)
    names = labels.value_counts().index[:most]
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


@_styled
def trials_figure(images: Any, responses: Sequence[np.ndarray], most: int = 200) -> Figure:
    """A few images and what the voxels did at each presentation: rows that look alike are a
    reliable measurement.

    Args:
        images: (n, 3, height, width) in [0, 1].
        responses: for each image the z-scores of its presentations (repeats, voxels), voxels in the
            order in which they are to be drawn.
        most: voxels drawn, the first ones.
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
            x[:, :most], aspect="auto", cmap="RdBu_r", vmin=-3, vmax=3, interpolation="nearest"
        )
        pairs = np.corrcoef(x)[np.triu_indices(len(x), 1)] if len(x) > 1 else np.array([])
        right.set(xticks=[], yticks=range(len(x)), yticklabels=[f"{i + 1}" for i in range(len(x))])
        right.set_ylabel(f"r = {pairs.mean():.2f}" if len(pairs) else "once", fontsize=8)
    axes[0, 1].set_title(
        f"the {min(most, responses[0].shape[1])} most reliable voxels, a row a presentation; r:"
        " mean correlation of the rows",
        fontsize=9,
    )
    fig.colorbar(shown, ax=axes[:, 1], shrink=0.6, label="z-score")
    return fig


@_styled
def roi_sets(voxels: pd.DataFrame, sets: dict[str, Any]) -> Figure:
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


def vote_sheet(seen: Any, chosen: Any, candidates: Any, tile: int = 512) -> np.ndarray:
    """One image as a strip: what was seen, what was chosen, a gap, and the candidates.

    Args:
        seen: (3, height, width) in [0, 1].
        chosen: (3, height, width) in [0, 1].
        candidates: (voters, 3, height, width) in [0, 1].
        tile: pixels a side of each picture.

    Returns:
        uint8 (height, width, 3): white, the pictures 20 pixels apart, 80 before the candidates.

    Source: the 2023 ROI project (3272 x 552 for four candidates of 512 pixels).
    """
    border, gap = 20, 60
    first = torch.stack([torch.as_tensor(picture).float() for picture in (seen, chosen)])
    pictures = [*_tiles(first, tile, "bicubic"), *_tiles(candidates, tile, "bicubic")]
    sheet = np.full(
        (tile + 2 * border, len(pictures) * (tile + border) + border + gap, 3), 255, np.uint8
    )
    for place, picture in enumerate(pictures):
        left = border + place * (tile + border) + (gap if place > 1 else 0)
        sheet[border : border + tile, left : left + tile] = picture
    return sheet


@_styled
def roi_figure(
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


# ------------------------------------------------------------------------------------------ sweeps
def _levels(names: Sequence[str]) -> dict[str, str]:
    """Colour of each level, in order; past the eighth they begin again, and places tell them apart."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


@_styled
def sweep_curves(histories: pd.DataFrame, factor: str) -> Figure:
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
def sweep_look(
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
    """The panel of `sweep_look` that decides: paired differences to the best level, and the spread
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
    """One panel of `sweep_look`."""
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
def region_curves(table: pd.DataFrame) -> Figure:
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


# ------------------------------------------------------------------------------------- attribution
VIEWS = {"from behind": ("x", "z"), "from above": ("x", "y"), "from the right": ("y", "z")}
AXES = {"x": "left - right (mm)", "y": "back - front (mm)", "z": "down - up (mm)"}


@_styled
def voxel_map(
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
def region_bars(
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


def glass_brain(voxels: pd.DataFrame, values: Any, affine: Any, title: str = "") -> Figure:
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
    from nilearn.plotting import plot_glass_brain  # takes seconds to import: only where it is used

    at = voxels[["i", "j", "k"]].to_numpy(int)
    volume = np.zeros(at.max(0) + 2, np.float32)
    volume[tuple(at.T)] = np.nan_to_num(np.asarray(values, np.float32))
    limit = max(float(np.nanquantile(np.abs(np.asarray(values, float)), 0.99)), 1e-12)
    with plt.rc_context(style()):
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
        plot_glass_brain(
            image, figure=fig, axes=(0.0, 0.0, 0.97, 0.88), display_mode="lyrz", **look
        )
        fig.text(0.012, 0.985, title, va="top", fontweight="bold", fontsize=11)
        fig.canvas.draw()
    plt.close(fig)
    return fig
