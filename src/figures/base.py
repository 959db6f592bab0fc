"""Figures of a run: plain matplotlib, one style, returned closed so that a notebook shows each
once.

- Every function returns a `Figure`; `save_figure(fig, path)` writes the PNG and hands the figure back, so
  a cell can end with it.
- Nothing is told by colour alone: series also differ in marker, line or place, and carry their
  name.
- Pictures are the first of the test set, never a selection, enlarged by a whole factor to a size at
  which they can be read.
- In `plot_score_dots` right is always better, also for distances, so that a row is read the same way
  everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.core.getipython import get_ipython
from IPython.display import Image as ShownImage
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
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


def apply_style() -> Any:
    """A context in which matplotlib draws in the common style: `with apply_style(): ...`."""
    settings: dict[str, Any] = {
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
    return plt.rc_context(settings)


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the common style, and close the figure so that a notebook does not show it twice."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        already = set(plt.get_fignums())
        try:
            with apply_style():
                fig = draw(*args, **kwargs)
                fig.canvas.draw()  # texts take their style now
        finally:
            for number in set(plt.get_fignums()) - already:
                plt.close(number)
        return fig

    return styled


def save_figure(fig: Figure, path: str | Path) -> None:
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


LINE = 13  # pixels a line of the sentences takes


def _wrapped(title: str, width: int) -> str:
    """The title in lines of about `width` characters."""
    lines = [""]
    for word in title.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _plural(kind: str, count: int) -> str:
    return kind if count == 1 else {"hit": "hits", "miss": "misses"}[kind]


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
