"""Figures of images: contact sheets, grids, hits and misses of retrieval, sheets of a vote.

Images are the first of the test set, never a selection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from src.figures.base import INK, SOFT, Look, draw_in_style, wrap_text
from src.figures.canvas import PixelCanvas, choose_tile_side, make_tiles
from src.utils import PerceptError

LINE_HEIGHT = 13  # pixels of a line of a caption

Captions = dict[str, Sequence[str]]  # of each image, by their source


class _SheetLayout:
    """Pixel positions on a contact sheet: rows of images, folded into blocks side by side.

    Args:
        side: pixels a side of an image.
        n_rows: rows of a block.
        row_width: pixels of the images of a row, with their gaps.
        label_width: pixels left of a row, for its label.
        caption_height: pixels beneath a row, for its captions.
    """

    GAP, HEAD, BETWEEN = 6, 40, 26  # between images; above all rows; between blocks

    def __init__(
        self,
        side: int,
        n_rows: int,
        row_width: int,
        label_width: int,
        caption_height: int,
    ):
        self.side, self.n_rows, self.label_width = side, n_rows, label_width
        self.block_width = label_width + row_width
        self.row_height = side + self.GAP + caption_height

    def make_canvas(self, n_blocks: int) -> PixelCanvas:
        """An empty page for so many blocks."""
        width = n_blocks * (self.block_width + self.BETWEEN) - self.BETWEEN + 8
        return PixelCanvas(width, self.HEAD + self.n_rows * self.row_height)

    def block_left(self, block: int) -> int:
        """Left edge of the first image of a block."""
        return block * (self.block_width + self.BETWEEN) + self.label_width

    def row_corner(self, index: int) -> tuple[int, int]:
        """Upper left corner (x, y) of the first image of the row with this index."""
        block, row = divmod(index, self.n_rows)
        return self.block_left(block), self.HEAD + row * self.row_height


@draw_in_style
def plot_contact_sheet(
    columns: dict[str, Any],
    n: int = 12,
    blocks: int = 2,
    labels: Sequence[Any] | None = None,
    enlarge: str = "bicubic",
    captions: Captions | None = None,
) -> Figure:
    """The first n test images beside what was reconstructed of them.

    One row an image, one column a kind, rows folded into blocks.

    Args:
        columns: images (m, 3 or 1, height, width) in [0, 1] by title, in the order shown, e.g.
            {"seen": ..., "low level": ..., "reconstructed": ..., "nearest training image": ...,
            "ceiling": ...}; resolutions may differ.
        n: rows; the first n, unselected.
        blocks: side-by-side blocks the rows are folded into.
        labels: (m,) short names of the rows, e.g. image ids; their places in the test set by
            default.
        enlarge: "bicubic" or "nearest", for small images.
        captions: (m,) sentences written beneath each row of images, by their source.

    Raises:
        PerceptError: if the columns differ in length.
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
    side = max(choose_tile_side(images) for images in columns.values())
    label_width = 14 + 7 * max(len(str(label)) for label in labels[:n])
    row_width = len(columns) * (side + _SheetLayout.GAP)
    texts = _join_captions(captions or {}, n, row_width // 7)
    n_lines = max((text.count("\n") + 1 for text in texts if text), default=0)
    n_rows = -(-n // blocks)
    layout = _SheetLayout(side, n_rows, row_width, label_width, LINE_HEIGHT * n_lines)
    canvas = layout.make_canvas(blocks)
    _write_captions(canvas, layout, texts)
    for c, (title, images) in enumerate(columns.items()):
        shift = c * (side + layout.GAP)
        weight = "bold" if c == 0 else "normal"
        look: Look = {"va": "bottom", "fontsize": 9, "fontweight": weight}
        for block in range(blocks):
            x = layout.block_left(block) + shift + side / 2
            text = wrap_text(title, 15)
            canvas.add_text(x, layout.HEAD - 6, text, linespacing=1.0, **look)
        for i, tile in enumerate(make_tiles(images[:n], side, enlarge)):
            x, y = layout.row_corner(i)
            canvas.add_tile(tile, x + shift, y)
    for i, label in enumerate(labels[:n]):
        x, y = layout.row_corner(i)
        _write_label(canvas, x, y + side / 2, str(label))
    return canvas.finish()


def _write_label(canvas: PixelCanvas, x: float, y: float, label: str) -> None:
    """Write the label of a row left of its first image, which begins at x."""
    canvas.add_text(x - 6, y, label, ha="right", color=SOFT, fontsize=8)


def _join_captions(captions: Captions, n: int, width: int) -> list[str]:
    """The text beneath each of n rows: a caption a source, in lines of about `width` characters."""
    texts = []
    for i in range(n):
        lines = [wrap_text(f"{source}: {rows[i]}", width) for source, rows in captions.items()]
        texts.append("\n".join(lines))
    return texts


def _write_captions(canvas: PixelCanvas, layout: _SheetLayout, texts: Sequence[str]) -> None:
    look: Look = {"va": "top", "ha": "left", "fontsize": 7.5, "linespacing": 1.05}
    for i, text in enumerate(texts):
        x, y = layout.row_corner(i)
        canvas.add_text(x, y + layout.side + 2, text, **look)


@draw_in_style
def plot_image_grid(
    rows: dict[str, Any],
    n: int = 12,
    enlarge: str = "bicubic",
) -> Figure:
    """One row of images a kind, the first n of each: for a quick look.

    Args:
        rows: images (m, 3 or 1, height, width) in [0, 1] by title.
        n: images a row.
        enlarge: "bicubic" or "nearest", for small images.
    """
    n = min(n, *(len(images) for images in rows.values()))
    side = min(88, max(choose_tile_side(images) for images in rows.values()))
    gap, margin = 6, 108
    width, height = margin + n * (side + gap), gap + len(rows) * (side + gap)
    canvas = PixelCanvas(width, height)
    for row, (title, images) in enumerate(rows.items()):
        y = gap + row * (side + gap)
        text = wrap_text(title, 12)
        canvas.add_text(margin - 8, y + side / 2, text, ha="right", fontsize=9)
        for i, tile in enumerate(make_tiles(images[:n], side, enlarge)):
            canvas.add_tile(tile, margin + i * (side + gap), y)
    return canvas.finish()


HEADINGS = {"hit": "Hits: the right one came first", "miss": "Misses: it did not"}


@draw_in_style
def plot_hits_and_misses(
    queries: Any,
    gallery: Any,
    candidates: Any,
    targets: Any,
    ranks: Any,
    n: int = 6,
    k: int = 6,
    title: str = "Image from brain",
    enlarge: str = "bicubic",
) -> Figure:
    """The first n queries whose right candidate came first, and the first n whose did not.

    Both are in test order: nothing is chosen by hand. A row shows the place in the test set, the
    seen image, the best candidates, and the rank of the right one, which is framed.

    Args:
        queries: seen images (m, 3, height, width) in [0, 1].
        gallery: candidate images (c, 3, height, width) in [0, 1].
        candidates: rows of the gallery, best first (m, k or more).
        targets: row of the gallery that is right for each query (m,).
        ranks: rank of the right candidate for each query (m,), 1 the best, e.g.
            `retrieval.rank_each`.
        n: rows of hits, and of misses.
        k: candidates shown.
        title: of the figure; the numbers of hits and misses are added.
        enlarge: "bicubic" or "nearest".

    Raises:
        PerceptError: if the arguments differ in length.
    """
    candidates, targets, ranks = (np.asarray(rows) for rows in (candidates, targets, ranks))
    if not len(queries) == len(candidates) == len(targets) == len(ranks):
        raise PerceptError(
            f"{len(queries)} queries, {len(candidates)} rows of candidates, {len(targets)} right"
            f" ones and {len(ranks)} ranks were passed; they must pair up."
        )
    is_hit = ranks == 1
    groups = {"hit": np.flatnonzero(is_hit), "miss": np.flatnonzero(~is_hit)}
    queries, gallery = torch.as_tensor(queries), torch.as_tensor(gallery)
    k, side = min(k, candidates.shape[1]), choose_tile_side(queries, 80)
    gap, left, head, heading = 12, 44, 46, 26
    n_rows = sum(max(1, len(rows[:n])) for rows in groups.values())
    width = left + (k + 1) * (side + gap) + 124
    height = head + 2 * heading + n_rows * (side + gap) + 4
    canvas = PixelCanvas(max(560, width), height)
    counts = {kind: len(rows) for kind, rows in groups.items()}
    _write_heading(canvas, gap, f"{title}: {_describe_counts(counts)}", n)
    y = head
    for kind, rows in groups.items():
        text = HEADINGS[kind] if len(rows) else HEADINGS[kind] + " - there are none"
        look: Look = {"ha": "left", "fontsize": 9}
        canvas.add_text(gap, y + heading / 2, text, fontweight="bold", **look)
        y += heading
        for row in rows[:n]:
            best = candidates[row, :k]
            images = [queries[row, None], gallery[torch.as_tensor(best)]]
            tiles = make_tiles(torch.cat(images), side, enlarge)
            _draw_candidates(canvas, tiles, (left, y), gap, best == targets[row])
            middle = y + side / 2
            _write_label(canvas, left, middle, str(row + 1))
            x = left + (k + 1) * (side + gap) + 22
            weight = "bold" if kind == "miss" else "normal"
            rank = f"rank {ranks[row]}\nof {len(gallery)}"
            canvas.add_text(x, middle, rank, fontweight=weight, **look)
            y += side + gap
        if not len(rows):
            y += side + gap
    return canvas.finish()


def _describe_counts(counts: dict[str, int]) -> str:
    """The numbers of hits and misses in words."""
    plurals = {"hit": "hits", "miss": "misses"}
    parts = []
    for kind, count in counts.items():
        parts.append(f"{count} {kind if count == 1 else plurals[kind]}")
    return f"{' and '.join(parts)} among {sum(counts.values())} test images"


def _write_heading(canvas: PixelCanvas, x: int, title: str, n: int) -> None:
    """Title of `plot_hits_and_misses`, and what its rows are."""
    canvas.add_text(x, 16, title, ha="left", fontsize=11, fontweight="bold")
    text = (
        f"the first {n} of each, in the order of the test set; their numbers there stand at the"
        " left"
    )
    canvas.add_text(x, 36, text, ha="left", fontsize=8, color=SOFT)


def _draw_candidates(
    canvas: PixelCanvas,
    tiles: np.ndarray,
    corner: tuple[int, int],
    gap: int,
    is_target: np.ndarray,
) -> None:
    """One row: the seen image and, after a space, the candidates with the right one framed.

    Args:
        canvas: the page.
        tiles: (1 + candidates, side, side, 3).
        corner: x and y of the seen image.
        gap: pixels between tiles.
        is_target: (candidates,) whether each is the right one.
    """
    (left, y), side = corner, tiles.shape[1]
    canvas.add_tile(tiles[0], left, y)
    for j, tile in enumerate(tiles[1:], start=1):
        x = left + j * (side + gap) + gap
        canvas.add_tile(tile, x, y)
        if is_target[j - 1]:
            look: Look = {"fill": False, "lw": 3, "ec": INK}
            frame = Rectangle(
                (x - 2, y - 2),
                side + 4,
                side + 4,
                zorder=2,
                **look,
            )
            corner_box = Rectangle((x, y), 20, 20, color=INK, zorder=2)
            canvas.ax.add_patch(frame)
            canvas.ax.add_patch(corner_box)
            look = {"color": "white", "fontsize": 10, "zorder": 3}
            canvas.add_text(x + 10, y + 10, "✓", **look)


def draw_vote_sheet(
    seen: Any,
    chosen: Any,
    candidates: Any,
    tile: int = 512,
) -> np.ndarray:
    """One image as a strip: the seen image, the chosen one, a gap, and the candidates.

    Args:
        seen: (3, height, width) in [0, 1].
        chosen: (3, height, width) in [0, 1].
        candidates: (voters, 3, height, width) in [0, 1].
        tile: pixels a side of each image.

    Returns:
        uint8 (height, width, 3): white, the images 20 pixels apart, 80 before the candidates.

    Source: the 2023 ROI project (3272 x 552 for four candidates of 512 pixels).
    """
    border, gap = 20, 60
    first = [torch.as_tensor(image).float() for image in (seen, chosen)]
    tiles = list(make_tiles(torch.stack(first), tile, "bicubic"))
    tiles += list(make_tiles(candidates, tile, "bicubic"))
    width = len(tiles) * (tile + border) + border + gap
    sheet = np.full((tile + 2 * border, width, 3), 255, np.uint8)
    for place, pixels in enumerate(tiles):
        left = border + place * (tile + border)
        if place > 1:
            left += gap
        sheet[border : border + tile, left : left + tile] = pixels
    return sheet
