"""Figures of a training: losses and validation over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from src.figures.base import COLOURS, INK, MARKERS, _styled
from src.utils import PerceptError


@_styled
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
