"""Scores of reconstructed images: what each metric computes, and the registry of all of them.

- Every metric gives one value an image (n,); means, intervals and tests are taken over images, never over a
  single number.
- A metric has two halves: `prepare` looks at one set of images, `compare` at two prepared sets. So the true
  images are prepared once, however many reconstructions and controls are scored, and a shuffled pairing costs
  no second look at the images.
- Two-way identification keeps the published orientation: for reconstruction j the other *true* images are the
  distractors.
- The field's SSIM call changed meaning between scikit-image 0.19 and 0.20. `ssim` is the two-dimensional one
  (0.20 and later), `ssim_columns` the one that took the 425 columns for channels (0.19 and before). They
  differ by about 0.1: never mix them.
- An image of one flat colour correlates 0 with everything here (the published code gives NaN for the whole
  set); `results.check_outputs` says so.
- What stands beside a score (intervals, floors, ceilings, alarms) is in `src.results`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor

from src.utils import PerceptError

SIZE = 425  # pixels a side at which the field compares pictures (the size of the NSD stimuli)
CHUNK = 32  # pictures that are handled at once
BLOCK = 2**27  # numbers of a block of features that is held in single precision (half a GiB)
RESIZING = {
    "published": "256 pixels first, without antialiasing, as MindEye's evaluation ran",
    "antialias": "256 pixels first, with antialiasing, as the same code runs with torchvision 0.17 and later",
    "straight": "no step in between",
}


# ------------------------------------------------------------------------------------------------ rows
def _part(rows: Any, at: slice | np.ndarray) -> Tensor:
    """Some rows of a tensor, an array or a file that is mapped, as floats; bytes become [0, 1].

    Raises:
        PerceptError: values that are not finite.
    """
    part = rows[at].detach().cpu() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows[at]))
    if part.dtype == torch.uint8:
        return part.float() / 255
    part = part if part.dtype in (torch.float32, torch.float64) else part.float()
    if not torch.isfinite(part).all():
        raise PerceptError("The rows to be compared hold NaN or infinite values; find out why (results.check_outputs) before scoring.")
    return part


def _check_pair(true: Any, made: Any, axes: str, pairing: Any = None) -> np.ndarray:
    """The pairing (n,), after checking that both have rows of some axes, and as many."""
    if len(true) != len(made):
        raise PerceptError(
            f"{len(true)} true and {len(made)} reconstructed rows were given: metrics compare row with row, so pass as many "
            "reconstructions as images, in the same order."
        )
    for name, rows in (("true", true), ("reconstructed", made)):
        if len(rows.shape) < 2:
            raise PerceptError(f"The {name} rows have shape {tuple(rows.shape)}; metrics expect {axes}.")
    return np.arange(len(made)) if pairing is None else np.asarray(pairing)


def _pairs(true: Any, made: Any, axes: str, pairing: Any = None, chunk: int = CHUNK) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of rows that belong together: true[pairing] and made."""
    order = _check_pair(true, made, axes, pairing)
    for start in range(0, len(order), chunk):
        yield _part(true, order[start : start + chunk]), _part(made, slice(start, start + chunk))


def _check_pictures(pictures: Tensor) -> None:
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise PerceptError(f"Images of shape {tuple(pictures.shape)} were given; pixel metrics expect (n, 3, height, width), floats in [0, 1] or bytes.")
    if pictures.numel() and (pictures.min() < -1e-4 or pictures.max() > 1 + 1e-4):
        raise PerceptError(
            f"Image values run from {pictures.min():.3g} to {pictures.max():.3g}; pixel metrics expect [0, 1]: "
            "clamp reconstructions, divide 8-bit images by 255."
        )


def resize(images: Tensor, size: int = SIZE, antialias: bool = False) -> Tensor:
    """Resize bilinearly to (n, channels, size, size), as torchvision does with tensors; those of that size stay as they are.

    The published code was run with a torchvision that did not antialias, hence the default; it matters only when images shrink.
    """
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=antialias)


