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
  whole set); `results.check_outputs` says so.
- What stands beside a score (intervals, floors, ceilings, alarms) is in `src.results`.
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

SIZE = 425  # pixels a side at which the field compares pictures (the size of the NSD stimuli)
CHUNK = 32  # pictures that are handled at once
TOLERANCE = 1e-3  # by which pictures may leave [0, 1]
SOME = 16384  # features that are added up in single precision
BLOCK = 2**27  # numbers of a block of features that is held in single precision (half a GiB)
RESIZING = {
    "published": "256 pixels first, without antialiasing, as MindEye's evaluation ran",
    "antialias": (
        "256 pixels first, with antialiasing, as the same code runs with torchvision 0.17 and later"
    ),
    "straight": "no step in between",
}


# -------------------------------------------------------------------------------------------- rows
def _part(rows: Any, at: slice | np.ndarray) -> Tensor:
    """Some rows of a tensor, an array or a file that is mapped, as floats; bytes become [0, 1].

    Raises:
        PerceptError: values that are not finite.
    """
    part = rows[at]
    part = part.detach().cpu() if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
    if part.dtype == torch.uint8:
        return part.float() / 255
    part = part if part.dtype in (torch.float32, torch.float64) else part.float()
    if not math.isfinite(part.sum()):  # any value that is not finite makes the sum so
        raise PerceptError(
            "The rows to be compared hold NaN or infinite values; find out why"
            " (results.check_outputs) before scoring."
        )
    return part


def _check_pair(true: Any, made: Any, axes: str, pairing: Any = None) -> np.ndarray:
    """The pairing (n,), after checking that both have rows of some axes, and as many."""
    if len(true) != len(made):
        raise PerceptError(
            f"{len(true)} true and {len(made)} reconstructed rows were given: metrics compare row"
            " with row, so pass as many reconstructions as images, in the same order."
        )
    for name, rows in (("true", true), ("reconstructed", made)):
        if len(rows.shape) < 2:
            raise PerceptError(
                f"The {name} rows have shape {tuple(rows.shape)}; metrics expect {axes}."
            )
    order = np.arange(len(made)) if pairing is None else np.asarray(pairing)
    if len(order) != len(made):
        raise PerceptError(
            f"A pairing of {len(order)} was given for {len(made)} reconstructions; give each the"
            " number of one true image."
        )
    return order


