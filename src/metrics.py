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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity
from torch import Tensor

from src.utils import PerceptError

SIZE = 425  # pixels a side at which the field compares pictures (the size of the NSD stimuli)
CHUNK = 128  # rows of a feature matrix, or images, that are handled at once


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