def as_compared(images: Any, resizing: str = "published") -> Tensor:
    """Pictures (n, 3, height, width) as an evaluation first brings them to one size: a key of `RESIZING`.

    The published evaluation takes all pictures to 256 pixels, and from there to what each metric asks for.

    Raises:
        PerceptError: an unknown way.
    """
    if resizing not in RESIZING:
        raise PerceptError(f"There is no resizing '{resizing}': choose one of {', '.join(RESIZING)}.")
    if resizing == "straight":
        return _part(images, slice(None))
    parts = [resize(_part(images, slice(i, i + CHUNK)), 256, resizing == "antialias") for i in range(0, len(images), CHUNK)]
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------ features
def _unit_rows(rows: Tensor, centre: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows (n, features), centred if asked, of length one; a flat row becomes zero."""
    rows = rows.flatten(1)
    flat = rows.amax(1, keepdim=True) == rows.amin(1, keepdim=True)
    rows = rows.to(dtype, copy=True)
    if centre:
        rows -= rows.mean(1, keepdim=True, dtype=torch.float64).to(dtype)
        rows *= ~flat  # a flat row must not become rounding noise
    return rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(1e-300 if dtype == torch.float64 else 1e-30))


def two_way_each(real_features: Any, recon_features: Any, pairing: Any = None) -> np.ndarray:
    """Two-way identification of each reconstruction: share of the other true images that resemble it less than its own.

    With R[i, j] the Pearson correlation of real i and reconstruction j over features, value j is #{i: R[i, j] < R[j, j]} / (n - 1): the
    distractors are true images, and a tie is lost, as in the published code (MindEye, arXiv 2305.18274, after Ozcelik & VanRullen 2023).
    Correlations are computed in single precision, and those that are as near to the own one as its error once more in double: the counts
    are exact. Only a block of the rows is held at a time, so both may be mapped files.

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
        raise PerceptError("Two-way identification needs at least two images: one to find and one to confuse it with.")
    block = max(1, BLOCK // features)
    counts = [_beaten(real_features, recon_features, np.arange(start, min(start + block, n)), order, max(1, block // 8)) for start in range(0, n, block)]
    return np.concatenate(counts) / (n - 1)


def _beaten(real: Any, recon: Any, mine: np.ndarray, order: np.ndarray, step: int) -> np.ndarray:
    """How many true images resemble each reconstruction of a block less than its own one does, (block,)."""
    part = _part(recon, slice(mine[0], mine[-1] + 1))
    if part.flatten(1).shape[1] != int(np.prod(real.shape[1:])):
        raise PerceptError(f"True features {tuple(real.shape[1:])} and reconstructed ones {tuple(recon.shape[1:])} differ: both must come from the same network.")
    preds = _unit_rows(part, dtype=torch.float32)  # (block, features)
    r = torch.cat([_unit_rows(_part(real, slice(i, i + step)), dtype=torch.float32) @ preds.T for i in range(0, len(real), step)])  # (n, block)
    own = r[order[mine], torch.arange(len(mine))]
    beaten = r < own
    near = (r - own).abs() < 1e-5
    near[:, preds.abs().amax(1) == 0] = False  # a flat reconstruction ties with every image, exactly
    for j in (near.sum(0) > 1).nonzero()[:, 0].tolist():
        rivals = near[:, j].nonzero()[:, 0].numpy()
        pred = _unit_rows(part[j : j + 1])[0]  # (features,)
        exact = torch.cat([_unit_rows(_part(real, rivals[i : i + CHUNK])) @ pred for i in range(0, len(rivals), CHUNK)])
        beaten[rivals, j] = exact < exact[int(np.flatnonzero(rivals == order[mine[j]])[0])]
    return beaten.sum(0).numpy().astype(np.float64)


def two_way_identification(real_features: Any, recon_features: Any) -> float:
    """Mean of `two_way_each`.

    Features (n, features...) of true and reconstructed images -> score in [0, 1], chance 0.5.
    """
    return float(two_way_each(real_features, recon_features).mean())


def two_way_within(real_features: Any, recon_features: Any, groups: Any) -> np.ndarray:
    """Two-way identification among the images of the same group only, e.g. of one category or cluster: hard distractors.

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
        raise PerceptError(f"{len(labels)} group labels were given for {len(values)} images; give one an image.")
    for label in pd.unique(labels):
        mine = np.flatnonzero(labels == label)
        if len(mine) > 1:
            values[mine] = two_way_each(_part(real_features, mine), _part(recon_features, mine))
    return values


def _paired(true: Any, made: Any, centre: bool, pairing: Any = None) -> np.ndarray:
    pairs = _pairs(true, made, "(n, ...)", pairing)
    return torch.cat([(_unit_rows(a, centre) * _unit_rows(b, centre)).sum(1) for a, b in pairs]).numpy()


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


def correlation_distance(real_features: Any, recon_features: Any, pairing: Any = None) -> np.ndarray:
    """1 - Pearson correlation of paired features (n, features).

    (n,) in [0, 2], lower is better; the EfficientNet and SwAV scores.
    """
    return 1 - _paired(real_features, recon_features, True, pairing)


def mse(images: Any, recons: Any, pairing: Any = None) -> np.ndarray:
    """Mean squared difference of each pair at its own resolution.

    (n, ...) and (n, ...) -> (n,), lower is better.
    """
    pairs = _pairs(images, recons, "(n, ...)", pairing)
    return torch.cat([(b.double() - a.double()).square().flatten(1).mean(1) for a, b in pairs]).numpy()


# ------------------------------------------------------------------------------------------------ pixels
def _each_pair(compare: Callable[[np.ndarray, np.ndarray], float], images: Any, recons: Any, pairing: Any) -> np.ndarray:
    """`compare` of each pair of pictures (3, height, width), (n,), on all cores: numpy works outside of Python's lock."""
    order = _check_pair(images, recons, "images (n, 3, height, width)", pairing)

    def some(start: int) -> list[float]:
        x, y = _part(images, order[start : start + 4]), _part(recons, slice(start, start + 4))
        _check_pictures(x)
        _check_pictures(y)
        return [compare(a, b) for a, b in zip(x.float().numpy(), y.float().numpy(), strict=True)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.array([value for values in pool.map(some, range(0, len(order), 4)) for value in values])


@lru_cache(maxsize=32)
def _resizer(side: int, size: int, antialias: bool) -> tuple[csr_array, csr_array, np.ndarray]:
    """Of resizing one axis bilinearly: its matrix A (size, side), A'A (side, side), and the mean over A's rows (side,).

    Bilinear resizing is linear and treats the axes apart.
    """
    matrix = np.eye(side, dtype=np.float32)
    if side != size:
        matrix = F.interpolate(torch.eye(side)[None, None], (size, side), mode="bilinear", align_corners=False, antialias=antialias)[0, 0].numpy()
    exact = matrix.astype(np.float64)
    return csr_array(matrix), csr_array((exact.T @ exact).astype(np.float32)), exact.mean(0).astype(np.float32)


def _on_both_axes(rows: csr_array, columns: csr_array, x: np.ndarray) -> np.ndarray:
    """Matrices times the rows and the columns of pictures (channels, height, width) -> (channels, height', width')."""
    channels, _, width = x.shape
    by_rows = (rows @ np.ascontiguousarray(x.transpose(1, 0, 2)).reshape(-1, channels * width)).reshape(-1, channels, width)
    by_columns = columns @ np.ascontiguousarray(by_rows.transpose(2, 1, 0)).reshape(width, -1)
    return by_columns.reshape(-1, channels, len(by_rows)).transpose(1, 2, 0)


def pixcorr(images: Any, recons: Any, size: int = SIZE, antialias: bool = False, pairing: Any = None) -> np.ndarray:
    """Pixel correlation of each pair: Pearson over all colours and pixels, both resized straight to `size`.

    Source: MindEye, Table 1.
    The enlarged images are never made: with A the resizing matrix of an axis, <A x B', A y B'> = <x, (A'A) y (B'B)>, where A'A is
    almost empty. The result is that of resizing first (tested). Only pictures of two sizes are resized.

    Args:
        images: true images (n, 3, height, width) in [0, 1], or bytes.
        recons: reconstructions (n, 3, height, width) in [0, 1], or bytes; may have another resolution.
        size: pixels a side of the comparison.
        antialias: smooth before shrinking (no effect on images up to `size`).
        pairing: (n,) the true image that each reconstruction is held against; its own by default.

    Returns:
        (n,) in [-1, 1]; 0 where an image is one flat colour.
    """

    def compare(x: np.ndarray, y: np.ndarray) -> float:
        if x.shape != y.shape:
            x, y = (_enlarged(z, size, antialias) for z in (x, y))
        (_, rows, row_mean), (_, columns, column_mean) = (_resizer(side, size, antialias) for side in x.shape[1:])
        x, y = (_centred(z, row_mean, column_mean) for z in (x, y))
        ax, ay = (_on_both_axes(rows, columns, z) for z in (x, y))
        xx, yy, xy = (np.sum(p * q, dtype=np.float64) for p, q in ((x, ax), (y, ay), (x, ay)))
        return xy / np.sqrt(xx * yy) if xx > 0 and yy > 0 else 0.0

    return _each_pair(compare, images, recons, pairing)


def _centred(x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A picture (3, height, width) less the constant that makes the mean of its resized version 0; a flat one becomes exactly 0."""
    if x.max() == x.min():
        return np.zeros_like(x)
    return x - np.float32((rows @ x.mean(0, dtype=np.float64)) @ columns)


def _enlarged(x: np.ndarray, size: int, antialias: bool) -> np.ndarray:
    """Pictures (channels, height, width) -> (channels, size, size)."""
    (rows, *_), (columns, *_) = (_resizer(side, size, antialias) for side in x.shape[1:])
    return x if x.shape[1:] == (size, size) else np.ascontiguousarray(_on_both_axes(rows, columns, x))


GREY = np.array([0.2125, 0.7154, 0.0721], np.float32)  # scikit-image's weights of red, green and blue
TAPS = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2).astype(np.float32)  # a Gaussian of 1.5 pixels, cut at 3.5 of them, as scikit-image cuts it
TAPS /= TAPS.sum()


def _smooth(x: np.ndarray, axis: int) -> np.ndarray:
    """Filter (rows, columns) along one axis with `TAPS`, where all of them fit: that axis loses 10 pixels."""
    kept = x.shape[axis] - 10

    def shifted(i: int) -> np.ndarray:
        return x[i : i + kept] if axis == 0 else x[:, i : i + kept]

    out = shifted(5) * TAPS[5]
    both = np.empty_like(out)
    for i in range(5):  # the filter is symmetric
        np.add(shifted(i), shifted(10 - i), out=both)
        both *= TAPS[i]
        out += both
    return out


def _structure(x: np.ndarray, y: np.ndarray, axes: tuple[int, ...]) -> float:
    """Structural similarity (Wang et al. 2004) of two grey pictures (rows, columns) in [0, 1], statistics taken along some axes."""
    c1, c2 = np.float32(0.01**2), np.float32(0.03**2)
    maps = [x, y, x * x + y * y, x * y]
    for axis in axes:
        maps = [_smooth(z, axis) for z in maps]
    mx, my, squares, product = maps
    both, means = mx * my, mx * mx + my * my
    product -= both
    squares -= means
    return float(((2 * both + c1) * (2 * product + c2) / ((means + c1) * (squares + c2))).mean(dtype=np.float64))


def _structures(images: Any, recons: Any, size: int, antialias: bool, pairing: Any, axes: tuple[int, ...]) -> np.ndarray:
    """`_structure` of the grey pictures of each pair, (n,). Grey is taken before resizing: both are linear, and it is a third of the work."""

    def compare(x: np.ndarray, y: np.ndarray) -> float:
        x, y = (_enlarged(np.tensordot(GREY, z, 1)[None], size, antialias)[0] for z in (x, y))
        return _structure(x, y, axes)

    return _each_pair(compare, images, recons, pairing)


def ssim(images: Any, recons: Any, size: int = SIZE, antialias: bool = False, pairing: Any = None) -> np.ndarray:
    """Structural similarity of the grey images, in two dimensions (Wang et al. 2004), as scikit-image >= 0.20 computes it.

    A Gaussian window of 1.5 pixels, population covariance, data range 1; scikit-image gives the same (tested), at three times the cost.

    Args:
        images: true images (n, 3, height, width) in [0, 1], or bytes.
        recons: reconstructions (n, 3, height, width) in [0, 1], or bytes.
        size: pixels a side of the comparison; both are resized straight to it.
        antialias: smooth before shrinking.
        pairing: (n,) the true image that each reconstruction is held against; its own by default.

    Returns:
        (n,) in [-1, 1].
    """
    return _structures(images, recons, size, antialias, pairing, (0, 1))


def ssim_columns(images: Any, recons: Any, size: int = SIZE, antialias: bool = False, pairing: Any = None) -> np.ndarray:
    """Structural similarity along the columns of the grey images.

    What scikit-image <= 0.19 computed for the same call.

    There `multichannel=True` made the 425 columns channels: a one-dimensional SSIM, averaged over columns,
    about 0.1 higher. Arguments and result as `ssim`.
    """
    return _structures(images, recons, size, antialias, pairing, (0,))


# ------------------------------------------------------------------------------------------------ registry
def _as_they_are(images: Any) -> Any:
    return images


@dataclass(frozen=True)
class Metric:
    """One score of reconstructions.

    Attributes:
        name: short name, unique in a table.
        compare: two prepared sets, and `pairing` (n,), the true image that each reconstruction is held against -> (n,) values.
        better: "higher" or "lower".
        chance: value without any information, where one is known, else None.
        description: one sentence for a reader.
        source: paper or code the definition comes from.
        prepare: images (n, 3, height, width) -> anything that is indexed by image, e.g. features (n, features).
        truth: what `prepare` should say of the true images, where that is known without looking (labels), else None.
        network: the frozen network through which the metric looks; it has to be given (`through`) before the metric can be computed.
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
        """This metric with its network: `embed` maps images (n, 3, height, width) to (n, features...), `prefix` goes before its name.

        `truth` are the features of the true images, where they are known already.
        """
        return replace(self, name=prefix + self.name, prepare=embed, truth=truth, network="")

    def prepare_true(self, images: Any) -> Any:
        """What `prepare` says of the true images, or the truth where that is known."""
        return self.prepare(images) if self.truth is None else self.truth

    def each(self, images: Any, recons: Any, features: dict | None = None) -> np.ndarray:
        """Score each pair: images and recons (n, 3, height, width) in [0, 1] -> (n,).

        `features` keeps what was prepared of the true images: pass one dict for one set of images, and it is prepared once.
        """
        features = {} if features is None else features
        if self.prepare not in features:
            features[self.prepare] = self.prepare_true(images)
        return self.compare(features[self.prepare], self.prepare(recons))


_FIELD = "MindEye, arXiv 2305.18274, after Ozcelik & VanRullen 2023"
_DIGITS = "digits69 literature, Du et al. 2018"
_COLUMNS = "the same call before scikit-image 0.20: structural similarity along columns"
_TWO_WAY = "share of other test images that resemble the reconstruction less than the seen image does"
_DISTANCE = "one minus the correlation of the features of seen image and reconstruction"


def two_way_metric(name: str, embed: Callable[[Any], Any], source: str = _FIELD, where: str = "") -> Metric:
    """Two-way identification in the features of a frozen network.

    `embed` maps images (n, 3, height, width) to (n, features...).
    """
    return Metric(name, two_way_each, "higher", 0.5, _TWO_WAY + where, source, embed)


def distance_metric(name: str, embed: Callable[[Any], Any], source: str = _FIELD, where: str = "") -> Metric:
    """Correlation distance in the features of a frozen network.

    `embed` maps images (n, 3, height, width) to (n, features...).
    """
    return Metric(name, correlation_distance, "lower", 1.0, _DISTANCE + where, source, embed)


def cosine_metric(name: str, embed: Callable[[Any], Any], source: str = "cosine") -> Metric:
    """Cosine in the features of a frozen network.

    `embed` maps images (n, 3, height, width) to (n, features...).
    """
    return Metric(name, cosine, "higher", None, "cosine of the features of seen image and reconstruction", source, embed)


def _field(make: Callable[..., Metric], name: str, network: str, layer: str) -> Metric:
    def embed(images: Any) -> Any:
        raise PerceptError(f"The metric {name} looks through {network}, which it was not given: use METRICS['{name}'].through(embed).")

    return replace(make(name, embed, where=f" ({network}, {layer})"), network=network)


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("pixcorr", pixcorr, "higher", 0.0, "correlation of pixels and colours at 425 x 425", _FIELD),
        Metric("ssim", ssim, "higher", None, "structural similarity in grey at 425 x 425", _FIELD),
        Metric("ssim_columns", ssim_columns, "higher", None, _COLUMNS, _FIELD),
        _field(two_way_metric, "AlexNet(2)", "AlexNet", "second convolution"),
        _field(two_way_metric, "AlexNet(5)", "AlexNet", "fifth convolution"),
        _field(two_way_metric, "InceptionV3", "InceptionV3", "average pool"),
        _field(two_way_metric, "CLIP", "CLIP ViT-L/14", "final embedding"),
        _field(distance_metric, "EffNet-B1", "EfficientNet-B1", "average pool"),
        _field(distance_metric, "SwAV", "SwAV ResNet-50", "average pool"),
        Metric("pcc", pcc, "higher", 0.0, "correlation of all pixels at their own size", _DIGITS),
        Metric("mse", mse, "lower", None, "mean squared difference of pixels at their own size", _DIGITS),
    )
}
EIGHT = ("pixcorr", "ssim", "AlexNet(2)", "AlexNet(5)", "InceptionV3", "CLIP", "EffNet-B1", "SwAV")  # of the field's tables, in their order


def answer_metrics(
    prefix: str, ask: Callable[[Tensor], dict[str, np.ndarray]], truth: dict[str, Sequence[str]], chance: dict[str, float]
) -> list[Metric]:
    """Whether a classifier answers questions about a reconstruction as is true of the image that was shown.

    Args:
        prefix: of the metrics' names, e.g. "mini:judge" gives "mini:judge:kind".
        ask: images (n, 3, height, width) in [0, 1] -> answers (n,) by question.
        truth: what is true of the images that were shown, (n,) by question; the classifier's word on them is not asked.
        chance: share right by guessing, by question.

    Returns:
        One metric a question, each 0 or 1 an image; the classifier looks once for all of them.
    """
    questions = list(truth)

    def prepare(images: Tensor) -> np.ndarray:
        answers = ask(images)
        return np.stack([np.asarray(answers[question], dtype=object) for question in questions], 1)  # (n, questions)

    right = np.stack([np.asarray(truth[question], dtype=object) for question in questions], 1)

    def compare(column: int) -> Callable[..., np.ndarray]:
        return lambda shown, said, pairing=slice(None): (shown[pairing, column] == said[:, column]).astype(np.float64)

    text = "share of reconstructions in which an independent classifier names the right {}"
    return [
        Metric(f"{prefix}:{q}", compare(i), "higher", chance[q], text.format(q), "model card of the mini models", prepare, right)
        for i, q in enumerate(questions)
    ]
