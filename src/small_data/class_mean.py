"""The mean image of the class that is decoded: what knowing the label alone is worth."""

from __future__ import annotations

from collections import Counter

import numpy as np
from sklearn.linear_model import LogisticRegression

from src.small_data.examples import Examples
from src.small_data.folds import Fold

INVERSE_PENALTY = 1e-3  # of the classifier


def are_classes(labels: np.ndarray | None) -> bool:
    """Whether labels (images,) are classes: two or more, of two images or more on average."""
    if labels is None:
        return False
    counts = Counter(labels.tolist())
    return 2 <= len(counts) <= len(labels) / 2


def predict_class_mean(examples: Examples, fold: Fold, labels: np.ndarray) -> np.ndarray:
    """Mean target of the class that a classifier decodes from the brain.

    Args:
        examples: all images.
        fold: rows of the training and of the test images.
        labels: (images,) the class of each image.

    Returns:
        (test images, targets).
    """
    train, test = fold
    classes = np.unique(labels[train])
    targets = examples.targets[train]
    decoded = np.full(len(test), classes[0])
    if len(classes) > 1:
        features, test_features = _rotate(examples.voxels[train], examples.voxels[test])
        classifier = LogisticRegression(C=INVERSE_PENALTY, max_iter=500)
        decoded = classifier.fit(features, labels[train]).predict(test_features)
    means = {label: targets[labels[train] == label].mean(0) for label in classes}
    return np.stack([means[label] for label in decoded])


def _rotate(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z-scored voxels (images, voxels) in as many dimensions as there are training images.

    The training images span these, so a penalised linear classifier says the same of them.
    """
    mean, sd = train.mean(0), train.std(0)
    sd[sd <= 1e-6 * np.abs(mean)] = np.inf
    scaled, test_scaled = (train - mean) / sd, (test - mean) / sd
    if scaled.shape[1] <= scaled.shape[0]:
        return scaled, test_scaled
    variances, axes = np.linalg.eigh((scaled @ scaled.T).astype(np.float64))
    is_used = variances > 1e-6 * variances[-1]
    axes = axes[:, is_used] / np.sqrt(variances[is_used])  # (training images, dimensions)
    return scaled @ (scaled.T @ axes), test_scaled @ (scaled.T @ axes)
