"""Scores of reconstructed images, their controls, and the statistics that make a score readable.

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
  set); `check_outputs` says so.
- A score is not written without its floors and its ceiling (`write_metrics`).
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity
from torch import Tensor

from src.utils import PerceptError, atomic, write_json

SIZE = 425  # pixels a side at which the field compares pictures (the size of the NSD stimuli)
CHUNK = 128  # rows of a feature matrix, or images, that are handled at once
CONFIDENCE = 0.95
CONTROLS = {
    "system": "the reconstructions themselves",
    "shuffled": "the same reconstructions against other test images: what any plausible pictures score",
    "mean_image": "the mean training image for every test image: what one blurred picture scores",
    "nearest_train": "the training image whose features are nearest to the prediction: what a lookup scores",
    "ceiling": "the generator fed with the true latents: the most this generator could score",
}


# ------------------------------------------------------------------------------------------------ shapes
def _pair(images: Any, recons: Any, axes: str) -> tuple[Tensor, Tensor]:
    """Both as tensors, after checking that they are finite and pair up."""
    images, recons = torch.as_tensor(images).detach(), torch.as_tensor(recons).detach()
    if len(images) != len(recons):
        raise PerceptError(
            f"{len(images)} true and {len(recons)} reconstructed rows were given: metrics compare row with "
            "row, "
            "so pass as many reconstructions as images, in the same order."
        )
    for name, rows in (("true", images), ("reconstructed", recons)):
        if rows.ndim < 2:
            raise PerceptError(f"The {name} rows have shape {tuple(rows.shape)}; metrics expect {axes}.")
        if not torch.isfinite(rows).all():
            raise PerceptError(
                f"The {name} rows hold NaN or infinite values; find out why (check_outputs) before scoring."
            )
    return images, recons


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise PerceptError(
            f"Images of shape {tuple(images.shape)} and type {images.dtype} were given; pixel metrics "
            "expect floats "
            "(n, 3, height, width) in [0, 1]."
        )
    if images.numel() and (images.min() < -1e-4 or images.max() > 1 + 1e-4):
        raise PerceptError(
            f"Image values run from {images.min():.3g} to {images.max():.3g}; pixel metrics expect [0, 1]: "
            "clamp reconstructions, divide 8-bit images by 255."
        )


def resize(images: Tensor, size: int = SIZE, antialias: bool = False) -> Tensor:
    """Resize bilinearly to (n, channels, size, size), as torchvision does with tensors.

    The published code was run with a torchvision that did not antialias, hence the default; it matters only
    when images shrink. The published MindEye scores also pass through 256 pixels first:
    `resize(resize(images, 256), 425)` repeats that.
    """
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=antialias)


# ------------------------------------------------------------------------------------------------ features
def _unit_rows(rows: Tensor, centre: bool = True) -> Tensor:
    """Rows (n, features) in double precision, centred if asked, of length one; a flat row becomes zero."""
    rows = rows.flatten(1).double()
    if centre:
        # a flat row must not become rounding noise
        spread = rows.amax(1, keepdim=True) > rows.amin(1, keepdim=True)
        rows = (rows - rows.mean(1, keepdim=True)) * spread
    return F.normalize(rows, dim=1)


def two_way_each(real_features: Any, recon_features: Any) -> np.ndarray:
    """Two-way identification of each reconstruction.

    Share of the other true images that resemble it less than its own.

    With R[i, j] the Pearson correlation of real i and reconstruction j over features, value j is #{i: R[i, j]
    < R[j, j]} / (n - 1): the distractors are true images, and a tie is lost, as in the published code
    (MindEye, arXiv 2305.18274, after Ozcelik & VanRullen 2023). Never holds more than (n, 128) correlations.

    Args:
        real_features: (n, features...) of the true images; further axes are flattened.
        recon_features: (n, features...) of the reconstructions, in the same order.

    Returns:
        (n,) values in [0, 1]; chance is 0.5.

    Raises:
        PerceptError: fewer than two rows, rows that do not pair up, or values that are not finite.
    """
    real, recon = _pair(real_features, recon_features, "features (n, features)")
    n = len(real)
    if n < 2:
        raise PerceptError(
            "Two-way identification needs at least two images: one to find and one to confuse it with."
        )
    values = []
    for start in range(0, n, CHUNK):
        preds = _unit_rows(recon[start : start + CHUNK])  # (chunk, features)
        r = torch.cat(
            [_unit_rows(reals) @ preds.T for reals in real.split(CHUNK)]
        )  # (n reals, chunk of recons)
        own = r[torch.arange(start, start + len(preds)), torch.arange(len(preds))]  # (chunk,)
        values.append((r < own).sum(0).double() / (n - 1))
    return torch.cat(values).cpu().numpy()


def two_way_identification(real_features: Any, recon_features: Any) -> float:
    """Mean of `two_way_each`.

    Features (n, features...) of true and reconstructed images -> score in [0, 1], chance 0.5.
    """
    return float(two_way_each(real_features, recon_features).mean())


def _paired(real: Any, recon: Any, centre: bool) -> np.ndarray:
    real, recon = _pair(real, recon, "(n, ...)")
    parts = [
        (_unit_rows(a, centre) * _unit_rows(b, centre)).sum(1)
        for a, b in zip(real.split(CHUNK), recon.split(CHUNK), strict=True)
    ]
    return torch.cat(parts).cpu().numpy()


def pcc(images: Any, recons: Any) -> np.ndarray:
    """Pearson correlation of each pair at its own resolution.

    (n, ...) and (n, ...) -> (n,) in [-1, 1]; the digits69 score.
    """
    return _paired(images, recons, centre=True)


def cosine(real: Any, recon: Any) -> np.ndarray:
    """Cosine of each pair of latents or features, further axes flattened.

    (n, ...) and (n, ...) -> (n,) in [-1, 1].
    """
    return _paired(real, recon, centre=False)


def correlation_distance(real_features: Any, recon_features: Any) -> np.ndarray:
    """1 - Pearson correlation of paired features (n, features).

    (n,) in [0, 2], lower is better; the EfficientNet and SwAV scores.
    """
    return 1 - _paired(real_features, recon_features, centre=True)


def mse(images: Any, recons: Any) -> np.ndarray:
    """Mean squared difference of each pair at its own resolution.

    (n, ...) and (n, ...) -> (n,), lower is better.
    """
    images, recons = _pair(images, recons, "(n, ...)")
    return F.mse_loss(recons.double(), images.double(), reduction="none").flatten(1).mean(1).cpu().numpy()


# ------------------------------------------------------------------------------------------------ pixels
def _resizer(side: int, size: int, antialias: bool) -> Tensor:
    """The matrix (size, side) that resizes one axis.

    Bilinear resizing is linear and treats the axes apart.
    """
    eye = torch.eye(side, dtype=torch.float64)[None, None]
    return F.interpolate(eye, (size, side), mode="bilinear", align_corners=False, antialias=antialias)[0, 0]


def pixcorr(images: Any, recons: Any, size: int = SIZE, antialias: bool = False) -> np.ndarray:
    """Pixel correlation of each pair: Pearson over all colours and pixels, both resized straight to `size`.

    Source: MindEye, Table 1.
    The enlarged images are never made: with A the resizing matrix of an axis, <A x B', A y B'> = <x, (A'A) y
    (B'B)>, which at 32 pixels costs almost nothing. The result is that of resizing first (tested).

    Args:
        images: true images (n, 3, height, width) in [0, 1].
        recons: reconstructions (n, 3, height, width) in [0, 1]; may have another resolution.
        size: pixels a side of the comparison.
        antialias: smooth before shrinking (no effect on images up to `size`).

    Returns:
        (n,) in [-1, 1]; 0 where an image is one flat colour.
    """
    images, recons = _pair(images, recons, "images (n, 3, height, width)")
    _check_images(images)
    _check_images(recons)
    rows, columns = (
        [_resizer(x.shape[axis], size, antialias).to(x.device) for x in (images, recons)] for axis in (2, 3)
    )

    def inner(x: Tensor, a: int, y: Tensor, b: int) -> Tensor:
        return (x * (rows[a].T @ rows[b] @ y @ columns[b].T @ columns[a])).sum((1, 2, 3))  # (n,)

    values = []
    for x, y in zip(images.split(CHUNK), recons.split(CHUNK), strict=True):
        x, y = (_centred(z.double(), r, c) for z, r, c in zip((x, y), rows, columns, strict=True))
        norms = (inner(x, 0, x, 0) * inner(y, 1, y, 1)).clamp_min(0).sqrt()
        values.append(torch.where(norms > 0, inner(x, 0, y, 1) / norms.clamp_min(1e-300), 0.0))
    return torch.cat(values).cpu().numpy()


def _centred(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images (n, 3, height, width) less the constant that makes the mean of their resized version 0.

    A flat image becomes exactly 0.
    """
    mean = torch.einsum("nchw,h,w->n", images, rows.mean(0), columns.mean(0)) / images.shape[1]
    flat = images.flatten(1).amax(1) == images.flatten(1).amin(1)
    return (images - mean[:, None, None, None]) * ~flat[:, None, None, None]


def grey(images: Any, size: int = SIZE, antialias: bool = False) -> np.ndarray:
    """Luminance of images (n, 3, height, width) in [0, 1], resized straight to `size`.

    (n, size, size) float32.

    scikit-image's weights (.2125, .7154, .0721). Grey is taken before resizing, which is the same (both are
    linear) and a third of the work.
    """
    images = torch.as_tensor(images)
    _check_images(images)
    luminance = torch.as_tensor(rgb2gray(images.detach().float().cpu().numpy(), channel_axis=1))[:, None]
    return torch.cat([resize(part, size, antialias) for part in luminance.split(CHUNK)])[:, 0].numpy()


def _each_pair(compare: Callable[[np.ndarray, np.ndarray], float], images: np.ndarray, recons: np.ndarray) -> np.ndarray:
    """`compare` of each pair, (n,), on all cores: the filters of a comparison work outside Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.array(list(pool.map(lambda pair: compare(*pair), zip(images, recons, strict=True))), dtype=np.float64)


def _ssim_grey(images: np.ndarray, recons: np.ndarray) -> np.ndarray:
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    return _each_pair(lambda x, y: structural_similarity(y, x, channel_axis=None, **options), images, recons)


def _ssim_columns_grey(images: np.ndarray, recons: np.ndarray) -> np.ndarray:
    """scikit-image's formula with channel_axis=1 on (n, rows, columns), all the columns at once."""
    c1, c2, radius = 0.01**2, 0.03**2, 5  # data range 1; 3.5 standard deviations of 1.5 pixels, rounded

    def smooth(x: np.ndarray) -> np.ndarray:
        return gaussian_filter1d(x, 1.5, axis=0, truncate=3.5, mode="reflect")

    def one(x: np.ndarray, y: np.ndarray) -> float:
        mx, my = smooth(x), smooth(y)
        vx, vy, vxy = smooth(x * x) - mx * mx, smooth(y * y) - my * my, smooth(x * y) - mx * my
        s = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
        return s[radius:-radius].mean(dtype=np.float64)

    return _each_pair(one, images, recons)


def _grey_pair(images: Any, recons: Any, size: int, antialias: bool) -> tuple[np.ndarray, np.ndarray]:
    images, recons = _pair(images, recons, "images (n, 3, height, width)")
    return grey(images, size, antialias), grey(recons, size, antialias)


def ssim(images: Any, recons: Any, size: int = SIZE, antialias: bool = False) -> np.ndarray:
    """Structural similarity of the grey images, two-dimensional.

    What scikit-image >= 0.20 computes for the field's call.

    Wang et al. 2004: Gaussian window of sigma 1.5, population covariance, data range 1.

    Args:
        images: true images (n, 3, height, width) in [0, 1].
        recons: reconstructions (n, 3, height, width) in [0, 1].
        size: pixels a side of the comparison; both are resized straight to it.
        antialias: smooth before shrinking.

    Returns:
        (n,) in [-1, 1].
    """
    return _ssim_grey(*_grey_pair(images, recons, size, antialias))


def ssim_columns(images: Any, recons: Any, size: int = SIZE, antialias: bool = False) -> np.ndarray:
    """Structural similarity along the columns of the grey images.

    What scikit-image <= 0.19 computed for the same call.

    There `multichannel=True` made the 425 columns channels: a one-dimensional SSIM, averaged over columns,
    about 0.1 higher. Arguments and result as `ssim`.
    """
    return _ssim_columns_grey(*_grey_pair(images, recons, size, antialias))


# ------------------------------------------------------------------------------------------------ registry
@dataclass(frozen=True)
class Metric:
    """One score of reconstructions.

    Attributes:
        name: short name, unique in a table.
        prepare: images (n, 3, height, width) -> anything that is indexed by image, e.g. features (n,
            features).
        compare: two prepared sets -> (n,) values.
        better: "higher" or "lower".
        chance: value without any information, where one is known, else None.
        description: one sentence for a reader.
        source: paper or code the definition comes from.
        truth: what `prepare` should say of the true images, where that is known without looking (labels), else
            None.
    """

    name: str
    prepare: Callable[[Tensor], Any]
    compare: Callable[[Any, Any], np.ndarray]
    better: str
    chance: float | None
    description: str
    source: str
    truth: Any = None

    def prepare_true(self, images: Tensor) -> Any:
        """What `prepare` says of the true images, or the truth where that is known."""
        return self.prepare(images) if self.truth is None else self.truth

    def each(self, images: Tensor, recons: Tensor, features: dict | None = None) -> np.ndarray:
        """Score each pair: images and recons (n, 3, height, width) in [0, 1] -> (n,).

        `features` keeps what was prepared of the true images: pass one dict for one set of images, and it is
        prepared once.
        """
        features = {} if features is None else features
        if self.prepare not in features:
            features[self.prepare] = self.prepare_true(images)
        return self.compare(features[self.prepare], self.prepare(recons))


def _same(images: Tensor) -> Tensor:
    return torch.as_tensor(images)


_FIELD = "MindEye, arXiv 2305.18274, after Ozcelik & VanRullen 2023"
_DIGITS = "digits69 literature, Du et al. 2018"
_COLUMNS = "the same call before scikit-image 0.20: structural similarity along columns"
METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric(
            "pixcorr", _same, pixcorr, "higher", 0.0, "correlation of pixels and colours at 425 x 425", _FIELD
        ),
        Metric(
            "ssim", grey, _ssim_grey, "higher", None, "structural similarity in grey at 425 x 425", _FIELD
        ),
        Metric("ssim_columns", grey, _ssim_columns_grey, "higher", None, _COLUMNS, _FIELD),
        Metric("pcc", _same, pcc, "higher", 0.0, "correlation of all pixels at their own size", _DIGITS),
        Metric(
            "mse", _same, mse, "lower", None, "mean squared difference of pixels at their own size", _DIGITS
        ),
    )
}


