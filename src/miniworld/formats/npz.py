"""The mini world as arrays in one .npz."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from src.utils import atomic


def write(
    path: str | Path, betas: np.ndarray, images: np.ndarray, **arrays: np.ndarray | str
) -> Path:
    """Write an .npz.

    Args:
        path: the file.
        betas: (trials, voxels).
        images: uint8 (images, height, width, 3) or (images, height, width).
        arrays: more arrays; the keys are those of `src.readers.npz`.

    Returns:
        `path`.

    Raises:
        PerceptError: if the disk is full.
    """
    content: dict[str, Any] = {"betas": betas, "images": images}
    content |= {key: np.asarray(value) for key, value in arrays.items()}
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **content)
    return Path(path)
