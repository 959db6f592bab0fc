"""Linear maps: ridge regression, maps between token spaces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from himalaya.backend import get_backend, set_backend
from himalaya.ridge import RidgeCV
from sklearn.model_selection import GroupKFold, KFold
from torch import Tensor, nn

from src.networks.base import Network
from src.utils import PerceptError, progress


class CaptionConverter(Network):
    """Tokens of one image encoder as those of another: one linear map along the tokens, then one
    along the features.

    Args:
        tokens_in: tokens that are given.
        tokens_out: tokens that are wanted.
        dim_in: dim of a token that is given.
        dim_out: dim of a token that is wanted.

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
        return self.linear2(self.linear1(x.transpose(1, 2)).transpose(1, 2))


ALPHAS = tuple(float(alpha) for alpha in np.logspace(1, 6, 11))


class RidgeBaseline(Network):
    """One linear map from voxels to targets of any shape, with a penalty a target chosen by
    cross-validation.

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
        x, y = (
            np.asarray(voxels, np.float32),
            np.asarray(targets, np.float32).reshape(len(targets), -1),
        )  # (images, voxels), (images, targets)
        splits = _folds(x, y, cv, groups, seed)
        batches = {
            "n_targets_batch": chunk,
            "n_targets_batch_refit": chunk,
            "n_alphas_batch": 1,
            "warn": False,
        }  # as quick, with half the memory
        with _himalaya_backend(backend):
            solver = RidgeCV(
                alphas=np.asarray(alphas, np.float32),
                cv=splits,
                fit_intercept=True,
                solver_params=batches,
            )
            solver.fit(x, y)
            weight, bias, best = (
                torch.as_tensor(value).float().cpu()
                for value in (solver.coef_, solver.intercept_, solver.best_alphas_)
            )
        made = cls(x.shape[1], targets.shape[1:])
        made.load_state_dict({"weight": weight, "bias": bias, "alphas": best.expand(y.shape[1])})
        return made


def _folds(
    x: np.ndarray, y: np.ndarray, cv: int, groups: np.ndarray | None, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Shuffled folds over rows, or over groups of rows; x (rows, voxels) and y (rows, targets) are
    checked on the way.
    """
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
    independent = len(x) if groups is None else len(np.unique(groups))
    if independent < cv:
        raise PerceptError(
            f"{independent} independent rows do not make {cv} folds: give more, or lower cv."
        )
    splitter = (
        KFold(cv, shuffle=True, random_state=seed)
        if groups is None
        else GroupKFold(cv, shuffle=True, random_state=seed)
    )
    return list(splitter.split(x, y, groups))


@contextmanager
def _himalaya_backend(name: str) -> Iterator[None]:
    """Set himalaya's global backend, and set the former one back."""
    if name == "auto":
        name = "torch_cuda" if torch.cuda.is_available() else "torch"
    before = get_backend().name
    try:
        set_backend(name)
        yield
    finally:
        set_backend(before)


