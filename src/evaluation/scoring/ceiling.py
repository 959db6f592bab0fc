"""The correlation of predicted with true tokens, beside the noise ceiling."""

from __future__ import annotations

import numpy as np
import pandas as pd
from torch import Tensor

from src.evaluation.records import make_record
from src.evaluation.scoring.material import Material
from src.evaluation.scoring.parts import Part
from src.evaluation.statistics import derangements, noise_ceiling
from src.metrics import pcc


def score_token_correlation(material: Material) -> Part:
    """What the predicted tokens correlate with the true ones, image by image after the mean over
    images is taken off, and the most that the mean of this decoder's predictions from single
    repeats could correlate with anything, from how these agree with each other (Spearman-Brown).

    Nothing where notebook 03 measured no such agreement.
    """
    tensors, metadata, p = material.tensors, material.metadata, material.run.parameters
    if "repeat_agreement" not in tensors:
        return Part()
    true, predicted = (_centre(tensors[k]) for k in ("true_tokens", metadata["compared"]))
    values = pcc(true, predicted)
    noise = noise_ceiling(tensors["repeat_agreement"], int(metadata["repeats"]))
    pairings = derangements(len(values), int(p["shuffles"]), int(p["seed"]))
    shuffled = np.stack([pcc(true, predicted, pairing=order) for order in pairings], 1)
    share = values.mean() / noise.value if noise.value > 0 else None
    record = make_record(
        "token_correlation",
        values,
        baselines={"shuffled": shuffled},
        upper_bound="the noise ceiling stands in its place",
        better="higher",
        **material.labels,
        chance=0.0,
        description="correlation of predicted and true CLIP tokens, image by image",
        source="docs/metrics.md",
        noise_ceiling=noise._asdict(),
        share_of_noise_ceiling=share,
    )
    images = {"metric": record["name"], "row": "system", "image": material.image_ids, "draw": 0}
    sentence = (
        f"predicted tokens correlate by {values.mean():.3f} with the true ones; noise ceiling"
        f" {noise.value:.3f} [{noise.low:.3f}, {noise.high:.3f}]"
    )
    return Part([record], pd.DataFrame(images | {"value": values}), sentence)


def _centre(tokens: Tensor) -> Tensor:
    """Tokens (images, features) less their mean over images."""
    flat = tokens.float().flatten(1)
    return flat - flat.mean(0)