def two_way_metric(name: str, embed: Callable[[Tensor], Any], source: str = _FIELD) -> Metric:
    """Two-way identification in the features of a frozen network.

    `embed` maps images (n, 3, height, width) to (n, features...).
    """
    text = "share of other test images that resemble the reconstruction less than the seen image does"
    return Metric(name, embed, two_way_each, "higher", 0.5, text, source)


def distance_metric(name: str, embed: Callable[[Tensor], Any], source: str = _FIELD) -> Metric:
    """Correlation distance in the features of a frozen network.

    `embed` maps images (n, 3, height, width) to (n, features...).
    """
    text = "one minus the correlation of the features of seen image and reconstruction"
    return Metric(name, embed, correlation_distance, "lower", 1.0, text, source)


def cosine_metric(name: str, embed: Callable[[Tensor], Any], source: str = "cosine") -> Metric:
    """Cosine in the features of a frozen network.

    `embed` maps images (n, 3, height, width) to (n, features...).
    """
    return Metric(
        name, embed, cosine, "higher", None, "cosine of the features of seen image and reconstruction", source
    )


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

    def compare(column: int) -> Callable[[Any, Any], np.ndarray]:
        return lambda shown, said: (shown[:, column] == said[:, column]).astype(np.float64)

    text = "share of reconstructions in which an independent classifier names the right {}"
    return [
        Metric(f"{prefix}:{q}", prepare, compare(i), "higher", chance[q], text.format(q), "model card of the mini models", right)
        for i, q in enumerate(questions)
    ]


