"""Sanity checks of results: outputs that are all alike, misaligned rows, training images in the test set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.evaluation.statistics import bootstrap_mean
from src.metrics import CHUNK, TOLERANCE


def check_outputs(recons: Any) -> list[str]:
    """Say what is wrong with reconstructions (n, 3, height, width) in [0, 1] before anyone scores
    them.

    Returns: Sentences, none when all is well: values that are not finite or out of range, black
    images,
        images of one colour, all alike.
    """
    n, alarms = len(recons), []
    found: list[Tensor] = []
    total: Any = 0.0
    square: Any = 0.0
    for start in range(0, n, CHUNK):  # a chunk at a time: 10,000 pictures fit
        rows = torch.as_tensor(recons[start : start + CHUNK]).detach().cpu()
        rows = (rows.float() / 255 if rows.dtype == torch.uint8 else rows.float()).flatten(1)
        finite = torch.isfinite(rows).all(1)
        rows = torch.where(finite[:, None], rows, 0.0)
        colours = (
            rows.unflatten(1, (3, -1)).std(2).amax(1)
        )  # spread of the colour that varies most over the picture
        found.append(torch.stack([finite, rows.amin(1), rows.amax(1), rows.std(1), colours], 1))
        total, square = total + rows.double().sum(0), square + rows.double().square().sum(0)
    finite, least, most, spread, colours = torch.cat(found).T
    finite = finite.bool()

    def say(which: Tensor, what: str) -> None:
        if which.any():
            first = ", ".join(str(i) for i in which.nonzero()[:5, 0].tolist())
            alarms.append(f"{int(which.sum())} of {n} reconstructions {what} (first: {first}).")

    say(~finite, "hold NaN or infinite values; half precision in the decoder is the usual cause")
    say((least < -TOLERANCE) | (most > 1 + TOLERANCE), "leave the range [0, 1]; clamp them")
    black = finite & (most < 0.02)
    say(black, "are black; a safety checker or a half-precision overflow is the usual cause")
    say(finite & ~black & (colours < 0.01), "are of one flat colour")
    between = (
        (square / n - (total / n) ** 2).clamp_min(0).sqrt().mean()
    )  # how much a pixel differs between pictures
    if n > 1 and between < 0.1 * spread.mean():
        alarms.append(
            f"The {n} reconstructions are nearly alike (they differ less than a tenth of what one "
            "picture's pixels do): "
            "the decoder ignores the brain, or the generator its condition."
        )
    return alarms


def check_alignment(
    two_way: Any, pixcorr: Any, pixcorr_shuffled: float = 0.0, ceiling: Any = None
) -> list[str]:
    """Say when scores look like rows of brain data and images that do not belong together.

    Args:
        two_way: (n,) of any two-way metric of the system.
        pixcorr: (n,) of the system.
        pixcorr_shuffled: mean pixel correlation of the shuffled pairing.
        ceiling: (n,) of the same two-way metric with the true latents, where known: it tells rows
            that do not belong together from a generator that cannot draw.

    Returns: One sentence when the interval of two-way identification reaches 50 % and the pixel
    correlation
        no better than shuffled, else none.
    """
    identification, pixels = bootstrap_mean(two_way), bootstrap_mean(pixcorr)
    if identification.low > 0.5 or pixels.low > pixcorr_shuffled + 0.02:
        return []
    found = (
        f"Two-way identification is {identification.value:.1%} and the pixel correlation"
        f" {pixels.value:.3f}, as for a random pairing"
    )
    if ceiling is None:
        return [
            f"{found}: your rows are probably misaligned (brain rows in another order than the"
            " images), or nothing was learned."
        ]
    best = bootstrap_mean(ceiling)
    if best.low <= 0.6:
        return [
            f"{found}, but true latents score {best.value:.1%} too: the generator, or the ceiling's"
            " latents, are at fault before the decoder is."
        ]
    return [
        f"{found}, while true latents reach {best.value:.1%}: your rows are probably misaligned"
        " (brain rows in another order than the images), or nothing was learned."
    ]


def check_leak(test_images: Any, train_images: Any) -> list[str]:
    """Say when pictures of the test set are among the training images, whatever their ids.

    Args:
        test_images: uint8 (n, height, width, 3).
        train_images: the same of the training images, or an iterable of such blocks.

    Returns: One sentence with the number of test images that are, byte for byte, training images,
    else none.
    """
    wanted: dict[bytes, list[int]] = {}
    for i, image in enumerate(np.asarray(test_images)):
        wanted.setdefault(
            hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest(), []
        ).append(i)
    blocks = [train_images] if isinstance(train_images, np.ndarray) else train_images
    seen = {
        hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()
        for block in blocks
        for image in block
    }
    leaked = sorted(i for key, rows in wanted.items() if key in seen for i in rows)
    if not leaked:
        return []
    first = ", ".join(map(str, leaked[:5]))
    return [
        f"{len(leaked)} of {len(test_images)} test images are also training images (first:"
        f" {first}): their scores are memory, not decoding; split by image."
    ]


def check_same_test(test_sets: Mapping[str, str]) -> list[str]:
    """Say when runs are to be compared that were not scored on the same images.

    Args:
        test_sets: test-set id by run.

    Returns: One sentence naming the ids and their runs, else none.
    """
    by_id: dict[str, list[str]] = {}
    for run, test_set in test_sets.items():
        by_id.setdefault(test_set, []).append(run)
    if len(by_id) < 2:
        return []
    groups = "; ".join(f"{test_set}: {', '.join(runs)}" for test_set, runs in by_id.items())
    return [
        f"These runs were scored on {len(by_id)} different test sets, whose scores cannot be"
        f" compared ({groups})."
    ]
