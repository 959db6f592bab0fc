"""The classifier that judges results: scene, category and colour of the main object of an image."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from src.pretrained import prepare_classifier_input

from .data import (
    ANSWERS,
    compute_share,
    draw_indices,
    draw_per_image,
    get_device,
    load_images,
    load_question_labels,
    to_pixels,
)
from .training import Options, train

ANSWER_COUNTS = [len(answers) for answers in ANSWERS.values()]


def build_classifier() -> ResNetForImageClassification:
    """One network with the logits of three questions side by side: scene, category and colour."""
    names = []
    for question, answers in ANSWERS.items():
        names += [f"{question}: {answer}" for answer in answers]
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[2, 2, 2],
        layer_type="basic",
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    return ResNetForImageClassification(config)


def compute_accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of images whose answer is right, by question.

    Args:
        logits: (images, answers of all questions).
        labels: (images, 3 or more) as indices: scene, category, colour.
    """
    accuracy = {}
    parts = logits.cpu().split(ANSWER_COUNTS, dim=1)
    for i, (question, part) in enumerate(zip(ANSWERS, parts, strict=True)):
        hits = part.argmax(1) == labels[:, i]
        accuracy[question] = round(compute_share(hits), 4)
    return accuracy


def compute_answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with label smoothing, summed over the questions; arguments as above."""
    pairs = zip(logits.float().split(ANSWER_COUNTS, dim=1), labels.T, strict=True)
    return sum(F.cross_entropy(part, column, label_smoothing=0.05) for part, column in pairs)


def augment_images(x: Tensor) -> Tensor:
    """Shift, blur and tint images and add noise.

    So the classifier looks at what an image shows and not at how cleanly it is painted.

    Args:
        x: (batch, 3, height, width) in [0, 1].
    """
    n = len(x)
    transform = torch.eye(2, 3).repeat(n, 1, 1)
    zoom = torch.empty(n, 1, 1).uniform_(0.92, 1.08)
    transform[:, :, :2] *= zoom
    transform[:, :, 2] = torch.empty(n, 2).uniform_(-0.1, 0.1)
    grid = F.affine_grid(transform, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    blurred = F.avg_pool2d(padded, 3, stride=1)
    x = torch.lerp(x, blurred, torch.rand(n, 1, 1, 1))
    tint = draw_per_image(n, 0.94, 1.06, channels=3)
    brightness = draw_per_image(n, -0.04, 0.04)
    x = x * tint + brightness
    noise = 0.05 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)
    return (x + noise).clamp(0, 1)


def train_classifier(options: Options, rank: int = 0) -> None:
    """Train on images of all combinations, in their natural shares."""
    images, check_pixels = load_images("judge"), to_pixels(load_images("judge_check"))
    labels, check_labels = load_question_labels("judge"), load_question_labels("judge_check")
    classifier = build_classifier().to(get_device())

    def compute_loss(rng: np.random.Generator, batch_size: int) -> Tensor:
        index = draw_indices(rng, len(images), batch_size)
        inputs = prepare_classifier_input(augment_images(to_pixels(images[index])))
        logits = classifier(inputs.to(get_device())).logits
        return compute_answer_loss(logits, labels[index].to(get_device()))

    def evaluate(model: nn.Module) -> dict[str, float]:
        logits = []
        for part in check_pixels.split(250):
            logits.append(model(prepare_classifier_input(part).to(get_device())).logits.cpu())
        return compute_accuracy(torch.cat(logits), check_labels)

    train("judge", classifier, compute_loss, evaluate, options, lr=2e-3, batch_size=128, rank=rank)