def _pairs(
    true: Any, made: Any, axes: str, pairing: Any = None, chunk: int = CHUNK
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of rows that belong together: true[pairing] and made."""
    order = _check_pair(true, made, axes, pairing)
    for start in range(0, len(order), chunk):
        yield _part(true, order[start : start + chunk]), _part(made, slice(start, start + chunk))


def _check_pictures(pictures: Tensor) -> None:
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise PerceptError(
            f"Images of shape {tuple(pictures.shape)} were given; pixel metrics expect (n, 3,"
            " height, width), floats in [0, 1] or bytes."
        )
    if pictures.numel() and (pictures.min() < -TOLERANCE or pictures.max() > 1 + TOLERANCE):
        raise PerceptError(
            f"Image values run from {pictures.min():.6g} to {pictures.max():.6g}; pixel metrics"
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


class _View:
    """Pictures (n, 3, height, width) that are put in another order, turned into floats and resized
    when they are read: 10,000 of them are not held twice.
    """

    def __init__(
        self, images: Any, size: int = 0, antialias: bool = False, order: np.ndarray | None = None
    ):
        self.images, self.size, self.antialias = images, size, antialias
        self.order = np.arange(len(images)) if order is None else order
        self.shape, self.dtype = (
            (len(images), 3, size, size) if size else tuple(images.shape),
            torch.float32,
        )

    ndim = 4

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, at: Any) -> Tensor:
        pictures = _part(self.images, self.order[at])
        return resize(pictures, self.size, self.antialias) if self.size else pictures


def reorder_lazily(images: Any, order: Any) -> Any:
    """Pictures (n, 3, height, width) in another order (n,), read one by one when they are needed."""
    return _View(images, order=np.asarray(order))


def apply_resizing(images: Any, resizing: str = "published") -> Any:
    """Pictures (n, 3, height, width) as an evaluation first brings them to one size: a key of
    `RESIZING`.

    The published evaluation takes all pictures to 256 pixels, and from there to what each metric
    asks for. What is returned can be sliced and has a length and a shape; the pictures are resized
    when they are read.

    Raises:
        PerceptError: an unknown way.
    """
    if resizing not in RESIZING:
        raise PerceptError(
            f"There is no resizing '{resizing}': choose one of {', '.join(RESIZING)}."
        )
    return _View(images, 0 if resizing == "straight" else 256, resizing == "antialias")


# ---------------------------------------------------------------------------------------- features
def _unit_rows(rows: Tensor, centre: bool = True) -> Tensor:
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
    in double: the counts are exact. Only a block of the rows is held at a time, so both may be
    mapped files.

    Args:
        real_features: (n, features...) of the true images; further axes are flattened.
        recon_features: (n, features...) of the reconstructions, in the same order.
        pairing: (n,) the true image that each reconstruction is held against; its own by default.

    Returns:
        (n,) values in [0, 1]; chance is 0.5.

    Raises:
        PerceptError: fewer than two rows, rows that do not pair up, or values that are not finite.
    """
    order = _check_pair(real_features, recon_features, "features (n, features)", pairing)
    n, features = len(order), int(np.prod(real_features.shape[1:]))
    if n < 2:
        raise PerceptError(
            "Two-way identification needs at least two images: one to find and one to confuse it"
            " with."
        )
    if features != int(np.prod(recon_features.shape[1:])):
        raise PerceptError(
            f"True features {tuple(real_features.shape[1:])} and reconstructed ones"
            f" {tuple(recon_features.shape[1:])} differ: both must come from the same network."
        )
    block = max(1, BLOCK // features)
    reals = [slice(start, start + block) for start in range(0, n, block)]
    known = [_moments_of(_part(real_features, at).flatten(1)) for at in reals]
    counts = [
        _beaten(
            real_features,
            reals,
            known,
            recon_features,
            np.arange(start, min(start + block, n)),
            order,
        )
        for start in range(0, n, block)
    ]
    return np.concatenate(counts) / (n - 1)


@njit(nogil=True, fastmath=True, cache=True)
def _moments(rows: Any) -> Any:
    """Sum, and length after centring, of rows (n, features): float64 (n, 2); a flat row has length 0."""
    found = np.zeros((len(rows), 2))
    for i in range(len(rows)):
        row = rows[i]
        total, least, most = 0.0, row[0], row[0]
        for j in range(len(row)):
            total += row[j]
            least, most = min(least, row[j]), max(most, row[j])
        mean, squares = total / len(row), 0.0
        if least < most:
            for j in range(len(row)):
                squares += (row[j] - mean) ** 2
        found[i, 0], found[i, 1] = total, np.sqrt(squares)
    return found


def _moments_of(rows: Tensor) -> Tensor:
    """`_moments` of rows (n, features), on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return torch.from_numpy(
            np.concatenate(
                list(
                    pool.map(
                        _moments, np.array_split(rows.contiguous().numpy(), max(1, len(rows) // 64))
                    )
                )
            )
        )


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a (n, features) times b (m, features) transposed, some features at a time and added up in
    double: single precision would lose what is small beside a large sum.
    """
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for some, others in zip(a.split(SOME, dim=1), b.split(SOME, dim=1), strict=True):
        total += some @ others.T
    return total


def _beaten(
    real: Any,
    reals: list[slice],
    known: list[Tensor],
    recon: Any,
    mine: np.ndarray,
    order: np.ndarray,
) -> np.ndarray:
    """How many true images resemble each reconstruction of a block less than its own one does,
    (block,).

    Args:
        real: (n, features...).
        reals: the blocks in which these are read.
        known: `_moments_of` each.
        recon: (n, features...).
        mine: the rows of this block.
        order: (n,) the true image that each reconstruction is held against.
    """
    part = _part(recon, slice(mine[0], mine[-1] + 1)).flatten(1)
    size, (sums, lengths) = part.shape[1], _moments_of(part).T
    truth = torch.cat(known)
    products = torch.cat(
        [_products(_part(real, at).flatten(1).to(part.dtype), part) for at in reals]
    )  # (n, block)
    if not torch.isfinite(products.sum()):
        raise PerceptError(
            "The features are too large for single precision; scale them down before they are"
            " compared."
        )
    r = (products - truth[:, :1] * sums / size) / (truth[:, 1:] * lengths).clamp_min(1e-300)
    r[:, lengths == 0], r[truth[:, 1] == 0] = (
        0.0,
        0.0,
    )  # what is flat correlates with nothing, exactly
    own = r[order[mine], torch.arange(len(mine))]
    beaten = r < own
    # single precision is as good as the products are; where a large mean was taken off, its error
    # weighs more
    whole = [
        (moments[:, 1] ** 2 + moments[:, 0] ** 2 / size).sqrt() / moments[:, 1].clamp_min(1e-300)
        for moments in (truth, torch.stack([sums, lengths], 1))
    ]
    near = (r - own).abs() < 4e-6 * whole[0][:, None] * whole[1]
    near[:, lengths == 0], near[truth[:, 1] == 0] = False, False
    near[order[mine], torch.arange(len(mine))] = True
    for j in (near.sum(0) > 1).nonzero()[:, 0].tolist():
        rivals = near[:, j].nonzero()[:, 0].numpy()
        pred = _unit_rows(part[j : j + 1])[0]  # (features,)
        exact = torch.cat(
            [
                (_unit_rows(_part(real, rivals[i : i + CHUNK])) * pred).sum(1)
                for i in range(0, len(rivals), CHUNK)
            ]
        )
        mine_exact = exact[int(np.flatnonzero(rivals == order[mine[j]])[0])]
        beaten[rivals, j] = (
            exact < mine_exact - 1e-13
        )  # what differs by the rounding of double precision is a tie
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
    labels, values = np.asarray(groups), np.full(len(real_features), np.nan)
    if len(labels) != len(values):
        raise PerceptError(
            f"{len(labels)} group labels were given for {len(values)} images; give one an image."
        )
    for label in pd.unique(labels):
        mine = np.flatnonzero(labels == label)
        if len(mine) > 1:
            values[mine] = two_way_each(_part(real_features, mine), _part(recon_features, mine))
    return values


def _paired(true: Any, made: Any, centre: bool, pairing: Any = None) -> np.ndarray:
    pairs = _pairs(true, made, "(n, ...)", pairing)
    _check_alike(true, made)
    return torch.cat(
        [(_unit_rows(a, centre) * _unit_rows(b, centre)).sum(1) for a, b in pairs]
    ).numpy()


def _check_alike(true: Any, made: Any) -> None:
    if tuple(true.shape[1:]) != tuple(made.shape[1:]):
        raise PerceptError(
            f"True rows {tuple(true.shape[1:])} and reconstructed ones {tuple(made.shape[1:])}"
            " differ: resize one set, this score takes them as they are."
        )


def pcc(images: Any, recons: Any, pairing: Any = None) -> np.ndarray:
    """Pearson correlation of each pair at its own resolution.

    (n, ...) and (n, ...) -> (n,) in [-1, 1]; the digits69 score.
    """
    return _paired(images, recons, True, pairing)


def cosine(real: Any, recon: Any, pairing: Any = None) -> np.ndarray:
    """Cosine of each pair of latents or features, further axes flattened.

    (n, ...) and (n, ...) -> (n,) in [-1, 1].
    """
    return _paired(real, recon, False, pairing)


def correlation_distance(
    real_features: Any, recon_features: Any, pairing: Any = None
) -> np.ndarray:
    """1 - Pearson correlation of paired features (n, features).

    (n,) in [0, 2], lower is better; the EfficientNet and SwAV scores.
    """
    return 1 - _paired(real_features, recon_features, True, pairing)


def mse(images: Any, recons: Any, pairing: Any = None) -> np.ndarray:
    """Mean squared difference of each pair at its own resolution.

    (n, ...) and (n, ...) -> (n,), lower is better.
    """
    pairs = _pairs(images, recons, "(n, ...)", pairing)
    _check_alike(images, recons)
    return torch.cat(
        [(b.double() - a.double()).square().flatten(1).mean(1) for a, b in pairs]
    ).numpy()


# ------------------------------------------------------------------------------------------ pixels
# The two pixel metrics read 3 x 425 x 425 numbers a pair; compiled, in one pass, they cost a
# millisecond each (benchmarks/metrics.py).
def _each_pair(
    compare: Callable[[np.ndarray, np.ndarray], float], images: Any, recons: Any, pairing: Any
) -> np.ndarray:
    """`compare` of each pair of pictures float32 (3, height, width), (n,), on all cores: compiled
    code works outside of Python's lock.
    """
    order = _check_pair(images, recons, "images (n, 3, height, width)", pairing)

    def some(start: int) -> list[float]:
        x, y = (
            _part(rows, at).float()
            for rows, at in ((images, order[start : start + 8]), (recons, slice(start, start + 8)))
        )
        _check_pictures(x)
        _check_pictures(y)
        return [
            compare(a, b)
            for a, b in zip(x.contiguous().numpy(), y.contiguous().numpy(), strict=True)
        ]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.array(
            [value for values in pool.map(some, range(0, len(order), 8)) for value in values]
        )


class _Resizer(NamedTuple):
    """Bilinear resizing of one axis, a matrix A (size, side) that is almost empty; the axes can be
    treated apart.
    """

    first: np.ndarray  # (size,) the first pixel that enters each new one
    taps: np.ndarray  # (taps, size) the weights of that pixel and of those after it
    bands: (
        np.ndarray
    )  # (2 * bands + 1, side) the diagonals of A'A: what inner products after resizing are
    mean: np.ndarray  # (side,) mean over the new pixels of each old one's weight


@lru_cache(maxsize=32)
def _resizer(side: int, size: int, antialias: bool) -> _Resizer:
    matrix = np.eye(side)
    if side != size:
        eye = torch.eye(side, dtype=torch.float64)[None, None]
        matrix = F.interpolate(
            eye, (size, side), mode="bilinear", align_corners=False, antialias=antialias
        )[0, 0].numpy()
    first = (matrix != 0).argmax(1)
    count = int((side - (matrix[:, ::-1] != 0).argmax(1) - first).max())
    first = np.minimum(first, side - count)
    taps = np.stack([matrix[np.arange(size), first + t] for t in range(count)])
    product = matrix.T @ matrix
    reach = max(o for o in range(side) if np.diagonal(product, o).any())
    bands = np.zeros((2 * reach + 1, side))
    for o in range(-reach, reach + 1):
        bands[o + reach, max(0, -o) : side - max(0, o)] = np.diagonal(product, o)
    return _Resizer(
        first, taps.astype(np.float32), bands.astype(np.float32), matrix.mean(0).astype(np.float32)
    )


@njit(nogil=True, fastmath=True, cache=True)
def _correlation(x: Any, y: Any, rows: Any, columns: Any, row_mean: Any, column_mean: Any) -> Any:
    """Pearson correlation of two pictures (3, height, width) after resizing, which is told by the
    bands and means of both axes' `_Resizer`.
    """
    channels, height, width = x.shape
    means, low, high = np.zeros(2), np.zeros(2), np.zeros(2)
    for k, z in enumerate((x, y)):
        low[k] = high[k] = z[0, 0, 0]
        for c in range(channels):
            for i in range(height):
                total, least, most = np.float32(0), z[c, i, 0], z[c, i, 0]
                for j in range(width):
                    total += z[c, i, j] * column_mean[j]
                    least, most = min(least, z[c, i, j]), max(most, z[c, i, j])
                means[k] += row_mean[i] * total
                low[k], high[k] = min(low[k], least), max(high[k], most)
        means[k] /= channels
    if low[0] == high[0] or low[1] == high[1]:
        return 0.0
    mx, my = np.float32(means[0]), np.float32(means[1])
    up, across = len(rows) // 2, len(columns) // 2
    xx = yy = xy = 0.0
    ux, uy = np.empty(width, np.float32), np.empty(width, np.float32)
    vx, vy = np.empty(width, np.float32), np.empty(width, np.float32)
    for c in range(channels):
        for i in range(height):
            ux[:], uy[:], vx[:], vy[:] = 0.0, 0.0, 0.0, 0.0
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
    resizing first (tested). Only pictures of two sizes are resized.

    Args:
        images: true images (n, 3, height, width) in [0, 1], or bytes.
        recons: reconstructions (n, 3, height, width) in [0, 1], or bytes; may have another
            resolution.
        size: pixels a side of the comparison.
        antialias: smooth before shrinking (no effect on images up to `size`).
        pairing: (n,) the true image that each reconstruction is held against; its own by default.

    Returns:
        (n,) in [-1, 1]; 0 where an image is one flat colour.
    """

    def compare(x: np.ndarray, y: np.ndarray) -> float:
        if x.shape != y.shape:
            x, y = (
                resize(torch.from_numpy(z)[None], size, antialias)[0].contiguous().numpy()
                for z in (x, y)
            )
        rows, columns = (_resizer(side, size, antialias) for side in x.shape[1:])
        return _correlation(x, y, rows.bands, columns.bands, rows.mean, columns.mean)

    return _each_pair(compare, images, recons, pairing)


GREY = np.array(
    [0.2125, 0.7154, 0.0721], np.float32
)  # scikit-image's weights of red, green and blue
TAPS = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2).astype(
    np.float32
)  # a Gaussian of 1.5 pixels, cut at 3.5 of them, as scikit-image cuts it
TAPS /= TAPS.sum()


@njit(nogil=True, fastmath=True, cache=True)
def _grey(
    picture: Any, weights: Any, first: Any, row_taps: Any, start: Any, column_taps: Any
) -> Any:
    """Luminance of a picture (3, height, width), resized.

    Grey is taken before resizing: both are linear, and it is a third of the work.
    """
    _, height, width = picture.shape
    wide, out = (
        np.zeros((height, len(start)), np.float32),
        np.zeros((len(first), len(start)), np.float32),
    )
    line = np.empty(width, np.float32)
    for i in range(height):
        for j in range(width):
            line[j] = (
                weights[0] * picture[0, i, j]
                + weights[1] * picture[1, i, j]
                + weights[2] * picture[2, i, j]
            )
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
    """Mean structural similarity of two grey pictures (rows, columns) in [0, 1] where the whole
    window fits, statistics taken along the rows' axis and, with `across`, along the columns' too.
    """
    c1, c2, half, reach = np.float32(0.01**2), np.float32(0.03**2), np.float32(0.5), len(taps)
    height, width = x.shape
    kept = width - reach + 1 if across else width
    line, recent, both, total = (
        np.empty((4, width), np.float32),
        np.empty((reach, 4, kept), np.float32),
        np.empty((4, kept), np.float32),
        0.0,
    )
    for i in range(height):
        for j in range(width):
            a, b = (
                x[i, j] - half,
                y[i, j] - half,
            )  # variances do not change, and rounding weighs less
            line[0, j], line[1, j], line[2, j], line[3, j] = a, b, a * a + b * b, a * b
        place = i % reach  # of the last `reach` rows, filtered along the row
        if across:
            recent[place] = 0.0
            for t in range(reach):
                w = taps[t]
                for k in range(4):
                    for j in range(kept):
                        recent[place, k, j] += w * line[k, j + t]
        else:
            recent[place] = line
        if i < reach - 1:
            continue
        both[:] = 0.0
        for t in range(reach):
            w, place = taps[t], (i + 1 + t) % reach
            for k in range(4):
                for j in range(kept):
                    both[k, j] += w * recent[place, k, j]
        for j in range(kept):
            a, b = both[0, j], both[1, j]
            covariance, variances = both[3, j] - a * b, both[2, j] - (a * a + b * b)
            a, b = a + half, b + half
            total += (
                (2 * (a * b) + c1)
                * (2 * covariance + c2)
                / (((a * a + b * b) + c1) * (variances + c2))
            )
    return total / ((height - reach + 1) * kept)


def _structures(
    images: Any, recons: Any, size: int, antialias: bool, pairing: Any, across: bool
) -> np.ndarray:
    """`_structure` of the grey pictures of each pair, (n,)."""

    def compare(x: np.ndarray, y: np.ndarray) -> float:
        greys = []
        for z in (x, y):
            rows, columns = (_resizer(side, size, antialias) for side in z.shape[1:])
            greys.append(_grey(z, GREY, rows.first, rows.taps, columns.first, columns.taps))
        return _structure(greys[0], greys[1], TAPS, across)

    return _each_pair(compare, images, recons, pairing)


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
        pairing: (n,) the true image that each reconstruction is held against; its own by default.

    Returns:
        (n,) in [-1, 1].
    """
    return _structures(images, recons, size, antialias, pairing, True)


def ssim_columns(
    images: Any, recons: Any, size: int = SIZE, antialias: bool = False, pairing: Any = None
) -> np.ndarray:
    """Structural similarity along the columns of the grey images.

    What scikit-image <= 0.19 computed for the same call.

    There `multichannel=True` made the 425 columns channels: a one-dimensional SSIM, averaged over
    columns, about 0.1 higher. Arguments and result as `ssim`.
    """
    return _structures(images, recons, size, antialias, pairing, False)


# ---------------------------------------------------------------------------------------- registry
def _as_they_are(images: Any) -> Any:
    return images


@dataclass(frozen=True)
class Metric:
    """One score of reconstructions.

    Attributes:
        name: short name, unique in a table.
        compare: two prepared sets, and `pairing` (n,), the true image that each reconstruction is
            held against -> (n,) values.
        better: "higher" or "lower".
        chance: value without any information, where one is known, else None.
        description: one sentence for a reader.
        source: paper or code the definition comes from.
        prepare: images (n, 3, height, width) -> anything that is indexed by image, e.g. features
            (n, features).
        truth: what `prepare` should say of the true images, where that is known without looking
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
    prepare: Callable[[Any], Any] = _as_they_are
    truth: Any = None
    network: str = ""

    def through(self, embed: Callable[[Any], Any], prefix: str = "", truth: Any = None) -> Metric:
        """This metric with its network: `embed` maps images (n, 3, height, width) to (n,
        features...), `prefix` goes before its name.

        `truth` are the features of the true images, where they are known already.
        """
        return replace(self, name=prefix + self.name, prepare=embed, truth=truth, network="")

    def prepare_true(self, images: Any) -> Any:
        """What `prepare` says of the true images, or the truth where that is known."""
        return self.prepare(images) if self.truth is None else self.truth

    def each(self, images: Any, recons: Any, features: dict | None = None) -> np.ndarray:
        """Score each pair: images and recons (n, 3, height, width) in [0, 1] -> (n,).

        `features` keeps what was prepared of the true images: pass one dict for one set of images,
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


def two_way_metric(
    name: str, embed: Callable[[Any], Any], source: str = _FIELD, where: str = ""
) -> Metric:
    """Two-way identification in the features of a frozen network.

    `embed` maps images (n, 3, height, width) to (n, features...).
    """
    return Metric(name, two_way_each, "higher", 0.5, _TWO_WAY + where, source, embed)


def distance_metric(
    name: str, embed: Callable[[Any], Any], source: str = _FIELD, where: str = ""
) -> Metric:
    """Correlation distance in the features of a frozen network.

    `embed` maps images (n, 3, height, width) to (n, features...).
    """
    return Metric(name, correlation_distance, "lower", 1.0, _DISTANCE + where, source, embed)


def cosine_metric(
    name: str, embed: Callable[[Any], Any], source: str = "cosine", where: str = ""
) -> Metric:
    """Cosine in the features of a frozen network; far above 0 for unrelated pictures, so read it
    against its floors.

    `embed` maps images (n, 3, height, width) to (n, features...).
    """
    return Metric(
        name,
        cosine,
        "higher",
        None,
        "cosine of the features of seen image and reconstruction" + where,
        source,
        embed,
    )


def _field(make: Callable[..., Metric], name: str, network: str, layer: str) -> Metric:
    def embed(images: Any) -> Any:
        raise PerceptError(
            f"The metric {name} looks through {network}, which it was not given: use"
            f" METRICS['{name}'].through(embed)."
        )

    return replace(make(name, embed, where=f" ({network}, {layer})"), network=network)


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric(
            "pixcorr",
            pixcorr,
            "higher",
            0.0,
            "correlation of pixels and colours at 425 x 425",
            _FIELD,
        ),
        Metric("ssim", ssim, "higher", None, "structural similarity in grey at 425 x 425", _FIELD),
        Metric("ssim_columns", ssim_columns, "higher", None, _COLUMNS, _FIELD),
        _field(two_way_metric, "AlexNet(2)", "AlexNet", "second convolution"),
        _field(two_way_metric, "AlexNet(5)", "AlexNet", "fifth convolution"),
        _field(two_way_metric, "InceptionV3", "InceptionV3", "average pool"),
        _field(two_way_metric, "CLIP", "CLIP ViT-L/14", "final embedding"),
        _field(cosine_metric, "CLIP-cosine", "CLIP ViT-L/14", "final embedding"),
        _field(distance_metric, "EffNet-B1", "EfficientNet-B1", "average pool"),
        _field(distance_metric, "SwAV", "SwAV ResNet-50", "average pool"),
        Metric("pcc", pcc, "higher", 0.0, "correlation of all pixels at their own size", _DIGITS),
        Metric(
            "mse",
            mse,
            "lower",
            None,
            "mean squared difference of pixels at their own size",
            _DIGITS,
        ),
    )
}
EIGHT = (
    "pixcorr",
    "ssim",
    "AlexNet(2)",
    "AlexNet(5)",
    "InceptionV3",
    "CLIP",
    "EffNet-B1",
    "SwAV",
)  # of the field's tables, in their order


