"""Figures of images: contact sheets, grids, hits and misses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from src.figures.base import INK, LINE, SOFT, _Canvas, _plural, _side, _styled, _tiles, _wrapped
from src.utils import PerceptError


@_styled
def plot_contact_sheet(
    columns: dict[str, Any],
    n: int = 12,
    blocks: int = 2,
    labels: Sequence[Any] | None = None,
    enlarge: str = "bicubic",
    captions: dict[str, Sequence[str]] | None = None,
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
        captions: (m,) sentences written beneath each row of pictures, by who says them.
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
    beneath = _beneath(captions or {}, n, (width - margin) // 7)
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


def _beneath(sentences: dict[str, Sequence[str]], n: int, width: int) -> list[str]:
    """What is written beneath each of n rows of pictures: a sentence a speaker, in lines of about
    `width` characters.
    """
    told = [
        [_wrapped(f"{who}: {said[i]}", width) for who, said in sentences.items()] for i in range(n)
    ]
    return ["\n".join(lines) for lines in told]


@_styled
def plot_image_grid(rows: dict[str, Any], n: int = 12, enlarge: str = "bicubic") -> Figure:
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


@_styled
def plot_hits_and_misses(
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


def draw_vote_sheet(seen: Any, chosen: Any, candidates: Any, tile: int = 512) -> np.ndarray:
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
