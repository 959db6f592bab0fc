"""The mini world as arrays in one .npz."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from src.data.files import disk_errors
from src.utils import atomic


def write(
    path: str | Path, betas: np.ndarray, images: np.ndarray, **arrays: np.ndarray | str
) -> Path:
    """Write an .npz that `read` understands; the keys are those of the module.

    Raises PerceptError if the disk is full.
    """
    content: dict[str, Any] = {"betas": betas, "images": images} | {
        k: np.asarray(v) for k, v in arrays.items()
    }
    with disk_errors(Path(path).parent), atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **content)
    return Path(path)
