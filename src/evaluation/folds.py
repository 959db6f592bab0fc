"""Folds over all images of a small data set, for cross-validation."""

from __future__ import annotations

from collections import Counter

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold

from src.data import Subject
from src.utils import PerceptError

Fold = tuple[np.ndarray, np.ndarray]


def find_labels(subject: Subject, image_ids: np.ndarray) -> np.ndarray | None:
    """Label of each image, from the first column of labels.

    Args:
        subject: prepared data of one subject.
        image_ids: (images,) ids.

    Returns:
        (images,) labels, or None where there are none, or only one for all.

    Raises:
        PerceptError: if labels.parquet lacks an image.
    """
    table = subject.labels
    if table is None or set(table.columns) <= {"image"}:
        return None
    column = next(str(name) for name in table.columns if name != "image")
    n_missing = int((~np.isin(image_ids, table["image"].to_numpy())).sum())
    if n_missing:
        raise PerceptError(
            f"{subject.folder / 'labels.parquet'} has no label for {n_missing} of"
            f" {len(image_ids)} images: give every image one, or remove the table."
        )
    labels: np.ndarray = subject.categories(image_ids, column)
    return labels if len(set(labels.tolist())) > 1 else None


def split_into_folds(
    n_images: int, labels: np.ndarray | None, folds: int, seed: int = 42
) -> list[Fold]:
    """Folds in which every image is a test image once.

    They are stratified by label where each label has at least as many images as there are folds.

    Args:
        n_images: number of images.
        labels: (images,) label of each image, or None.
        folds: number of folds.
        seed: of the order.

    Returns:
        Rows (training images,) and (test images,) of each fold.

    Raises:
        PerceptError: for more folds than images.
    """
    if folds > n_images:
        raise PerceptError(f"folds is {folds} for {n_images} images: ask for at most {n_images}.")
    rows = np.zeros(n_images)
    if labels is not None and min(Counter(labels.tolist()).values()) >= folds:
        stratified = StratifiedKFold(folds, shuffle=True, random_state=seed)
        return list(stratified.split(rows, labels))
    return list(KFold(folds, shuffle=True, random_state=seed).split(rows))


def parse_voxel_counts(text: str, n_voxels: int) -> list[int]:
    """Candidate numbers of voxels that the data have.

    Args:
        text: whole numbers, separated by commas.
        n_voxels: voxels of the data.

    Raises:
        PerceptError: for text that is no such list, or where all candidates exceed the data.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise PerceptError(
            f"voxels_kept is '{text}': give numbers of voxels separated by commas, such as 400,800."
        )
    counts = [int(part) for part in parts if int(part) <= n_voxels]
    if not counts:
        raise PerceptError(
            f"voxels_kept is '{text}', but the data have {n_voxels} voxels: ask for fewer."
        )
    return counts
