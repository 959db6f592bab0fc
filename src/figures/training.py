"""Figures of a training: losses and validation over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from src.figures.base import COLOURS, INK, MARKERS, Look, draw_in_style, list_unique
from src.utils import PerceptError


@draw_in_style
def plot_training_curves(
    history: pd.DataFrame, quantities: Sequence[str] | None = None, x: str = "epoch"
) -> Figure:
    """Training (line) and validation (dashed, with dots) by epoch, one panel a quantity.

    The best validation loss is marked.

    Args:
        history: one row an epoch, columns such as "train/loss", "val/loss", "train/lr"; `x` may be
            a column or is the row number.
        quantities: what stands after the slash, in order; all numeric ones by default.
        x: name of the horizontal axis.

    Raises:
        PerceptError: for a history without such columns.
    """
    numeric = [name for name in history.select_dtypes("number").columns if "/" in name]
    if quantities is None:
        quantities = list_unique(_split_name(name)[1] for name in numeric)
    if not quantities:
        raise PerceptError("The history has no columns such as 'train/loss' to draw.")
    epochs = history[x].to_numpy() if x in history else np.arange(len(history))
    n_columns = min(3, len(quantities))
    n_rows = -(-len(quantities) // n_columns)
    size = (3.6 * n_columns, 2.6 * n_rows)
    fig, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    for ax, quantity in zip(axes.flat, quantities, strict=False):
        series = {}
        for name in numeric:
            part, quantity_of_column = _split_name(name)
            if quantity_of_column == quantity:
                series[part] = history[name].to_numpy()
        _draw_series(ax, epochs, series)
        ax.set(title=quantity, xlabel=x)
    for ax in axes.flat[len(quantities) :]:
        ax.axis("off")
    if "loss" in quantities and "val/loss" in history:
        ax = axes.flat[list(quantities).index("loss")]
        _mark_best(ax, epochs, history["val/loss"].to_numpy(), x)
    for ax in axes.flat[: len(quantities)]:
        ax.legend(fontsize=8)
    return fig


def _split_name(column: str) -> tuple[str, str]:
    """Part and quantity of a column of the history: "train/loss" -> "train", "loss"."""
    part, quantity = column.split("/", 1)
    return part, quantity


def _draw_series(
    ax: Any,
    epochs: np.ndarray,
    series: dict[str, np.ndarray],
) -> None:
    """Draw one panel: training as a line, validation dashed with dots where it was measured."""
    looks: dict[str, Look] = {
        "train": {"color": COLOURS[0]},
        "val": {"color": COLOURS[1], "ls": "--", "marker": "o", "ms": 3.5},
    }
    for i, (name, values) in enumerate(series.items()):
        measured = np.isfinite(values.astype(float))
        look = looks.get(name, {"ls": ":", "marker": MARKERS[i], "ms": 3.5})
        ax.plot(epochs[measured], values[measured], label=name, **look)
    ax.grid(axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _mark_best(
    ax: Any,
    epochs: np.ndarray,
    losses: np.ndarray,
    x: str,
) -> None:
    """Put a star at the lowest validation loss, if there is any."""
    if np.isfinite(losses).any():
        best = int(np.nanargmin(losses))
        look: Look = {"marker": "*", "ms": 13, "color": INK, "ls": "none"}
        ax.plot(epochs[best], losses[best], label=f"best, {x} {epochs[best]}", **look)
