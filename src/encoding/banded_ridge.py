"""Banded ridge regression from feature spaces to voxels, and its out-of-fold predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from src.encoding.features import FEATURE_SPACES, FeatureSpace
from src.encoding.model import EncodingModel, FeatureProjection
from src.encoding.nonlinear import fit_kernel_readout, fit_mlp_readout
from src.encoding.readouts import KernelReadout, LinearReadout, check_readout
from src.networks.linear import himalaya_backend
from src.utils import PerceptError

PENALTIES = tuple(float(penalty) for penalty in np.logspace(0, 2.5, 6))  # 1 to 316

Folds = list[tuple[np.ndarray, np.ndarray]]  # rows to fit, rows to predict


@dataclass(frozen=True)
class EncodingFit:
    """An encoding model and how well it predicts images that it was not fitted to.

    Attributes:
        model: fitted to all images.
        out_of_fold: float32 (images, voxels), each row predicted by a model that was fitted without
            that image, nor any other of its group.
        residuals: float32 (images, voxels), measured less `out_of_fold`.
        penalties: float32 (spaces, voxels), of each feature space for each voxel.
        score: float64 (voxels,), share of the variance that `out_of_fold` explains, 1 at best.
    """

    model: EncodingModel
    out_of_fold: np.ndarray
    residuals: np.ndarray
    penalties: np.ndarray
    score: np.ndarray

    @property
    def total_score(self) -> float:
        """Share of the variance of all voxels together that `out_of_fold` explains."""
        measured = self.residuals + self.out_of_fold
        spread = ((measured - measured.mean(0)) ** 2).sum()
        return float(1 - (self.residuals**2).sum() / spread)


@dataclass(frozen=True)
class RidgeSettings:
    """How a banded ridge is fitted; arguments of `fit_encoding_model`."""

    penalties: Sequence[float] = PENALTIES
    n_mixtures: int = 1
    penalty_folds: int = 2
    folds: int = 4
    seed: int = 0
    device: str = "cpu"


def fit_encoding_model(
    features: Mapping[str, Any],
    voxels: np.ndarray,
    groups: np.ndarray | None = None,
    spaces: Mapping[str, FeatureSpace] | None = None,
    readout: str = "linear",
    **options: Any,
) -> EncodingFit:
    """Fit voxels as a map of feature spaces: a banded ridge, with a penalty a space and voxel.

    Minimises ||y - sum_s Z_s w_s||^2 + sum_s penalty_s ||w_s||^2 for each voxel y, where Z_s are
    the principal components of space s at a mean squared length of 1. The penalties of each voxel
    are those that predict best in a cross-validation over `penalty_folds`. `out_of_fold` is then
    predicted over other folds with these penalties, which is a little in its favour: judge a model
    by images that it has not seen at all.

    Args:
        features: by name (images, ...), of `compute_features`.
        voxels: (images, voxels), z-scored; the mean over repeats.
        groups: (images,) labels; images of one group stay in one fold. None: each is its own.
        spaces: how each feature space enters, by name; those of FEATURE_SPACES by default.
        readout: "linear"; "kernel" for a kernel ridge on the components of all spaces, with a
            penalty a voxel; "mlp" for a hidden layer on what the linear map leaves, which takes
            `folds` + 1 trainings.
        options: of `RidgeSettings`.
            penalties: candidates, where all spaces share one (1 to 316).
            n_mixtures: how many ways to share a penalty among the spaces are tried: all equal,
                then random ones. With 1 this is a ridge with one penalty a voxel.
            penalty_folds: of the choice of the penalties, at least 2 (2).
            folds: of the out-of-fold predictions, at least 2 (4).
            seed: of folds and components (0).
            device: torch device of the linear algebra ("cpu").

    Raises:
        PerceptError: if rows do not match, there are fewer groups than folds, or values are not
            finite.

    Source: Dupré la Tour et al. 2022 (banded ridge, himalaya); Nunez-Elizalde et al. 2019.
    """
    settings = RidgeSettings(**options)
    check_readout(readout)
    y = np.asarray(voxels, np.float32)
    check_rows(features, y, groups)
    projections = fit_projections(features, spaces, settings.seed)
    components = {
        name: projection.project(features[name]).numpy() for name, projection in projections.items()
    }
    fitted = _fit_readout(readout, components, y, groups, settings)
    model = assemble_model(projections, y.shape[1], readout, fitted.module)
    score = explained_variance(y, fitted.out_of_fold)
    residuals = y - fitted.out_of_fold
    return EncodingFit(model, fitted.out_of_fold, residuals, fitted.penalties, score)


@dataclass(frozen=True)
class _FittedReadout:
    """A readout, the penalties (spaces, voxels) and its out-of-fold predictions."""

    module: nn.Module
    penalties: np.ndarray
    out_of_fold: np.ndarray


def _fit_readout(
    kind: str,
    components: Mapping[str, np.ndarray],
    y: np.ndarray,
    groups: np.ndarray | None,
    settings: RidgeSettings,
) -> _FittedReadout:
    """Fit one of READOUTS to the components of all spaces."""
    x, sizes = _concatenate(components)
    folds = split_rows(len(y), settings.folds, groups, settings.seed + 1)
    if kind == "kernel":
        penalty_folds = split_rows(len(y), settings.penalty_folds, groups, settings.seed)
        module, chosen, out_of_fold = fit_kernel_readout(
            x, y, penalty_folds, folds, settings.device
        )
        penalties = np.tile(chosen, (len(sizes), 1))
        return _FittedReadout(module, penalties, out_of_fold)
    penalties, out_of_fold = _fit_components(components, y, groups, settings)
    linear = _make_linear(*solve_banded_ridge(x, sizes, y, penalties, settings.device))
    if kind == "linear":
        return _FittedReadout(linear, penalties, out_of_fold)
    for rows, left_out in folds:
        part = _make_linear(
            *solve_banded_ridge(x[rows], sizes, y[rows], penalties, settings.device)
        )
        mlp = fit_mlp_readout(x[rows], y[rows], part, settings.seed, settings.device)
        with torch.no_grad():
            out_of_fold[left_out] = mlp(torch.from_numpy(x[left_out])).numpy()
    mlp = fit_mlp_readout(x, y, linear, settings.seed, settings.device)
    return _FittedReadout(mlp, penalties, out_of_fold)


def _make_linear(weight: Tensor, bias: Tensor) -> LinearReadout:
    """A linear readout with weight (components, voxels) and bias (voxels,)."""
    linear = LinearReadout(*weight.shape)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    return linear


def _fit_components(
    components: Mapping[str, np.ndarray],
    y: np.ndarray,
    groups: np.ndarray | None,
    settings: RidgeSettings,
) -> tuple[np.ndarray, np.ndarray]:
    """Penalties (spaces, voxels), and out-of-fold predictions (images, voxels)."""
    x, sizes = _concatenate(components)
    penalty_folds = split_rows(len(y), settings.penalty_folds, groups, settings.seed)
    penalties = choose_penalties(
        x, sizes, y, settings.penalties, settings.n_mixtures, penalty_folds, settings.device
    )
    folds = split_rows(len(y), settings.folds, groups, settings.seed + 1)
    return penalties, predict_out_of_fold(x, sizes, y, penalties, folds, settings.device)


def _concatenate(components: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """Components of all spaces side by side, and how many each space has."""
    parts = list(components.values())
    return np.concatenate(parts, 1), [part.shape[1] for part in parts]


def fit_projections(
    features: Mapping[str, Any], spaces: Mapping[str, FeatureSpace] | None = None, seed: int = 0
) -> dict[str, FeatureProjection]:
    """Principal components of each feature space; arguments as for `fit_encoding_model`."""
    settings = FEATURE_SPACES | dict(spaces or {})
    return {
        name: FeatureProjection.fit(rows, settings.get(name, FeatureSpace()), seed)
        for name, rows in features.items()
    }


def check_rows(features: Mapping[str, Any], voxels: np.ndarray, groups: np.ndarray | None) -> None:
    """Refuse features and voxels that do not match or are not finite."""
    counts = {name: len(rows) for name, rows in features.items()}
    if not features or {*counts.values()} != {len(voxels)}:
        raise PerceptError(
            f"An encoding model needs a row of features an image: there are {len(voxels)} rows of"
            f" voxels and {counts or 'no features'}; give the same images in the same order."
        )
    if groups is not None and len(groups) != len(voxels):
        raise PerceptError(
            f"There are {len(groups)} groups for {len(voxels)} images: give one label an image."
        )
    if not np.isfinite(voxels).all():
        raise PerceptError(
            "Voxels for the encoding model hold values that are not finite: drop these voxels when"
            " the data are prepared."
        )


def assemble_model(
    projections: Mapping[str, FeatureProjection], n_voxels: int, kind: str, readout: nn.Module
) -> EncodingModel:
    """An encoding model of fitted projections and a fitted readout of that kind."""
    sizes = {name: list(part.components.shape) for name, part in projections.items()}
    options = {"n_images": len(readout.inputs)} if isinstance(readout, KernelReadout) else {}
    model = EncodingModel(sizes, n_voxels, kind, options)
    for name, part in projections.items():
        model.get_projection(name).load_state_dict(part.state_dict())
    model.readout = readout
    return model.eval().requires_grad_(False)


def split_rows(count: int, folds: int, groups: np.ndarray | None, seed: int) -> Folds:
    """Shuffled folds over images, or over groups of images.

    Raises:
        PerceptError: if there are fewer of them than folds.
    """
    from sklearn.model_selection import GroupKFold, KFold

    independent = count if groups is None else len(np.unique(groups))
    if not 2 <= folds <= independent:
        raise PerceptError(
            f"{independent} images or groups of images do not make {folds} folds: choose from 2 to"
            f" {independent} folds."
        )
    splitter_class = KFold if groups is None else GroupKFold
    splitter = splitter_class(folds, shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(count), groups=groups))


def choose_penalties(
    x: np.ndarray,
    sizes: Sequence[int],
    y: np.ndarray,
    penalties: Sequence[float],
    n_mixtures: int,
    folds: Folds,
    device: str = "cpu",
    chunk: int = 4096,
) -> np.ndarray:
    """Penalty of each space for each voxel, by cross-validation through himalaya.

    Args:
        x: (images, components), the spaces side by side.
        sizes: components of each space.
        y: (images, voxels).
        penalties: candidates, for a mixture that treats all spaces alike.
        n_mixtures: mixtures tried; the first treats all alike.
        folds: of the cross-validation.
        device: torch device.
        chunk: voxels at a time, which bounds the memory.

    Returns:
        float32 (spaces, voxels); infinite for a space that a mixture leaves out.
    """
    from himalaya.ridge import solve_group_ridge_random_search

    backend = "torch_cuda" if device.startswith("cuda") else "torch"
    blocks = np.split(x, np.cumsum(sizes)[:-1], axis=1)
    mixtures = _draw_mixtures(len(sizes), n_mixtures)
    with himalaya_backend(backend):
        deltas, *_ = solve_group_ridge_random_search(
            blocks,
            y,
            n_iter=mixtures,
            alphas=np.asarray(penalties, np.float32),
            fit_intercept=True,
            cv=folds,
            return_weights=False,
            n_targets_batch=chunk,
            n_alphas_batch=1,
            progress_bar=False,
            warn=False,
        )
        logarithm = torch.as_tensor(deltas).float().cpu().numpy()
    with np.errstate(over="ignore"):
        return np.exp(-logarithm)


def _draw_mixtures(n_spaces: int, count: int) -> np.ndarray:
    """Weights (mixtures, spaces) with a mean of 1: all equal first, then from a Dirichlet law."""
    equal = np.ones((1, n_spaces), np.float32)
    if n_spaces == 1 or count <= 1:
        return equal
    random_mixtures = np.random.default_rng(0).dirichlet(np.ones(n_spaces), count - 1)
    return np.concatenate([equal, n_spaces * random_mixtures]).astype(np.float32)


def solve_banded_ridge(
    x: np.ndarray,
    sizes: Sequence[int],
    y: np.ndarray,
    penalties: np.ndarray,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Weights for given penalties: (X'X + D) w = X'y, D diagonal, x and y centred.

    Args:
        x: (images, components), the spaces side by side.
        sizes: components of each space.
        y: (images, voxels).
        penalties: (spaces, voxels); infinite leaves a space out.
        device: torch device.

    Returns:
        Weight (components, voxels) and bias (voxels,), float32 on the CPU.
    """
    inputs = torch.as_tensor(x, dtype=torch.float32, device=device)
    outputs = torch.as_tensor(y, dtype=torch.float32, device=device)
    mean_x, mean_y = inputs.mean(0), outputs.mean(0)
    inputs = inputs - mean_x
    gram, cross = inputs.T @ inputs, inputs.T @ (outputs - mean_y)
    weight = torch.zeros_like(cross)
    for columns, penalty in _group_by_penalty(penalties):
        used = torch.as_tensor(np.repeat(np.isfinite(penalty), sizes), device=device)
        ridge = torch.as_tensor(np.repeat(penalty, sizes), device=device, dtype=torch.float32)
        rows = used.nonzero()[:, 0]
        if not len(rows):
            continue
        matrix = gram[rows][:, rows] + ridge[rows].diag()
        factor = torch.linalg.cholesky(matrix)
        targets = torch.as_tensor(columns, device=device)
        weight[rows[:, None], targets] = torch.cholesky_solve(cross[rows][:, targets], factor)
    bias = mean_y - mean_x @ weight
    return weight.cpu(), bias.cpu()


