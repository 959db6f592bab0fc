"""Scores of reconstructed images: what each metric computes, and the registry of all of them.

- Every metric gives one value an image (n,); means, intervals and tests are taken over images,
  never over a single number.
- A metric has two halves: `prepare` looks at one set of images, `compare` at two prepared sets. So
  the true images are prepared once, however many reconstructions and controls are scored, and a
  shuffled pairing costs no second look at the images.
- Two-way identification keeps the published orientation: for reconstruction j the other *true*
  images are the distractors.
- The field's SSIM call changed meaning between scikit-image 0.19 and 0.20. `ssim` is the
  two-dimensional one (0.20 and later), `ssim_columns` the one that took the 425 columns for
  channels (0.19 and before). They differ by about 0.1: never mix them.
- An image of one flat grey correlates 0 with everything here (the published code gives NaN for the
  whole set); `sanity_checks.check_outputs` says so.
- What stands beside a score (intervals, baselines, upper bounds, alarms) is in `src.evaluation`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from src.utils import PerceptError

SIZE = 425  # pixels a side at which the field compares images (the size of the NSD stimuli)
CHUNK = 32  # images that are handled at once
PIXEL_CHUNK = 8  # pairs of images that one thread compares
TOLERANCE = 1e-3  # by which images may leave [0, 1]
FEATURE_CHUNK = 16384  # features that are added up in single precision
BLOCK = 2**27  # numbers of a block of features that is in memory in single precision (half a GiB)
MOMENT_ROWS = 64  # rows of a block whose moments one thread computes
RESIZING = {
    "published": "256 pixels first, without antialiasing, as MindEye's evaluation ran",
    "antialias": (
        "256 pixels first, with antialiasing, as the same code runs with torchvision 0.17 and later"
    ),
    "straight": "no step in between",
}


# -------------------------------------------------------------------------------------------- rows
def _read_rows(rows: Any, at: slice | np.ndarray) -> Tensor:
    """Some rows of a tensor, an array or a file that is mapped, as floats; bytes become [0, 1].

    Raises:
        PerceptError: values that are not finite.
    """
    part = rows[at]
    if isinstance(part, Tensor):
        part = part.detach().cpu()
    else:
        part = torch.from_numpy(np.array(part))
    if part.dtype == torch.uint8:
        return part.float() / 255
    if part.dtype not in (torch.float32, torch.float64):
        part = part.float()
    if not math.isfinite(part.sum()):  # any value that is not finite makes the sum so
        raise PerceptError(
            "The rows to be compared hold NaN or infinite values; find out why"
            " (check_outputs) before scoring."
        )
    return part


def _check_pair(true: Any, recon: Any, axes: str, pairing: Any = None) -> np.ndarray:
    """The pairing (n,), after checking that both have rows of some axes, and as many."""
    n = len(recon)
    if len(true) != n:
        raise PerceptError(
            f"{len(true)} true and {n} reconstructed rows were given: metrics compare row"
            " with row, so pass as many reconstructions as images, in the same order."
        )
    for name, rows in (("true", true), ("reconstructed", recon)):
        if len(rows.shape) < 2:
            raise PerceptError(
                f"The {name} rows have shape {tuple(rows.shape)}; metrics expect {axes}."
            )
    order = np.arange(n) if pairing is None else np.asarray(pairing)
    if len(order) != n:
        raise PerceptError(
            f"A pairing of {len(order)} was given for {n} reconstructions; give each the"
            " number of one true image."
        )
    return order


def _check_same_shape(true: Any, recon: Any) -> None:
    if tuple(true.shape[1:]) != tuple(recon.shape[1:]):
        raise PerceptError(
            f"True rows {tuple(true.shape[1:])} and reconstructed ones {tuple(recon.shape[1:])}"
            " differ: resize one set, this score takes them as they are."
        )


def _iterate_pairs(true: Any, recon: Any, pairing: Any = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of rows of one shape that belong together: true[pairing] and recon."""
    order = _check_pair(true, recon, "(n, ...)", pairing)
    _check_same_shape(true, recon)
    for start in range(0, len(order), CHUNK):
        at = slice(start, start + CHUNK)
        yield _read_rows(true, order[at]), _read_rows(recon, at)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise PerceptError(
            f"Images of shape {tuple(images.shape)} were given; pixel metrics expect (n, 3,"
            " height, width), floats in [0, 1] or bytes."
        )
    if not images.numel():
        return
    low, high = images.min(), images.max()
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise PerceptError(
            f"Image values run from {low:.6g} to {high:.6g}; pixel metrics"
            " expect [0, 1]: clamp reconstructions, divide 8-bit images by 255."
        )


