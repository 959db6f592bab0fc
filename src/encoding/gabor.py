"""A pyramid of Gabor energies: what early visual cortex is known to respond to.

A Gabor filter is a wave under a Gaussian window. The energy of a pair of filters a quarter of a
wave apart says how strong an orientation and a spatial frequency are at a place, whatever the phase
of the wave (Adelson & Bergen 1985; Kay et al. 2008 predict V1 to V3 from such features).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.utils import PerceptError

SIGMAS = (0.06, 0.09, 0.13, 0.19)  # of the windows, as shares of the image's side

GRIDS = (9, 7, 6, 4)  # windows a side, for each sigma

CYCLES = (0.24, 0.42)  # spatial frequencies, in cycles per sigma


class GaborPyramid(nn.Module):
    """Gabor energies and local means of three opponent channels.

    Windows lie on square grids between .08 and .92 of the image's side. For every window, channel,
    orientation and frequency the feature is

        energy = sqrt(even^2 + odd^2),   even = <w cos(2 pi f u), x>,   odd = <w sin(2 pi f u), x>

    where x is the channel, w the Gaussian window (its sum is 1), u the coordinate along the
    orientation from the window's centre, and f = cycles / sigma. The even filter is a plain Gabor
    function: at few cycles it also answers to the local mean, as simple cells do. For every window
    and channel the local mean <w, x> and its absolute value follow.

    The channels are luminance (R + G + B) / 3 - 1/2, red against green (R - G) / 2 and blue against
    yellow (B - (R + G) / 2) / 2.

    Args:
        size: images are resized to this many pixels a side; the smallest window's wave must span
            two of them.
        sigmas: standard deviations of the windows, as shares of the side.
        grids: windows a side, one number for each sigma.
        orientations: number of orientations, evenly spaced over 180 degrees.
        cycles: spatial frequencies, in cycles per sigma.

    Raises:
        PerceptError: if there is not one grid a sigma, or a wave is too fine for `size` pixels.
    """

    even: Tensor
    odd: Tensor
    windows: Tensor

    def __init__(
        self,
        size: int = 32,
        sigmas: Sequence[float] = SIGMAS,
        grids: Sequence[int] = GRIDS,
        orientations: int = 4,
        cycles: Sequence[float] = CYCLES,
    ):
        super().__init__()
        if len(sigmas) != len(grids):
            raise PerceptError(
                f"A Gabor pyramid has one grid for each sigma, but was given {len(sigmas)} sigmas"
                f" and {len(grids)} grids: give as many of both."
            )
        finest = max(cycles) / min(sigmas)  # cycles an image
        if finest > size / 2:
            raise PerceptError(
                f"The finest wave of the Gabor pyramid has {finest:.1f} cycles an image, which"
                f" {size} pixels cannot show: take at least {math.ceil(2 * finest)} pixels."
            )
        self.size = size
        even, odd, windows = [], [], []
        for sigma, grid in zip(sigmas, grids, strict=True):
            u, v, window = _place_windows(size, sigma, grid)
            windows.append(window)
            for number in range(orientations):
                angle = math.pi * number / orientations
                along = u * math.cos(angle) + v * math.sin(angle)
                for frequency in cycles:
                    phase = 2 * math.pi * frequency / sigma * along
                    even.append(window * phase.cos())
                    odd.append(window * phase.sin())
        for name, filters in (("even", even), ("odd", odd), ("windows", windows)):
            self.register_buffer(name, torch.cat(filters).float(), persistent=False)

    @property
    def n_features(self) -> int:
        """Features of an image: 5,460 by default."""
        return 3 * (len(self.even) + 2 * len(self.windows))

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, 3, height, width) in [0, 1] -> features (n, n_features)."""
        if images.shape[-2:] != (self.size, self.size):
            size = (self.size, self.size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        channels = split_into_opponent_channels(images).flatten(2)  # (n, 3, pixels)
        energies = torch.hypot(channels @ self.even.T, channels @ self.odd.T)
        means = channels @ self.windows.T
        return torch.cat([energies, means, means.abs()], 2).flatten(1)


def split_into_opponent_channels(images: Tensor) -> Tensor:
    """Images (n, 3, height, width) in [0, 1] -> luminance, red-green, blue-yellow, likewise."""
    red, green, blue = images.unbind(1)
    luminance = (red + green + blue) / 3 - 0.5
    red_green = (red - green) / 2
    blue_yellow = (blue - (red + green) / 2) / 2
    return torch.stack([luminance, red_green, blue_yellow], 1)


def _place_windows(size: int, sigma: float, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian windows on a square grid, and the coordinates from their centres.

    Returns:
        Distance to the right and downwards, as shares of the side, and windows that sum to 1, each
        float64 (grid * grid, pixels).
    """
    pixels = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    y, x = torch.meshgrid(pixels, pixels, indexing="ij")
    middle = torch.linspace(0.08, 0.92, grid, dtype=torch.float64)
    if grid == 1:
        middle = torch.tensor([0.5], dtype=torch.float64)
    centre_y, centre_x = torch.meshgrid(middle, middle, indexing="ij")
    u = x.flatten() - centre_x.reshape(-1, 1)
    v = y.flatten() - centre_y.reshape(-1, 1)
    window = torch.exp(-(u**2 + v**2) / (2 * sigma**2))
    return u, v, window / window.sum(1, keepdim=True)
