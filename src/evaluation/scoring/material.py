"""Seen images and reconstructions to be scored: those of a run, or anyone's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from src.data.identity import check_made_from
from src.data.splits import open_training_split
from src.data.subject import Subject
from src.decoding.reconstructions import load_reconstructions
from src.evaluation.images import (
    compute_mean_image,
    find_most_similar,
    hash_pixels,
    load_image_pairs,
)
from src.evaluation.sanity_checks import check_leak, check_outputs
from src.metrics import reorder_lazily, resize
from src.parameters import Run
from src.utils import PerceptError, resolve


@dataclass(frozen=True)
class Material:
    """What is scored.

    Attributes:
        run: with the parameters of notebook 06.
        seen: (images, 3, height, width) in [0, 1].
        conditions: images (images, 3, height, width) by name: "system" first, then baselines, upper
            bound and other decoders.
        image_ids: (images,).
        metadata: protocol, test_set and what notebook 03 wrote.
        tensors: what notebook 03 wrote beside the images, (images, ...) by name.
        subject: of a run of this repository; None for anyone's reconstructions.
        mark: ending of the names of scores, where blurry images are blended in.
    """

    run: Run
    seen: Any
    conditions: dict[str, Any]
    image_ids: np.ndarray
    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    subject: Subject | None
    mark: str

    @property
    def recons(self) -> Any:
        """The reconstructions that are scored (images, 3, height, width)."""
        return self.conditions["system"]

    @property
    def labels(self) -> dict[str, str]:
        """Protocol and test set, as records carry them."""
        return {name: self.metadata[name] for name in ("protocol", "test_set")}

    @property
    def low_level_name(self) -> str:
        """Condition of the low-level images of the system."""
        return f"low_level_{self.metadata.get('main', '')}"

    @property
    def no_upper_bound(self) -> str:
        """Why there is no upper bound, "" where there is one."""
        if "ceiling" in self.conditions:
            return ""
        return "the generator of these reconstructions is not known here"

    def score_options(self) -> dict[str, Any]:
        """Options of `score_table`."""
        p = self.run.parameters
        return {"draws": p["shuffles"], "seed": p["seed"], "image_ids": self.image_ids}

    def describe_data(self) -> dict[str, Any]:
        """Subject, dataset and data of `provenance`."""
        p = self.run.parameters
        if self.subject is None:
            return {"subject": "unknown", "dataset": p["recon_path"], "data": {}}
        return {"subject": p["subj"], "dataset": p["dataset"], "data": self.subject.identity}

    def describe(self) -> str:
        """Shapes of seen images and reconstructions, and the other conditions."""
        names = ", ".join(list(self.conditions)[1:])
        return (
            f"(test images, channels, height, width) = {tuple(self.seen.shape)} seen,"
            f" {tuple(self.recons.shape)} reconstructed; other rows: {names}"
        )

    def find_alarms(self) -> list[str]:
        """What looks wrong before anything is scored: black, flat or identical images, and test
        images that were trained on.

        Raises:
            PerceptError: for values that cannot be scored.
        """
        alarms = check_outputs(self.recons)
        for alarm in alarms:
            if "NaN" in alarm or "leave the range" in alarm:
                raise PerceptError(f"These reconstructions cannot be scored: {alarm}")
        if self.subject is not None:
            train_ids = self.subject.image_ids("train")
            parts = np.array_split(train_ids, max(1, len(train_ids) // 500))
            blocks = (self.subject.images(ids) for ids in parts)
            alarms += check_leak(self.subject.images(self.image_ids), blocks)
        return alarms


def load_material(run: Run) -> Material:
    """Load what parameters recon_path and all_images_path name, or else what notebook 03 left.

    With parameter blend some of the blurry image is mixed into what is scored, and the names of the
    scores say so.

    Raises:
        PerceptError: for missing files or parameters, images that do not pair up, or no blurry
            image to blend in.
    """
    material = _load_given(run) if run.parameters["recon_path"] else _load_own(run)
    n_seen, n_recons = len(material.seen), len(material.recons)
    if not 2 <= n_seen == n_recons:
        raise PerceptError(
            f"{n_seen} seen and {n_recons} reconstructed pictures were given: give as many of"
            " both, in the same order, and at least two."
        )
    if material.mark:
        _blend(material, float(run.parameters["blend"]))
    return material


def add_other_recon(material: Material) -> None:
    """Add the condition "other_recon": for each image the other reconstruction that looks most like
    its own.
    """
    recons = material.recons
    material.conditions["other_recon"] = reorder_lazily(recons, find_most_similar(recons))


def _make_mark(run: Run) -> str:
    blend = run.parameters["blend"]
    return f", blend {blend:g}" if blend else ""


def _load_own(run: Run) -> Material:
    p = run.parameters
    subject = open_training_split(str(p["dataset"]), int(p["subj"]), run.logs)
    tensors, metadata = load_reconstructions(run.results)
    images = {name: tensors[name] for name in tensors if tensors[name].ndim == 4}
    conditions = {"system": images.pop(metadata["main"])} | images
    check_made_from(metadata, subject.identity, run.name)
    return Material(
        run=run,
        seen=conditions.pop("seen"),
        conditions=conditions,
        image_ids=tensors["image_ids"].numpy(),
        metadata=metadata,
        tensors=tensors,
        subject=subject,
        mark=_make_mark(run),
    )


def _load_given(run: Run) -> Material:
    p = run.parameters
    if not (p["all_images_path"] and p["model_name"]):
        raise PerceptError(
            "recon_path needs all_images_path (the images that were seen) and model_name (a name"
            " for the results)."
        )
    pairs = load_image_pairs(resolve(str(p["all_images_path"])), resolve(str(p["recon_path"])))
    return Material(
        run=run,
        seen=pairs.seen,
        conditions={"system": pairs.recons, "mean_seen": compute_mean_image(pairs.seen)},
        image_ids=np.arange(len(pairs.seen)),
        metadata={"protocol": "as given", "test_set": hash_pixels(pairs.seen)},
        tensors={},
        subject=None,
        mark=_make_mark(run),
    )


def _blend(material: Material, share: float) -> None:
    """Mix a share of the low level's blurry images into those that are scored."""
    blurry = material.conditions.get(material.low_level_name)
    if blurry is None:
        raise PerceptError(
            "blend needs the blurry pictures of a low level, which these reconstructions come"
            " without: set it to 0."
        )
    for name in {"system", "refined"} & set(material.conditions):
        images = material.conditions[name].float()
        enlarged = resize(blurry.float(), images.shape[-1])
        material.conditions[name] = (1 - share) * images + share * enlarged


def split_by_condition(table: pd.DataFrame) -> dict[Any, np.ndarray]:
    """Scores (images,) by (condition, metric), of a `score_table`."""
    groups = table[table["draw"] == 0].groupby(["row", "metric"], sort=False)
    return {key: part["value"].to_numpy() for key, part in groups}
