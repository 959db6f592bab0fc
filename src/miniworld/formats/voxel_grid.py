"""A small grid of voxels for writers of formats that store volumes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from src.utils import PerceptError


@dataclass(frozen=True)
class VoxelGrid:
    """A grid (x, y, z) over which the voxels are spread evenly, in C order as the reader has it.

    Attributes:
        shape: (x, y, z).
        n_voxels: number of voxels.
    """

    shape: tuple[int, int, int]
    n_voxels: int

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or self.size < self.n_voxels:
            raise PerceptError(
                f"A grid {self.shape} has no room for {self.n_voxels} voxels: give a larger (x, y,"
                " z)."
            )

    @property
    def size(self) -> int:
        """Number of places."""
        return int(np.prod(self.shape))

    @cached_property
    def places(self) -> np.ndarray:
        """Flat index of each voxel, (voxels,)."""
        return (np.arange(self.n_voxels) * self.size) // self.n_voxels

    def fill(self, values: np.ndarray, background: float) -> np.ndarray:
        """A volume (x, y, z) with values (voxels,) at the voxels and `background` around them."""
        volume = np.full(self.size, background, values.dtype)
        volume[self.places] = values
        return volume.reshape(self.shape)


def choose_small_grid(n_voxels: int) -> tuple[int, int, int]:
    """Three different sides, which tell the order of the axes, with some room beside the voxels."""
    side = int(np.ceil((1.3 * n_voxels) ** (1 / 3)))
    return side, side + 1, side + 2
