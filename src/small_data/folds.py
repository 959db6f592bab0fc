"""Folds over all images of a small data set, for cross-validation."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
from sklearn.model_selection import StratifiedKFold

from src.data import Subject
from src.utils import PerceptError

Fold = tuple[np.ndarray, np.ndarray]  # training rows, test rows

LEAVE_ONE_OUT = 0  # as a number of folds: one picture at a time


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
    groups: np.ndarray, labels: np.ndarray | None, folds: int, seed: int = 42
) -> list[Fold]:
    """Folds in which every image is a test image once, and equal pictures stay together.

    Each label is spread over the folds as evenly as it can be.

    Args:
        groups: (images,) the picture that each image shows, see `group_equal_images`.
        labels: (images,) label of each image, or None.
        folds: number of folds, or LEAVE_ONE_OUT.
        seed: of the order.

    Returns:
        Rows (training images,) and (test images,) of each fold.

    Raises:
        PerceptError: for one fold, or more folds than pictures.
    """
    _, first_rows, pictures = np.unique(groups, return_index=True, return_inverse=True)
    n_pictures = len(first_rows)
    folds = n_pictures if folds == LEAVE_ONE_OUT else folds
    if not 2 <= folds <= n_pictures:
        raise PerceptError(
            f"folds is {folds} for {n_pictures} pictures: ask for 2 to {n_pictures}, or for 0,"
            " which leaves out one picture at a time."
        )
    picture_labels = None if labels is None else labels[first_rows]
    rows = np.arange(len(groups))
    splits = []
    for held_out in _deal_pictures(n_pictures, picture_labels, folds, seed):
        is_test = np.isin(pictures, held_out)
        splits.append((rows[~is_test], rows[is_test]))
    return splits


def _deal_pictures(
    n_pictures: int, labels: np.ndarray | None, folds: int, seed: int
) -> list[np.ndarray]:
    """The pictures of each fold, ascending."""
    pictures = np.arange(n_pictures)
    if labels is not None and min(Counter(labels.tolist()).values()) >= folds:
        stratified = StratifiedKFold(folds, shuffle=True, random_state=seed)
        return [held_out for _, held_out in stratified.split(pictures, labels)]
    order = np.random.default_rng(seed).permutation(n_pictures)
    if labels is not None:
        order = order[np.argsort(labels[order], kind="stable")]
    return [np.sort(order[fold::folds]) for fold in range(folds)]  # as cards are dealt


def group_equal_images(images: np.ndarray) -> np.ndarray:
    """The picture that each image shows: images with the same pixels have the same number.

    Args:
        images: (images, height, width, channels).

    Returns:
        int64 (images,).
    """
    first_rows: dict[bytes, int] = {}
    groups = np.empty(len(images), np.int64)
    for row, image in enumerate(images):
        digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
        groups[row] = first_rows.setdefault(digest, row)
    return groups


def parse_voxel_counts(text: str, n_voxels: int) -> list[int]:
    """Candidate numbers of voxels, none more than the data have.

    Args:
        text: whole numbers, separated by commas.
        n_voxels: voxels of the data; numbers above it become it.

    Returns:
        Ascending, each once.

    Raises:
        PerceptError: for text that is no such list.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise PerceptError(
            f"voxels_kept is '{text}': give numbers of voxels separated by commas, such as 400,800."
        )
    return sorted({min(int(part), n_voxels) for part in parts})


def parse_penalties(text: str) -> list[float]:
    """Candidate penalties.

    Args:
        text: numbers above zero, separated by commas.

    Raises:
        PerceptError: for text that is no such list.
    """
    try:
        penalties = [float(part) for part in text.split(",")]
    except ValueError:
        penalties = []
    if not penalties or not all(0 < penalty < float("inf") for penalty in penalties):
        raise PerceptError(
            f"alphas is '{text}': give numbers above zero separated by commas, such as 100,300."
        )
    return penalties
