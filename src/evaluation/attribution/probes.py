"""Linear probes that name labels from tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA

from src.evaluation.attribution.importance import Score
from src.networks.linear import RidgeBaseline
from src.utils import PerceptError

COMPONENTS = 256

PENALTIES = tuple(float(alpha) for alpha in np.logspace(0, 6, 13))

Probe = Callable[[Any], np.ndarray]  # tokens (n, ...) -> names (n,)


def fit_probes(
    tokens: Any, labels: Mapping[str, Any], cv: int = 5, seed: int = 42
) -> dict[str, Probe]:
    """Linear probes that name labels from tokens, fitted on true tokens of training images.

    Least squares on indicators of the labels from the first principal components of the tokens,
    which are scaled to unit length first; the penalty is chosen by cross-validation within these
    images.

    Args:
        tokens: (images, ...) of training images.
        labels: by column of the labels (images,) of these.
        cv: folds.
        seed: of these, and of the search for components.

    Returns:
        By column a function from tokens (n, ...) to names (n,).

    Raises:
        PerceptError: for a column with one label only.
    """
    x = _scale_tokens(tokens)
    n_components = min(COMPONENTS, *x.shape)
    pca = PCA(n_components, svd_solver="randomized", random_state=seed).fit(x)
    components = pca.transform(x)

    def fit_probe(column: str, values: Any) -> Probe:
        names, codes = np.unique(np.asarray(values).astype(str), return_inverse=True)
        if len(names) < 2:
            raise PerceptError(
                f"A probe needs at least two labels, and the training images have {len(names)} in"
                f" the column {column}: leave it out."
            )
        indicators = np.eye(len(names), dtype=np.float32)[codes]
        ridge = RidgeBaseline.fit(components, indicators, alphas=PENALTIES, cv=cv, seed=seed)

        def name_labels(tokens: Any) -> np.ndarray:
            features = torch.from_numpy(pca.transform(_scale_tokens(tokens)))
            return names[ridge(features).detach().numpy().argmax(1)]

        return name_labels

    return {column: fit_probe(column, values) for column, values in labels.items()}


def _scale_tokens(tokens: Any) -> np.ndarray:
    """Tokens (n, ...) flat, of length sqrt(features), so that a feature is about 1; float32."""
    flat = torch.as_tensor(tokens).detach().cpu().float().flatten(1)
    unit = F.normalize(flat, dim=1)
    return (unit * unit.shape[1] ** 0.5).numpy()


def naming_score(probe: Probe, labels: Any) -> Score:
    """The score of a probe: for each image 1 if its own label is named, else 0."""
    truth = np.asarray(labels).astype(str)

    def score(predictions: Any) -> np.ndarray:
        return (probe(predictions) == truth).astype(float)

    return score
