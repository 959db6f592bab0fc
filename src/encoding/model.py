"""Encoding models: from named feature spaces of an image to its voxels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src.encoding.features import FeatureSpace
from src.encoding.readouts import READOUTS, check_readout
from src.utils import PerceptError

BATCH = 4096  # images at once

PCA_IMAGES = 3000  # images, drawn by seed, of which components are found; this bounds the memory


class FeatureProjection(nn.Module):
    """Principal components of one feature space, as (features - mean) @ components.

    Each feature is centred and, if asked, divided by its standard deviation; the components are
    divided by one number, so that their mean squared length over the training images is 1. So
    spaces of any size and unit weigh the same in a ridge with one penalty. Responses take no part.

    Args:
        n_features: of the space.
        n_components: that are kept.
    """

    mean: Tensor
    components: Tensor

    def __init__(self, n_features: int, n_components: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("components", torch.zeros(n_features, n_components))

    def forward(self, features: Tensor) -> Tensor:
        """Features (n, ...) -> components (n, n_components)."""
        return (features.flatten(1).float() - self.mean) @ self.components

    @classmethod
    def fit(cls, features: Any, space: FeatureSpace, seed: int = 0) -> FeatureProjection:
        """Fit to the features (n, ...) of training images.

        Raises:
            PerceptError: if all images have the same features.
        """
        rows = np.asarray(features).reshape(len(features), -1)
        mean = rows.mean(0, dtype=np.float64).astype(np.float32)
        spread = _compute_spread(rows, mean)
        if not spread.any():
            raise PerceptError(
                "A feature space is the same for all images, so that nothing can be predicted from"
                " it: leave it out."
            )
        divisor = np.ones_like(spread)
        if space.standardise:
            divisor = np.where(spread > 1e-6 * spread.max(), spread, np.inf)
        order = np.random.default_rng(seed).permutation(len(rows))
        chosen = np.sort(order[:PCA_IMAGES])
        axes = _find_principal_axes((rows[chosen] - mean) / divisor, space.n_components, seed)
        projection = cls(*axes.shape)
        projection.mean.copy_(torch.from_numpy(mean))
        projection.components.copy_(torch.from_numpy(axes / divisor[:, None]))
        projection.components /= projection.project(rows).square().sum(1).mean().sqrt()
        return projection

    @torch.no_grad()
    def project(self, features: Any) -> Tensor:
        """Components (n, n_components) of an array of features (n, ...), a block at a time."""
        blocks = []
        for start in range(0, len(features), PCA_IMAGES):
            block = np.asarray(features[start : start + PCA_IMAGES], np.float32)
            blocks.append(self(torch.from_numpy(block)))
        return torch.cat(blocks)


def _compute_spread(rows: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Standard deviation (features,) about a mean, float32."""
    squares = np.zeros(rows.shape[1])
    for start in range(0, len(rows), PCA_IMAGES):
        squares += ((rows[start : start + PCA_IMAGES] - mean) ** 2).sum(0)
    spread: np.ndarray = np.sqrt(squares / len(rows)).astype(np.float32)
    return spread


def _find_principal_axes(centred: np.ndarray, n_components: int, seed: int) -> np.ndarray:
    """Principal axes (features, components) of centred rows; 0 for all that carry variance.

    A few of many are found by a randomised algorithm (Halko et al. 2011).
    """
    from sklearn.decomposition import PCA

    highest = min(len(centred) - 1, centred.shape[1])
    count = min(n_components or highest, highest)
    options: dict[str, Any] = {"svd_solver": "full"}
    if 0 < count < 0.5 * highest:
        # without normalisation two iterations lose more to rounding than they gain
        options = {"svd_solver": "randomized", "iterated_power": 1}
    pca = PCA(count, random_state=seed, **options).fit(centred.astype(np.float32))
    is_used = pca.explained_variance_ > 1e-7 * pca.explained_variance_[0]
    axes: np.ndarray = pca.components_[is_used].T
    return axes


class EncodingModel(nn.Module):
    """Predicts voxels from the features of images.

    Args:
        spaces: by name [features, components] of each feature space, in order.
        n_voxels: voxels that are predicted.
        readout: kind of the map from components to voxels, a key of READOUTS.
        options: further arguments of the readout.

    Attributes:
        config: these arguments, of which `build_encoding_model` makes the same model.
    """

    def __init__(
        self,
        spaces: Mapping[str, Sequence[int]],
        n_voxels: int,
        readout: str = "linear",
        options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        check_readout(readout)
        sizes = {name: [int(size) for size in pair] for name, pair in spaces.items()}
        self.config: dict[str, Any] = {
            "spaces": sizes,
            "n_voxels": int(n_voxels),
            "readout": readout,
            "options": dict(options or {}),
        }
        self.projections = nn.ModuleList(FeatureProjection(*pair) for pair in sizes.values())
        n_components = sum(components for _, components in sizes.values())
        self.readout = READOUTS[readout](n_components, n_voxels, **(options or {}))

    @property
    def spaces(self) -> list[str]:
        """Names of the feature spaces that `predict` needs."""
        return list(self.config["spaces"])

    @property
    def n_voxels(self) -> int:
        """Voxels that are predicted."""
        return int(self.config["n_voxels"])

    def get_projection(self, name: str) -> FeatureProjection:
        """The principal components of one of `spaces`."""
        projection = self.projections[self.spaces.index(name)]
        assert isinstance(projection, FeatureProjection)
        return projection

    def project(self, features: Mapping[str, Any]) -> Tensor:
        """Components of all spaces side by side, float32 (n, components).

        Args:
            features: by name (n, ...), arrays or tensors; more spaces than needed may be given.

        Raises:
            PerceptError: if a space is missing or has another number of features.
        """
        parts = []
        for name in self.spaces:
            projection = self.get_projection(name)
            if name not in features:
                raise PerceptError(
                    f"The encoding model needs the feature space '{name}' and was given"
                    f" {', '.join(features) or 'none'}: compute it too (compute_features)."
                )
            rows = torch.as_tensor(features[name])
            rows = rows.reshape(len(rows), -1)
            expected = len(projection.mean)
            if rows.shape[1] != expected:
                raise PerceptError(
                    f"The feature space '{name}' has {rows.shape[1]} features and the encoding"
                    f" model was fitted with {expected}: compute it as it was in notebook"
                    " 01_train_encoder."
                )
            parts.append(projection(rows.to(projection.mean.device)))
        return torch.cat(parts, 1)

    def forward(self, features: Mapping[str, Any]) -> Tensor:
        """As `predict`, for all images at once and with gradients."""
        return self.readout(self.project(features))

    @torch.no_grad()
    def predict(self, features: Mapping[str, Any]) -> Tensor:
        """Predict the mean response to images.

        Args:
            features: of `compute_features`: by name (n, ...), arrays or tensors.

        Returns:
            float32 (n, voxels), in the units of the z-scored voxels that the model was fitted to,
            on the device of the model.

        Raises:
            PerceptError: as `project`.
        """
        names = self.spaces
        missing = [name for name in names if name not in features]
        if missing or len({len(features[name]) for name in names}) != 1:
            return self(features)  # says what is wrong
        count = len(features[names[0]])
        blocks = []
        for start in range(0, count, BATCH):
            block = {name: features[name][start : start + BATCH] for name in names}
            blocks.append(self(block))
        return torch.cat(blocks)


def build_encoding_model(config: Mapping[str, Any]) -> EncodingModel:
    """The model, not yet fitted, that `EncodingModel.config` describes."""
    return EncodingModel(**config)