def resize(images: Tensor, size: int = SIZE, antialias: bool = False) -> Tensor:
    """Resize bilinearly to (n, channels, size, size), as torchvision does with tensors; those of
    that size stay as they are.

    The published code was run with a torchvision that did not antialias, hence the default; it
    matters only when images shrink.
    """
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(
        images, (size, size), mode="bilinear", align_corners=False, antialias=antialias
    )


class _LazyImages:
    """Images (n, 3, height, width) that are reordered, turned into floats and resized when they are
    read: 10,000 of them are not in memory twice.

    Args:
        images: anything that is indexed by image; bytes, or floats in [0, 1].
        size: pixels a side, 0 for that of the images.
        antialias: smooth before shrinking.
        order: (n,) position of each image among `images`, by default its own.
    """

    ndim = 4
    dtype = torch.float32

    def __init__(
        self, images: Any, size: int = 0, antialias: bool = False, order: np.ndarray | None = None
    ):
        self.images = images
        self.size = size
        self.antialias = antialias
        self.order = np.arange(len(images)) if order is None else order
        self.shape = (len(images), 3, size, size) if size else tuple(images.shape)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, at: Any) -> Tensor:
        images = _read_rows(self.images, self.order[at])
        return resize(images, self.size, self.antialias) if self.size else images


def reorder_lazily(images: Any, order: Any) -> Any:
    """Images (n, 3, height, width) in another order (n,), read when they are needed."""
    return _LazyImages(images, order=np.asarray(order))


def apply_resizing(images: Any, resizing: str = "published") -> Any:
    """Images (n, 3, height, width) as an evaluation first brings them to one size.

    The published evaluation resizes all images to 256 pixels, and from there to what each metric
    asks for.

    Args:
        images: floats in [0, 1], or bytes.
        resizing: a key of `RESIZING`.

    Returns:
        An object with a length and a shape that can be sliced; images are resized when they are
        read.

    Raises:
        PerceptError: an unknown way.
    """
    if resizing not in RESIZING:
        raise PerceptError(
            f"There is no resizing '{resizing}': choose one of {', '.join(RESIZING)}."
        )
    size = 0 if resizing == "straight" else 256
    return _LazyImages(images, size, antialias=resizing == "antialias")


# ---------------------------------------------------------------------------------------- features
def _normalize_rows(rows: Tensor, centre: bool = True) -> Tensor:
    """Rows (n, features) in double precision, centred if asked, of length one; a flat row becomes
    zero.
    """
    rows = rows.flatten(1).double()
    if centre:
        # a flat row must not become rounding noise
        spread = rows.amax(1, keepdim=True) > rows.amin(1, keepdim=True)
        rows = (rows - rows.mean(1, keepdim=True)) * spread
    return F.normalize(rows, dim=1)


