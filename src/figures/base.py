"""What all figures share: one style, colours, marks of the controls, panels and legends.

- Every function that plots returns a closed `Figure`, so that a notebook shows it once;
  `save_figure(fig, path)` writes the PNG.
- Nothing is told by colour alone: series also differ in marker, line or place, and carry their
  name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from IPython.core.getipython import get_ipython
from IPython.display import Image as DisplayedImage
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from src.utils import atomic

DPI = 110

INK, SOFT, FAINT = "#1f2430", "#6b7280", "#e5e7eb"

COLOURS = [  # Okabe & Ito, extended
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7A5195",
    "#8C6D31",
]

MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]


Look = dict[str, Any]  # options of matplotlib's artists


class ControlMark(NamedTuple):
    """How a baseline or the ceiling is drawn, and what the legend calls it."""

    marker: str
    colour: str
    label: str


CONTROL_MARKS = {  # by condition of a score table
    "shuffled": ControlMark("x", SOFT, "shuffled pairing"),
    "mean_image": ControlMark("s", "#E69F00", "mean image"),
    "mean_seen": ControlMark("s", "#E69F00", "mean seen image"),
    "other_recon": ControlMark("v", "#CC79A7", "most similar other reconstruction"),
    "untrained": ControlMark("P", "#56B4E9", "untrained network"),
    "nearest_train": ControlMark("D", "#009E73", "nearest training image"),
    "ceiling": ControlMark("|", "#7A5195", "ceiling"),
}


# ------------------------------------------------------------------------------------------- style
def apply_style() -> AbstractContextManager[None]:
    """A context in which matplotlib draws in the common style: `with apply_style(): ...`."""
    settings: Any = {
        "figure.dpi": DPI,
        "savefig.dpi": DPI,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        # names of runs, regions and captions may hold dollar signs, which are no formulas
        "text.parse_math": False,
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


def draw_in_style(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorate a plotting function: common style, and the figure closed when it is returned.

    A figure that stayed open would be shown twice by a notebook.
    """

    @functools.wraps(draw)
    def draw_styled(*args: Any, **kwargs: Any) -> Figure:
        open_before = set(plt.get_fignums())
        try:
            with apply_style():
                fig = draw(*args, **kwargs)
                fig.canvas.draw()  # texts take their style now
        finally:
            for number in set(plt.get_fignums()) - open_before:
                plt.close(number)
        return fig

    return draw_styled


