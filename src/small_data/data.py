"""From a prepared subject to rows an image: what was measured, what was shown, which split."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix

from src.data import Subject
from src.small_data.folds import Fold
from src.small_data.variants import warp_images

USED = "train+val+test"  # all splits: folds cut them anew
MIN_SESSION = 20  # training trials by which a session is z-scored; else by those of all sessions
MAX_VARIANTS = 3000  # moved copies of all images together
MAX_COPIES = 30  # of one image
STRENGTHS = (0.5, 1.0)  # of their movements
BATCH = 64  # images that a frozen network sees at once
RANDOM_SPLIT = re.compile(r"-random\d*-seed\d+$")  # protocols whose test set we drew


@dataclass(frozen=True)
class Responses:
    """Single trials, to be averaged for each fold.

    Attributes:
        betas: float32 (trials, voxels), as measured.
        sessions: (trials,).
        image_rows: (trials,) the row of the image that each trial showed.
        n_images: number of images.
    """

    betas: np.ndarray
    sessions: np.ndarray
    image_rows: np.ndarray
    n_images: int

    def average(self, train_rows: np.ndarray) -> np.ndarray:
        """Mean over the repeats of each image, float32 (images, voxels).

        Where there are several sessions, each is z-scored first, by its trials of training images.

        Args:
            train_rows: (training images,) rows of images.
        """
        betas = self.betas
        if len(np.unique(self.sessions)) > 1:
            betas = self._standardise(np.isin(self.image_rows, train_rows))
        counts = np.bincount(self.image_rows, minlength=self.n_images)
        shares = (1 / counts[self.image_rows]).astype(np.float32)
        places = (self.image_rows, np.arange(len(betas)))
        averaging = csr_matrix((shares, places), shape=(self.n_images, len(betas)))
        mean: np.ndarray = averaging @ betas
        return mean

    def _standardise(self, is_train: np.ndarray) -> np.ndarray:
        """z-scored trials (trials, voxels), by the trials (trials,) of training images."""
        scaled = np.empty_like(self.betas)
        for session in np.unique(self.sessions):
            is_here = self.sessions == session
            reference = is_here & is_train
            if reference.sum() < MIN_SESSION:
                reference = is_train
            mean, sd = self.betas[reference].mean(0), self.betas[reference].std(0)
            sd[sd <= 1e-6 * np.abs(mean)] = np.inf  # constant voxels become 0
            scaled[is_here] = (self.betas[is_here] - mean) / sd
        return scaled


def read_responses(subject: Subject) -> tuple[Responses, np.ndarray]:
    """All trials of a subject that are not excluded, and the images that they showed.

    Trials may come in any order, images may be shown any number of times.

    Returns:
        The trials, and ids (images,) of the images, ascending.
    """
    ids = subject.image_ids(USED)
    rows = np.flatnonzero((subject.trials["split"] != "exclude").to_numpy())
    image_rows = np.searchsorted(ids, subject.trials["image"].to_numpy()[rows])
    sessions = subject.trials["session"].to_numpy()[rows]
    return Responses(subject.get_betas(rows), sessions, image_rows, len(ids)), ids


def make_pixels(images: np.ndarray, max_side: int) -> np.ndarray:
    """Images as a decoder predicts them.

    Args:
        images: uint8 (n, height, width, 3).
        max_side: larger images are shrunk until their longer side has so many pixels.

    Returns:
        float32 (n, channels, height, width) in [0, 1], with one channel where all images are grey.
    """
    is_grey = (images == images[..., :1]).all()
    channels = images[..., :1] if is_grey else images
    pixels = torch.from_numpy(np.ascontiguousarray(channels)).permute(0, 3, 1, 2)
    height, width = images.shape[1:3]
    scale = max_side / max(height, width)
    if scale >= 1:
        return (pixels.float() / 255).numpy()
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    parts = [
        F.interpolate(part.float() / 255, size, mode="bilinear", antialias=True)
        for part in pixels.split(BATCH)
    ]
    shrunk: np.ndarray = torch.cat(parts).clamp(0, 1).numpy()
    return shrunk


def make_variants(pixels: np.ndarray, seed: int) -> dict[float, np.ndarray]:
    """Moved copies of images, by the strength of their movements.

    Args:
        pixels: float32 (n, channels, height, width).
        seed: of the movements.

    Returns:
        float32 (n, copies, channels * height * width) by strength, fewer copies of more images.
    """
    copies = int(np.clip(MAX_VARIANTS // len(pixels), 1, MAX_COPIES))
    return {
        strength: warp_images(pixels, copies, strength, seed).reshape(len(pixels), copies, -1)
        for strength in STRENGTHS
    }


def find_official_split(subject: Subject, ids: np.ndarray) -> Fold | None:
    """The split that came with the data; training and validation images are one side.

    Args:
        subject: prepared data.
        ids: (images,) ids, as of `read_responses`.

    Returns:
        Rows of the training and of the test images; None where the data came without a split (its
        test set was then drawn at random, and folds say more), or with a side that is too small.

    Warns:
        UserWarning: if a side is too small.
    """
    is_test = np.isin(ids, subject.image_ids("test"))
    if not is_test.any() or RANDOM_SPLIT.search(subject.protocol):
        return None
    n_test = int(is_test.sum())
    if n_test < 2 or len(ids) - n_test < 4:
        warnings.warn(
            f"The official split has {len(ids) - n_test} training and {n_test} test images, which"
            " is too few: it is left out.",
            stacklevel=2,
        )
        return None
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def encode_images(encoder: Any, images: np.ndarray) -> np.ndarray:
    """Embeddings of images, a batch at a time.

    Args:
        encoder: a frozen model, such as `Clipper`.
        images: uint8 (n, height, width, 3).

    Returns:
        float32 (n, features).
    """
    starts = range(0, len(images), BATCH)
    parts = [encoder.encode_pixels(images[start : start + BATCH]) for start in starts]
    embeddings: np.ndarray = np.concatenate(parts).reshape(len(images), -1)
    return embeddings
