"""The ridge baseline of a training stage: the same voxels and targets as the network's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.data.normaliser import Normaliser
from src.data.subject import Subject
from src.data.targets import LatentFile, TargetCache
from src.networks.linear import RidgeBaseline
from src.utils import count_parameters, save_checkpoint


def fit_ridge_baseline(
    path: str | Path,
    subject: Subject,
    normaliser: Normaliser,
    targets: TargetCache | LatentFile,
    config: dict[str, Any],
    target_shape: Sequence[int] | None = None,
    folds: int = 5,
    seed: int = 42,
) -> RidgeBaseline:
    """Fit a `RidgeBaseline` to the training images, repeats averaged, and write its checkpoint.

    Args:
        path: of the checkpoint (.safetensors).
        subject: with its training split.
        normaliser: of its voxels.
        targets: frozen targets of the training images.
        config: stored with it; its entry "model" becomes the baseline's, "data" the subject's.
        target_shape: of one target, e.g. (tokens, dim); by default as `targets` has it.
        folds: of the cross-validation that chooses the penalties.
        seed: of the folds.
    """
    betas, image_ids = subject.get_mean_betas("train", normaliser=normaliser)
    rows = targets.rows(image_ids).astype(np.float32)
    if target_shape is not None:
        rows = rows.reshape(len(rows), *target_shape)
    # neighbouring trials (images, trials, voxels) are features like any others
    voxels = betas.reshape(len(betas), -1)
    ridge = RidgeBaseline.fit(voxels, rows, cv=folds, seed=seed)
    data = {subject.key: subject.identity}
    save_checkpoint(path, ridge.state_dict(), config | {"model": ridge.config, "data": data})
    return ridge


def describe_ridge(ridge: RidgeBaseline) -> str:
    """Its number of weights and its median penalty."""
    median_penalty = np.median(ridge.alphas.numpy())
    return f"{count_parameters(ridge):,} weights, median penalty {median_penalty:.3g}"