def save_figure(fig: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically; in a notebook also show it."""
    with atomic(Path(path)) as temporary:
        fig.savefig(temporary, format="png", dpi=DPI)
    plt.close(fig)
    if getattr(get_ipython(), "kernel", None) is not None:
        display(DisplayedImage(filename=str(path)))  # the file itself, so that both look alike


# ------------------------------------------------------------------------------------------- texts
def wrap_text(text: str, width: int) -> str:
    """Break a text into lines of about `width` characters."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and len(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def describe_metric(name: str, better: str | None) -> str:
    """Name of a metric as a title, with a remark where lower values are better."""
    title = name.replace("_", " ")
    return f"{title} (lower is better)" if better == "lower" else title


def set_metric_title(ax: Any, name: str, better: str) -> None:
    """Title of a panel that shows a metric, with small tick labels."""
    ax.set_title(wrap_text(describe_metric(name, better), 30), fontsize=9)
    ax.tick_params(axis="both", labelsize=8, length=2)


# ----------------------------------------------------------------------------------------- markers
def get_control_mark(condition: str) -> ControlMark:
    """Mark of a baseline or the ceiling; conditions that are not listed get a triangle."""
    unlisted = ControlMark("v", COLOURS[5], condition.replace("_", " "))
    return CONTROL_MARKS.get(condition, unlisted)


def get_marker_options(condition: str) -> dict[str, Any]:
    """Matplotlib's options for the marker of a control.

    Crosses and bars have no face, so their line has the colour; the bar of the ceiling is long
    enough to show behind a dot.
    """
    marker, colour, _ = get_control_mark(condition)
    if marker not in "x|":
        return {"marker": marker, "ms": 7, "mew": 0.8, "mec": "white"}
    size = 18 if marker == "|" else 7
    return {"marker": marker, "ms": size, "mew": 2.2, "mec": colour}


def draw_interval(
    ax: Any,
    x: Any,
    y: Any,
    colour: str,
    width: float = 2.5,
    zorder: float = 4,
) -> None:
    """Draw a confidence interval as a thick line between two points with flat ends."""
    ax.plot(x, y, color=colour, lw=width, solid_capstyle="butt", zorder=zorder)


def draw_dot(
    ax: Any,
    x: Any,
    y: Any,
    colour: str,
    size: float,
    edge_width: float = 1,
    marker: str = "o",
) -> None:
    """Draw one mark with a white edge, above lines and intervals."""
    look: Look = {"marker": marker, "ms": size, "mew": edge_width, "mec": "white"}
    ax.plot(x, y, color=colour, zorder=5, **look)


# ------------------------------------------------------------------------------------------ panels
def make_panel_row(count: int) -> tuple[Figure, list[Any]]:
    """A figure with `count` panels side by side."""
    size = (3.3 * count, 3.0)
    fig, axes = plt.subplots(1, count, figsize=size, squeeze=False, layout="constrained")
    return fig, list(axes[0])


def make_panel_grid(
    count: int, width: float, height: float, max_columns: int = 4, **options: Any
) -> tuple[Figure, list[Any]]:
    """A figure with panels in rows, as even as can be; places that stay empty are hidden.

    Args:
        count: number of panels.
        width: of a panel, in inches.
        height: of a panel, in inches.
        max_columns: most panels in a row.
        options: of `plt.subplots`.
    """
    rows = -(-count // max_columns)
    columns = -(-count // rows)
    size = (width * columns, height * rows)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return fig, list(axes.flat[:count])


def add_controls_legend(
    fig: Figure,
    conditions: Collection[str],
    first: Sequence[Line2D],
    y: float,
    ncols: int = 4,
    **look: Any,
) -> None:
    """Legend of baselines and ceiling at the top of a figure.

    Args:
        fig: the figure.
        conditions: the controls that the figure shows.
        first: entries that stand before those of the controls.
        y: upper edge of the legend, as a share of the figure's height.
        ncols: columns of the legend.
        look: options of the lines of the controls that replace the usual ones.
    """
    handles = list(first)
    for condition in [*CONTROL_MARKS, *sorted(set(conditions) - set(CONTROL_MARKS))]:
        if condition in conditions:
            mark = get_control_mark(condition)
            options = {"color": mark.colour, "ls": "none"} | get_marker_options(condition)
            handles.append(make_handle(mark.label, **(options | {"ms": 9} | look)))
    add_top_legend(fig, handles, y, ncols=ncols, columnspacing=1.3, handletextpad=0.5)


def make_handle(label: str, **look: Any) -> Line2D:
    """Entry of a legend that looks as a line of the figure."""
    return Line2D([], [], label=label, **look)


def add_title(fig: Figure, y: float, title: str, fontsize: float) -> None:
    """Bold title at the upper left of a figure; `y` as a share of its height."""
    look: Look = {"va": "top", "fontweight": "bold", "fontsize": fontsize}
    fig.text(0.012, y, title, **look)


def add_top_legend(
    fig: Figure,
    handles: Sequence[Any],
    y: float,
    **options: Any,
) -> None:
    """Legend in the middle of the upper edge of a figure; `y` as a share of its height."""
    place: Look = {"loc": "upper center", "bbox_to_anchor": (0.5, y), "fontsize": 8}
    fig.legend(handles=handles, **place, **options)


# -------------------------------------------------------------------------------------- statistics
def list_unique(values: Iterable[Any]) -> list[Any]:
    """Values without repetitions, in the order of their first appearance."""
    return list(dict.fromkeys(values))


def bootstrap_means(groups: Sequence[np.ndarray], seed: int = 0) -> np.ndarray:
    """Mean and 95 % bootstrap interval of each group of values, (groups, 3): mean, low, high."""
    rng, rows = np.random.default_rng(seed), []
    for values in groups:
        resampled = rng.integers(0, len(values), (1000, len(values)))
        means = values[resampled].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        rows.append((values.mean(), low, high))
    return np.array(rows)
