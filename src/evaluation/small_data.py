"""Scores of notebook 08: every decoder and baseline on every split of a small data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from src import metrics, retrieval
from src.data import Subject
from src.evaluation import records, statistics
from src.metrics import METRICS, Metric
from src.parameters import Run

SYSTEM = "mean"  # the row that stands for the stage: the mean of the chosen decoders
REFERENCE = "ridge"  # the row that the other decoders are compared with
PIXEL_METRICS = tuple(METRICS[name] for name in ("pcc", "ssim", "mse"))
EMBEDDING_METRICS = (
    metrics.two_way_metric("clip two-way", lambda rows: rows, ending=" (CLIP, final embedding)"),
    Metric(
        "clip top-1",
        retrieval.top1_image_from_brain_each,
        "higher",
        None,
        "share of images whose own embedding is the most similar to the decoded one",
        "cosine of centred embeddings",
    ),
)
NO_UPPER_BOUND = "targets are decoded directly, without a generator"


def as_images(flat: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """Pixels (n, channels * height * width) as images (n, 3, height, width), clipped to [0, 1]."""
    images = torch.as_tensor(np.clip(flat, 0, 1), dtype=torch.float32).view(-1, *shape)
    return images.expand(-1, 3, -1, -1).contiguous()


def score_pixels(
    truth: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    rows: np.ndarray,
    ids: np.ndarray,
    shape: tuple[int, ...],
    seed: int = 0,
) -> pd.DataFrame:
    """Correlation, SSIM and squared error of decoded pixels.

    Args:
        truth: (images, pixels) of all images.
        predictions: (test images, pixels) by row of the table, `SYSTEM` among them.
        rows: (test images,) rows of `truth`.
        ids: (images,) ids of all images.
        shape: (channels, height, width).
        seed: of the pairings of the baseline "shuffled", which is made of `SYSTEM`.

    Returns:
        [metric, row, image, draw, value].
    """
    conditions = {"system": as_images(predictions[SYSTEM], shape)}
    for row, predicted in predictions.items():
        if row != SYSTEM:
            conditions[row] = as_images(predicted, shape)
    seen = as_images(truth[rows], shape)
    table = records.score_table(seen, conditions, PIXEL_METRICS, seed=seed, image_ids=ids[rows])
    return table.replace({"row": {"system": SYSTEM}})


def score_embeddings(
    truth: np.ndarray, predictions: Mapping[str, np.ndarray], rows: np.ndarray, ids: np.ndarray
) -> pd.DataFrame:
    """Two-way identification and top-1 of decoded embeddings, less the mean of all embeddings.

    Arguments and result as of `score_pixels`, embeddings in place of pixels.
    """
    mean = truth.mean(0)
    parts = []
    for row, predicted in predictions.items():
        centred = predicted - mean
        values = (
            metrics.two_way_each(truth[rows] - mean, centred),
            retrieval.top1_image_from_brain_each(centred, truth[rows] - mean),
        )
        for metric, value in zip(EMBEDDING_METRICS, values, strict=True):
            columns = {"metric": metric.name, "row": row, "image": ids[rows], "draw": 0}
            parts.append(pd.DataFrame(columns | {"value": value}))
    return pd.concat(parts, ignore_index=True)


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95 % bootstrap interval over test images: [split, metric, row, value, low, high, n].

    Args:
        scores: [split, metric, row, image, draw, value]; draws are averaged first.
    """
    lines: list[dict[str, Any]] = []
    groups = _average_draws(scores).groupby(["split", "metric", "row"], sort=False)
    for (split, metric, row), part in groups:
        names = {"split": str(split), "metric": str(metric), "row": str(row)}
        interval = statistics.bootstrap_mean(part["value"].to_numpy())
        lines.append(names | interval._asdict() | {"n": len(part)})
    return pd.DataFrame(lines)


def compare_with_ridge(scores: pd.DataFrame) -> pd.DataFrame:
    """Every other decoder less ridge, paired over test images, positive where it is better.

    Args:
        scores: as of `summarise`.

    Returns:
        [split, metric, row, value, low, high, p, better].
    """
    better = {metric.name: metric.better for metric in (*PIXEL_METRICS, *EMBEDDING_METRICS)}
    lines: list[dict[str, Any]] = []
    groups = _average_draws(scores).groupby(["split", "metric"], sort=False)
    for (split, metric_name), part in groups:
        metric = str(metric_name)
        wide = part.pivot(index="image", columns="row", values="value")
        sign = 1 if better[metric] == "higher" else -1
        controls = {*records.BASELINES, REFERENCE}
        decoders = [str(row) for row in wide.columns if row not in controls]
        for row in decoders:
            gain = statistics.paired_bootstrap(sign * wide[row], sign * wide[REFERENCE])
            names = {"split": str(split), "metric": metric, "row": row}
            lines.append(names | gain._asdict() | {"better": _name_better(row, gain)})
    return pd.DataFrame(lines)


def _name_better(row: str, gain: statistics.Difference) -> str:
    if gain.low > 0:
        return row
    return REFERENCE if gain.high < 0 else "undecided"


def _average_draws(scores: pd.DataFrame) -> pd.DataFrame:
    keys = ["split", "metric", "row", "image"]
    return scores.groupby(keys, sort=False)["value"].mean().reset_index()


def add_small_data_results(
    run: Run,
    subject: Subject,
    scores: pd.DataFrame,
    summary: pd.DataFrame,
    differences: pd.DataFrame,
) -> None:
    """Add the stage's scores and tables to the results of the run.

    Args:
        run: with the parameters folds, inner_folds and seed.
        subject: whose images were decoded.
        scores: [split, metric, row, image, draw, value].
        summary: of `summarise`.
        differences: of `compare_with_ridge`.
    """
    dataset, seed = str(run.parameters["dataset"]), int(run.parameters["seed"])
    rows: list[dict[str, Any]] = []
    for split, part in scores.groupby("split", sort=False):
        used = set(part["metric"])
        chosen = [m for m in (*PIXEL_METRICS, *EMBEDDING_METRICS) if m.name in used]
        new = records.make_records(
            part.replace({"row": {SYSTEM: "system"}}),
            chosen,
            protocol=subject.protocol if split == "official" else f"{dataset}-{split}",
            test_set=f"{part['image'].nunique()} images, {split}",
            no_upper_bound=NO_UPPER_BOUND,
        )
        rows += [record | {"name": f"{record['name']} ({SYSTEM}, {split})"} for record in new]
    inner = f"{run.parameters['inner_folds']}-fold cross-validation within the training images"
    what = "voxels, settings, and which decoders enter the mean"
    about = records.provenance(
        run.recipe or run.name,
        {"all": seed},
        [{"what": what, "chosen": "in each fold", "split": inner}],
        dataset=dataset,
        data=subject.identity,
        acknowledgement=subject.attributes.get("acknowledgement", ""),
    )
    note = "Paired over the same images, positive where the decoder is better than ridge."
    tables = [
        {"title": "Decoders against ridge", "note": note, "rows": differences.to_dict("records")},
        {"title": "Every row of every split", "note": "", "rows": summary.to_dict("records")},
    ]
    named = scores.assign(metric=scores["metric"] + " (" + scores["split"] + ")")
    records.add_results(run.results, run.stage, named.drop(columns="split"), rows, about, tables)
