"""Miniatures of the networks that metrics look through: AlexNet, EfficientNet, Inception, SwAV."""

from __future__ import annotations

import json
from typing import Any

import kornia.augmentation as K
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from src import miniworld
from src.losses import mixco_nce
from src.pretrained import metric_networks
from src.training import augment

from . import data
from .category_classifier import (
    ANSWER_COUNTS,
    augment_images,
    compute_accuracy,
    compute_answer_loss,
)
from .data import (
    draw_indices,
    get_device,
    load_images,
    load_question_labels,
    normalize_images,
    to_pixels,
)
from .teacher import score_linear_probe
from .training import Options, load_averaged, train

METRIC_NETWORKS: dict[str, dict[str, Any]] = {  # by folder under data/mini_models/metric_networks
    "alexnet": {
        "class": "AlexNet",
        "settings": {"channels": [16, 32, 64, 64, 64], "kernel": 7, "stride": 2},
        "size": 64,
    },
    "efficientnet_b1": {
        "class": "EfficientNet",  # blocks: expansion, kernel, stride, channels in and out, repeats
        "settings": {
            "blocks": [
                [1, 3, 1, 24, 16, 1],
                [4, 3, 2, 16, 40, 2],
                [4, 3, 1, 40, 64, 2],
            ],
            "last_channel": 320,
        },
        "size": 32,
    },
    "inception_v3": {
        "class": "ShuffleNetV2",
        "settings": {"repeats": [2, 3, 2], "channels": [16, 48, 96, 192, 384]},
        "size": 64,
    },
    "swav_resnet50": {
        "class": "RegNet",
        "settings": {
            "stem_width": 16,
            "depths": [1, 2, 1],
            "widths": [48, 96, 192],
            "group_widths": [16, 32, 32],
            "bottleneck_multipliers": [1.0] * 3,
            "strides": [2, 2, 2],
        },
        "size": 64,
    },
}

SELF_SUPERVISED = "swav_resnet50"  # the one that is trained without labels


class MetricNetworkTrainer(nn.Module):
    """A network with the head that trains it, which is left behind.

    The head gives logits of the classifier's questions, or the vector that is compared between two
    views.

    Args:
        name: one of `METRIC_NETWORKS`.
    """

    def __init__(self, name: str):
        super().__init__()
        self.body = metric_networks.build_mini_network(METRIC_NETWORKS[name])
        self.size = METRIC_NETWORKS[name]["size"]
        with torch.no_grad():
            example = torch.zeros(1, 3, self.size, self.size)
            dim = self.body.eval()(example).shape[1]
        projector = nn.Sequential(
            nn.Linear(dim, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(True),
            nn.Linear(256, 128, bias=False),
        )
        if name == SELF_SUPERVISED:
            self.head = projector
        else:
            classifier = nn.Linear(dim, sum(ANSWER_COUNTS))
            self.head = nn.Sequential(nn.Dropout(0.1), classifier)
        self.train()

    def compute_features(self, x: Tensor) -> Tensor:
        """Images (batch, 3, 32, 32) in [0, 1] -> (batch, dim), as the metric computes them."""
        x = F.interpolate(x, (self.size, self.size), mode="bilinear")
        mean, std = metric_networks.IMAGENET_MEAN, metric_networks.IMAGENET_STD
        return self.body(normalize_images(x, mean, std))

    def forward(self, x: Tensor) -> Tensor:
        """Output of the head for images (batch, 3, 32, 32) in [0, 1]."""
        return self.head(self.compute_features(x))


def _compute_all_features(model: MetricNetworkTrainer, x: Tensor) -> Tensor:
    parts = (part.to(get_device()) for part in x.split(250))
    return torch.cat([model.compute_features(part).cpu() for part in parts])


def train_metric_network(name: str, options: Options, rank: int = 0) -> None:
    """Train one of the networks on the classifier's images, which no other model has seen.

    SwAV's miniature learns without labels, by finding an image again in a second view of it; of
    SwAV it has only that, not its clusters. The others learn to answer the classifier's questions.
    """
    if name == SELF_SUPERVISED:
        _train_self_supervised(name, options, rank)
    else:
        _train_supervised(name, options, rank)


def _train_supervised(name: str, options: Options, rank: int) -> None:
    images, check_pixels = load_images("judge"), to_pixels(load_images("judge_check"))
    labels, check_labels = load_question_labels("judge"), load_question_labels("judge_check")
    network = MetricNetworkTrainer(name).to(get_device())

    def compute_loss(rng: np.random.Generator, batch_size: int) -> Tensor:
        index = draw_indices(rng, len(images), batch_size)
        logits = network(augment_images(to_pixels(images[index])).to(get_device()))
        return compute_answer_loss(logits, labels[index].to(get_device()))

    def evaluate(model: nn.Module) -> dict[str, float]:
        parts = (part.to(get_device()) for part in check_pixels.split(250))
        logits = torch.cat([model(part).cpu() for part in parts])
        return compute_accuracy(logits, check_labels)

    train(name, network, compute_loss, evaluate, options, lr=2e-3, batch_size=128, rank=rank)


def _train_self_supervised(name: str, options: Options, rank: int) -> None:
    images, check_pixels = load_images("judge"), to_pixels(load_images("judge_check"))
    labels, check_labels = load_question_labels("judge"), load_question_labels("judge_check")
    network = MetricNetworkTrainer(name).to(get_device())
    make_view = nn.Sequential(
        K.RandomHorizontalFlip(p=0.5),
        augment.build_teacher_augmentation(miniworld.IMAGE_SIZE),
    )

    def compute_loss(rng: np.random.Generator, batch_size: int) -> Tensor:
        x = to_pixels(images[draw_indices(rng, len(images), batch_size)])
        views = torch.cat([make_view(x), make_view(x)])
        vectors = network(views.to(get_device())).float()
        first, second = F.normalize(vectors, dim=-1).chunk(2)
        return mixco_nce(first, second, temp=0.1)

    def evaluate(model: nn.Module) -> dict[str, float]:
        """Accuracy of linear probes on the features, and on those of random weights."""
        pixels, random_state = to_pixels(images[::10]), torch.get_rng_state()
        untrained = MetricNetworkTrainer(name).to(get_device()).eval()
        torch.set_rng_state(random_state)
        accuracy = {}
        for prefix, probed in (("", model), ("random_", untrained)):
            features = _compute_all_features(probed, pixels)
            check_features = _compute_all_features(probed, check_pixels)
            shares = score_linear_probe(features, labels[::10], check_features, check_labels)
            for question, share in shares.items():
                accuracy[prefix + question] = share
        return accuracy

    train(name, network, compute_loss, evaluate, options, lr=2e-3, batch_size=96, rank=rank)


def export_metric_networks() -> None:
    """Write the networks without their heads, as `metric_networks.FeatureNetwork` reads them."""
    for name, config in METRIC_NETWORKS.items():
        folder = data.OUT / "metric_networks" / name
        folder.mkdir(parents=True, exist_ok=True)
        trained = load_averaged(name, MetricNetworkTrainer(name))
        save_file(trained.body.half().state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
