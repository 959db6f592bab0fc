"""Random draws that depend on (seed, epoch, image) only.

They are the same on every machine, in any order, with any batch size and number of workers.
"""

from __future__ import annotations

import numpy as np

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # increment of SplitMix64

MIXING_STEPS = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)  # shift, factor


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): uint64 -> well mixed uint64."""
    for shift, factor in MIXING_STEPS:
        state = (state ^ (state >> shift)) * factor
    mixed: np.ndarray = state ^ (state >> np.uint64(31))
    return mixed


def hash_images(seed: int, epoch: int, image_ids: np.ndarray) -> np.ndarray:
    """Well mixed uint64 (batch,), a pure function of (seed, epoch, image)."""
    state = np.zeros(1, np.uint64)
    for value in (seed, epoch):
        state = _mix(state + np.uint64(value % 2**64) + GOLDEN_GAMMA)
    state = _mix(state + np.asarray(image_ids).astype(np.uint64))
    return _mix(state + GOLDEN_GAMMA)


def choose_repeats(seed: int, epoch: int, image_ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Choose a repeat of each image, a pure function of (seed, epoch, image).

    Args:
        seed, epoch: integers.
        image_ids: (batch,) ids.
        counts: (batch,) number of repeats of each.

    Returns:
        int64 (batch,), uniform over 0..count-1.
    """
    hashes = hash_images(seed, epoch, image_ids)
    return (hashes % np.asarray(counts).astype(np.uint64)).astype(np.int64)
