"""Figures of embeddings: brain and image embeddings in one plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from src.figures.base import COLOURS, FAINT, INK, MARKERS, SOFT, Look, draw_in_style, make_handle
from src.utils import PerceptError


@draw_in_style
def plot_embeddings(
    brain: Any,
    clip: Any,
    categories: Sequence[Any],
    seed: int = 0,
    max_categories: int = 8,
) -> Figure:
    """Brain and image embeddings in one UMAP plane (McInnes et al. 2018), by category.

    Filled marks are brains, open ones images.

    Args:
        brain: embeddings predicted from the brain (n, dim) or (n, tokens, dim).
        clip: embeddings of the same images, same shape.
        categories: label of every image (n,).
        seed: of UMAP.
        max_categories: categories drawn with a mark of their own, the most frequent ones; the
            others are grey dots.

    Raises:
        PerceptError: if the arguments differ in length.
    """
    if not len(brain) == len(clip) == len(categories):
        raise PerceptError(
            f"{len(brain)} brain and {len(clip)} image embeddings and {len(categories)} categories"
            " were passed; they must pair up."
        )
    brain_points, image_points = _fit_umap(brain, clip, seed)
    labels = pd.Series(list(categories)).astype(str)
    names = labels.value_counts().index[:max_categories]
    fig, ax = plt.subplots(figsize=(7.2, 5.2))
    fig.subplots_adjust(left=0.02, right=0.77, bottom=0.02, top=0.93)
    for i, name in enumerate(names):
        mask = (labels == name).to_numpy()
        colour, marker = COLOURS[i % 8], MARKERS[i % 8]
        points = (brain_points[mask], image_points[mask])
        _scatter_pairs(ax, *points, colour, (marker, marker), name)
    mask = (~labels.isin(names)).to_numpy()
    if mask.any():
        points = (brain_points[mask], image_points[mask])
        _scatter_pairs(ax, *points, SOFT, (".", "o"), "other")
    dot: Look = {"color": INK, "marker": "o", "ls": "none"}
    kinds = [
        make_handle("from the brain", mfc=INK, **dot),
        make_handle("of the image", mfc="none", **dot),
    ]
    place: Look = {"loc": "upper left", "alignment": "left", "fontsize": 9}
    legend = ax.legend(
        handles=kinds,
        title="embedding",
        bbox_to_anchor=(1, 1),
        **place,
    )
    ax.add_artist(legend)
    ax.legend(title="category", bbox_to_anchor=(1, 0.82), **place)
    ax.set(xticks=[], yticks=[], title="UMAP of brain and image embeddings (cosine)")
    ax.spines[["left", "bottom"]].set_color(FAINT)
    return fig


@draw_in_style
def plot_tokens(rows: dict[str, Any], n: int = 3) -> Figure:
    """Tokens of a few images as maps: a row a token, a column a number of it.

    The mean over the images that were passed first is taken off, so that what differs between
    images is seen.

    Args:
        rows: tokens (images, tokens, dim) by title, e.g. {"true": ..., "predicted": ...}.
        n: images drawn, the first ones.
    """
    tokens = {title: torch.as_tensor(values).float() for title, values in rows.items()}
    mean = next(iter(tokens.values())).mean(0)
    n = min(n, *(len(values) for values in tokens.values()))
    size = (3.2 * n + 0.6, 1.25 * len(tokens) + 0.3)
    fig, axes = plt.subplots(len(tokens), n, figsize=size, squeeze=False, layout="constrained")
    limit = float((next(iter(tokens.values()))[:n] - mean).abs().quantile(0.99))
    for row, (title, values) in zip(axes, tokens.items(), strict=True):
        for i, ax in enumerate(row):
            look: Look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "aspect": "auto"}
            ax.imshow((values[i] - mean).numpy(), interpolation="nearest", **look)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(title, fontsize=9)
    for i, ax in enumerate(axes[0]):
        ax.set_title(f"image {i + 1}", fontsize=9)
    return fig


def _fit_umap(
    brain: Any,
    clip: Any,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Both embeddings (n, ...) in one UMAP plane: (n, 2) of the brain and (n, 2) of the images."""
    from umap import UMAP  # compiles for seconds when imported: only where it is used

    tensors = (torch.as_tensor(embeddings).detach() for embeddings in (brain, clip))
    rows = torch.cat([tensor.float().cpu().flatten(1) for tensor in tensors])
    n_neighbors = min(15, len(rows) - 1)
    options: Look = {"metric": "cosine", "min_dist": 0.3, "n_jobs": 1}
    reducer = UMAP(n_neighbors=n_neighbors, random_state=seed, **options)
    points = reducer.fit_transform(rows.numpy())  # (2n, 2)
    return points[: len(rows) // 2], points[len(rows) // 2 :]


def _scatter_pairs(
    ax: Any,
    brain_points: np.ndarray,
    image_points: np.ndarray,
    colour: str,
    markers: tuple[str, str],
    label: str,
) -> None:
    """Draw the points of one category: filled those of the brain, open those of the images."""
    filled, hollow = markers
    look: Look = {"c": colour, "marker": filled, "lw": 0, "alpha": 0.85}
    ax.scatter(*brain_points.T, s=26, label=label, **look)
    look = {"facecolors": "none", "edgecolors": colour, "marker": hollow}
    ax.scatter(*image_points.T, s=26, lw=0.9, **look)