def answer_metrics(
    prefix: str,
    ask: Callable[[Tensor], dict[str, np.ndarray]],
    truth: dict[str, Sequence[str]],
    chance: dict[str, float],
) -> list[Metric]:
    """Whether a classifier answers questions about a reconstruction as is true of the image that
    was shown.

    Args:
        prefix: of the metrics' names, e.g. "mini:judge" gives "mini:judge:kind".
        ask: images (n, 3, height, width) in [0, 1] -> answers (n,) by question.
        truth: what is true of the images that were shown, (n,) by question; the classifier's word
            on them is not asked.
        chance: share right by guessing, by question.

    Returns:
        One metric a question, each 0 or 1 an image; the classifier looks once for all of them.
    """
    questions = list(truth)

    def prepare(images: Tensor) -> np.ndarray:
        answers = ask(images)
        return np.stack(
            [np.asarray(answers[question], dtype=object) for question in questions], 1
        )  # (n, questions)

    right = np.stack([np.asarray(truth[question], dtype=object) for question in questions], 1)

    def compare(column: int) -> Callable[..., np.ndarray]:
        return lambda shown, said, pairing=slice(None): (
            shown[pairing, column] == said[:, column]
        ).astype(np.float64)

    text = "share of reconstructions in which an independent classifier names the right {}"
    return [
        Metric(
            f"{prefix}:{q}",
            compare(i),
            "higher",
            chance[q],
            text.format(q),
            "model card of the mini models",
            prepare,
            right,
        )
        for i, q in enumerate(questions)
    ]
