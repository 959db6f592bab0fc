"""Images on a page, pixel for pixel: tiles of one size, and the white page that they are put on.

Small images are enlarged by a whole factor to a size at which they can be looked at.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from src.figures.base import DPI, Look
from src.utils import PerceptError

ENLARGEMENTS = {"nearest": Image.Resampling.NEAREST, "bicubic": Image.Resampling.BICUBIC}


def make_tiles(images: Any, side: int, enlarge: str) -> np.ndarray:
    """Scale images to squares of one size.

    Args:
        images: (n, 3 or 1, height, width) in [0, 1].
        side: pixels a side of a tile.
        enlarge: "nearest" or "bicubic", for images smaller than a tile; larger ones are shrunk by
            Lanczos' filter.

    Returns:
        uint8 (n, side, side, 3).

    Raises:
        PerceptError: for an unknown enlargement or images of another shape.
    """
    if enlarge not in ENLARGEMENTS:
        raise PerceptError(
            f"The enlargement {enlarge!r} is unknown; choose one of {', '.join(ENLARGEMENTS)}."
        )
    pixels = torch.as_tensor(images).detach().float().cpu()
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise PerceptError(
            f"Images of shape {tuple(pixels.shape)} were passed; figures expect (n, 3 or 1,"
            " height, width) in [0, 1]."
        )
    pixels = torch.nan_to_num(pixels).clamp(0, 1)
    pixels = pixels.expand(-1, 3, -1, -1).permute(
        0,
        2,
        3,
        1,
    )  # (n, height, width, 3)
    pixels_uint8 = (pixels * 255).round().to(torch.uint8).numpy()
    shrinks = max(pixels_uint8.shape[1:3]) > side
    method = Image.Resampling.LANCZOS if shrinks else ENLARGEMENTS[enlarge]
    tiles = []
    for image in pixels_uint8:
        tile = Image.fromarray(image).resize((side, side), method)
        tiles.append(np.asarray(tile))
    return np.stack(tiles)


def choose_tile_side(images: Any, target: int = 112) -> int:
    """Pixels a side at which images are shown.

    Small images are enlarged by a whole factor to about `target`, large ones shrunk to it.
    """
    height = torch.as_tensor(images).shape[2]
    if height > target:
        return target
    return height * max(1, round(target / height))


class PixelCanvas:
    """A white page with tiles and texts at pixel positions; images are shown pixel for pixel.

    Args:
        width: of the page, in pixels.
        height: of the page, in pixels.
    """

    def __init__(self, width: int, height: int):
        self.pixels = np.full((height, width, 3), 255, np.uint8)
        self.fig = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        self.ax = self.fig.add_axes((0, 0, 1, 1))
        self.ax.set(xlim=(0, width), ylim=(height, 0))
        self.ax.axis("off")

    def add_tile(self, tile: np.ndarray, x: int, y: int) -> None:
        """Put a tile (height, width, 3) with its upper left corner at x, y."""
        height, width = tile.shape[:2]
        self.pixels[y : y + height, x : x + width] = tile

    def add_text(self, x: float, y: float, text: str, **kwargs: Any) -> None:
        """Write a text at x, y, centred by default; `kwargs` are those of matplotlib's texts."""
        self.ax.text(
            x,
            y,
            text,
            **({"va": "center", "ha": "center"} | kwargs),
        )

    def finish(self) -> Figure:
        """The figure with all tiles drawn."""
        height, width = self.pixels.shape[:2]
        look: Look = {"interpolation": "nearest", "aspect": "auto", "zorder": 0}
        look["extent"] = (0, width, height, 0)
        self.ax.imshow(self.pixels, **look)
        return self.fig