def two_way_each(real_features: Any, recon_features: Any, pairing: Any = None) -> np.ndarray:
    """Two-way identification of each reconstruction: share of the other true images that resemble
    it less than its own.

    With R[i, j] the Pearson correlation of real i and reconstruction j over features, value j is
    #{i: R[i, j] < R[j, j]} / (n - 1): the distractors are true images, and a tie is lost, as in the
    published code (MindEye, arXiv 2305.18274, after Ozcelik & VanRullen 2023). Correlations are
    computed in single precision, and those that are as near to the own one as its error once more
    in double: the counts are exact. Only a block of the rows is in memory at a time, so both may be
    mapped files.

    Args:
        real_features: (n, features...) of the true images; further axes are flattened.
        recon_features: (n, features...) of the reconstructions, in the same order.
        pairing: (n,) the true image that each reconstruction is compared with; its own by default.

    Returns:
        (n,) values in [0, 1]; chance is 0.5.

    Raises:
        PerceptError: fewer than two rows, rows that do not pair up, or values that are not finite.
    """
    order = _check_pair(real_features, recon_features, "features (n, features)", pairing)
    n = len(order)
    n_features = int(np.prod(real_features.shape[1:]))
    if n < 2:
        raise PerceptError(
            "Two-way identification needs at least two images: one to find and one to confuse it"
            " with."
        )
    if n_features != int(np.prod(recon_features.shape[1:])):
        raise PerceptError(
            f"True features {tuple(real_features.shape[1:])} and reconstructed ones"
            f" {tuple(recon_features.shape[1:])} differ: both must come from the same network."
        )
    n_rows = max(1, BLOCK // n_features)
    starts = range(0, n, n_rows)
    blocks = [slice(start, min(start + n_rows, n)) for start in starts]
    moments = [_compute_moments(_read_rows(real_features, at).flatten(1)) for at in blocks]
    real = _RealFeatures(real_features, blocks, torch.cat(moments))
    # a block of reconstructions is correlated with all n images at once
    n_columns = max(1, min(n_rows, BLOCK // 4 // n))
    columns = [slice(start, min(start + n_columns, n)) for start in range(0, n, n_columns)]
    counts = [_count_beaten(real, recon_features, at, order[at]) for at in columns]
    return np.concatenate(counts) / (n - 1)


@njit(nogil=True, fastmath=True, cache=True)
def _moments(rows: Any) -> Any:
    """Sum, and length after centring, of rows (n, features): float64 (n, 2); a flat row has length
    0.
    """
    moments = np.zeros((len(rows), 2))
    for i in range(len(rows)):
        row = rows[i]
        total = 0.0
        low = row[0]
        high = row[0]
        for j in range(len(row)):
            total += row[j]
            low = min(low, row[j])
            high = max(high, row[j])
        mean = total / len(row)
        squares = 0.0
        if low < high:
            for j in range(len(row)):
                squares += (row[j] - mean) ** 2
        moments[i, 0] = total
        moments[i, 1] = np.sqrt(squares)
    return moments


def _compute_moments(rows: Tensor) -> Tensor:
    """`_moments` of rows (n, features), on all cores."""
    n_parts = max(1, len(rows) // MOMENT_ROWS)
    parts = np.array_split(rows.contiguous().numpy(), n_parts)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return torch.from_numpy(np.concatenate(list(pool.map(_moments, parts))))


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a (n, features) times b (m, features) transposed, some features at a time and added up in
    double: single precision would lose what is small beside a large sum.
    """
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    a_chunks = a.split(FEATURE_CHUNK, dim=1)
    b_chunks = b.split(FEATURE_CHUNK, dim=1)
    for a_chunk, b_chunk in zip(a_chunks, b_chunks, strict=True):
        total += a_chunk @ b_chunk.T
    return total


@dataclass(frozen=True)
class _RealFeatures:
    """Features of the true images, with which reconstructions are compared.

    Attributes:
        features: (n, features...).
        blocks: slices of rows in which they are read.
        moments: float64 (n, 2), `_moments` of all rows.
    """

    features: Any
    blocks: list[slice]
    moments: Tensor

    def correlate(self, recon: Tensor, recon_moments: Tensor) -> Tensor:
        """Pearson correlation of all true images with some reconstructions (m, features), in single
        precision; float64 (n, m), exactly 0 where one of the two is flat.
        """
        parts = []
        for at in self.blocks:
            block = _read_rows(self.features, at).flatten(1).to(recon.dtype)
            parts.append(_multiply(block, recon))
        products = torch.cat(parts)  # (n, m)
        if not torch.isfinite(products.sum()):
            raise PerceptError(
                "The features are too large for single precision; scale them down before they are"
                " compared."
            )
        sums, lengths = recon_moments.T
        means = self.moments[:, :1] * sums / recon.shape[1]
        norms = (self.moments[:, 1:] * lengths).clamp_min(1e-300)
        correlation = (products - means) / norms
        correlation[:, lengths == 0] = 0.0
        correlation[self.moments[:, 1] == 0] = 0.0
        return correlation

    def correlate_exactly(self, rows: np.ndarray, recon: Tensor) -> Tensor:
        """Pearson correlation of some true images (rows,) with one reconstruction (features,), in
        double precision.
        """
        direction = _normalize_rows(recon[None])[0]
        parts = []
        for start in range(0, len(rows), CHUNK):
            block = _normalize_rows(_read_rows(self.features, rows[start : start + CHUNK]))
            parts.append((block * direction).sum(1))
        return torch.cat(parts)


def _relative_length(moments: Tensor, n_features: int) -> Tensor:
    """How much longer rows are before centring than after it, from their moments (n, 2)."""
    sums, lengths = moments.T
    return (lengths**2 + sums**2 / n_features).sqrt() / lengths.clamp_min(1e-300)


def _count_beaten(
    real: _RealFeatures, recon_features: Any, at: slice, targets: np.ndarray
) -> np.ndarray:
    """How many true images resemble each reconstruction of a block less than its own one does,
    float64 (block,).

    Args:
        real: features of all true images.
        recon_features: (n, features...).
        at: the rows of this block.
        targets: (block,) the true image that each of them is compared with.
    """
    recon = _read_rows(recon_features, at).flatten(1)
    recon_moments = _compute_moments(recon)
    correlation = real.correlate(recon, recon_moments)  # (n, block)
    columns = torch.arange(len(targets))
    target_correlation = correlation[targets, columns]
    beaten = correlation < target_correlation

    # single precision is as good as the products are; where a large mean was taken off, its error
    # weighs more
    n_features = recon.shape[1]
    real_error = _relative_length(real.moments, n_features)[:, None]
    error = 4e-6 * real_error * _relative_length(recon_moments, n_features)
    is_close = (correlation - target_correlation).abs() < error
    is_close[:, recon_moments[:, 1] == 0] = False
    is_close[real.moments[:, 1] == 0] = False
    is_close[targets, columns] = True
    for j in (is_close.sum(0) > 1).nonzero()[:, 0].tolist():
        rivals = is_close[:, j].nonzero()[:, 0].numpy()
        exact = real.correlate_exactly(rivals, recon[j])
        target_exact = exact[int(np.flatnonzero(rivals == targets[j])[0])]
        # what differs by the rounding of double precision is a tie
        beaten[rivals, j] = exact < target_exact - 1e-13
    return beaten.sum(0).numpy().astype(np.float64)


def two_way_identification(real_features: Any, recon_features: Any) -> float:
    """Mean of `two_way_each`.

    Features (n, features...) of true and reconstructed images -> score in [0, 1], chance 0.5.
    """
    return float(two_way_each(real_features, recon_features).mean())


def two_way_within(real_features: Any, recon_features: Any, groups: Any) -> np.ndarray:
    """Two-way identification among the images of the same group only, e.g. of one category or
    cluster: hard distractors.

    Args:
        real_features: (n, features...) of the true images.
        recon_features: (n, features...) of the reconstructions, in the same order.
        groups: (n,) label of each image.

    Returns:
        (n,) values in [0, 1], NaN for images that are alone in their group; chance is 0.5.
    """
    _check_pair(real_features, recon_features, "features (n, features)")
    labels = np.asarray(groups)
    values = np.full(len(real_features), np.nan)
    if len(labels) != len(values):
        raise PerceptError(
            f"{len(labels)} group labels were given for {len(values)} images; give one an image."
        )
    for label in pd.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) > 1:
            real = _read_rows(real_features, members)
            values[members] = two_way_each(real, _read_rows(recon_features, members))
    return values


def _multiply_pairs(true: Any, recon: Any, centre: bool, pairing: Any = None) -> np.ndarray:
    """Inner products of paired rows of length one, (n,)."""
    parts = []
    for a, b in _iterate_pairs(true, recon, pairing):
        parts.append((_normalize_rows(a, centre) * _normalize_rows(b, centre)).sum(1))
    return torch.cat(parts).numpy()


def pcc(images: Any, recons: Any, pairing: Any = None) -> np.ndarray:
    """Pearson correlation of each pair at its own resolution.

    (n, ...) and (n, ...) -> (n,) in [-1, 1]; the digits69 score.
    """
    return _multiply_pairs(images, recons, True, pairing)


def cosine(real: Any, recon: Any, pairing: Any = None) -> np.ndarray:
    """Cosine of each pair of latents or features, further axes flattened.

    (n, ...) and (n, ...) -> (n,) in [-1, 1].
    """
    return _multiply_pairs(real, recon, False, pairing)


def correlation_distance(
    real_features: Any, recon_features: Any, pairing: Any = None
) -> np.ndarray:
    """1 - Pearson correlation of paired features (n, features).

    (n,) in [0, 2], lower is better; the EfficientNet and SwAV scores.
    """
    return 1 - _multiply_pairs(real_features, recon_features, True, pairing)


def mse(images: Any, recons: Any, pairing: Any = None) -> np.ndarray:
    """Mean squared difference of each pair at its own resolution.

    (n, ...) and (n, ...) -> (n,), lower is better.
    """
    parts = []
    for a, b in _iterate_pairs(images, recons, pairing):
        difference = b.double() - a.double()
        parts.append(difference.square().flatten(1).mean(1))
    return torch.cat(parts).numpy()


# ------------------------------------------------------------------------------------------ pixels
# The two pixel metrics read 3 x 425 x 425 numbers a pair; compiled, in one pass, they cost a
# millisecond each (benchmarks/metrics.py).
def _score_pairs(
    compare: Callable[[np.ndarray, np.ndarray], float], images: Any, recons: Any, pairing: Any
) -> np.ndarray:
    """`compare` of each pair of images float32 (3, height, width), (n,), on all cores: compiled
    code works outside of Python's lock.
    """
    order = _check_pair(images, recons, "images (n, 3, height, width)", pairing)

    def score_chunk(start: int) -> list[float]:
        at = slice(start, start + PIXEL_CHUNK)
        true = _read_rows(images, order[at]).float()
        recon = _read_rows(recons, at).float()
        _check_images(true)
        _check_images(recon)
        true_images = true.contiguous().numpy()
        recon_images = recon.contiguous().numpy()
        return [compare(a, b) for a, b in zip(true_images, recon_images, strict=True)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        chunks = list(pool.map(score_chunk, range(0, len(order), PIXEL_CHUNK)))
    return np.array([value for chunk in chunks for value in chunk])


class _Resizer(NamedTuple):
    """Bilinear resizing of one axis, a matrix A (size, side) that is almost empty; the axes can be
    treated apart.

    Attributes:
        first: (size,) the first pixel that enters each new one.
        taps: (taps, size) the weights of that pixel and of those after it.
        bands: (2 * bands + 1, side) the diagonals of A'A: what inner products after resizing are.
        mean: (side,) mean over the new pixels of each old one's weight.
    """

    first: np.ndarray
    taps: np.ndarray
    bands: np.ndarray
    mean: np.ndarray


@lru_cache(maxsize=32)
def _make_resizer(side: int, size: int, antialias: bool) -> _Resizer:
    matrix = np.eye(side)
    if side != size:
        eye = torch.eye(side, dtype=torch.float64)[None, None]
        resized = F.interpolate(
            eye, (size, side), mode="bilinear", align_corners=False, antialias=antialias
        )
        matrix = resized[0, 0].numpy()
    first = (matrix != 0).argmax(1)
    last = side - (matrix[:, ::-1] != 0).argmax(1)
    n_taps = int((last - first).max())
    first = np.minimum(first, side - n_taps)
    new_pixels = np.arange(size)
    taps = np.stack([matrix[new_pixels, first + t] for t in range(n_taps)])
    product = matrix.T @ matrix
    reach = max(o for o in range(side) if np.diagonal(product, o).any())
    bands = np.zeros((2 * reach + 1, side))
    for o in range(-reach, reach + 1):
        pixels = slice(max(0, -o), side - max(0, o))
        bands[o + reach, pixels] = np.diagonal(product, o)
    mean = matrix.mean(0)
    return _Resizer(
        first, taps.astype(np.float32), bands.astype(np.float32), mean.astype(np.float32)
    )


@njit(nogil=True, fastmath=True, cache=True)
def _correlation(x: Any, y: Any, rows: Any, columns: Any, row_mean: Any, column_mean: Any) -> Any:
    """Pearson correlation of two images (3, height, width) after resizing, which is given by the
    bands and means of both axes' `_Resizer`.
    """
    channels, height, width = x.shape
    means = np.zeros(2)
    low = np.zeros(2)
    high = np.zeros(2)
    for k, z in enumerate((x, y)):
        low[k] = high[k] = z[0, 0, 0]
        for c in range(channels):
            for i in range(height):
                total = np.float32(0)
                row_low = z[c, i, 0]
                row_high = z[c, i, 0]
                for j in range(width):
                    total += z[c, i, j] * column_mean[j]
                    row_low = min(row_low, z[c, i, j])
                    row_high = max(row_high, z[c, i, j])
                means[k] += row_mean[i] * total
                low[k] = min(low[k], row_low)
                high[k] = max(high[k], row_high)
        means[k] /= channels
    if low[0] == high[0] or low[1] == high[1]:
        return 0.0
    mx = np.float32(means[0])
    my = np.float32(means[1])
    up = len(rows) // 2
    across = len(columns) // 2
    xx = yy = xy = 0.0
    ux = np.empty(width, np.float32)
    uy = np.empty(width, np.float32)
    vx = np.empty(width, np.float32)
    vy = np.empty(width, np.float32)
    for c in range(channels):
        for i in range(height):
            ux[:] = 0.0
            uy[:] = 0.0
            vx[:] = 0.0
            vy[:] = 0.0
            for o in range(-up, up + 1):
                if 0 <= i + o < height:
                    weight = rows[o + up, i]
                    for j in range(width):
                        ux[j] += weight * (x[c, i + o, j] - mx)
                        uy[j] += weight * (y[c, i + o, j] - my)
            for o in range(-across, across + 1):
                for j in range(max(0, -o), width - max(0, o)):
                    vx[j] += columns[o + across, j] * ux[j + o]
                    vy[j] += columns[o + across, j] * uy[j + o]
            sx = sy = sxy = np.float32(0)
            for j in range(width):
                sx += (x[c, i, j] - mx) * vx[j]
                sy += (y[c, i, j] - my) * vy[j]
                sxy += (x[c, i, j] - mx) * vy[j]
            xx += float(sx)
            yy += float(sy)
            xy += float(sxy)
    return xy / np.sqrt(xx * yy) if xx > 0 and yy > 0 else 0.0


def pixcorr(
    images: Any, recons: Any, size: int = SIZE, antialias: bool = False, pairing: Any = None
) -> np.ndarray:
    """Pixel correlation of each pair: Pearson over all colours and pixels, both resized straight to
    `size`.

    Source: MindEye, Table 1. The enlarged images are never made: with A the resizing matrix of an
    axis, <A x B', A y B'> = <x, (A'A) y (B'B)>, where A'A is almost empty. The result is that of
    resizing first (tested). Only images of two sizes are resized.

    Args:
        images: true images (n, 3, height, width) in [0, 1], or bytes.
        recons: reconstructions (n, 3, height, width) in [0, 1], or bytes; may have another
            resolution.
        size: pixels a side of the comparison.
        antialias: smooth before shrinking (no effect on images up to `size`).
        pairing: (n,) the true image that each reconstruction is compared with; its own by default.

    Returns:
        (n,) in [-1, 1]; 0 where an image is one flat colour.
    """

    def enlarge(image: np.ndarray) -> np.ndarray:
        enlarged = resize(torch.from_numpy(image)[None], size, antialias)
        return enlarged[0].contiguous().numpy()

    def compare(x: np.ndarray, y: np.ndarray) -> float:
        if x.shape != y.shape:
            x = enlarge(x)
            y = enlarge(y)
        rows, columns = (_make_resizer(side, size, antialias) for side in x.shape[1:])
        return _correlation(x, y, rows.bands, columns.bands, rows.mean, columns.mean)

    return _score_pairs(compare, images, recons, pairing)


# scikit-image's weights of red, green and blue
GREY = np.array([0.2125, 0.7154, 0.0721], np.float32)
# a Gaussian of 1.5 pixels, cut at 3.5 of them, as scikit-image cuts it
_OFFSETS = np.arange(-5, 6) / 1.5
TAPS = np.exp(-0.5 * _OFFSETS**2).astype(np.float32)
TAPS /= TAPS.sum()


@njit(nogil=True, fastmath=True, cache=True)
def _grey(image: Any, weights: Any, first: Any, row_taps: Any, start: Any, column_taps: Any) -> Any:
    """Luminance of an image (3, height, width), resized.

    Grey is taken before resizing: both are linear, and it is a third of the work.
    """
    _, height, width = image.shape
    wide = np.zeros((height, len(start)), np.float32)
    out = np.zeros((len(first), len(start)), np.float32)
    line = np.empty(width, np.float32)
    red, green, blue = image[0], image[1], image[2]
    for i in range(height):
        for j in range(width):
            grey = weights[0] * red[i, j] + weights[1] * green[i, j]
            line[j] = grey + weights[2] * blue[i, j]
        for t in range(len(column_taps)):
            for j in range(len(start)):
                wide[i, j] += column_taps[t, j] * line[start[j] + t]
    for i in range(len(first)):
        for t in range(len(row_taps)):
            weight = row_taps[t, i]
            for j in range(len(start)):
                out[i, j] += weight * wide[first[i] + t, j]
    return out


@njit(nogil=True, fastmath=True, cache=True)
def _structure(x: Any, y: Any, taps: Any, across: bool) -> Any:
    """Mean structural similarity of two grey images (rows, columns) in [0, 1] where the whole
    window fits, statistics taken along the rows' axis and, with `across`, along the columns' too.
    """
    c1 = np.float32(0.01**2)
    c2 = np.float32(0.03**2)
    half = np.float32(0.5)
    reach = len(taps)
    height, width = x.shape
    valid = width - reach + 1 if across else width
    line = np.empty((4, width), np.float32)
    recent = np.empty((reach, 4, valid), np.float32)
    window = np.empty((4, valid), np.float32)
    total = 0.0
    for i in range(height):
        for j in range(width):
            # variances do not change when half is subtracted, and rounding weighs less
            a = x[i, j] - half
            b = y[i, j] - half
            line[0, j] = a
            line[1, j] = b
            line[2, j] = a * a + b * b
            line[3, j] = a * b
        place = i % reach  # of the last `reach` rows, filtered along the row
        if across:
            recent[place] = 0.0
            for t in range(reach):
                w = taps[t]
                for k in range(4):
                    for j in range(valid):
                        recent[place, k, j] += w * line[k, j + t]
        else:
            recent[place] = line
        if i < reach - 1:
            continue
        window[:] = 0.0
        for t in range(reach):
            w = taps[t]
            place = (i + 1 + t) % reach
            for k in range(4):
                for j in range(valid):
                    window[k, j] += w * recent[place, k, j]
        for j in range(valid):
            a = window[0, j]
            b = window[1, j]
            covariance = window[3, j] - a * b
            variances = window[2, j] - (a * a + b * b)
            a = a + half
            b = b + half
            similarity = (2 * (a * b) + c1) * (2 * covariance + c2)
            total += similarity / (((a * a + b * b) + c1) * (variances + c2))
    return total / ((height - reach + 1) * valid)


def _score_structure(
    images: Any, recons: Any, size: int, antialias: bool, pairing: Any, across: bool
) -> np.ndarray:
    """`_structure` of the grey images of each pair, (n,)."""

    def make_grey(image: np.ndarray) -> np.ndarray:
        rows, columns = (_make_resizer(side, size, antialias) for side in image.shape[1:])
        return _grey(image, GREY, rows.first, rows.taps, columns.first, columns.taps)

    def compare(x: np.ndarray, y: np.ndarray) -> float:
        return _structure(make_grey(x), make_grey(y), TAPS, across)

    return _score_pairs(compare, images, recons, pairing)


def ssim(
    images: Any, recons: Any, size: int = SIZE, antialias: bool = False, pairing: Any = None
) -> np.ndarray:
    """Structural similarity of the grey images, in two dimensions (Wang et al. 2004), as
    scikit-image >= 0.20 computes it.

    A Gaussian window of 1.5 pixels, population covariance, data range 1; scikit-image gives the
    same (tested), at three times the cost.

    Args:
        images: true images (n, 3, height, width) in [0, 1], or bytes.
        recons: reconstructions (n, 3, height, width) in [0, 1], or bytes.
        size: pixels a side of the comparison; both are resized straight to it.
        antialias: smooth before shrinking.
        pairing: (n,) the true image that each reconstruction is compared with; its own by default.

    Returns:
        (n,) in [-1, 1].
    """
    return _score_structure(images, recons, size, antialias, pairing, True)


def ssim_columns(
    images: Any, recons: Any, size: int = SIZE, antialias: bool = False, pairing: Any = None
) -> np.ndarray:
    """Structural similarity along the columns of the grey images: what scikit-image <= 0.19
    computed for the same call.

    There `multichannel=True` made the 425 columns channels: a one-dimensional SSIM, averaged over
    columns, about 0.1 higher. Arguments and result as `ssim`.
    """
    return _score_structure(images, recons, size, antialias, pairing, False)


# ---------------------------------------------------------------------------------------- registry
def _return_images(images: Any) -> Any:
    """What pixel metrics prepare: the images as they are."""
    return images


@dataclass(frozen=True)
class Metric:
    """One score of reconstructions.

    Attributes:
        name: short name, unique in a table.
        compare: two prepared sets, and `pairing` (n,), the true image that each reconstruction is
            compared with -> (n,) values.
        better: "higher" or "lower".
        chance: value without any information, where one is known, else None.
        description: one sentence for a reader.
        source: paper or code the definition comes from.
        prepare: images (n, 3, height, width) -> anything that is indexed by image, e.g. features
            (n, features).
        truth: what `prepare` should give for the true images, where that is known without looking
            (labels), else None.
        network: the frozen network through which the metric looks; it has to be given (`through`)
            before the metric can be computed.
    """

    name: str
    compare: Callable[..., np.ndarray]
    better: str
    chance: float | None
    description: str
    source: str
    prepare: Callable[[Any], Any] = _return_images
    truth: Any = None
    network: str = ""

    def through(self, embed: Callable[[Any], Any], prefix: str = "", truth: Any = None) -> Metric:
        """This metric with its network.

        Args:
            embed: maps images (n, 3, height, width) to (n, features...).
            prefix: goes before the name.
            truth: features of the true images, where they are known already.
        """
        return replace(self, name=prefix + self.name, prepare=embed, truth=truth, network="")

    def prepare_true(self, images: Any) -> Any:
        """What `prepare` gives for the true images, or the truth where that is known."""
        return self.prepare(images) if self.truth is None else self.truth

    def score(self, images: Any, recons: Any, features: dict | None = None) -> np.ndarray:
        """Score each pair: images and recons (n, 3, height, width) in [0, 1] -> (n,).

        `features` stores what was prepared of the true images: pass one dict for one set of images,
        and it is prepared once.
        """
        features = {} if features is None else features
        if self.prepare not in features:
            features[self.prepare] = self.prepare_true(images)
        return self.compare(features[self.prepare], self.prepare(recons))


_FIELD = "MindEye, arXiv 2305.18274, after Ozcelik & VanRullen 2023"
_DIGITS = "digits69 literature, Du et al. 2018"
_COLUMNS = "the same call before scikit-image 0.20: structural similarity along columns"
_TWO_WAY = (
    "share of other test images that resemble the reconstruction less than the seen image does"
)
_DISTANCE = "one minus the correlation of the features of seen image and reconstruction"
_COSINE = "cosine of the features of seen image and reconstruction"
_PIXCORR = "correlation of pixels and colours at 425 x 425"
_SSIM = "structural similarity in grey at 425 x 425"
_PCC = "correlation of all pixels at their own size"
_MSE = "mean squared difference of pixels at their own size"


def two_way_metric(
    name: str, embed: Callable[[Any], Any], source: str = _FIELD, ending: str = ""
) -> Metric:
    """Two-way identification in the features of a frozen network.

    Args:
        name: of the metric.
        embed: maps images (n, 3, height, width) to (n, features...).
        source: paper or code the definition comes from.
        ending: of the description, e.g. the network and its layer.
    """
    return Metric(name, two_way_each, "higher", 0.5, _TWO_WAY + ending, source, embed)


def distance_metric(
    name: str, embed: Callable[[Any], Any], source: str = _FIELD, ending: str = ""
) -> Metric:
    """Correlation distance in the features of a frozen network; arguments as `two_way_metric`."""
    return Metric(name, correlation_distance, "lower", 1.0, _DISTANCE + ending, source, embed)


def cosine_metric(
    name: str, embed: Callable[[Any], Any], source: str = "cosine", ending: str = ""
) -> Metric:
    """Cosine in the features of a frozen network; arguments as `two_way_metric`.

    It is far above 0 for unrelated images, so read it against its baselines.
    """
    return Metric(name, cosine, "higher", None, _COSINE + ending, source, embed)


def _network_metric(make: Callable[..., Metric], name: str, network: str, layer: str) -> Metric:
    """A metric of the field that has to be given its network before it can be computed."""

    def embed(images: Any) -> Any:
        raise PerceptError(
            f"The metric {name} looks through {network}, which it was not given: use"
            f" METRICS['{name}'].through(embed)."
        )

    return replace(make(name, embed, ending=f" ({network}, {layer})"), network=network)


_REGISTERED = (
    Metric("pixcorr", pixcorr, "higher", 0.0, _PIXCORR, _FIELD),
    Metric("ssim", ssim, "higher", None, _SSIM, _FIELD),
    Metric("ssim_columns", ssim_columns, "higher", None, _COLUMNS, _FIELD),
    _network_metric(two_way_metric, "AlexNet(2)", "AlexNet", "second convolution"),
    _network_metric(two_way_metric, "AlexNet(5)", "AlexNet", "fifth convolution"),
    _network_metric(two_way_metric, "InceptionV3", "InceptionV3", "average pool"),
    _network_metric(two_way_metric, "CLIP", "CLIP ViT-L/14", "final embedding"),
    _network_metric(cosine_metric, "CLIP-cosine", "CLIP ViT-L/14", "final embedding"),
    _network_metric(distance_metric, "EffNet-B1", "EfficientNet-B1", "average pool"),
    _network_metric(distance_metric, "SwAV", "SwAV ResNet-50", "average pool"),
    Metric("pcc", pcc, "higher", 0.0, _PCC, _DIGITS),
    Metric("mse", mse, "lower", None, _MSE, _DIGITS),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _REGISTERED}
# of the field's tables, in their order; SSIM in both of its meanings
PUBLISHED_METRICS = (
    "pixcorr",
    "ssim",
    "ssim_columns",
    "AlexNet(2)",
    "AlexNet(5)",
    "InceptionV3",
    "CLIP",
    "EffNet-B1",
    "SwAV",
)


def answer_metrics(
    prefix: str,
    classify: Callable[[Tensor], dict[str, np.ndarray]],
    truth: dict[str, Sequence[str]],
    chance: dict[str, float],
) -> list[Metric]:
    """Whether a classifier answers questions about a reconstruction as is true of the image that
    was seen.

    Args:
        prefix: of the metrics' names, e.g. "mini:judge" gives "mini:judge:kind".
        classify: images (n, 3, height, width) in [0, 1] -> answers (n,) by question.
        truth: what is true of the images that were seen, (n,) by question; the classifier's word
            on them is not asked.
        chance: share right by guessing, by question.

    Returns:
        One metric a question, each 0 or 1 an image; the classifier looks once for all of them.
    """

    def stack(answers: Any) -> np.ndarray:
        """Answers by question as one array (n, questions)."""
        columns = [np.asarray(answers[question], dtype=object) for question in truth]
        return np.stack(columns, 1)

    def prepare(images: Tensor) -> np.ndarray:
        return stack(classify(images))

    def make_metric(column: int, question: str) -> Metric:
        def compare(true: Any, answers: Any, pairing: Any = slice(None)) -> np.ndarray:
            return (true[pairing, column] == answers[:, column]).astype(np.float64)

        return Metric(
            f"{prefix}:{question}",
            compare,
            "higher",
            chance[question],
            "share of reconstructions in which an independent classifier names the right"
            f" {question}",
            "model card of the mini models",
            prepare,
            true_answers,
        )

    true_answers = stack(truth)
    return [make_metric(column, question) for column, question in enumerate(truth)]
