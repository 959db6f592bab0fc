"""Principal components of targets: what a decoder predicts in place of every single number.

Tokens and latents of images vary along few directions: on the mini world 400 of 2,176 hold 97 % of
the variance of the tokens. A decoder that predicts these components has fewer outputs, and none
that are noise alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from src.utils import PerceptError, progress

BLOCK_NUMBERS = 2**24  # numbers read at once, 64 MB in single precision

IMAGES_AT_ONCE = 256

EXACT_DIM = 4096  # up to this many numbers a target the covariance itself is decomposed

OVERSAMPLING = 50  # further directions of the randomised algorithm, which make the last ones exact


class TargetRows(Protocol):
    """Targets that are looked up by image id: `TargetCache`, `LatentFile`."""

    def rows(self, image_ids: np.ndarray) -> np.ndarray:
        """Targets (n, ...) by image id."""


@dataclass(frozen=True)
class TargetSet:
    """Targets of some images.

    Attributes:
        source: where they are looked up.
        image_ids: (images,).
    """

    source: TargetRows
    image_ids: np.ndarray


@dataclass(frozen=True)
class TargetBasis:
    """Mean and principal components of targets.

    Attributes:
        mean: float32 (numbers,), of the training images.
        components: float32 (components, numbers), orthonormal, that of the largest variance first.
        variances: float64 (components,), mean squares of the components over all images.
        total_variance: of all numbers together, over the same images.
    """

    mean: Tensor
    components: Tensor
    variances: Tensor
    total_variance: float

    @property
    def explained(self) -> float:
        """Share of the variance that the components hold."""
        return float(self.variances.sum() / self.total_variance)

    def encode(self, targets: Tensor) -> Tensor:
        """Targets (n, ...) -> components (n, components)."""
        return (targets.flatten(1).float() - self.mean) @ self.components.T


def fit_target_basis(
    training: TargetSet,
    further: Sequence[TargetSet] = (),
    n_components: int = 400,
    iterations: int = 4,
    seed: int = 0,
    device: str = "cpu",
) -> TargetBasis:
    """Principal components of the targets of training images and of others, about the mean of the
    training images.

    Targets are read block by block: besides a block, memory holds the components alone. Of targets
    with many numbers they are found by randomised subspace iteration, which reads all targets
    `iterations` + 2 times: 257 x 768 tokens have a covariance of 156 GB.

    Args:
        training: whose mean is subtracted.
        further: other images, that widen the directions that are found.
        n_components: that are kept, at most as many as images or numbers allow.
        iterations: of the randomised algorithm.
        seed: of its start.
        device: torch device of the products.

    Raises:
        PerceptError: for fewer than two training images, or targets that are all alike.

    Source: Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.3.
    """
    if len(training.image_ids) < 2 or n_components < 1:
        raise PerceptError(
            f"{n_components} components of the targets of {len(training.image_ids)} images were"
            " asked for: give at least 2 images, and keep at least 1 component."
        )
    sets = [training, *further]
    mean = compute_target_mean(training, device)
    n_images = sum(len(part.image_ids) for part in sets)
    count = min(n_components, len(mean), n_images - 1)
    if len(mean) <= EXACT_DIM:
        values, vectors, total = _decompose_exactly(sets, mean, device)
    else:
        width = min(count + OVERSAMPLING, len(mean))
        start = torch.randn(len(mean), width, generator=torch.Generator().manual_seed(seed))
        values, vectors, total = _decompose_randomly(sets, mean, start.to(device), iterations)
    if not total > 0:
        raise PerceptError("The targets of all images are the same: there is nothing to decode.")
    is_used = values[:count] > 1e-9 * values[0]  # of targets that vary in fewer directions, those
    components = vectors[:, :count][:, is_used].T
    return TargetBasis(
        mean.float().cpu(),
        components.float().cpu().contiguous(),
        values[:count][is_used].double().cpu() / n_images,
        float(total) / n_images,
    )


def encode_rows(
    encode: Callable[..., Tensor], sources: Sequence[TargetRows], image_ids: np.ndarray
) -> np.ndarray:
    """Components of the targets of images, block by block.

    Args:
        encode: targets of each source (n, ...) -> components (n, outputs); those of
            `PerceptDecoder.encode_targets`.
        sources: of the targets, in the order in which `encode` takes them.
        image_ids: (images,), of which some may be the same.

    Returns:
        float32 (images, outputs).
    """
    unique, rows = np.unique(image_ids, return_inverse=True)
    blocks = []
    for start in range(0, len(unique), IMAGES_AT_ONCE):
        ids = unique[start : start + IMAGES_AT_ONCE]
        targets = [torch.from_numpy(np.asarray(source.rows(ids))).float() for source in sources]
        blocks.append(encode(*targets).cpu().numpy())
    components: np.ndarray = np.concatenate(blocks)[rows]
    return components


def compute_target_mean(targets: TargetSet, device: str = "cpu") -> Tensor:
    """Mean target, float64 (numbers,)."""
    total: Tensor | None = None
    for block in iterate_targets([targets], device):
        part = block.sum(0, dtype=torch.float64)
        total = part if total is None else total + part
    assert total is not None
    return total / len(targets.image_ids)


def iterate_targets(
    sets: Sequence[TargetSet], device: str | torch.device = "cpu", what: str = ""
) -> Iterator[Tensor]:
    """Targets of several sets of images, block by block, float32 (images, numbers).

    Args:
        sets: in order.
        device: where the blocks go.
        what: name of a progress bar, "" for none.
    """
    blocks: list[TargetSet] = []
    for part in sets:
        numbers = max(1, part.source.rows(part.image_ids[:1]).size)
        size = max(1, BLOCK_NUMBERS // numbers)
        for start in range(0, len(part.image_ids), size):
            blocks.append(TargetSet(part.source, part.image_ids[start : start + size]))
    for block in progress(blocks, what) if what else blocks:
        rows = block.source.rows(block.image_ids)
        yield torch.from_numpy(np.ascontiguousarray(rows)).to(device).float().flatten(1)


def _decompose_exactly(
    sets: Sequence[TargetSet], mean: Tensor, device: str
) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues, descending, and eigenvectors (numbers, numbers) of the sum of products of
    centred targets, and its trace.
    """
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=device)
    for block in iterate_targets(sets, device, "components of targets"):
        centred = block - mean.float()
        products += centred.T @ centred
    values, vectors = torch.linalg.eigh(products)
    return values.flip(0), vectors.flip(1), float(products.diagonal().sum())


def _decompose_randomly(
    sets: Sequence[TargetSet], mean: Tensor, start: Tensor, iterations: int
) -> tuple[Tensor, Tensor, float]:
    """The largest eigenvalues and their vectors (numbers, width), as `_decompose_exactly`, by
    iterating products of centred targets with `start` (numbers, width).
    """
    directions = torch.linalg.qr(start)[0]
    for number in range(iterations + 1):
        product, total = torch.zeros_like(directions), 0.0
        for block in iterate_targets(sets, directions.device, f"components, pass {number + 1}"):
            centred = block - mean.float()
            product += centred.T @ (centred @ directions)
            total += float(centred.square().sum(dtype=torch.float64))
        if number < iterations:
            directions = torch.linalg.qr(product)[0]
    small = (directions.T @ product).double()  # (width, width)
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    return values.flip(0), directions @ rotation.flip(1).float(), total
