"""Two-way identification among images of the same kind."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans

from src.evaluation.records import make_record
from src.evaluation.scoring.instruments import Instruments
from src.evaluation.scoring.material import Material
from src.evaluation.scoring.parts import Part
from src.metrics import two_way_within

CONDITIONS = (
    "system",
    "mean_image",
    "mean_seen",
    "other_recon",
    "untrained",
    "nearest_train",
    "ceiling",
    "ridge",
    "kernel",
)

NOT_BASELINES = ("system", "ceiling", "ridge", "kernel")


def score_within_groups(material: Material, instruments: Instruments) -> Part:
    """Two-way identification whose distractors share labels (parameter hard_negatives) or a cluster
    of CLIP's embeddings with the image that was seen.
    """
    groups, kind = _group_images(material, instruments)
    scores = {}
    for condition in CONDITIONS:
        if condition in material.conditions:
            features = instruments.embed(material.conditions[condition])
            scores[condition] = two_way_within(instruments.clip_seen, features, groups)
    has_group = np.isfinite(scores["system"])
    sentence = f"{has_group.sum()} of {len(has_group)} images share their {kind} with another one"
    if not has_group.any():
        return Part(sentence=sentence)
    scores = {condition: values[has_group] for condition, values in scores.items()}
    record = make_record(
        f"{instruments.get_network_name('CLIP')} within {kind}{material.mark}",
        scores["system"],
        baselines={r: v for r, v in scores.items() if r not in NOT_BASELINES},
        upper_bound=scores.get("ceiling", material.no_upper_bound),
        better="higher",
        **material.labels,
        chance=0.5,
        description=f"two-way identification among test images of the same {kind}",
        source="hard distractors",
    )
    images = {"metric": record["name"], "image": material.image_ids[has_group], "draw": 0}
    tables = [
        pd.DataFrame(images | {"row": condition, "value": values})
        for condition, values in scores.items()
    ]
    return Part([record], pd.concat(tables, ignore_index=True), sentence)


def _group_images(material: Material, instruments: Instruments) -> tuple[np.ndarray, str]:
    """The group of each image (images,), and what a group is."""
    p = material.run.parameters
    columns = str(p["hard_negatives"])
    if columns and material.subject is not None:
        groups = material.subject.categories(material.image_ids, columns)
        return groups, columns.replace(",", " and ")
    n_clusters = max(2, len(material.seen) // 20)
    clustering = KMeans(n_clusters, n_init=4, random_state=p["seed"])
    return clustering.fit_predict(instruments.clip_seen), "cluster"