# ------------------------------------------------------------------------------------------------ statistics
class Interval(NamedTuple):
    """A mean over images and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """A mean paired difference, its 95 % bootstrap interval and its two-sided p."""

    value: float
    low: float
    high: float
    p: float


def _values(values: Any) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise PerceptError(
            f"Statistics are taken over images: expected values (n,), got shape {values.shape}."
        )
    if not np.isfinite(values).all():
        raise PerceptError(
            f"{(~np.isfinite(values)).sum()} of {len(values)} per-image values are NaN or infinite; no "
            "mean is given."
        )
    return values


def _bootstrap(values: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """Means (n_boot,) of resamples of the images."""
    return values[np.random.default_rng(seed).integers(0, len(values), (n_boot, len(values)))].mean(1)


def bootstrap_mean(values: Any, n_boot: int = 2000, seed: int = 0) -> Interval:
    """Mean of per-image values (n,) with its 95 % percentile interval over resamples of the images (Efron &
    Tibshirani 1993).
    """
    values = _values(values)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(_bootstrap(values, n_boot, seed), [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def paired_bootstrap(a: Any, b: Any, n_boot: int = 2000, seed: int = 0) -> Difference:
    """Mean of a - b over the same images, (n,) and (n,), with its interval and the two-sided bootstrap p of
    no difference.

    The p is twice the smaller share of resampled means on either side of 0, counting the observed one, so it
    is never 0.
    """
    a, b = _values(a), _values(b)
    if a.shape != b.shape:
        raise PerceptError(
            f"A paired difference needs the same images on both sides; got {len(a)} and {len(b)} values."
        )
    means = _bootstrap(a - b, n_boot, seed)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    p = 2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / (1 + n_boot)
    return Difference(float((a - b).mean()), float(low), float(high), float(min(p, 1.0)))


def permutation_p(
    own: Any, others: Any, better: str = "higher", n_permutations: int = 2000, seed: int = 0
) -> float:
    """One-sided p that reconstructions fit their own images better than other ones.

    If the pairing carried nothing, the own image would be exchangeable with the others, reconstruction by
    reconstruction: the null distribution takes, for each, one of its 1 + draws scores at random. The smallest
    p is 1 / (1 + n_permutations).

    Args:
        own: (n,) scores against the own image.
        others: (n, draws) scores of the same reconstructions against other images.
        better: "higher" or "lower".
        n_permutations: random draws from the null.
        seed: of these draws.
    """
    sign = {"higher": 1.0, "lower": -1.0}[better]
    own, others = sign * _values(own), sign * np.asarray(others, dtype=np.float64)
    if others.ndim != 2 or len(others) != len(own):
        raise PerceptError(
            f"Expected shuffled scores (n, draws) for n = {len(own)} images, got shape {others.shape}."
        )
    scores = np.column_stack([own, others])  # (n, 1 + draws)
    pick = np.random.default_rng(seed).integers(0, scores.shape[1], (n_permutations, len(own)))
    null = scores[np.arange(len(own)), pick].mean(1)  # (n_permutations,)
    return float((1 + (null >= own.mean() - 1e-12).sum()) / (1 + n_permutations))


def derangements(n: int, draws: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield `draws` random permutations (n,) in which nothing stays in its place."""
    if n < 2:
        raise PerceptError("A shuffled pairing needs at least two images.")
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        order = rng.permutation(n)
        while (order == np.arange(n)).any():  # about e tries
            order = rng.permutation(n)
        yield order


