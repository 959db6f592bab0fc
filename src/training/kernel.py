"""The kernel decoder of a training stage: the same voxels and targets as the network's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.data.normaliser import Normaliser
from src.data.subject import Subject
from src.data.targets import LatentFile, TargetCache
from src.networks.kernels import KernelRidge, RepeatNoise
from src.utils import save_checkpoint, to_device

TRIALS_AT_ONCE = 768  # read and summed together


def fit_kernel_decoder(
    path: str | Path,
    subject: Subject,
    normaliser: Normaliser,
    targets: TargetCache | LatentFile,
    config: dict[str, Any],
    target_shape: Sequence[int] | None = None,
    kernel: str = "arc-cosine",
    device: str = "auto",
) -> KernelRidge:
    """Fit a `KernelRidge` to the training images, repeats averaged, and write its checkpoint.

    Args:
        path: of the checkpoint (.safetensors).
        subject: with its training split.
        normaliser: of its voxels.
        targets: frozen targets of the training images.
        config: stored with it; its entry "model" becomes the decoder's, "data" the subject's.
        target_shape: of one target, e.g. (tokens, dim); by default as `targets` has it.
        kernel: "arc-cosine" or "rbf".
        device: torch device on which it is solved; "auto": a GPU where there is one.
    """
    betas, image_ids = subject.get_mean_betas("train", normaliser=normaliser)
    rows = targets.rows(image_ids).astype(np.float32)
    if target_shape is not None:
        rows = rows.reshape(len(rows), *target_shape)
    device = to_device(device)
    noise = estimate_repeat_noise(subject, normaliser, device)
    decoder = KernelRidge.fit(betas, rows, noise, kernel, device=device)
    data = {subject.key: subject.identity}
    save_checkpoint(path, decoder.state_dict(), config | {"model": decoder.config, "data": data})
    return decoder


def estimate_repeat_noise(
    subject: Subject, normaliser: Normaliser, device: str = "cpu"
) -> RepeatNoise | None:
    """Covariance of single trials about the mean of their image, over training images.

    Args:
        subject: with its training split; where it has neighbouring trials, these are voxels like
            any others.
        normaliser: of its voxels.
        device: torch device on which products are summed.

    Returns:
        None where no training image was shown twice.
    """
    groups = subject.rows_by_image("train")
    repeated = [rows for rows in groups if len(rows) > 1]
    if not repeated:
        return None
    n_voxels = subject.get_betas(repeated[0], normaliser)[0].size
    products = torch.zeros(n_voxels, n_voxels, device=device)
    images_at_once = max(1, TRIALS_AT_ONCE // max(len(rows) for rows in repeated))
    for start in range(0, len(repeated), images_at_once):
        chunk = repeated[start : start + images_at_once]
        sizes = [len(rows) for rows in chunk]
        betas = subject.get_betas(np.concatenate(chunk), normaliser).reshape(sum(sizes), -1)
        sums = np.add.reduceat(betas, np.cumsum([0, *sizes[:-1]]), axis=0)
        means = sums / np.array(sizes)[:, None]
        residuals = betas - np.repeat(means, sizes, axis=0)
        block = torch.as_tensor(residuals, dtype=torch.float32, device=device)
        products.addmm_(block.T, block)
    freedom = sum(map(len, repeated)) - len(repeated)
    averaged = float(np.mean([1 / len(rows) for rows in groups]))
    return RepeatNoise(products / freedom, averaged)


def describe_kernel(decoder: KernelRidge) -> str:
    """The kernel, what it compares, and how many training images it keeps."""
    n_images, n_features = decoder.support.shape
    what = "signal dimensions"
    if decoder.weighted:
        same = bool((decoder.projection == decoder.projection[0]).all())
        what = "voxels as they are (no image was shown twice)" if same else "weighted voxels"
    return f"{decoder.kernel} on {n_features:,} {what}, {n_images:,} training images kept"
