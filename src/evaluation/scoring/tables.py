"""Tables beside the scores: fewer repeats, other decoders, far and near images, held-out clusters,
what a vote is worth.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from src.evaluation.scoring.material import Material
from src.evaluation.statistics import bootstrap_mean
from src.evaluation.votes import describe_ensemble_gain, ensemble_gain, gain_table
from src.metrics import Metric

Table = dict[str, Any]  # title, note, rows

Scores = Mapping[Any, np.ndarray]  # (images,) by (condition, metric)

FIFTHS = ("nearest fifth", "second", "third", "fourth", "farthest fifth")

NONE = "There is none for this run."


def make_tables(
    material: Material,
    metrics: Sequence[Metric],
    scores: Scores,
    records: Sequence[Mapping[str, Any]],
) -> list[Table]:
    """The tables that a run has the material for.

    Args:
        material: what was scored.
        metrics: of the images.
        scores: of `split_by_condition`.
        records: of all scores, for their conditions beside baselines and upper bound.
    """
    candidates = [
        _compare_repeats(material, metrics, scores),
        _compare_decoders(material, records),
        _compare_distances(material, metrics, scores),
        _compare_held_out(material, metrics, scores),
        _compare_votes(material, metrics, scores),
    ]
    return [table for table in candidates if table is not None]


def find_table(tables: Sequence[Table], title: str) -> Any:
    """The table of that title, a row a metric, or a sentence."""
    for table in tables:
        if table["title"] == title:
            return pd.DataFrame(table["rows"]).set_index("metric")
    return NONE


def format_interval(values: np.ndarray) -> str:
    """Mean and interval of some images' values, as text."""
    interval = bootstrap_mean(values)
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def list_repeats(material: Material) -> list[str]:
    """Conditions in which the system read fewer repeats."""
    return sorted(name for name in material.conditions if name.startswith("repeats_"))


def _compare_repeats(material: Material, metrics: Sequence[Metric], scores: Scores) -> Table | None:
    conditions = list_repeats(material)
    if not conditions:
        return None
    rows = []
    for metric in metrics:
        row = {"metric": metric.name}
        for condition in conditions:
            number = condition.removeprefix("repeats_")
            noun = "repeat" if number == "1" else "repeats"
            row[f"{number} {noun}"] = format_interval(scores[condition, metric.name])
        all_repeats = f"{material.metadata['repeats']} repeats"
        row[all_repeats] = format_interval(scores["system", metric.name])
        rows.append(row)
    return {
        "title": "Fewer repeats of the test images",
        "note": "Published tables average three repeats; life offers one.",
        "rows": rows,
    }


def _compare_decoders(material: Material, records: Sequence[Mapping[str, Any]]) -> Table | None:
    repeats, rows = list_repeats(material), []
    for record in records:
        cells = {
            condition: _format_difference(entry, record["better"])
            for condition, entry in record.get("others", {}).items()
            if condition not in repeats
        }
        if cells:
            rows.append({"metric": record["name"]} | cells)
    if not rows:
        return None
    note = "In brackets what the system is better by, paired by image, with its 95 % interval."
    if "retrieved" in material.metadata:
        pool = json.loads(material.metadata["retrieved"])
        exact = pool["exact image in pool"]
        note = f"Retrieved: from {pool['pool']}; exact image in pool: {exact}. {note}"
    return {"title": "Other decoders on the same images", "note": note, "rows": rows}


def _format_difference(entry: Mapping[str, Any], better: str) -> str:
    """Value of another condition, and what the system is better by."""
    sign = 1 if better == "higher" else -1
    value, low, high = (sign * entry["difference"][k] for k in ("value", "low", "high"))
    interval = f"{min(low, high):+.3f}, {max(low, high):+.3f}"
    return f"{entry['value']:.3f} ({value:+.3f} [{interval}])"


def _compare_distances(
    material: Material, metrics: Sequence[Metric], scores: Scores
) -> Table | None:
    distances = material.tensors.get("train_distance")
    if distances is None or len(material.seen) < len(FIFTHS):
        return None
    order = np.argsort(distances.numpy(), kind="stable")
    parts = dict(zip(FIFTHS, np.array_split(order, len(FIFTHS)), strict=True))
    rows = [
        {"metric": metric.name}
        | {k: format_interval(scores["system", metric.name][part]) for k, part in parts.items()}
        for metric in metrics
    ]
    return {
        "title": "By distance to the nearest training image",
        "note": "In CLIP's tokens: is a score owed to look-alikes that were trained?",
        "rows": rows,
    }


def _compare_held_out(
    material: Material, metrics: Sequence[Metric], scores: Scores
) -> Table | None:
    if "held_out" not in material.tensors:
        return None
    out = material.tensors["held_out"].numpy()
    if not 0 < out.sum() < len(out):
        return None
    rows = [
        {
            "metric": metric.name,
            "held-out clusters": format_interval(scores["system", metric.name][out]),
            "kept clusters": format_interval(scores["system", metric.name][~out]),
        }
        for metric in metrics
    ]
    note = (
        f"No training image was like the {out.sum()} test images of the held-out clusters; notebook"
        " 07 compares with the plain run, pair by pair."
    )
    return {"title": "Held-out clusters", "note": note, "rows": rows}


def _compare_votes(material: Material, metrics: Sequence[Metric], scores: Scores) -> Table | None:
    """Where several models voted (notebook 03_vote): the vote beside the single models, the mean of
    their latents, and the oracle, which takes the best voter of each image by the very score of its
    line.
    """
    metadata = material.metadata
    if "voters" not in metadata:
        return None
    gains = ensemble_gain(
        scores,
        {metric.name: metric.better for metric in metrics},
        metadata["voters"].split(","),
        metadata["best_voter"],
        int(material.run.parameters["seed"]),
    )
    note = describe_ensemble_gain(gains)
    return {"title": "What the vote is worth", "note": note, "rows": gain_table(gains)}
