"""The frozen classifier of what an image of the mini world shows."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    ResNetForImageClassification,
)

from src.pretrained.base import load_pretrained, locate_model


def prepare_classifier_input(images: Tensor) -> Tensor:
    """Images (batch, 3, 32, 32) in [0, 1] as the judge takes them, in training as in use: 64 pixels
    a side, in [-1, 1].
    """
    return 2 * F.interpolate(images, (64, 64), mode="bilinear") - 1


class CategoryClassifier:
    """The classifier that says what a picture of the mini world shows: scene, kind and colour of
    the main object.

    It was trained on images of its own, and nothing was ever trained towards it or conditioned on
    it, so that it judges reconstructions from outside. There is one for the mini world alone:
    photographs have no such small set of answers.

    Args:
        weights: "mini" or a folder that holds `judge/`.
        device: torch device.
    """

    def __init__(self, weights: str = "mini", device: str = "cpu"):
        self.device = torch.device(device)
        self.model = (
            load_pretrained(ResNetForImageClassification, locate_model("judge", weights))
            .float()
            .eval()
            .requires_grad_(False)
            .to(self.device)
        )
        self.answers: dict[str, list[str]] = {}  # by question, in the order of the logits
        for i in range(self.model.config.num_labels):
            question, answer = self.model.config.id2label[i].split(": ")
            self.answers.setdefault(question, []).append(answer)

    @property
    def chance(self) -> dict[str, float]:
        """Share of right answers by guessing, by question."""
        return {question: 1 / len(answers) for question, answers in self.answers.items()}

    @torch.no_grad()
    def ask(self, images: Tensor, batch_size: int = 250) -> dict[str, np.ndarray]:
        """(images, 3, 32, 32) in [0, 1] -> answers (images,) by question."""
        starts = range(0, len(images), batch_size)
        parts = [
            self.model(prepare_classifier_input(images[i : i + batch_size].float().to(self.device))).logits
            for i in starts
        ]
        by_question = (
            torch.cat(parts).cpu().split([len(answers) for answers in self.answers.values()], dim=1)
        )
        return {
            q: np.array(names)[logits.argmax(1)]
            for (q, names), logits in zip(self.answers.items(), by_question, strict=True)
        }
