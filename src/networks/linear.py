"""Linear maps: ridge regression, maps between token spaces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.networks.base import Network
from src.utils import PerceptError, exact_products, progress


class CaptionConverter(Network):
    """Tokens of one image encoder to those of another.

    One linear map along the tokens, then one along the features.

    Args:
        tokens_in: number of input tokens.
        tokens_out: number of output tokens.
        dim_in: dim of an input token.
        dim_out: dim of an output token.

    Source: MindEye2 (arXiv 2403.11207), appendix A.6 (from CLIP bigG to the image tokens of GIT).
    """

    def __init__(
        self, tokens_in: int = 256, tokens_out: int = 257, dim_in: int = 1664, dim_out: int = 1024
    ):
        super().__init__()
        self.linear1 = nn.Linear(tokens_in, tokens_out)
        self.linear2 = nn.Linear(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens_in, dim_in) -> (batch, tokens_out, dim_out)."""
        x = self.linear1(x.transpose(1, 2))  # (batch, dim_in, tokens_out)
        return self.linear2(x.transpose(1, 2))


ALPHAS = tuple(float(alpha) for alpha in np.logspace(1, 6, 11))


class RidgeBaseline(Network):
    """One linear map from voxels to targets of any shape.

    The penalty of each target is chosen by cross-validation.

    Args:
        in_dim: number of voxels.
        target_shape: shape of the target of one image.

    The state dict holds weight (voxels, targets), bias (targets,) and alphas (targets,), the
    penalties that were chosen.
    """

    alphas: Tensor

    def __init__(self, in_dim: int, target_shape: Sequence[int]):
        super().__init__()
        self.target_shape = tuple(target_shape)
        size = math.prod(self.target_shape)
        self.weight = nn.Parameter(torch.zeros(in_dim, size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.register_buffer("alphas", torch.zeros(size))

    def forward(self, voxels: Tensor) -> Tensor:
        """(batch, voxels), or (batch, trials, voxels), -> (batch, *target_shape)."""
        voxels = voxels.flatten(1)
        if voxels.shape[-1] != len(self.weight):
            raise PerceptError(
                f"The ridge baseline reads {len(self.weight)} voxels but was given"
                f" {voxels.shape[-1]}: use the subject that it was fitted on."
            )
        return (voxels @ self.weight + self.bias).view(len(voxels), *self.target_shape)

    @classmethod
    def fit(
        cls,
        voxels: np.ndarray,
        targets: np.ndarray,
        alphas: Sequence[float] = ALPHAS,
        cv: int = 5,
        groups: np.ndarray | None = None,
        seed: int = 0,
        backend: str = "auto",
        chunk: int = 4096,
    ) -> RidgeBaseline:
        """Fit on training images only.

        Args:
            voxels: (images, voxels), normalised.
            targets: (images, ...).
            alphas: candidate penalties.
            cv: folds within these images.
            groups: (images,) labels; rows of one group stay in one fold (image ids, when the rows
                are trials).
            seed: of the folds.
            backend: himalaya's "numpy", "torch" or "torch_cuda"; "auto": torch, on a GPU where
                there is one.
            chunk: targets solved at a time, which bounds the memory.

        Returns:
            The fitted module, its `alphas` (targets,) being the chosen penalties.

        Raises:
            PerceptError: if voxels and targets do not match, hold non-finite values, or are too few
                for the folds.

        Source: Hoerl & Kennard 1970; solved by himalaya (Dupré la Tour et al. 2022).
        """
        from himalaya.ridge import RidgeCV

        x = np.asarray(voxels, np.float32)  # (images, voxels)
        y = np.asarray(targets, np.float32).reshape(len(targets), -1)  # (images, targets)
        _check_rows(x, y, groups)
        solver_params = {
            "n_targets_batch": chunk,
            "n_targets_batch_refit": chunk,
            "n_alphas_batch": 1,  # one at a time: as fast, with half the memory
            "warn": False,
        }
        with himalaya_backend(backend), exact_products():
            solver = RidgeCV(
                alphas=np.asarray(alphas, np.float32),
                cv=_split_into_folds(x, y, cv, groups, seed),
                fit_intercept=True,
                solver_params=solver_params,
            )
            solver.fit(x, y)
            weight, bias, best_alphas = (
                torch.as_tensor(value).float().cpu()
                for value in (solver.coef_, solver.intercept_, solver.best_alphas_)
            )
        alphas_by_target = best_alphas.expand(y.shape[1])
        ridge = cls(x.shape[1], targets.shape[1:])
        ridge.load_state_dict({"weight": weight, "bias": bias, "alphas": alphas_by_target})
        return ridge


def _check_rows(x: np.ndarray, y: np.ndarray, groups: np.ndarray | None) -> None:
    """Refuse x (rows, voxels) and y (rows, targets) that do not match or are not finite."""
    if len(x) != len(y) or (groups is not None and len(groups) != len(x)):
        raise PerceptError(
            f"A ridge needs one row of voxels a target, but there are {len(x)} and {len(y)} (groups"
            " too must match): pass matching rows."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise PerceptError(
            "Voxels or targets for the ridge hold values that are not finite: clean or drop these"
            " rows first."
        )


def _split_into_folds(
    x: np.ndarray, y: np.ndarray, cv: int, groups: np.ndarray | None, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Shuffled folds over rows, or over groups of rows: (training rows, test rows) of each."""
    from sklearn.model_selection import GroupKFold, KFold

    independent = len(x) if groups is None else len(np.unique(groups))
    if independent < cv:
        raise PerceptError(
            f"{independent} independent rows do not make {cv} folds: give more, or lower cv."
        )
    splitter_class = KFold if groups is None else GroupKFold
    splitter = splitter_class(cv, shuffle=True, random_state=seed)
    return list(splitter.split(x, y, groups))


@contextmanager
def himalaya_backend(name: str) -> Iterator[None]:
    """Set himalaya's global backend, and set the former one back."""
    from himalaya.backend import get_backend, set_backend

    if name == "auto":
        name = "torch_cuda" if torch.cuda.is_available() else "torch"
    before = get_backend().name
    try:
        set_backend(name)
        yield
    finally:
        set_backend(before)


class TokenMap(Network):
    """Image tokens of one frozen model as another model would give them.

    A linear map of the class token, and another one that all patches share. The grid of patches is
    first resampled (bilinear) to that of the other model. The map is fitted on images alone: BLIP
    can then describe tokens of CLIP, true or predicted ones, without any brain data.

    Args:
        shape_in: (tokens, dim) of the input: the class token, then a square grid of patches row by
            row.
        shape_out: (tokens, dim) of the output.

    Raises:
        PerceptError: if the patches of either are no square.

    The state dict holds the two maps, `alphas` (class token, patches), the penalties that were
    chosen, and `r2`, the explained share of the variance on the images by which they were chosen.
    """

    alphas: Tensor
    r2: Tensor

    def __init__(self, shape_in: Sequence[int], shape_out: Sequence[int]):
        super().__init__()
        self.shape_in = tuple(shape_in)
        self.shape_out = tuple(shape_out)
        self.side_in = _grid_side(shape_in[0])
        self.side_out = _grid_side(shape_out[0])
        self.token = nn.Linear(shape_in[1], shape_out[1])
        self.patch = nn.Linear(shape_in[1], shape_out[1])
        self.register_buffer("alphas", torch.zeros(2))
        self.register_buffer("r2", torch.zeros(2))

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, dim) of the one model -> (batch, tokens, dim) of the other.

        Raises:
            PerceptError: for tokens of another shape.
        """
        if tokens.shape[1:] != self.shape_in:
            raise PerceptError(
                f"The map reads tokens (batch, {', '.join(map(str, self.shape_in))}) but was given"
                f" {tuple(tokens.shape)}: use those it was fitted on."
            )
        token, patches = self._split(tokens)
        return torch.cat([self.token(token), self.patch(patches)], dim=1)

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Class token (batch, 1, dim), and patches (batch, patches, dim) on the output's grid."""
        token, patches = tokens[:, :1], tokens[:, 1:]
        if self.side_in != self.side_out:
            grid = patches.transpose(1, 2).unflatten(2, (self.side_in, self.side_in))
            grid = F.interpolate(grid, (self.side_out, self.side_out), mode="bilinear")
            patches = grid.flatten(2).transpose(1, 2)
        return token, patches

    @classmethod
    @torch.no_grad()
    @exact_products()
    def fit(
        cls,
        source: Any,
        target: Any,
        image_ids: Sequence[int] | np.ndarray | None = None,
        alphas: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        validation_share: float = 0.1,
        seed: int = 0,
        batch_size: int = 64,
        device: str = "cpu",
    ) -> TokenMap:
        """Ridge regression in closed form, over all images and locations.

        One block of images is in memory at a time.

        Args:
            source: tokens to map from, (images, tokens, dim), or an object whose `rows(image_ids)`
                gives them (`src.data.TargetCache`).
            target: tokens to map to, likewise.
            image_ids: (images,) training images, none of them twice; needed where `rows` gives the
                tokens.
            alphas: candidate penalties, in units of the mean variance of the input tokens.
            validation_share: share of these images on which the penalty is chosen; the map is then
                fitted on all of them.
            seed: of that choice.
            batch_size: images in a block.
            device: torch device.

        Returns:
            The fitted module.

        Raises:
            PerceptError: if there are too few images, or their tokens are no class token and square
                grid, or not finite.

        Source: Hoerl & Kennard 1970.
        """
        ids = np.arange(len(source)) if image_ids is None else np.asarray(image_ids)
        count = round(validation_share * len(ids))
        if len(ids) < 10 or not 0 < count < len(ids):
            raise PerceptError(
                f"{len(ids)} images of which {count} are held out are too few to fit a map of"
                " tokens: give at least 10, and hold some of them out."
            )
        shape_in = _read_tokens(source, ids[:1]).shape[1:]
        shape_out = _read_tokens(target, ids[:1]).shape[1:]
        token_map = cls(shape_in, shape_out).to(device)
        shuffled = np.random.default_rng(seed).permutation(ids)
        validation, training = (
            token_map._sum_moments(source, target, _split_into_blocks(part, batch_size))
            for part in np.split(shuffled, [count])
        )
        for i, linear in enumerate((token_map.token, token_map.patch)):
            scores = [validation[i].compute_r2(*training[i].solve_ridge(alpha)) for alpha in alphas]
            best = int(np.argmax(scores))
            weight, bias = (training[i] + validation[i]).solve_ridge(alphas[best])
            linear.weight.copy_(weight.T)
            linear.bias.copy_(bias)
            token_map.alphas[i] = alphas[best]
            token_map.r2[i] = scores[best]
        return token_map.cpu().eval()

    def _sum_moments(
        self, source: Any, target: Any, blocks: Sequence[np.ndarray]
    ) -> tuple[_Moments, _Moments]:
        """Sums over blocks of images: of their class tokens, and of their patches."""
        token_moments, patch_moments = _Moments(), _Moments()
        device = self.alphas.device
        for block in progress(blocks, "fitting the map of tokens"):
            x = _read_tokens(source, block).to(device)
            y = _read_tokens(target, block).to(device)
            if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
                raise PerceptError(
                    "The tokens to map from or to hold values that are not finite: make them again."
                )
            token, patches = self._split(x)
            target_token, target_patches = y[:, :1], y[:, 1:]
            token_moments.add(token.flatten(0, 1), target_token.flatten(0, 1))
            patch_moments.add(patches.flatten(0, 1), target_patches.flatten(0, 1))
        return token_moments, patch_moments


def _grid_side(tokens: int) -> int:
    """Side of the square of patches behind a class token.

    Raises:
        PerceptError: if the patches are no square.
    """
    side = math.isqrt(max(0, tokens - 1))
    if side < 1 or side**2 + 1 != tokens:
        raise PerceptError(
            f"{tokens} tokens are not a class token and a square grid of patches: give the"
            " tokens of a vision transformer."
        )
    return side


def _split_into_blocks(ids: np.ndarray, size: int) -> list[np.ndarray]:
    """Parts of about the same length, of at most `size` each."""
    return np.array_split(ids, math.ceil(len(ids) / size))


def _read_tokens(tokens: Any, image_ids: np.ndarray) -> Tensor:
    """Tokens (images, tokens, dim) of some images, of an array or of a cache of targets."""
    rows = tokens.rows(image_ids) if hasattr(tokens, "rows") else tokens[image_ids]
    return torch.as_tensor(np.asarray(rows)).float()


class _Moments:
    """Sums over rows from which a ridge regression is solved and scored, in double precision.

    The sums are those of 1, x, y, xx', xy' and y^2.
    """

    def __init__(self, sums: Sequence[Any] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)):
        self.sums = list(sums)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x (rows, dim_in) and y (rows, dim_out)."""
        new_sums = (
            len(x),
            x.double().sum(0),
            y.double().sum(0),
            (x.T @ x).double(),
            (x.T @ y).double(),
            y.double().square().sum(),
        )
        pairs = zip(self.sums, new_sums, strict=True)
        self.sums = [old + new for old, new in pairs]

    def __add__(self, other: _Moments) -> _Moments:
        pairs = zip(self.sums, other.sums, strict=True)
        return _Moments([a + b for a, b in pairs])

    def solve_ridge(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Weight (dim_in, dim_out) and bias (dim_out,).

        The penalty `alpha` is in units of the mean variance of x.
        """
        n, x, y, xx, xy, _ = self.sums
        covariance = xx / n - torch.outer(x, x) / n**2
        identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
        penalty = alpha * covariance.diagonal().mean() * identity
        cross_covariance = xy / n - torch.outer(x, y) / n**2
        weight = torch.linalg.solve(covariance + penalty, cross_covariance)
        return weight, (y - x @ weight) / n

    def compute_r2(self, weight: Tensor, bias: Tensor) -> float:
        """Share of the variance of y that a map explains."""
        n, x, y, xx, xy, yy = self.sums
        cross = (weight * xy).sum() + bias @ y
        quadratic = (weight * (xx @ weight)).sum()
        square = quadratic + 2 * (x @ weight) @ bias + n * bias @ bias
        residual = yy - 2 * cross + square
        return float(1 - residual / (yy - y @ y / n))