# ------------------------------------------------------------------------------------------------ tables
class Evaluator:
    """Scores several sets of reconstructions of the same images, preparing the true images once.

    Args:
        images: true images (n, 3, height, width) in [0, 1].
        metrics: the metrics to compute.
    """

    def __init__(self, images: Tensor, metrics: Sequence[Metric]):
        """Keep the images; they are prepared when a metric first needs them."""
        self.images, self.metrics = torch.as_tensor(images), list(metrics)
        self.features: dict[Callable, Any] = {}

    def score(self, recons: Tensor, row: str, shuffles: Sequence[np.ndarray] = ()) -> pd.DataFrame:
        """Score reconstructions (n, 3, height, width) in [0, 1].

        Args:
            recons: reconstructions in the order of the images.
            row: name of this set in the table.
            shuffles: permutations (n,) of the reconstructions, scored as draws of a further row "shuffled".

        Returns: Tidy table [metric, row, image, draw, value] with one line a metric, order and image; `image`
            counts from 0, and in the row "shuffled" names the reconstruction, so that its scores stand beside
            the one against its own image.
        """
        recons = torch.as_tensor(recons)
        _pair(self.images, recons, "images (n, 3, height, width)")
        orders = [
            (row, 0, np.arange(len(recons))),
            *(("shuffled", draw, order) for draw, order in enumerate(shuffles)),
        ]
        prepared: dict[Callable, Any] = {}
        tables = []
        for metric in self.metrics:
            key = metric.prepare
            if key not in self.features:
                self.features[key] = metric.prepare_true(self.images)
            if key not in prepared:
                prepared[key] = key(recons)
            for name, draw, order in orders:
                values = metric.compare(self.features[key], prepared[key][order])
                columns = {"metric": metric.name, "row": name, "image": order, "draw": draw, "value": values}
                tables.append(pd.DataFrame(columns))
        return pd.concat(tables, ignore_index=True)


