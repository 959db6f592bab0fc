"""Sanity checks of results: outputs that look alike, misaligned rows, training images among the
test images.

Every check returns sentences: what looks wrong, and why it matters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.evaluation.statistics import bootstrap_mean
from src.metrics import CHUNK, TOLERANCE

DARKEST = 0.02  # an image without a brighter pixel counts as black
FLATTEST = 0.01  # standard deviation of a colour below which it counts as flat
LISTED = 5  # images that a sentence names
NOT_FINITE = "hold NaN or infinite values; half precision in the decoder is the usual cause"


class _PixelSummary:
    """What a check needs to know of reconstructions (n, 3, height, width), read once in chunks, so
    that 10,000 images fit.

    Attributes:
        finite: bool (n,), whether all pixels are numbers.
        darkest, brightest: (n,) extreme pixels.
        spread: (n,) standard deviation of all pixels.
        colour_spread: (n,) that of the colour channel that varies most over the image.
        between: how much a pixel differs between images, averaged over pixels.
    """

    def __init__(self, recons: Any):
        n = len(recons)
        rows: list[Tensor] = []
        total: Any = 0.0
        square: Any = 0.0
        for start in range(0, n, CHUNK):
            pixels, finite = _read_pixels(recons[start : start + CHUNK])
            colour_spread = pixels.unflatten(1, (3, -1)).std(2).amax(1)
            extremes = [pixels.amin(1), pixels.amax(1)]
            columns = [finite, *extremes, pixels.std(1), colour_spread]
            rows.append(torch.stack(columns, 1))
            total = total + pixels.double().sum(0)
            square = square + pixels.double().square().sum(0)
        finite, self.darkest, self.brightest, self.spread, self.colour_spread = torch.cat(rows).T
        self.finite = finite.bool()
        variance = (square / n - (total / n) ** 2).clamp_min(0)
        self.between = variance.sqrt().mean()


def _read_pixels(recons: Any) -> tuple[Tensor, Tensor]:
    """Pixels (n, 3 * height * width) as floats, 0 in images that are not finite; bool (n,) which
    images are.
    """
    pixels = torch.as_tensor(recons).detach().cpu()
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    pixels = pixels.flatten(1)
    finite = torch.isfinite(pixels).all(1)
    return torch.where(finite[:, None], pixels, 0.0), finite


def check_outputs(recons: Any) -> list[str]:
    """Say what is wrong with reconstructions before anyone scores them.

    Args:
        recons: (n, 3, height, width) in [0, 1], or bytes.

    Returns:
        Sentences, none when all is well: values that are not finite or out of range, black images,
        images of one colour, images that are all alike.
    """
    n = len(recons)
    pixels = _PixelSummary(recons)
    outside = (pixels.darkest < -TOLERANCE) | (pixels.brightest > 1 + TOLERANCE)
    black = pixels.finite & (pixels.brightest < DARKEST)
    flat = pixels.finite & ~black & (pixels.colour_spread < FLATTEST)
    problems = [
        (~pixels.finite, NOT_FINITE),
        (outside, "leave the range [0, 1]; clamp them"),
        (black, "are black; a safety checker or a half-precision overflow is the usual cause"),
        (flat, "are of one flat colour"),
    ]
    alarms = [_name_images(mask, n, problem) for mask, problem in problems if mask.any()]
    if n > 1 and pixels.between < 0.1 * pixels.spread.mean():
        alarms.append(
            f"The {n} reconstructions are nearly alike (they differ less than a tenth of what one"
            " image's pixels do): the decoder ignores the brain, or the generator its condition."
        )
    return alarms


def _name_images(mask: Tensor, n: int, problem: str) -> str:
    """A sentence that counts the images of a problem and names the first of them."""
    positions = mask.nonzero()[:LISTED, 0].tolist()
    first = ", ".join(map(str, positions))
    return f"{int(mask.sum())} of {n} reconstructions {problem} (first: {first})."


def check_alignment(
    two_way: Any, pixcorr: Any, pixcorr_shuffled: float = 0.0, oracle: Any = None
) -> list[str]:
    """Say when scores look like rows of brain data and images that do not belong together.

    Args:
        two_way: (n,) of any two-way metric of the system.
        pixcorr: (n,) of the system.
        pixcorr_shuffled: mean pixel correlation of the shuffled pairing.
        oracle: (n,) of the same two-way metric with the true latents, where there is one: it
            distinguishes misaligned rows from a generator that cannot draw.

    Returns:
        One sentence when the interval of two-way identification reaches 50 % and the pixel
        correlation is no better than shuffled, else none.
    """
    identification = bootstrap_mean(two_way)
    pixels = bootstrap_mean(pixcorr)
    if identification.low > 0.5 or pixels.low > pixcorr_shuffled + 0.02:
        return []
    observation = (
        f"Two-way identification is {identification.value:.1%} and the pixel correlation"
        f" {pixels.value:.3f}, as for a random pairing"
    )
    misaligned = (
        "your rows are probably misaligned (brain rows in another order than the images), or"
        " nothing was learned."
    )
    if oracle is None:
        return [f"{observation}: {misaligned}"]
    best = bootstrap_mean(oracle)
    if best.low <= 0.6:
        return [
            f"{observation}, but true latents score {best.value:.1%} too: the generator, or the"
            " ceiling's latents, are at fault before the decoder is."
        ]
    return [f"{observation}, while true latents reach {best.value:.1%}: {misaligned}"]


def check_leak(test_images: Any, train_images: Any) -> list[str]:
    """Say when images of the test set are among the training images, whatever their ids.

    Args:
        test_images: uint8 (n, height, width, 3).
        train_images: the same of the training images, or an iterable of such blocks.

    Returns:
        One sentence with the number of test images that are, byte for byte, training images, else
        none.
    """
    blocks: Iterable[Any] = train_images
    if isinstance(train_images, np.ndarray):
        blocks = [train_images]
    trained: set[bytes] = set()
    for block in blocks:
        trained.update(_hash_image(image) for image in block)
    hashes = [_hash_image(image) for image in np.asarray(test_images)]
    leaked = [i for i, digest in enumerate(hashes) if digest in trained]
    if not leaked:
        return []
    first = ", ".join(map(str, leaked[:LISTED]))
    return [
        f"{len(leaked)} of {len(test_images)} test images are also training images (first:"
        f" {first}): their scores are memory, not decoding; split by image."
    ]


def _hash_image(image: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()


def check_same_test(test_sets: Mapping[str, str]) -> list[str]:
    """Say when runs are to be compared that were not scored on the same images.

    Args:
        test_sets: test-set id by run.

    Returns:
        One sentence naming the ids and their runs, else none.
    """
    runs_by_id: dict[str, list[str]] = {}
    for run, test_set in test_sets.items():
        runs_by_id.setdefault(test_set, []).append(run)
    if len(runs_by_id) < 2:
        return []
    groups = "; ".join(f"{test_set}: {', '.join(runs)}" for test_set, runs in runs_by_id.items())
    return [
        f"These runs were scored on {len(runs_by_id)} different test sets, whose scores cannot be"
        f" compared ({groups})."
    ]
