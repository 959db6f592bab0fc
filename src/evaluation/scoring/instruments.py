"""Metrics with the frozen networks that they look through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from src import utils
from src.evaluation.scoring.material import Material
from src.metrics import (
    METRICS,
    PUBLISHED_METRICS,
    Metric,
    answer_metrics,
    apply_resizing,
    resize,
)
from src.pretrained.category_classifier import CategoryClassifier
from src.pretrained.clip import Clipper
from src.pretrained.metric_networks import FeatureNetwork
from src.utils import PerceptError

CLIP_BATCH = 64


@dataclass
class Instruments:
    """What images are looked at through.

    Attributes:
        clipper: CLIP's final embedding.
        prefix: of the names of scores that look through a network: "mini:" for miniatures.
        names: of the metrics that were asked for.
        resizing: how images are brought to one size, key of `RESIZING`.
        metrics: with their networks, under the names that results carry.
        clip_seen: CLIP's embeddings of the seen images (images, dim).
        models: fingerprints of the networks by name.
        sentences: what the independent classifier says of the seen images themselves.
    """

    clipper: Clipper
    prefix: str
    names: list[str]
    resizing: str
    metrics: list[Metric]
    clip_seen: Tensor
    models: dict[str, Any]
    sentences: list[str]

    def embed(self, images: Any) -> Tensor:
        """CLIP's final embedding (n, dim) of images (n, 3, height, width), resized bilinearly as
        the published evaluation does.
        """
        return _embed(self.clipper, self.resizing, images)

    def bring_to_one_size(self, images: Any) -> Any:
        """Images (n, 3, height, width) as parameter resizing brings them to one size first."""
        return apply_resizing(images, resizing=self.resizing)

    def get_network_name(self, name: str, mark: str = "") -> str:
        """Under which name results carry a metric that looks through a network."""
        return f"{self.prefix}{name}{mark}"


def _embed(clipper: Clipper, resizing: str, images: Any) -> Tensor:
    first, parts = apply_resizing(images, resizing=resizing), []
    for start in range(0, len(first), CLIP_BATCH):
        batch = first[start : start + CLIP_BATCH].float()
        resized = resize(batch, clipper.size, antialias=resizing == "antialias")
        parts.append(clipper.embed_image(resized).float().cpu())
    return torch.cat(parts)


def open_instruments(material: Material) -> Instruments:
    """The metrics that parameter metrics names, with their networks; of images of the mini world
    also what an independent classifier names.

    Raises:
        PerceptError: for an unknown metric.
    """
    p: Any = material.run.parameters
    weights, resizing, device = p["weights"], p["resizing"], material.run.device
    clipper = Clipper(weights, hidden=False, norm_embs=True, device=device)
    listed = PUBLISHED_METRICS if p["metrics"] == "published" else p["metrics"].split(",")
    names = [name.strip() for name in listed if name.strip()]
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise PerceptError(
            f"metrics names {', '.join(unknown)}: choose among {', '.join(METRICS)}."
        )
    instruments = Instruments(
        clipper=clipper,
        prefix="mini:" if weights == "mini" else "",
        names=names,
        resizing=resizing,
        metrics=[],
        clip_seen=_embed(clipper, resizing, material.seen),
        models={"CLIP": clipper.fingerprint()},
        sentences=[],
    )
    metrics = [_look_through(instruments, material, name) for name in names]
    metrics += _ask_classifier(instruments, material)
    named = [replace(metric, name=metric.name + material.mark) for metric in metrics]
    return replace(instruments, metrics=named)


def _look_through(instruments: Instruments, material: Material, name: str) -> Metric:
    """A metric with the network it looks through; features of the seen images are kept for other
    runs.
    """
    metric, p = METRICS[name], material.run.parameters
    if name in ("pcc", "mse"):  # of images at their own size
        return metric
    if not metric.network:
        return metric.through(instruments.bring_to_one_size)
    prefix = instruments.prefix
    if metric.network.startswith("CLIP"):
        return metric.through(instruments.embed, prefix, instruments.clip_seen)
    network = FeatureNetwork(name, str(p["weights"]), material.run.device, instruments.resizing)
    instruments.models[name] = network.fingerprint()
    cache = utils.HOME / "results" / ".features"
    return metric.through(network, prefix, network.features(material.seen, cache=cache))


def _ask_classifier(instruments: Instruments, material: Material) -> list[Metric]:
    """Whether the independent classifier of the mini world names in a reconstruction what was seen;
    nothing for other images.
    """
    subject = material.subject
    labels = None if subject is None else subject.labels
    if labels is None or material.run.parameters["weights"] != "mini":
        return []
    judge = CategoryClassifier("mini", material.run.device)
    if not set(judge.categories) <= set(labels.columns):
        return []
    labels = labels.set_index("image").loc[material.image_ids]
    truth: dict[str, Any] = {q: labels[q].to_numpy() for q in judge.categories}
    named = judge.classify(material.seen)
    right = {q: round(float((named[q] == labels[q]).mean()), 3) for q in named}
    instruments.sentences.append(f"the judge is right about the images that were shown: {right}")
    return answer_metrics("mini:judge", judge.classify, truth, judge.chance_accuracy)
