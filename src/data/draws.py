"""Random draws that depend on (seed, epoch, image) only: the same on every machine and in any order."""

from __future__ import annotations

import numpy as np


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): uint64 -> well mixed uint64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def hash_images(seed: int, epoch: int, image_ids: np.ndarray) -> np.ndarray:
    """Well mixed uint64 (batch,), a pure function of (seed, epoch, image)."""
    state = np.zeros(1, np.uint64)
    for value in (seed, epoch):
        state = _mix(state + np.uint64(value % 2**64) + np.uint64(0x9E3779B97F4A7C15))
    return _mix(
        _mix(state + np.asarray(image_ids).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    )


def choose_repeats(seed: int, epoch: int, image_ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A repeat for each image, uniform over 0..count-1 and a pure function of (seed, epoch, image).

    Args:
        seed, epoch: integers.
        image_ids: (batch,) ids.
        counts: (batch,) number of repeats of each.

    Returns:
        int64 (batch,).
    """
    return (hash_images(seed, epoch, image_ids) % np.asarray(counts).astype(np.uint64)).astype(
        np.int64
    )
