"""Slightly moved copies of images: what else could have been shown, as a prior for few images."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

# standard deviations at strength 1
ROTATION = 6.0  # degrees
SCALE = 0.08  # of the factor
SHIFT = 0.03  # of the side


def warp_images(images: np.ndarray, copies: int, strength: float, seed: int = 0) -> np.ndarray:
    """Rotated, scaled and shifted copies of images.

    Args:
        images: float32 (n, channels, height, width).
        copies: of each image.
        strength: all movements are multiplied by it.
        seed: of the movements.

    Returns:
        float32 (n, copies, channels, height, width), bilinear, the border continued outwards.
    """
    count = len(images) * copies
    draws = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    angle = torch.deg2rad(ROTATION * strength * draws[:, 0])
    factor = (1 + SCALE * strength * draws[:, 1]).clamp(min=0.5)
    height, width = images.shape[-2:]
    matrix = torch.zeros(count, 2, 3)  # in coordinates that reach from -1 to 1
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
    matrix[:, 0, 1] = -angle.sin() * height / width
    matrix[:, 1, 0] = angle.sin() * width / height
    matrix[:, :, :2] *= factor[:, None, None]
    matrix[:, :, 2] = 2 * SHIFT * strength * draws[:, 2:]
    copied = torch.from_numpy(images).repeat_interleave(copies, 0)
    grid = F.affine_grid(matrix, list(copied.shape), align_corners=False)
    warped = F.grid_sample(copied, grid, padding_mode="border", align_corners=False)
    return warped.unflatten(0, (len(images), copies)).numpy()
