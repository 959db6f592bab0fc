"""The frozen classifier of what an image of the mini world shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src.pretrained.base import freeze, load_frozen, locate_model


def prepare_classifier_input(images: Tensor) -> Tensor:
    """Images (batch, 3, 32, 32) in [0, 1] as the classifier takes them: 64 pixels a side, [-1, 1].

    It was trained on images that were prepared in the same way.
    """
    return 2 * F.interpolate(images, (64, 64), mode="bilinear") - 1


class CategoryClassifier:
    """Names scene, kind and colour of the main object in an image of the mini world.

    It was trained on images of its own. Nothing was ever trained towards it or conditioned on it,
    so its answers on reconstructions are independent. It exists for the mini world alone:
    photographs have no such small set of categories.

    Args:
        weights: "mini" or a folder that holds `judge/`.
        device: torch device.

    Attributes:
        categories: the possible answers to each question ("scene", "kind", "colour"), in the order
            of the logits.
    """

    def __init__(self, weights: str = "mini", device: str = "cpu"):
        from transformers import ResNetForImageClassification

        self.device = torch.device(device)
        model = load_frozen(ResNetForImageClassification, locate_model("judge", weights))
        self.model: Any = freeze(model.float(), self.device)
        self.categories: dict[str, list[str]] = {}
        for i in range(self.model.config.num_labels):
            question, category = self.model.config.id2label[i].split(": ")
            self.categories.setdefault(question, []).append(category)

    @property
    def chance_accuracy(self) -> dict[str, float]:
        """Share of right answers by guessing, for each question."""
        return {question: 1 / len(names) for question, names in self.categories.items()}

    @torch.no_grad()
    def classify(self, images: Tensor, batch_size: int = 250) -> dict[str, np.ndarray]:
        """Answer each question about each image.

        Args:
            images: (images, 3, 32, 32) in [0, 1].
            batch_size: images at a time.

        Returns:
            Categories (images,) for each question.
        """
        parts = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size].float().to(self.device)
            parts.append(self.model(prepare_classifier_input(batch)).logits)
        sizes = [len(names) for names in self.categories.values()]
        logits_by_question = torch.cat(parts).cpu().split(sizes, dim=1)
        answers = {}
        for question, logits in zip(self.categories, logits_by_question, strict=True):
            answers[question] = np.array(self.categories[question])[logits.argmax(1)]
        return answers