class TokenMap(Network):
    """Image tokens of one frozen model as another model would give them: a linear map of the class
    token, and one that all patches share.

    The grid of patches is resampled (bilinear) to that of the other model. Fitted on images alone:
    no brain data are needed to say with BLIP what tokens of CLIP show, true or predicted ones.

    Args:
        shape_in: (tokens, dim) of the tokens that are given: the class token, then a square grid of
            patches row by row.
        shape_out: (tokens, dim) of those that are wanted.

    Raises:
        PerceptError: if the patches of either are no square.

    The state dict holds the two maps, `alphas` (class token, patches), the penalties that were
    chosen, and `r2`, the explained share of the variance on the images by which they were chosen.
    """

    alphas: Tensor
    r2: Tensor

    def __init__(self, shape_in: Sequence[int], shape_out: Sequence[int]):
        super().__init__()
        self.shape_in, self.shape_out = tuple(shape_in), tuple(shape_out)
        self.sides = tuple(math.isqrt(max(0, tokens - 1)) for tokens in (shape_in[0], shape_out[0]))
        for side, (tokens, _) in zip(self.sides, (self.shape_in, self.shape_out), strict=True):
            if side < 1 or side**2 + 1 != tokens:
                raise PerceptError(
                    f"{tokens} tokens are not a class token and a square grid of patches: give the"
                    " tokens of a vision transformer."
                )
        self.token, self.patch = (nn.Linear(shape_in[1], shape_out[1]) for _ in range(2))
        self.register_buffer("alphas", torch.zeros(2))
        self.register_buffer("r2", torch.zeros(2))

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, dim) of the one model -> (batch, tokens, dim) of the other."""
        if tokens.shape[1:] != self.shape_in:
            raise PerceptError(
                f"The map reads tokens (batch, {', '.join(map(str, self.shape_in))}) but was given"
                f" {tuple(tokens.shape)}: use those it was fitted on."
            )
        token, patches = self._parts(tokens)
        return torch.cat([self.token(token), self.patch(patches)], dim=1)

    def _parts(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens (batch, tokens, dim) the class token (batch, 1, dim), and the patches on the
        grid that is wanted (batch, patches, dim).
        """
        token, patches = tokens[:, :1], tokens[:, 1:]
        here, there = self.sides
        if here != there:
            grid = patches.transpose(1, 2).unflatten(2, (here, here))  # (batch, dim, h, w)
            patches = (
                F.interpolate(grid, (there, there), mode="bilinear").flatten(2).transpose(1, 2)
            )
        return token, patches

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        source: Any,
        target: Any,
        image_ids: Sequence[int] | np.ndarray | None = None,
        alphas: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        held_out: float = 0.1,
        seed: int = 0,
        batch_size: int = 64,
        device: str = "cpu",
    ) -> TokenMap:
        """Ridge regression in closed form, over all images and places; a block of images is in
        memory at a time.

        Args:
            source: tokens to map from, (images, tokens, dim), or an object whose `rows(image_ids)`
                gives them (`data.TargetCache`).
            target: tokens to map to, likewise.
            image_ids: (images,) training images, none of them twice; needed where `rows` gives the
                tokens.
            alphas: candidate penalties, in units of the mean variance of the tokens that are given.
            held_out: share of these images on which the penalty is chosen; then it is fitted on all
                of them.
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
        count = round(held_out * len(ids))
        if len(ids) < 10 or not 0 < count < len(ids):
            raise PerceptError(
                f"{len(ids)} images of which {count} are held out are too few to fit a map of"
                " tokens: give at least 10, and hold some of them out."
            )
        first, wanted = (_token_rows(tokens, ids[:1]) for tokens in (source, target))
        made = cls(first.shape[1:], wanted.shape[1:]).to(device)
        sums = [
            made._moments(source, target, np.array_split(part, math.ceil(len(part) / batch_size)))
            for part in np.split(np.random.default_rng(seed).permutation(ids), [count])
        ]
        for i, (linear, held, rest) in enumerate(zip((made.token, made.patch), *sums, strict=True)):
            scores = [held.r2(*rest.ridge(alpha)) for alpha in alphas]
            best = int(np.argmax(scores))
            weight, bias = (rest + held).ridge(alphas[best])
            linear.weight.copy_(weight.T)
            linear.bias.copy_(bias)
            made.alphas[i], made.r2[i] = alphas[best], scores[best]
        return made.cpu().eval()

    def _moments(
        self, source: Any, target: Any, blocks: Sequence[np.ndarray]
    ) -> tuple[_Moments, _Moments]:
        """Sums over blocks of images: of their class tokens, and of their patches."""
        of_token, of_patches = _Moments(), _Moments()
        for block in progress(blocks, "fitting the map of tokens"):
            x, y = (
                _token_rows(tokens, block).to(self.alphas.device) for tokens in (source, target)
            )
            if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
                raise PerceptError(
                    "The tokens to map from or to hold values that are not finite: make them again."
                )
            token, patches = self._parts(x)
            of_token.add(token.flatten(0, 1), y[:, :1].flatten(0, 1))
            of_patches.add(patches.flatten(0, 1), y[:, 1:].flatten(0, 1))
        return of_token, of_patches


def _token_rows(tokens: Any, image_ids: np.ndarray) -> Tensor:
    """Tokens (images, tokens, dim) of some images, from an array or from what gives rows by image."""
    return torch.as_tensor(
        np.asarray(tokens.rows(image_ids) if hasattr(tokens, "rows") else tokens[image_ids])
    ).float()


class _Moments:
    """Sums over rows from which a ridge regression is solved and scored: of 1, x, y, xx', xy' and
    y^2, in double precision.
    """

    def __init__(self, parts: Sequence[Any] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)):
        self.parts = list(parts)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x (rows, dim_in) and y (rows, dim_out)."""
        new = (
            len(x),
            x.double().sum(0),
            y.double().sum(0),
            (x.T @ x).double(),
            (x.T @ y).double(),
            y.double().square().sum(),
        )
        self.parts = [old + more for old, more in zip(self.parts, new, strict=True)]

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments([a + b for a, b in zip(self.parts, other.parts, strict=True)])

    def ridge(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Weight (dim_in, dim_out) and bias (dim_out,), the penalty being in units of the mean
        variance of x.
        """
        n, x, y, xx, xy, _ = self.parts
        centred = xx / n - torch.outer(x, x) / n**2
        penalty = (
            alpha * centred.diagonal().mean() * torch.eye(len(x), dtype=x.dtype, device=x.device)
        )
        weight = torch.linalg.solve(centred + penalty, xy / n - torch.outer(x, y) / n**2)
        return weight, (y - x @ weight) / n

    def r2(self, weight: Tensor, bias: Tensor) -> float:
        """Share of the variance of y that a map explains."""
        n, x, y, xx, xy, yy = self.parts
        cross = (weight * xy).sum() + bias @ y
        square = (weight * (xx @ weight)).sum() + 2 * (x @ weight) @ bias + n * bias @ bias
        return float(1 - (yy - 2 * cross + square) / (yy - y @ y / n))
