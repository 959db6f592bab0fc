"""The teacher: local embeddings for the contrastive loss of the low level."""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from src import pretrained
from src.losses import mixco_nce
from src.training import augment

from . import data
from .category_classifier import compute_accuracy
from .data import (
    ANSWERS,
    draw_indices,
    get_device,
    load_images,
    load_question_labels,
    normalize_images,
    to_pixels,
)
from .training import Options, load_averaged, train

TEACHER_CONFIG = {
    "dims": (16, 32, 64, 128),
    "depths": (1, 1, 2, 1),
    "maps": (96, 96, 512),
}
TEACHER_SIZE = 128  # pixels a side of its input: four by four locations


def prepare_teacher_input(x: Tensor) -> Tensor:
    """Images (batch, 3, 32, 32) in [0, 1] as the teacher reads them."""
    x = F.interpolate(x, (TEACHER_SIZE, TEACHER_SIZE), mode="bilinear", antialias=True)
    return normalize_images(x, pretrained.TEACHER_MEAN, pretrained.TEACHER_STD)


def score_linear_probe(
    features: Tensor, labels: Tensor, check_features: Tensor, check_labels: Tensor
) -> dict[str, float]:
    """Accuracy of a ridge classifier on features, by question.

    Args:
        features: (images, dim).
        labels: (images, 3): scene, category, colour.
        check_features: (held-out images, dim).
        check_labels: (held-out images, 3).
    """
    mean, std = features.mean(0), features.std(0) + 1e-6
    x, check_x = ((f - mean) / std for f in (features, check_features))
    columns = zip(labels.T, ANSWERS.values(), strict=True)
    one_hot = [F.one_hot(column, len(answers)) for column, answers in columns]
    targets = torch.cat(one_hot, 1).float()
    regularized = x.T @ x + 10 * torch.eye(x.shape[1])
    weights = torch.linalg.solve(regularized, x.T @ targets)
    return compute_accuracy(check_x @ weights, check_labels)


def build_teacher() -> nn.Module:
    """An untrained teacher."""
    return pretrained.ConvNeXtMaps(**TEACHER_CONFIG)


def train_teacher(options: Options, rank: int = 0) -> None:
    """Train to find each place again in a second view, among all places of all images of a batch.

    The views differ in light, sharpness and noise alone. Simpler than VICRegL and its crops;
    without negatives from the same image the embeddings of the places of an image became the same.
    """
    images, check_pixels = load_images("train"), to_pixels(load_images("check"))
    labels, check_labels = load_question_labels("train"), load_question_labels("check")
    teacher = build_teacher().to(get_device())

    def embed_view(x: Tensor) -> Tensor:
        inputs = prepare_teacher_input(augment.jitter_images(x)).to(get_device())
        maps = teacher(inputs).flatten(0, 1).float()
        return F.normalize(maps, dim=-1)

    def compute_loss(rng: np.random.Generator, batch_size: int) -> Tensor:
        x = to_pixels(images[draw_indices(rng, len(images), batch_size)])
        first, second = embed_view(x), embed_view(x)
        return mixco_nce(first, second, temp=0.1)

    def compute_features(model: nn.Module, x: Tensor) -> Tensor:
        parts = []
        for part in x.split(250):
            maps = model(prepare_teacher_input(part).to(get_device()))
            grid = maps.unflatten(1, (2, 2, 2, 2))
            quarters = grid.mean((2, 4))
            parts.append(quarters.flatten(1).cpu())
        return torch.cat(parts)

    def evaluate(model: nn.Module) -> dict[str, float]:
        features = compute_features(model, to_pixels(images[:4000]))
        check_features = compute_features(model, check_pixels)
        return score_linear_probe(features, labels[:4000], check_features, check_labels)

    train("teacher", teacher, compute_loss, evaluate, options, lr=1e-3, batch_size=48, rank=rank)


def export_teacher() -> None:
    """Write the teacher as `pretrained.Teacher` reads it."""
    folder = data.OUT / "teacher"
    folder.mkdir(exist_ok=True)
    state = load_averaged("teacher", build_teacher()).half().state_dict()
    save_file(state, folder / "model.safetensors")
    config = TEACHER_CONFIG | {"image_size": TEACHER_SIZE}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
