"""The mini world as the digits69 MATLAB file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io

from src.utils import PerceptError, atomic


def write(
    path: str | Path, betas: np.ndarray, images: np.ndarray, labels: np.ndarray, n_test: int
) -> Path:
    """Write the MATLAB file from arrays; the last `n_test` rows are its test set.

    Args:
        path: the file.
        betas: (images, voxels).
        images: uint8 (images, 28, 28).
        labels: (images,) 1 = six, 2 = nine.
        n_test: number of test images.

    Returns:
        `path`.

    Raises:
        PerceptError: for images of another size or a full disk.
    """
    if images.shape != (len(betas), 28, 28) or not 0 < n_test < len(betas):
        raise PerceptError(
            f"digits69 needs images ({len(betas)}, 28, 28) and 0 < n_test < {len(betas)}, not "
            f"{images.shape} and {n_test}."
        )
    by_column = images.astype(np.uint8).transpose(0, 2, 1)  # (images, columns, rows)
    arrays: dict[str, np.ndarray] = {
        "fmri": np.asarray(betas, np.float64),
        "stim": by_column.reshape(len(images), -1),  # (images, 784)
        "label": np.asarray(labels, np.uint8)[:, None],
    }
    content = {}
    for name, rows in arrays.items():
        content[f"{name}Trn"], content[f"{name}Test"] = rows[:-n_test], rows[-n_test:]
    with atomic(path) as temporary, open(temporary, "wb") as file:
        scipy.io.savemat(file, content)
    return Path(path)