def score_table(
    images: Tensor,
    recons: Tensor,
    controls: dict[str, Tensor],
    ceiling: Tensor | None,
    metrics: Sequence[Metric],
    draws: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Score a system and its controls on the same images, one line an image.

    Args:
        images: true images (n, 3, height, width) in [0, 1].
        recons: the system's reconstructions, in the same order.
        controls: floors by name, e.g. {"mean_image": ..., "nearest_train": ...}, each (n, 3, height, width).
        ceiling: images made from the true latents, or None where there is no such thing (say why in
            `make_records`).
        metrics: e.g. `METRICS.values()`.
        draws: random pairings of the "shuffled" floor, which is always computed.
        seed: of these pairings.

    Returns: Tidy table [metric, row, image, draw, value]; row is "system", "shuffled", a control's name or
        "ceiling".
    """
    taken = {"system", "shuffled", "ceiling"} & set(controls)
    if taken:
        raise PerceptError(
            f"The control name {sorted(taken)[0]!r} is used by score_table itself; choose another one."
        )
    evaluator = Evaluator(images, metrics)
    tables = [
        evaluator.score(recons, "system", list(derangements(len(evaluator.images), draws, seed))),
        *(evaluator.score(control, name) for name, control in controls.items()),
    ]
    if ceiling is not None:
        tables.append(evaluator.score(ceiling, "ceiling"))
    return pd.concat(tables, ignore_index=True)


def make_record(
    name: str,
    values: Any,
    *,
    floors: dict[str, Any],
    ceiling: Any,
    better: str,
    protocol: str,
    test_set: str,
    **more: Any,
) -> dict[str, Any]:
    """One record of metrics.json from per-image values.

    Args:
        name: the metric.
        values: (n,) of the system.
        floors: per-image values (n,) by control; "shuffled" may be (n, draws), and then gives `p_shuffled`.
        ceiling: per-image values (n,), or a sentence saying why there is no ceiling.
        better: "higher" or "lower".
        protocol: name of the data protocol, e.g. "nsd-1000".
        test_set: id of the test images, `Subject.test_set`.
        **more: further entries, e.g. description, source, chance.

    Returns: {name, value, low, high, n, better, protocol, test_set, floors: {control: {value, low, high, p}},
        ceiling, p_shuffled, ...}; the p of a floor is that of `paired_bootstrap` against the system.
    """
    values = _values(values)
    record: dict[str, Any] = {
        "name": name,
        **bootstrap_mean(values)._asdict(),
        "n": len(values),
        "better": better,
    }
    record |= {"protocol": protocol, "test_set": test_set, "floors": {}}
    for control, scores in floors.items():
        scores = np.asarray(scores, dtype=np.float64)
        if control == "shuffled" and scores.ndim == 2:
            record["p_shuffled"] = permutation_p(values, scores, better)
            scores = scores.mean(1)
        p = paired_bootstrap(values, scores).p
        record["floors"][control] = {**bootstrap_mean(scores)._asdict(), "p": p}
    has_reason = isinstance(ceiling, str)
    record["ceiling"] = {"not_applicable": ceiling} if has_reason else bootstrap_mean(ceiling)._asdict()
    return record | more


def make_records(
    table: pd.DataFrame, metrics: Sequence[Metric], *, protocol: str, test_set: str, no_ceiling: str = ""
) -> list[dict[str, Any]]:
    """Summarise a `score_table` into the records of metrics.json.

    Args:
        table: [metric, row, image, draw, value].
        metrics: those of the table.
        protocol: name of the data protocol.
        test_set: id of the test images.
        no_ceiling: why the table has no "ceiling" row, where it has none.

    Raises:
        PerceptError: there is neither a ceiling nor a reason.
    """
    records = []
    for metric in metrics:
        mine = table[table["metric"] == metric.name]
        rows = {
            str(row): part.pivot(index="image", columns="draw", values="value").to_numpy()
            for row, part in mine.groupby("row", sort=False)
        }
        if "ceiling" not in rows and not no_ceiling:
            raise PerceptError(
                f"{metric.name} has no ceiling row; give one to score_table, or the reason in no_ceiling."
            )
        floors = {
            row: scores if row == "shuffled" else scores[:, 0]
            for row, scores in rows.items()
            if row not in ("system", "ceiling")
        }
        records.append(make_record(
            metric.name, rows["system"][:, 0], floors=floors, better=metric.better,
            protocol=protocol, test_set=test_set,
            ceiling=rows["ceiling"][:, 0] if "ceiling" in rows else no_ceiling,
            chance=metric.chance, description=metric.description, source=metric.source,
        ))  # fmt: skip
    return records


def provenance(
    recipe: str, seeds: dict[str, int], selection: Sequence[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """What a reader must know to repeat a table.

    Args:
        recipe: name of the recipe or run.
        seeds: seed by purpose.
        selection: one dict a choice that was made, e.g. {"what": "epoch", "chosen": 37, "split": "val",
            "candidates": 60}.
        **more: further entries, e.g. parameters, subject, alarms.
    """
    packages = ("numpy", "scipy", "scikit-image", "torch", "torchvision", "transformers", "diffusers")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    settings = {
        "pixel metrics": f"bilinear resize straight to {SIZE} pixels, without antialiasing",
        "grey": ".2125 red + .7154 green + .0721 blue",
        "intervals": "95 % percentile bootstrap over test images, 2000 resamples",
    }
    return {
        "recipe": recipe,
        "seeds": dict(seeds),
        "selection": list(selection),
        "versions": versions,
        "settings": settings,
        **more,
    }


def _is_score(entry: Any) -> bool:
    """Whether an entry of a record holds a finite value and interval."""
    numbers = [entry.get(key) for key in ("value", "low", "high")] if isinstance(entry, dict) else [None]
    return all(isinstance(number, float | int) and math.isfinite(number) for number in numbers)


def _check_record(record: dict[str, Any]) -> None:
    needed = ("name", "value", "low", "high", "n", "better", "protocol", "test_set")
    missing = [key for key in needed if record.get(key) in (None, "")]
    if missing:
        raise PerceptError(
            f"The record of {record.get('name', 'a metric')!r} lacks {', '.join(missing)}; make it with "
            "make_record."
        )

    name, floors, ceiling = record["name"], record.get("floors"), record.get("ceiling")
    if not _is_score(record):
        raise PerceptError(f"The score {name!r} is not finite; it is not written.")
    if not floors or not all(_is_score(floor) for floor in floors.values()):
        raise PerceptError(
            f"The score {name!r} has no floor; a score is only shown beside what no decoding would give "
            "(score_table adds a shuffled pairing, pass mean_image and nearest_train as controls)."
        )
    if not _is_score(ceiling) and not (isinstance(ceiling, dict) and ceiling.get("not_applicable")):
        raise PerceptError(
            f"The score {name!r} has no ceiling; score the generator on the true latents, "
            'or say why there is none with {"not_applicable": "the reason"}.'
        )


def write_metrics(path: str | Path, records: Sequence[dict[str, Any]], provenance: dict[str, Any]) -> None:
    """Write metrics.json: {"metrics": [one record a metric], "provenance": {...}}.

    Raises:
        PerceptError: a record lacks its floors, its ceiling (or the reason why there is none), its interval,
            protocol or test set; or the provenance lacks recipe, seeds or selection.
    """
    for record in records:
        _check_record(record)
    missing = [key for key in ("recipe", "seeds", "selection") if key not in provenance]
    if missing:
        raise PerceptError(
            f"The provenance lacks {', '.join(missing)}; make it with metrics.provenance(...)."
        )
    write_json(Path(path), {"metrics": list(records), "provenance": provenance})


def write_scores(path: str | Path, table: pd.DataFrame) -> None:
    """Write the per-image table [metric, row, image, draw, value] of `score_table` as parquet."""
    with atomic(Path(path)) as temporary:
        table.to_parquet(temporary, index=False)


# ------------------------------------------------------------------------------------------------ alarms
def check_outputs(recons: Any) -> list[str]:
    """Say what is wrong with reconstructions (n, 3, height, width) in [0, 1] before anyone scores them.

    Returns: Sentences, none when all is well: values that are not finite or out of range, black images,
        images of one colour, all alike.
    """
    recons = torch.as_tensor(recons).detach().float().cpu()
    n, flat = len(recons), recons.flatten(1)
    finite = torch.isfinite(flat).all(1)
    alarms = []

    def say(which: Tensor, what: str) -> None:
        if which.any():
            first = ", ".join(str(i) for i in which.nonzero()[:5, 0].tolist())
            alarms.append(f"{int(which.sum())} of {n} reconstructions {what} (first: {first}).")

    say(~finite, "hold NaN or infinite values; half precision in the decoder is the usual cause")
    flat = torch.where(finite[:, None], flat, 0.0)
    say((flat.amin(1) < -1e-3) | (flat.amax(1) > 1 + 1e-3), "leave the range [0, 1]; clamp them")
    black = finite & (flat.amax(1) < 0.02)
    say(black, "are black; a safety checker or a half-precision overflow is the usual cause")
    say(finite & ~black & (flat.std(1) < 0.01), "are of one flat colour")
    if n > 1 and flat.std(0).mean() < 0.1 * flat.std(1).mean():
        alarms.append(
            f"The {n} reconstructions are nearly alike (they differ less than a tenth of what one "
            "picture's pixels do): "
            "the decoder ignores the brain, or the generator its condition."
        )
    return alarms


def check_alignment(two_way: Any, pixcorr: Any, pixcorr_shuffled: float = 0.0) -> list[str]:
    """Say when scores look like rows of brain data and images that do not belong together.

    Args:
        two_way: (n,) of any two-way metric of the system.
        pixcorr: (n,) of the system.
        pixcorr_shuffled: mean pixel correlation of the shuffled pairing.

    Returns: One sentence when the interval of two-way identification reaches 50 % and the pixel correlation
        no better than shuffled, else none.
    """
    identification, pixels = bootstrap_mean(two_way), bootstrap_mean(pixcorr)
    if identification.low <= 0.5 and pixels.low <= pixcorr_shuffled + 0.02:
        return [
            f"Two-way identification is {identification.value:.1%} and the pixel correlation "
            f"{pixels.value:.3f}, as for a random "
            "pairing: your rows are probably misaligned (brain rows in another order than the images), or "
            "nothing was learned."
        ]
    return []