def _group_by_penalty(penalties: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Voxels (columns) that share their penalties, and these (spaces,)."""
    unique, codes = np.unique(penalties, axis=1, return_inverse=True)
    for number in range(unique.shape[1]):
        yield np.flatnonzero(codes.ravel() == number), unique[:, number]


def predict_out_of_fold(
    x: np.ndarray,
    sizes: Sequence[int],
    y: np.ndarray,
    penalties: np.ndarray,
    folds: Folds,
    device: str = "cpu",
) -> np.ndarray:
    """Voxels (images, voxels) of each fold, predicted from the other folds; penalties are given."""
    predicted = np.empty_like(y)
    for fitted, left_out in folds:
        weight, bias = solve_banded_ridge(x[fitted], sizes, y[fitted], penalties, device)
        predicted[left_out] = (torch.from_numpy(x[left_out]) @ weight + bias).numpy()
    return predicted


def explained_variance(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Share of each voxel's variance over images that is predicted, float64 (voxels,).

    1 - sum of squared errors / sum of squares about the mean; 0 where nothing varies.
    """
    error = ((measured - predicted) ** 2).sum(0, dtype=np.float64)
    spread = ((measured - measured.mean(0)) ** 2).sum(0, dtype=np.float64)
    share = np.divide(error, spread, out=np.ones_like(error), where=spread > 0)
    return 1 - share


def partition_variance(
    fit: EncodingFit,
    features: Mapping[str, Any],
    voxels: np.ndarray,
    groups: np.ndarray | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Which feature space explains what of each voxel, out of fold.

    The models of each space alone and of all but one are fitted too. A space's unique part is what
    the model of all loses without it; with two spaces, what either could explain is shared:
    R2(A) + R2(B) - R2(A, B). With more spaces, what is no one's own is shared.

    Args:
        fit: of all spaces.
        features, voxels, groups: that it was fitted to.
        options: with which it was fitted: `penalties`, `n_mixtures`, `penalty_folds`, `folds`,
            `seed` and `device` of `fit_encoding_model`.

    Returns:
        One row a voxel: "all" (share of variance of the model of all spaces), "<space> alone",
        "<space> unique", and "shared". Parts may be slightly negative, as each model is scored on
        images that it was not fitted to.

    Raises:
        PerceptError: for fewer than two spaces.

    Source: Borcard et al. 1992; for encoding models de Heer et al. 2017.
    """
    names = fit.model.spaces
    if len(names) < 2:
        raise PerceptError(
            "Variance is partitioned between feature spaces: give at least two of them."
        )
    settings = RidgeSettings(**options)
    y = np.asarray(voxels, np.float32)
    components = {
        name: fit.model.get_projection(name).project(features[name]).numpy() for name in names
    }
    scores = {tuple(names): fit.score}
    for subset in [*combinations(names, 1), *combinations(names, len(names) - 1)]:
        if subset not in scores:
            x = {name: components[name] for name in subset}
            scores[subset] = explained_variance(y, _fit_components(x, y, groups, settings)[1])
    table = {"all": fit.score}
    table |= {f"{name} alone": scores[(name,)] for name in names}
    unique = {}
    for name in names:
        other_spaces = tuple(other for other in names if other != name)
        unique[f"{name} unique"] = fit.score - scores[other_spaces]
    table |= unique
    table["shared"] = fit.score - np.sum(list(unique.values()), axis=0)
    return pd.DataFrame(table)
